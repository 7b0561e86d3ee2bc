"""What runs a bundle beside the best peer that rounds as it does: who leads, by how much, and how sure that is."""

from collections.abc import Iterator
from typing import NamedTuple

from fope_export.benchmark.contenders import CONTENDERS, EAGER
from fope_export.benchmark.rounds import interval, ratios
from fope_export.benchmark.run import BenchResult, Cell, What
from fope_export.config import ExportConfig

WHATS: tuple[tuple[What, str], ...] = (("first", "prefill"), ("next", "decode"))
MEMORY = "memory"


class Lead(NamedTuple):
    """The fastest of ours over the fastest peer at one size; of memory, the peer's over the one of ours that needs
    least. Above 1 ours is ahead.
    """

    what: str
    """prefill, decode or memory."""
    length: int
    batch: int
    ours: str
    peer: str
    ratio: float
    interval: tuple[float, float] | None
    """Where the median lies, at 95 % confidence; of memory, which is one number, None."""

    def __str__(self) -> str:
        sure = f" ({self.interval[0]:.2f} to {self.interval[1]:.2f})" if self.interval else ""
        rows = f" x {self.batch}" if self.batch > 1 else ""
        return f"{self.what} at {self.length:,}{rows}: {self.ours} {self.ratio:.2f}{sure} times {self.peer}"


def leads(result: BenchResult, export: ExportConfig) -> Iterator[Lead]:
    """For every size where one of ours and a peer of the same rounding were timed. Ours with rounded caches count where
    weights are rounded, since peers round both then.
    """
    rounding = export.quantize or export.dtype
    for length, batch in dict.fromkeys((cell.length, cell.batch) for cell in result.cells):
        cells = [c for c in result.cells if (c.length, c.batch) == (length, batch) and not c.refused]
        ours = [c for c in cells if _is_ours(c) and (export.quantize or not CONTENDERS[c.contender].cache)]
        peers = [c for c in cells if _is_peer(c) and CONTENDERS[c.contender].rounds == rounding]
        if not ours or not peers:
            continue
        for what, name in WHATS:
            best, other = (min(each, key=lambda cell: cell.median(what)) for each in (ours, peers))
            found = ratios(getattr(other, what), getattr(best, what))
            middle, *ends = interval(found)
            yield Lead(name, length, batch, best.contender, other.contender, middle, (ends[0], ends[1]))
        known = [[cell for cell in each if cell.peak] for each in (ours, peers)]
        if all(known):
            best, other = (min(each, key=lambda cell: cell.peak or 0) for each in known)
            assert best.peak and other.peak
            yield Lead(MEMORY, length, batch, best.contender, other.contender, other.peak / best.peak, None)


def _is_ours(cell: Cell) -> bool:
    row = CONTENDERS[cell.contender]
    return row.backend not in ("", EAGER) and not row.twin


def _is_peer(cell: Cell) -> bool:
    return CONTENDERS[cell.contender].peer not in ("", "any") and not CONTENDERS[cell.contender].backend
