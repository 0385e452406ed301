"""The HTTP server: its routes, and what they accept and return."""
