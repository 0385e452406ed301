"""The ONNX graph that onnxruntime-genai runs, with its configuration."""
