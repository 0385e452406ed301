"""What stands behind ``plan``."""
