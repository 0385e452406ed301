"""Files of weights and JSON: read without running any code in them, and written at given offsets."""
