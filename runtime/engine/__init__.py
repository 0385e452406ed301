"""Decoding in token ids: sequences, sampling, and the protocol of a backend."""
