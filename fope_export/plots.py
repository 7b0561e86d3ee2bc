"""The figures, for the reports and the README."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fope_export.benchmark.contenders import CONTENDERS
from fope_export.benchmark.run import BenchResult, What
from fope_export.evaluation import Evaluation
from fope_export.parity.judge import LIMITS
from fope_export.parity.results import ParityResult

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#6b7280"
PALETTE = (GREY, "#1f2937", BLUE, GREEN, "#9ca3af", ORANGE, RED, "#cc79a7", "#56b4e9")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "fope-export",
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#374151",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
}

Losses = Mapping[str, Mapping[int, float]]
"""Model -> context length -> nats per token."""
Speeds = dict[str, dict[int, float]]
"""Contender -> tokens of the prompt -> tokens a second."""


def as_svg(figure: Figure) -> str:
    """The <svg> element alone, for a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG or SVG by the path's ending."""
    figure.savefig(path, dpi=160, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})


def error_figure(result: ParityResult, training_length: int | None) -> Figure:
    """Errors in units of rounding by length: the backend, the limits, and the deliberately wrong models."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.2), layout="constrained")
        draw_error(figure.subplots(), result, training_length)
    return figure


def draw_error(axes: Axes, result: ParityResult, training_length: int | None) -> None:
    """`error_figure` on given axes."""
    rows = sorted((case for case in result.cases if not case.rounded), key=lambda case: case.length)
    lengths, values, row = [case.length for case in rows], [], "token" if training_length else "row"
    for name, style, size, what in (("rms", "o", 4.5, f"all {row}s"), ("token", "_", 9, f"worst {row}")):
        ratios = [case.verdict.ratios[name] for case in rows]
        axes.plot(lengths, ratios, style, ms=size, color=BLUE, mew=1.4, label=f"{result.backend}, {what}")
        values += ratios
    axes.axhspan(
        1e-12, limit := LIMITS["rms"], color=GREEN, alpha=0.1, lw=0, label=f"allowed: {limit:g} over all {row}s"
    )
    axes.axhline(limit := LIMITS["token"], color=GREEN, lw=1.2, label=f"allowed: {limit:g} for one {row}")
    values += [LIMITS["token"], *_draw_controls(axes, result)]
    if training_length:
        axes.axvline(training_length, color=GREY, lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [2**n for n in range(0, 32, 2) if 2**n <= 2 * max(lengths)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    finite = [value for value in values if 0 < value < float("inf")]
    axes.set_ylim(min(finite) / 3, max(finite) * 6)
    trained = f"tokens (dotted: training length, {training_length})"
    axes.set_xlabel(trained if training_length else "largest symbolic size")
    axes.set_ylabel(f"error in units of rounding, {result.dtype}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)


def _draw_controls(axes: Axes, result: ParityResult) -> list[float]:
    """A line for each deliberate mistake; how far off they are."""
    wrong = sorted((control.verdict.ratio, control.name) for control in result.controls if control.verdict)
    for number, (error, name) in enumerate(wrong):
        axes.axhline(error, color=RED, lw=1, ls=(0, (4, 3)))
        axes.annotate(  # above and below in turn, so that the names of neighbours keep apart
            name, (0.995, error), (0, (1, -2)[number % 2]), xycoords=("axes fraction", "data"),
            textcoords="offset points", color=RED, fontsize=8.5, ha="right", va=("bottom", "top")[number % 2],
        )  # fmt: skip
    return [error for error, _ in wrong]


def loss_figure(losses: Losses, training_length: int) -> Figure:
    """Loss by length of context, a line for each model."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        draw_loss(figure.subplots(), losses, training_length)
    return figure


def draw_loss(axes: Axes, losses: Losses, training_length: int, unit: str = "byte") -> None:
    """`loss_figure` on given axes."""
    _by_length(axes, losses, training_length, f"{unit}s")
    for line, by_length in zip(axes.get_lines(), losses.values(), strict=False):
        end, color = list(by_length.items())[-1], line.get_color()
        axes.annotate(f"{end[1]:.2f}", end, (6, -3), textcoords="offset points", color=color)
    axes.set_ylabel(f"loss, nats per {unit}")


def draw_passkeys(axes: Axes, accuracy: Losses, training_length: int, unit: str = "byte") -> None:
    """Share of the passkeys that were found by length of context, a line for each model."""
    _by_length(axes, accuracy, training_length, f"{unit}s")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("passkeys found")


def _by_length(axes: Axes, values: Losses, training_length: int, unit: str) -> None:
    for color, (name, by_length) in zip((BLUE, ORANGE, GREEN, RED), values.items(), strict=False):
        axes.plot(list(by_length), list(by_length.values()), "o-", color=color, lw=2, ms=5, label=name)
    axes.axvline(training_length, color=GREY, lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    ticks = sorted({length for by_length in values.values() for length in by_length})
    axes.set_xticks(ticks, [f"{tick:,}\n{tick / training_length:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.08)
    axes.set_xlabel(f"context in {unit}, and as a multiple of the training length")
    axes.legend(loc="best")


def evaluation_figure(results: Sequence[Evaluation]) -> Figure:
    """Loss and passkeys by length of context, a line for each model."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_loss(left, {each.name: each.losses for each in results}, results[0].trained, "token")
        draw_passkeys(right, {each.name: each.accuracy for each in results}, results[0].trained, "token")
    return figure


def speed_figure(result: BenchResult, batch: int) -> Figure:
    """Tokens a second by length for one batch size, a line for each contender: prompts, and one by one after them."""
    sides: dict[What, Speeds] = {"first": {}, "next": {}}
    for what, speeds in sides.items():
        for cell in result.cells:
            if cell.batch == batch and not cell.refused:
                speeds.setdefault(cell.contender, {})[cell.length] = result.tokens_per_second(cell, what)
    return speeds_figure(sides["first"], sides["next"])


def speeds_figure(prefill: Speeds, decode: Speeds) -> Figure:
    """The same of any tokens a second; contenders on a RoPE twin are dashed."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_speeds(left, prefill, "prefill", "tokens of the prompt")
        draw_speeds(right, decode, "decode", "tokens before")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9)
    return figure


def draw_speeds(axes: Axes, speeds: Speeds, title: str, label: str) -> None:
    """One side of `speeds_figure`."""
    for color, (name, by_length) in zip(cycle(PALETTE), speeds.items()):
        style = "s--" if CONTENDERS[name].twin else "o-"
        axes.plot(list(by_length), list(by_length.values()), style, color=color, lw=1.8, ms=5, label=name)
    ticks = sorted({length for by_length in speeds.values() for length in by_length})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.set_xlabel(label)
    axes.set_ylabel("tokens a second")
    axes.set_title(title, loc="left", fontsize=11)
