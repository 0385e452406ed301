"""Files of weights and settings: read without running anything in them, and written in order."""
