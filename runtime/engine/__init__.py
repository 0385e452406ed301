"""Decoding of token ids: sequences, sampling, and the protocol of a backend."""
