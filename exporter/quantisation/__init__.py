"""Weights in 8 and 4 bits: encodings, GPTQ, calibration, and which layer gets how many bits."""
