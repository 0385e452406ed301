"""What weights are made from: a base with its adapters, or a merged directory."""
