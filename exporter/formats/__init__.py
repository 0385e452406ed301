"""What an export can write, one form a file."""
