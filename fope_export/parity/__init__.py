"""Does a backend compute what PyTorch computes? Judged by the arithmetic's own noise, and shown able to fail."""
