"""Many machines: Ray starts workers on them, hands them windows of lines, and replaces workers that end."""
