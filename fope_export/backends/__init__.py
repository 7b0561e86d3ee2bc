"""What runs a decoder, behind one protocol."""
