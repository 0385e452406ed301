"""ONNX decoder graphs that share one weight file."""
