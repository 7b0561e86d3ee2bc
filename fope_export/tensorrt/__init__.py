"""TensorRT: its plugin, engines and builder."""
