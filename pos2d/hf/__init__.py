"""Configuration and model files that travel inside every torch artifact; they import nothing of this project."""
