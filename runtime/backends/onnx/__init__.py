"""ONNX artifacts on ONNX Runtime."""
