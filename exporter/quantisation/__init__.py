"""Quantisation to 8 and 4 bits: storage encodings, GPTQ with data-free calibration, and mixed-precision allocation."""
