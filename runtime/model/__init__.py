"""A loaded artifact."""
