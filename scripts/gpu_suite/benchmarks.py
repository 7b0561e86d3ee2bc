"""What is timed, beside what, and how many bytes it moves."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fope_export.benchmark.rounds import ratio
from gpu_suite import rivals
from gpu_suite.cases import Call, Case, Finding, Launch, Shape, check, judge, make
from gpu_suite.stopwatch import Calls, Stopwatch, Times, fastest

SPREAD = 8  # times the L2 cache that the buffers of a cold row occupy
FEWEST_CALLS, MOST_CALLS = 4, 2048  # in one graph
WARM_CALLS = 200  # on the same buffers, where the cache is warm
DECODED_TO = 8191  # the last position of a decoding row
RIVAL_ULPS = 16
AIMS = {"share_of_copy": 0.85, "over_empty": 1.3, "over_triton": 1.0}
"""At least, at most, at most. Prefill, decode, both."""


class Model(NamedTuple):
    """H query heads, K key-value heads and as many groups, E head_dim, D frequencies, F pairs."""

    H: int
    K: int
    E: int
    D: int
    F: int

    def shape(self, batch: int, length: int) -> Shape:
        return Shape(batch, length, self.H, self.K, self.E, self.D, self.F, self.K)


SMALL, LARGE = Model(16, 16, 64, 16, 16), Model(32, 8, 128, 31, 31)
OTHERS = (Model(16, 4, 64, 16, 16), Model(32, 8, 128, 36, 32), Model(32, 4, 128, 31, 31), Model(32, 16, 128, 36, 32))
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Row:
    """One line of the result. `warm`: q, k and coefficients are in the cache, as nothing is in prefill."""

    phase: str  # prefill or decode
    case: Case
    warm: bool
    torch: bool  # beside torch eager and torch.compile too

    @property
    def elements(self) -> int:
        B, S, H, K, E, *_ = self.case.shape  # noqa: N806
        return B * S * (H + K) * E

    @property
    def bytes(self) -> int:
        """q and k read and written once, and the positions; the coefficients are read once a block, from the cache."""
        return 2 * self.elements * self.case.dtype.itemsize + 8 * self.case.shape.B * self.case.shape.S

    @property
    def footprint(self) -> int:
        """Bytes of everything that a call touches."""
        _, _, _, _, _, D, F, G = self.case.shape  # noqa: N806
        return self.bytes + 4 * D + 8 * G * D * F

    def sets(self, cache: int) -> int:
        """How many buffers a graph goes through."""
        return 1 if self.warm else min(MOST_CALLS, max(FEWEST_CALLS, math.ceil(SPREAD * cache / self.footprint)))

    def __str__(self) -> str:
        temperature = " warm" if self.warm else " cold" if self.phase == "decode" else ""
        return f"{self.phase}{temperature} {self.case.kind} {self.case.shape}"


def rows(*, quick: bool) -> list[Row]:
    """Prefill, then decoding with a warm cache (q and k were just computed) and a cold one (so were many weights)."""
    chosen = []
    for model in (SMALL, LARGE) if quick else (SMALL, LARGE, *OTHERS):
        main = model in (SMALL, LARGE)
        for length in (2048, 8192) if quick else LENGTHS:
            case = Case(model.shape(1, length), last=None)
            chosen.append(Row("prefill", case, warm=False, torch=main and length in (512, 4096, 8192, 32_768)))
        for batch in (1, 16) if quick else BATCHES:
            case = Case(model.shape(batch, 1), last=DECODED_TO)
            chosen.append(Row("decode", case, warm=True, torch=main and batch in (1, 64)))
            if main and batch in (1, 8, 64) and not quick:
                chosen.append(Row("decode", case, warm=False, torch=False))
    for kind in () if quick else ("bf16", "fp32"):
        chosen += [
            Row("prefill", Case(LARGE.shape(1, s), kind, last=None), warm=False, torch=False) for s in (2048, 8192)
        ]
        chosen.append(Row("decode", Case(LARGE.shape(1, 1), kind, last=DECODED_TO), warm=True, torch=False))
    return chosen


class Buffers:
    """The inputs and outputs of every call of a graph, each in memory of its own."""

    def __init__(self, row: Row, count: int, device: torch.device) -> None:
        first = make(row.case, device)
        names = ("q", "k", "position_ids", "freq", "sin_coef", "cos_coef")
        stacked = {name: _stack(getattr(first, name), count) for name in names}
        self.calls = [Call(row.case, **{name: stacked[name][i] for name in names}) for i in range(count)]
        self.outputs = [*zip(*(torch.full_like(stacked[name], math.nan).unbind(0) for name in ("q", "k")), strict=True)]


def _stack(tensor: Tensor, count: int) -> Tensor:
    return tensor.expand(count, *tensor.shape).contiguous()


@dataclass(frozen=True)
class Bench:
    """Everything that a row is timed with."""

    device: torch.device
    cache: int  # bytes of L2
    launch: Launch
    nothing: Callable[[], None]
    stopwatch: Stopwatch
    rounds: int
    repeats: int = WARM_CALLS
    compiling: bool = True  # torch.compile too
    plans: tuple[tuple[str, Launch], ...] = ()  # other cuts of the same work, for tuning

    def run(self, row: Row) -> dict[str, Any]:
        """Check every contender on the row's own inputs, time those that passed, and say which did not."""
        buffers = Buffers(row, row.sets(self.cache), self.device)
        findings: list[Finding] = []
        contenders: dict[str, Calls] = {}
        for name, calls, finding in self._contenders(row, buffers):
            findings += [finding] if finding else []
            if finding is None or not finding.fault:
                contenders[name] = [*calls] * (self.repeats if row.warm else 1)
        wrong = {finding.name: finding.fault for finding in findings if finding.fault}
        result = facts(row) | {"buffers": len(buffers.calls), "wrong": wrong}
        if "ours" not in contenders:
            return result
        times = self.stopwatch.time(contenders, self.rounds)
        after = judge("ours, as timed", buffers.calls[-1], buffers.outputs[-1])
        return result | summary(row, times) | {"wrong": wrong | ({after.name: after.fault} if after.fault else {})}

    def _contenders(self, row: Row, buffers: Buffers) -> Iterator[tuple[str, Calls, Finding | None]]:
        launches = [("ours", self.launch), ("ours again", self.launch), *self.plans]
        for name, launch in launches:
            calls = [
                lambda launch=launch, call=call, out=out: launch(call, *out)
                for call, out in zip(buffers.calls, buffers.outputs, strict=True)
            ]
            yield name, calls, check(launch, buffers.calls[0], name=name)
        if row.phase == "prefill":
            yield from self._copies(row, len(buffers.calls))
        yield "empty", [self.nothing] * len(buffers.calls), None
        yield from self._triton(buffers)
        if row.torch:
            yield from self._torch(buffers)

    def _copies(self, row: Row, count: int) -> Iterator[tuple[str, Calls, None]]:
        """As many bytes read and as many written, by the driver and by a kernel."""
        size = row.bytes // 2 // row.case.dtype.itemsize
        sources = torch.randn(count, size, dtype=row.case.dtype, device=self.device).unbind(0)
        targets = torch.empty(count, size, dtype=row.case.dtype, device=self.device).unbind(0)
        pairs = [*zip(sources, targets, strict=True)]
        yield "copy by copy_", [partial(b.copy_, a) for a, b in pairs], None
        yield "copy by kernel", [partial(torch.neg, a, out=b) for a, b in pairs], None

    def _triton(self, buffers: Buffers) -> Iterator[tuple[str, Calls, Finding | None]]:
        try:
            module = rivals.triton_rope()
        except ImportError:
            return
        if not module.available():
            return
        turned = rivals.as_rope(buffers.calls[0])
        cos, sin = rivals.rope_tables(turned)
        outputs = [(torch.full_like(c.q, math.nan), torch.full_like(c.k, math.nan)) for c in buffers.calls]
        for config in module.CONFIGS:
            name = f"triton rope, {config[0]} heads, {config[1]} warps"

            def launch(call: Call, q: Tensor, k: Tensor, config: tuple[int, int] = config) -> None:
                module.rotate(call.q, call.k, call.position_ids, cos, sin, q, k, *config)

            calls = [
                lambda launch=launch, call=call, out=out: launch(call, *out)
                for call, out in zip(buffers.calls, outputs, strict=True)
            ]
            yield name, calls, check(launch, turned, name=name)

    def _torch(self, buffers: Buffers) -> Iterator[tuple[str, Calls, Finding | None]]:
        makers = {"torch eager": lambda: rivals.eager} | ({"torch.compile": rivals.compiled} if self.compiling else {})
        for name, maker in makers.items():
            try:
                function = maker()
                finding = judge(name, buffers.calls[0], function(buffers.calls[0]), RIVAL_ULPS)
            except Exception as error:  # a rival that does not run is reported, not timed
                yield name, [], Finding(name, None, f"{type(error).__name__}: {error}"[:500])
                continue
            yield name, [partial(function, call) for call in buffers.calls], finding


def facts(row: Row) -> dict[str, Any]:
    """What a row is, whatever came of it."""
    return {
        "phase": row.phase,
        "warm": row.warm,
        "kind": row.case.kind,
        **row.case.shape._asdict(),
        "bytes": row.bytes,
    }


def summary(row: Row, times: Times) -> dict[str, Any]:
    """Medians and spreads in microseconds, and how the kernel stands to each of the others."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    against = {
        "share_of_copy": (fastest(times, "copy"), "ours"),
        "over_empty": ("ours", "empty" if row.phase == "decode" else None),
        "over_triton": ("ours", fastest(times, "triton")),
        "speed_over_eager": (fastest(times, "torch eager"), "ours"),
        "speed_over_compile": (fastest(times, "torch.compile"), "ours"),
        "again_over_ours": ("ours again", "ours"),
    }
    return {
        "microseconds": {name: round(value, 4) for name, value in medians.items()},
        "deciles": {name: [round(cut, 4) for cut in statistics.quantiles(v, n=10)[::8]] for name, v in times.items()},
        "gigabytes_per_second": round(row.bytes / medians["ours"] / 1e3, 1),
        **{name: round(ratio(times[a], times[b]), 4) for name, (a, b) in against.items() if a and b},
    }


def aims(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim beside what was measured: the worst and the middle of its rows, and how many reach it."""
    wanted = (
        ("share_of_copy", "prefill", "at least 85 % of a device copy of as many bytes"),
        ("over_empty", "decode", "under 1.3 times an empty kernel"),
        ("over_triton", "prefill", "not slower than a fused RoPE in Triton"),
        ("over_triton", "decode", "not slower than a fused RoPE in Triton"),
    )
    goals = []
    for name, phase, text in wanted:
        values = sorted(r[name] for r in results if r["phase"] == phase and r["kind"] == "fp16" and name in r)
        if not values:
            continue
        reached = [v >= AIMS[name] if name == "share_of_copy" else v <= AIMS[name] for v in values]
        worst = values[0] if name == "share_of_copy" else values[-1]
        goals.append(
            {"aim": f"{phase}, fp16: {text}", "measure": name, "wanted": AIMS[name], "worst": worst,
             "median": round(statistics.median(values), 4), "rows": len(values), "reached_in": sum(reached)}
        )  # fmt: skip
    return goals
