#!/usr/bin/env python
"""How likely a bundle finds each token of a text, beside a twin: examples/score.py OUT TWIN FILE"""

import sys
from pathlib import Path

import fope_export as fx


def main(out: str, twin: str, file: str) -> None:
    text = Path(file).read_text()
    for folder in (out, twin):
        tokens = fx.Tokenizer(folder).encode(text)
        scores = fx.log_probabilities(fx.load_backend(folder), tokens)
        print(f"{folder}: {-scores.mean():.3f} nats a token")


if __name__ == "__main__":
    main(*sys.argv[1:])
