"""The command line: a verb is a file."""
