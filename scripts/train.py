#!/usr/bin/env python
"""Train a byte-level decoder with FoPE, and its RoPE twin from the same seed on the same data.

    scripts/train.py OUT                    both, on the standard library's source
    scripts/train.py OUT --text FILE …      on your own text
    scripts/train.py OUT --spectrum fope    one of them
    scripts/train.py OUT --task passkey     to find five digits in such text, and say them at its end

Interrupted, the same command goes on where it stopped. OUT/fope and OUT/rope become checkpoints in the native layout,
each with its model card.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from fope_export.backends.base import Ids
from fope_export.backends.eager import EagerBackend
from fope_export.config import ModelConfig
from fope_export.corpus import as_tokens, python_source
from fope_export.evaluation import DEPTHS, finds, loss_by_length
from fope_export.fope import frequencies
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.spectrum import Spectrum
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from fope_export.model.layouts.native import save
from fope_export.parity.cases import FACTORS
from fope_export.passkey import DIGITS, passkey
from fope_export.tokens import byte_tokenizer

TEXT, PASSKEY = TASKS = ("text", "passkey")
ANSWER = 20.0
"""What a token of a passkey weighs beside one of the text, or the text would be all that is learnt."""
SHORTEST, TRIALS = 96, 10
HEAD_DIM, THETA = 64, 10_000.0
VOCABULARY, SEPARATOR = 256, 0
SAVE_EVERY = 100  # steps
HELD_OUT_BYTES = 1 << 18


@dataclass(frozen=True)
class Run:
    """Everything that decides the result; a saved state of another run is refused."""

    spectrum: str
    steps: int
    batch: int
    length: int
    layers: int
    heads: int
    ff: int
    learning_rate: float
    gain: float
    seed: int
    data: str
    task: str = TEXT

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length


def build(run: Run) -> Decoder:
    """The twins' shared weights come from one seed; the coefficients have a generator of their own."""
    generator = torch.Generator().manual_seed(run.seed)
    rotaries = [_rotary(run, generator) for _ in range(run.layers)]
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=run.heads * HEAD_DIM, intermediate_size=run.ff, num_layers=run.layers,
        num_heads=run.heads, num_kv_heads=run.heads, norm_eps=1e-6, tie_embeddings=False, training_length=run.length,
        rope_theta=THETA, floored=run.spectrum == "fope", eos_token_id=SEPARATOR, pad_token_id=SEPARATOR,
        spectrum=rotaries[0].config,
    )  # fmt: skip
    torch.manual_seed(run.seed)
    model = Decoder(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            out = name.endswith(("attn_out.weight", "ff_out.weight"))
            nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * run.layers) if out else 1))
    for attention, rotary in zip(model.attentions(), rotaries, strict=True):
        attention.rotary = rotary
    return model


def _rotary(run: Run, generator: torch.Generator) -> FopeRotary:
    if run.spectrum == "rope":
        return FopeRotary.from_spectrum(Spectrum.rope(frequencies.exponential(THETA, HEAD_DIM).numpy(), HEAD_DIM))
    return FopeRotary.create(
        head_dim=HEAD_DIM, groups=run.heads, training_length=run.length, theta=THETA, gain=run.gain, generator=generator
    )


def batch_of(tokens: Ids, run: Run, step: int) -> Tensor:
    """Windows [B, S + 1] at places that only the seed and the step decide, so that a resumed run sees the same data."""
    generator = np.random.default_rng((run.seed, step))
    if run.task == PASSKEY:
        length = length_of(run, step) + 1
        tasks = [passkey(as_bytes, tokens, length, generator.random(), generator) for _ in range(run.batch)]
        return torch.from_numpy(np.stack([np.concatenate(task) for task in tasks]))
    starts = generator.integers(0, len(tokens) - run.length, run.batch)
    return torch.from_numpy(np.stack([tokens[i : i + run.length + 1] for i in starts]))


def length_of(run: Run, step: int) -> int:
    """Tokens S of a window. Passkeys begin with what they need and a few more, or finding them is not learnt."""
    shortest = min(SHORTEST, run.length) if run.task == PASSKEY else run.length
    return round(shortest + (run.length - shortest) * min(2 * step / run.steps, 1))


def as_bytes(text: str) -> list[int]:
    """Token ids."""
    return list(text.encode())


def weights_of(run: Run) -> Tensor | None:
    """Of the losses of the last L targets; None is all alike."""
    if run.task == TEXT:
        return None
    weights = torch.ones(run.length)
    weights[-1 - DIGITS :] = ANSWER  # a blank stands before the digits
    return weights


def learning_rate(run: Run, step: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to a tenth."""
    warmup = max(run.steps // 20, 1)
    if step < warmup:
        return run.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(run.steps - warmup, 1)
    return run.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train(run: Run, tokens: Ids, folder: Path, device: str, console: Console) -> tuple[Decoder, float, float]:
    """Returns the model, its last smoothed training loss, and the seconds it took over all sittings."""
    model = build(run).to(device)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    first, smoothed, seconds = _resume(run, folder, model, optimizer, device)
    mask = torch.ones(run.batch, run.length, dtype=torch.int64, device=device)
    positions = torch.arange(run.length, device=device).expand(run.batch, -1)
    columns = (*Progress.get_default_columns()[:3], TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn())
    weights = None if (each := weights_of(run)) is None else each.to(device)
    started = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(run.spectrum, total=run.steps, completed=first, loss=smoothed)
        for step in range(first, run.steps):
            windows = batch_of(tokens, run, step).to(device)
            new = windows.shape[1] - 1
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                logits, _ = model(windows[:, :-1], mask[:, :new], positions[:, :new], model.empty_cache(run.batch))
            loss = _loss(logits.float(), windows[:, 1:], weights)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run, step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decayed + plain, 1.0)
            optimizer.step()
            smoothed = loss.item() if step == 0 else 0.98 * smoothed + 0.02 * loss.item()
            progress.update(task, advance=1, loss=smoothed)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == run.steps:
                spent = seconds + time.perf_counter() - started
                _keep(run, folder, model, optimizer, step + 1, smoothed, spent)
    return model, smoothed, seconds + time.perf_counter() - started


def _loss(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Of logits [B, S, V] on targets [B, S], of which the last have the last of `weights`."""
    if weights is None:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    each = nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    return (each * (weights := weights[-each.shape[1] :])).mean() / weights.mean()


def _keep(
    run: Run, folder: Path, model: Decoder, optimizer: torch.optim.Optimizer, step: int, loss: float, seconds: float
) -> None:
    state = {
        "run": vars(run), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "step": step, "loss": loss, "seconds": seconds,
    }  # fmt: skip
    torch.save(state, folder / "state.tmp")
    (folder / "state.tmp").replace(folder / "state.pt")


def _resume(
    run: Run, folder: Path, model: Decoder, optimizer: torch.optim.Optimizer, device: str
) -> tuple[int, float, float]:
    path = folder / "state.pt"
    if not path.exists():
        return 0, float("nan"), 0.0
    state = torch.load(path, map_location=device, weights_only=True)
    if state["run"] != vars(run):
        raise SystemExit(f"{path} belongs to a run with other settings; choose another OUT or delete it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["loss"], state["seconds"]


CARD = """\
# {title}

A byte-level decoder of {parameters:,} parameters that {does}, made to show and test the export of FoPE. It is no
use for anything else. Its twin, trained from the same seed on the same batches, differs only in the position
embedding.

| | |
|---|---|
| position embedding | {embedding} |
| shape | {layers} layers, {heads} heads of {head_dim}, hidden {hidden}, SwiGLU {ff}; 256 bytes, 0 separates files |
| data | {data} |
| training | {steps} steps of {batch} windows of {length} bytes ({tokens:,}); AdamW, rate {learning_rate}, bfloat16 |
| where | {where}, {minutes:.0f} minutes |
| loss at the end | {loss:.3f} nats per byte in training |
| stored as | float16 weights, float32 frequencies and coefficients; the losses below are those of the stored model |

Loss on held-out text, {scored:,} bytes, in nats per byte, by length of context (trained at {length}):

| {lengths} |
|{rules}|
| {losses} |
{passkeys}
Made by `scripts/train.py`, seed {seed}.
"""


PASSKEYS = """
Passkeys of five digits said to the last one, of {of} at each length:

| {lengths} |
|{rules}|
| {found} |
"""
DOES = {TEXT: "writes Python", PASSKEY: "finds five digits in Python and says them"}


def _passkeys(found: dict[int, int], of: int) -> str:
    """The card's part on them, or nothing."""
    if not found:
        return ""
    numbers = {"lengths": " | ".join(map(str, found)), "found": " | ".join(map(str, found.values()))}
    return PASSKEYS.format(of=of, rules="|".join(["---"] * len(found)), **numbers)


def card(
    run: Run,
    model: Decoder,
    losses: dict[int, float],
    found: dict[int, int],
    scored: int,
    device: str,
    loss: float,
    seconds: float,
) -> str:
    """The model card, from what was run and what was read back."""
    config = model.config
    kept = f"{config.spectrum.frequencies} frequencies kept, {config.spectrum.pairs} of {HEAD_DIM // 2} pairs rotated"
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return CARD.format(
        title=f"{'FoPE' if run.spectrum == 'fope' else 'RoPE'} demonstration model",
        does=DOES[run.task],
        passkeys=_passkeys(found, TRIALS * len(DEPTHS)),
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=f"FoPE: {kept}, gain {run.gain}" if run.spectrum == "fope" else f"RoPE, theta {THETA:g}",
        hidden=config.hidden_size,
        head_dim=HEAD_DIM,
        tokens=run.tokens,
        where=on_cpu if device == "cpu" else torch.cuda.get_device_name(device),
        minutes=seconds / 60,
        loss=loss,
        scored=scored,
        lengths=" | ".join(map(str, losses)),
        rules="|".join(["---"] * len(losses)),
        losses=" | ".join(f"{value:.3f}" for value in losses.values()),
        **vars(run),
    )


def finish(run: Run, model: Decoder, held_out: Ids, device: str, loss: float, seconds: float, folder: Path) -> None:
    """Write the checkpoint, read it back, and describe what was read."""
    save(model.cpu(), folder, dtype=torch.float16)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str(pretty=True))
    stored = load_checkpoint(folder)
    backend, lengths = EagerBackend(stored.model), [run.length * factor for factor in FACTORS]
    losses = loss_by_length(backend, held_out, lengths)
    found = {n: found_at(backend, held_out, n) for n in lengths} if run.task == PASSKEY else {}
    told = card(run, stored.model, losses, found, len(held_out) - 1, device, loss, seconds)
    (folder / "MODEL_CARD.md").write_text(told)
    record = {"run": vars(run), "loss": loss, "seconds": seconds, "held_out_loss": losses, "passkeys": found}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def found_at(backend: EagerBackend, text: Ids, length: int) -> int:
    """How many passkeys a model finds, of TRIALS at each depth."""
    found = 0
    for depth in DEPTHS:
        generator = np.random.default_rng((0, length, round(100 * depth)))
        found += sum(finds(backend, passkey(as_bytes, text, length, depth, generator)) for _ in range(TRIALS))
    return found


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--spectrum", choices=("fope", "rope", "both"), default="both")
    parser.add_argument("--task", choices=TASKS, default=TEXT, help="what the windows are (default: text)")
    parser.add_argument("--text", type=Path, nargs="+", help="files to train on; their last twentieth is held out")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="training length in bytes")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4, help=f"of {HEAD_DIM} channels each")
    parser.add_argument("--ff", type=int, default=384, help="inner width of the feed-forward layer")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--gain", type=float, default=0.3, help="of FoPE's initial noise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def corpus(files: Sequence[Path] | None, length: int) -> tuple[Ids, Ids, str]:
    """Training tokens, held-out tokens (as many as whole windows of the longest context take), and what they are."""
    if files:
        tokens = as_tokens(b"\0".join(path.read_bytes() for path in files))
        cut = len(tokens) * 19 // 20
        train_on, held_out, what = tokens[:cut], tokens[cut:], ", ".join(path.name for path in files)
    else:
        train_on, held_out = (as_tokens(python_source(held_out=side)) for side in (False, True))
        what = f"source of Python {platform.python_version()}'s standard library"
    longest = length * max(FACTORS)
    scored = (min(len(held_out), HELD_OUT_BYTES + 1) - 1) // longest * longest
    if not scored:
        raise SystemExit(f"{len(held_out)} held-out bytes are too few for a context of {longest}: give more text")
    return train_on, held_out[: scored + 1], f"{what}, {len(train_on):,} bytes"


def main() -> None:
    args = arguments()
    console = Console(stderr=True)
    tokens, held_out, data = corpus(args.text, args.length)
    for spectrum in ("fope", "rope") if args.spectrum == "both" else (args.spectrum,):
        run = Run(
            spectrum, args.steps, args.batch, args.length, args.layers, args.heads, args.ff, args.learning_rate,
            args.gain, args.seed, data, args.task,
        )  # fmt: skip
        folder = args.out / spectrum
        folder.mkdir(parents=True, exist_ok=True)
        model, loss, seconds = train(run, tokens, folder, args.device, console)
        finish(run, model, held_out, args.device, loss, seconds, folder)
        console.print((folder / "MODEL_CARD.md").read_text())


if __name__ == "__main__":
    main()
