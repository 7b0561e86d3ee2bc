#!/usr/bin/env python
"""Two requests share an engine; each has settings of its own: examples/two_answers.py OUT PROMPT"""

import sys
from contextlib import closing

import fope_export as fx
from fope_export.serving.requests import Token


def main(out: str, prompt: str) -> None:
    tokenizer = fx.Tokenizer(out)
    with closing(fx.Engine(fx.load_backend(out), slots=2)) as engine:
        settings = fx.SamplingParams(max_new_tokens=20), fx.SamplingParams(max_new_tokens=20, temperature=0.8, seed=7)
        handles = [engine.submit(fx.Request(prompt=tokenizer.encode(prompt), sampling=each)) for each in settings]
        while engine.step():
            pass
        for handle in handles:
            tokens = [told.id for told in handle.take() if isinstance(told, Token)]
            print(repr(tokenizer.decode(tokens)))


if __name__ == "__main__":
    main(*sys.argv[1:])
