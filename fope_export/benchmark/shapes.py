"""The paper's models with random weights, for measurements that do not ask what a model says."""

from pathlib import Path

import torch

from fope_export.config import ModelConfig
from fope_export.fope import frequencies
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.spectrum import Spectrum
from fope_export.model.decoder import Decoder
from fope_export.model.layouts.native import save

SHAPES = {"60M": (512, 8, 8), "180M": (1024, 8, 8), "1.2B": (2048, 16, 16)}
"""Hidden size, heads, layers of the paper's models; trained at 512."""
LENGTH, VOCABULARY, THETA = 512, 50304, 10_000.0


def write_checkpoint(shape: str, kind: str, folder: Path) -> int:
    """A native checkpoint with random weights; returns the bytes of its weights."""
    hidden, heads, layers = SHAPES[shape]
    head_dim = hidden // heads
    torch.manual_seed(0)
    if kind == "rope":
        rope = Spectrum.rope(frequencies.exponential(THETA, head_dim).numpy(), head_dim)
        rotaries = [FopeRotary.from_spectrum(rope) for _ in range(layers)]
    else:
        rotaries = [FopeRotary.create(head_dim=head_dim, groups=heads, training_length=LENGTH) for _ in range(layers)]
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=heads, norm_eps=1e-6, tie_embeddings=False, training_length=LENGTH, rope_theta=THETA,
        floored=kind == "fope", eos_token_id=0, pad_token_id=1, spectrum=rotaries[0].config,
    )  # fmt: skip
    model = Decoder(config).requires_grad_(False)
    for attention, rotary in zip(model.attentions(), rotaries, strict=True):
        attention.rotary = rotary
    folder.mkdir()
    save(model, folder)
    return sum(p.numel() * 4 for p in model.parameters())
