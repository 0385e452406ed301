"""The base model: its configuration and the places of its tensors, checked before any weight is read."""
