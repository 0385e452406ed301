"""Merged and bitsandbytes artifacts on torch."""
