"""The HTTP layer of the server: the guards around the routes, the routes, and what they accept and return."""
