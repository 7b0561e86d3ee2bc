"""What is measured: the paper's 60M shape with random weights and a tokenizer of its size, and its RoPE twin."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fope_export.benchmark.shapes import VOCABULARY, write_checkpoint
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.corpus import python_source
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.shipped import shipped

SHAPE = "60M"
KINDS = {"float32": ExportConfig(), "int4": ExportConfig(quantize="int4")}


@dataclass
class Made:
    """Bundles in a folder, each made when it is first asked for."""

    folder: Path

    def bundle(self, spectrum: str, kind: str) -> Path:
        """Of "fope" or "rope", exported and optimized in a kind of KINDS."""
        out = self.folder / f"{spectrum}-{kind}"
        if not out.exists():
            optimize(export(self.checkpoint(spectrum), out, KINDS[kind]))
        return out

    def shipped(self) -> Bundle:
        """The model that comes along."""
        out = self.folder / "shipped"
        return Bundle.open(out) if out.exists() else optimize(export(shipped("fope"), out))

    def checkpoint(self, spectrum: str) -> Path:
        """What it is made of."""
        checkpoint = self.folder / f"checkpoint-{spectrum}"
        if not checkpoint.exists():
            write_checkpoint(SHAPE, spectrum, checkpoint)
            learnt = self.folder / "tokenizer.json"
            if not learnt.exists():
                _tokenizer().save(str(learnt))
            (checkpoint / learnt.name).write_bytes(learnt.read_bytes())
        return checkpoint


def _tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE of the standard library's source."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    text = python_source(held_out=False).decode(errors="replace")
    made.train_from_iterator(text.splitlines(keepends=True), learner)
    return made


def prompts(seed: int, count: int, length: int) -> list[list[int]]:
    """Random tokens, none of which ends a text."""
    return [
        [int(token) for token in row] for row in np.random.default_rng(seed).integers(2, VOCABULARY, (count, length))
    ]
