"""The decoder as ONNX graphs over one file of weights."""
