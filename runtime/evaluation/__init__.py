"""How one artifact is compared with another."""
