"""Decoding the sequences of many requests together: who is admitted, which prompt is read next, who has ended."""
