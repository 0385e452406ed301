"""Every tensor of a result: where it comes from, what is added to it, and how it is rounded."""
