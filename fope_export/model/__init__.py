"""Checkpoints: the decoder, the layouts on disk, strict loading."""
