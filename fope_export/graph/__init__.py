"""From a decoder to an ONNX bundle."""
