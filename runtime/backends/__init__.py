"""Backends that run a decoder: torch, and ONNX Runtime."""
