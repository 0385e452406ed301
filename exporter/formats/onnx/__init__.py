"""ONNX decoders over one file of weights."""
