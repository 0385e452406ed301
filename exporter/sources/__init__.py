"""The weights that an artifact is made from: a base with its adapters, or a merged directory."""
