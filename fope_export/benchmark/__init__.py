"""Speed and memory of a bundle beside PyTorch and beside other runtimes, in turn within every round."""
