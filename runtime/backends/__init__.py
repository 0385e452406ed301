"""What runs a decoder: torch with its caches, kernels and devices, and ONNX Runtime."""
