"""The base model: its configuration and its tensors, checked before any weight is read."""
