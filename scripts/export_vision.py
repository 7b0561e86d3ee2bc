#!/usr/bin/env python
"""Export a model that is no language model: a small flow-matching transformer for images, with its own FoPE code.

    scripts/export_vision.py                 exports, validates, and builds for TensorRT-RTX where that is installed

`TheirFope` stands for the code that a model was trained with; `Adapter` is all that has to be written to export it.
Weights are random.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim

import fope_export as fx
from fope_export.benchmark.contenders import ALLOWED
from fope_export.report import parity_table


class TheirFope(nn.Module):
    """FoPE as its authors might write it for images: positions are implicit, coefficients are per head.

    q, k [B, H, S, E]; freq [D]; sin_coef, cos_coef [H, D, F].
    """

    def __init__(self, heads: int, head_dim: int, longest: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        start = fx.FopeRotary.create(head_dim=head_dim, groups=heads, training_length=longest).spectrum
        self.freq: Tensor
        self.register_buffer("freq", torch.from_numpy(start.freq))
        self.sin_coef, self.cos_coef = (nn.Parameter(torch.from_numpy(c)) for c in (start.sin_coef, start.cos_coef))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.arange(q.shape[2])[:, None] * self.freq
        rest = (0, q.shape[3] // 2 - self.sin_coef.shape[2])
        sin, cos = (
            nn.functional.pad(wave @ coef, rest, value=1.0).repeat(1, 1, 2)
            for wave, coef in ((angles.sin(), self.sin_coef), (angles.cos(), self.cos_coef))
        )
        q, k = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin for x in (q, k))
        return q, k


class Adapter(nn.Module):
    """The same rotation by FopeRotary, which takes [B, S, H, E] and positions [B, S]."""

    def __init__(self, theirs: TheirFope) -> None:
        super().__init__()
        freq, sin_coef, cos_coef = (t.detach().numpy() for t in (theirs.freq, theirs.sin_coef, theirs.cos_coef))
        self.rotary = fx.FopeRotary.from_spectrum(fx.Spectrum.fope(freq, sin_coef, cos_coef, theirs.head_dim))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(q.shape[2]).expand(q.shape[0], -1)
        q, k = self.rotary(q.transpose(1, 2), k.transpose(1, 2), positions)
        return q.transpose(1, 2), k.transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fope = TheirFope(heads, width // heads, longest=256)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.fope(q, k)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class FlowTransformer(nn.Module):
    """The velocity [B, 3, 4 * rows, 4 * columns] of noisy images of that shape at times [B] in [0, 1]."""

    def __init__(self, width: int = 256, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head, self.pixels = nn.Linear(width, 3 * 16), nn.PixelShuffle(4)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        x = self.patches(image)
        rows, columns = x.shape[2:]
        x = x.flatten(2).mT + self.time(time[:, None])[:, None]
        for block in self.blocks:
            x = block(x)
        velocity: Tensor = self.pixels(self.head(x).mT.unflatten(2, (rows, columns)))
        return velocity


def example(batch: int = 2, rows: int = 6, columns: int = 5) -> dict[str, Tensor]:
    return {"image": torch.randn(batch, 3, 4 * rows, 4 * columns), "time": torch.rand(batch)}


def sizes() -> dict[str, dict[int, object]]:
    batch = Dim("batch")
    return {"image": {0: batch, 2: 4 * Dim("rows"), 3: 4 * Dim("columns")}, "time": {0: batch}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the bundle (default: a temporary one)")
    args = parser.parse_args()
    torch.manual_seed(0)
    console, started = Console(width=140), time.perf_counter()
    model, inputs = FlowTransformer().eval(), example()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = model(**inputs)
        replaced = fx.replace_rotary(model, TheirFope, Adapter)
        difference = float((model(**inputs) - before).abs().max() / before.abs().max())
        console.print(
            f"replaced {replaced} modules; the model's output changed by {difference:.0e} of its largest value"
        )
        bundle = fx.export_module(model, inputs, args.out or Path(folder) / "vision", dynamic_shapes=sizes())
        for port in (*bundle.manifest.inputs, *bundle.manifest.outputs):
            console.print(f"  {port.name} {port.dtype} {port.shape}", markup=False)
        result = fx.validate_module(bundle, model)
        console.print(parity_table(result))
        try:
            bundle, record = fx.build(bundle, fx.BuildConfig(sizes={"rows": (2, 8, 16), "columns": (2, 8, 16)}))
            console.print(record.described)
        except fx.FopeError as reason:
            console.print(f"no engine: {reason}", markup=False)
    console.print(f"{'passed' if result.passed else 'FAILED'} in {time.perf_counter() - started:.0f} s")
    if not result.passed or not math.isfinite(difference) or difference > ALLOWED["fp32"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
