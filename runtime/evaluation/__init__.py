"""Comparing artifacts: logits, and the sequences that a text is evaluated in."""
