"""The models: drawn by number, so that every machine makes the same ones; untrained, trained briefly, or shipped."""

import math
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fope_export.bundle import Bundle
from fope_export.config import ExportConfig, ModelConfig
from fope_export.corpus import as_tokens, python_source
from fope_export.fope.rotary import FopeRotary
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize
from fope_export.model.decoder import Decoder
from fope_export.model.layouts.native import save
from fope_export.shipped import NAMES, shipped

THETA, BATCH, RATE, BYTES = 10_000.0, 16, 2e-3, 256
WEIGHTS = 6_000_000
"""Of the blocks of most models: wide ones have fewer layers, so that thousands of runs take hours and not days."""
SHAPES = (
    (1, 32), (4, 16), (2, 64), (8, 16), (1, 128), (4, 32), (3, 32), (16, 16), (2, 16), (6, 32), (4, 64), (1, 64),
    (8, 32), (12, 32), (2, 32), (16, 32), (8, 64), (4, 128), (16, 64),
)  # fmt: skip
"""Heads and channels of each: widths from 32 to 1,024."""
LAYERS = (2, 1, 4, 12, 3, 6, 1, 8, 2, 5)
LENGTHS = (32, 64, 32, 48, 32, 96, 32, 48)
"""Of training. A plain validation goes to 16 times as many tokens."""
STEPS = (0, 60, 30, 0, 150, 0, 60)
VOCABULARIES = (64, 256, 100, 500, 1000, 2000)
SPREADS = (0.02, 0.5, 1.0, 2.0)
"""Of an untrained model's weights: the usual deviation, and some in units of one over the root of the inputs."""
COUNTS = {"fit": (40, 1), "count": (64, 2)}
"""Models of each role, and the number that all their numbers are drawn with."""
LARGE = 2
"""Models of more than 20 million weights among the counted ones."""
CALIBRATED = 2048
"""Random tokens that the calibrated kinds see."""
KINDS = {
    "float32": ExportConfig(),
    "fp16": ExportConfig(dtype="fp16"),
    "int8": ExportConfig(quantize="int8"),
    "bf16": ExportConfig(dtype="bf16"),
    "int4": ExportConfig(quantize="int4"),
    "int8-qdq": ExportConfig(quantize="int8-qdq"),
    "fp8-qdq": ExportConfig(quantize="fp8-qdq"),
}


@dataclass(frozen=True)
class Recipe:
    """All that makes a model. `lengths` are those of its prefills, or of a plain validation where there are none."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    vocabulary: int
    length: int
    spread: float
    steps: int
    groups: int
    pairing: str
    extras: bool
    """Biases, and norms of queries and keys."""
    tied: bool
    seed: int
    lengths: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@cache
def pool(role: str) -> tuple[Recipe | str, ...]:
    """The models of a role; a name is that of a shipped one."""
    count, entropy = COUNTS[role]
    drawn = [_draw(role, entropy, number) for number in range(count)]
    return (*drawn, *NAMES, *map(_large, range(LARGE))) if role == "count" else tuple(drawn)


def _draw(role: str, entropy: int, number: int) -> Recipe:
    rng = np.random.default_rng((entropy, number))
    heads, head_dim = SHAPES[number % len(SHAPES)]
    width, steps = heads * head_dim, STEPS[number % len(STEPS)]
    kv_heads = int(rng.choice([k for k in range(1, heads + 1) if heads % k == 0]))
    ff = int(width * rng.uniform(1.0, 3.0)) // 8 * 8
    layers = max(1, min(LAYERS[number % len(LAYERS)], WEIGHTS // (width * (4 * width + 3 * ff))))
    return Recipe(
        name=f"{role} {number}", layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, ff=ff,
        vocabulary=BYTES if steps else int(rng.choice(VOCABULARIES)), length=LENGTHS[rng.integers(len(LENGTHS))],
        spread=0.02 if steps else float(rng.choice(SPREADS)), steps=steps, groups=int(rng.choice([1, kv_heads])),
        pairing=str(rng.choice(["half", "interleaved"])), extras=bool(rng.integers(4) == 0),
        tied=bool(rng.integers(4) == 0), seed=100 * entropy + number,
    )  # fmt: skip


def _large(number: int) -> Recipe:
    """Wide and short in its cases."""
    return Recipe(
        f"large {number}", 2, 16, 4, 64, 2816, 2000, 128, (0.02, 1.0)[number], 0, 4, "half", False, False, 900 + number,
        lengths=(1, 7, 64),
    )  # fmt: skip


def build(recipe: Recipe) -> Decoder:
    """The untrained model."""
    generator = torch.Generator().manual_seed(recipe.seed)
    rotaries = [
        FopeRotary.create(
            head_dim=recipe.head_dim, groups=recipe.groups, training_length=recipe.length, theta=THETA,
            pairing=recipe.pairing, generator=generator,
        )
        for _ in range(recipe.layers)
    ]  # fmt: skip
    config = ModelConfig(
        vocab_size=recipe.vocabulary, hidden_size=recipe.width, intermediate_size=recipe.ff, num_layers=recipe.layers,
        num_heads=recipe.heads, num_kv_heads=recipe.kv_heads, norm_eps=1e-6, tie_embeddings=recipe.tied,
        training_length=recipe.length, rope_theta=THETA, floored=True, eos_token_id=0, pad_token_id=0,
        spectrum=rotaries[0].config, qk_norm=recipe.extras, qkv_bias=recipe.extras, out_bias=recipe.extras,
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    model = Decoder(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            usual = recipe.spread == SPREADS[0]
            nn.init.normal_(parameter, std=recipe.spread if usual else recipe.spread / math.sqrt(parameter.shape[1]))
    for attention, rotary in zip(model.attentions(), rotaries, strict=True):
        attention.rotary = rotary
    return model


@cache
def _text() -> NDArray[np.int64]:
    return as_tokens(python_source(held_out=False))


def train(model: Decoder, recipe: Recipe) -> None:
    """A minute or less: the rate rises over a tenth of the steps and stays."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95))
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(recipe.steps // 10, 1)))
    rng = np.random.default_rng(recipe.seed)
    positions = torch.arange(recipe.length).expand(BATCH, -1)
    for _ in range(recipe.steps):
        starts = rng.integers(0, len(_text()) - recipe.length, BATCH)
        windows = torch.from_numpy(np.stack([_text()[start : start + recipe.length + 1] for start in starts]))
        logits, _ = model(windows[:, :-1], torch.ones_like(positions), positions, model.empty_cache(BATCH))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        warm.step()


def checkpoint_of(recipe: Recipe | str, work: Path) -> Path:
    """Where the model lies as a checkpoint; made where it is not there."""
    if isinstance(recipe, str):
        return shipped(recipe)
    folder, half = work / recipe.name, work / f".{recipe.name}"
    if not folder.exists():
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        model = build(recipe)
        train(model, recipe)
        save(model, half)
        half.rename(folder)
    return folder


def bundle_of(recipe: Recipe | str, kind: str, work: Path) -> Bundle:
    """The model's bundle with both files; made where it is not there."""
    name = recipe if isinstance(recipe, str) else recipe.name
    checkpoint, out = checkpoint_of(recipe, work), work / f"{name}, {kind}"
    if not (out / "optimized").exists():
        config = KINDS[kind]
        ids = work / f"{name}.npy"
        vocabulary = BYTES if isinstance(recipe, str) else recipe.vocabulary
        np.save(ids, np.random.default_rng(0).integers(0, vocabulary, CALIBRATED))
        measured = config.quantization is not None and config.quantization.calibrated
        bundle = export(checkpoint, out, config, calibration=ids if measured else None)
        optimize(bundle)
        (out / "optimized").touch()
    return Bundle.open(out, verify=False)
