"""What the records say, as text: false alarms with a bound over models, how near each ratio came, power, places."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from calibrate.faults import FAULTS
from calibrate.power import raises
from calibrate.records import Record, rule
from fope_export.parity.judge import LIMITS

CONFIDENCE = 0.95
REFUSED = 0.95
"""Of the seeds: the strength at which a fault counts as seen."""
SLACK = 10 ** (1 / 8)
"""A step between strengths: what is nearer than that is alike."""


def upper_bound(alarming: int, models: int) -> float:
    """The largest share of models with a false alarm that is compatible with what was seen (Clopper and Pearson).

    Models are the unit, as the runs of one are alike; without an alarm it is 1 - 0.05 ** (1 / models).
    """
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(alarming, models, middle) > 1 - CONFIDENCE else (low, middle)
    return high


def _at_most(count: int, of: int, share: float) -> float:
    """Probability of so few."""
    term = total = (1 - share) ** of
    for i in range(count):
        term *= (of - i) / (i + 1) * share / (1 - share)
        total += term
    return min(total, 1.0) if share < 1 else 0.0


def heading(lines: Iterable[Record]) -> str:
    """The rule that the newest sitting judged by, and on what."""
    sittings = [line for line in lines if "machine" in line]
    if not sittings:
        return "no records"
    judged = sittings[-1]["rule"]
    told = [f"rule {judged}" + ("" if judged == rule() else ", which is not the rule as it is now")]
    for line in sittings:
        if line["rule"] == judged:
            libraries = ", ".join(" ".join(each) for each in line["machine"]["libraries"].items())
            told.append(
                "  commit {commit}: {processor}, {instructions}; ".format(**line, **line["machine"]) + libraries
            )
    return "\n".join(told)


def tables(records: Sequence[Record]) -> str:
    """Everything, or that there is nothing."""
    if not records:
        return "no records of this rule"
    runs = [line for line in records if "ratios" in line]
    parts = [_alarms(role, [line for line in runs if line["role"] == role]) for role in ("fit", "count")]
    return "\n\n".join(filter(None, (*parts, _nearness(runs), _power(records), _places(records), _skipped(records))))


def _alarms(role: str, runs: Sequence[Record]) -> str:
    if not runs:
        return ""
    kinds: dict[str, list[Record]] = {"all": list(runs)}
    for line in runs:
        kinds.setdefault(f"{line['instructions']}, threads: {line['run'][3]}", []).append(line)
    rows = [_alarm_row(name, lines) for name, lines in kinds.items()]
    alarms = [
        f"  {', '.join(map(str, line['run'][:3]))}, {line['file']}: {'; '.join(wrong)}"
        for line in runs
        if (wrong := line["failed"] + [f"not refused: {mistake}" for mistake in line.get("missed", ())])
    ]
    return "\n".join((f"False alarms, role '{role}'", *_aligned(_ALARM_HEAD, rows), *alarms))


_ALARM_HEAD = (
    "instructions", "runs", "models", "refused", "models refused", "95 % bound", "mistakes not refused",
    "former rule refuses",
)  # fmt: skip


def _alarm_row(name: str, lines: Sequence[Record]) -> tuple[Any, ...]:
    models, refused = {line["run"][0] for line in lines}, [line for line in lines if line["failed"]]
    alarming = {line["run"][0] for line in refused}
    former = sum(max(line["former"].values()) > 1 for line in lines)
    missed = sum(bool(line.get("missed")) for line in lines)
    bound = f"{upper_bound(len(alarming), len(models)):.1%} of models"
    return name, len(lines), len(models), len(refused), len(alarming), bound, missed, former


def _nearness(runs: Sequence[Record]) -> str:
    """The largest of each ratio as a share of its limit, by kind and file."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for line in runs:
        groups.setdefault((line["role"], line["run"][1], line["file"]), []).append(line)
    rows = [
        (*group, len(lines), *(f"{max(each['ratios'][name] for each in lines) / LIMITS[name]:.2f}" for name in LIMITS),
         sum(each["members"] > 8 for each in lines))
        for group, lines in sorted(groups.items())
    ]  # fmt: skip
    head = ("role", "kind", "file", "runs", *LIMITS, "judged again")
    return "\n".join(("Largest value as a share of its limit", *_aligned(head, rows))) if rows else ""


def quantile(values: Iterable[float | None], share: float = REFUSED) -> float | None:
    """The smallest strength that is enough for so many of them; None where even the largest is not."""
    ordered = sorted(values, key=lambda value: float("inf") if value is None else value)
    return ordered[math.ceil(len(ordered) * share) - 1]


def _power(records: Sequence[Record]) -> str:
    tried = [line for line in records if "power" in line]
    if not tried:
        return ""
    units = {fault.name: fault.unit for fault in FAULTS}
    rows: list[tuple[Any, ...]] = []
    for setting in dict.fromkeys(tuple(line["power"][:3]) for line in tried):
        for name in units:
            seeds = [line for line in tried if line["power"][:3] == list(setting) and line["power"][4] == name]
            if seeds:
                strengths = [quantile(line[rule] for line in seeds) for rule in ("least", "former", "raised")]
                numbers = (len(seeds), *map(_strength, strengths), _compared(strengths))
                rows.append((", ".join(setting), name, *numbers, units[name]))
    head = ("model", "fault", "seeds", "rule", "former", "former, raised", "weaker than", "strength is")
    weaker = [sum(rule in row[6] for row in rows) for rule in ("raised", "former")]
    count = f"{len(rows)} rows: weaker than the raised rule in {weaker[0]}, than the former as it was in {weaker[1]}"
    title = "Strength at which 95 % of the seeds are refused"
    return "\n".join((title, *_aligned(head, rows), *_raised(tried, records), count))


def _raised(tried: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """How many times the former limits were raised, least and most; and what is needed after all runs."""
    least, most = ({name: way(line["by"][name] for line in tried) for name in tried[0]["by"]} for way in (min, max))
    told = {"raised at least": least, "at most": most, "needed": raises(list(records))}
    return [f"former limits, {what}: {_listed(times)}" for what, times in told.items()]


def _listed(times: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {each:.3g}" for name, each in times.items())


def _compared(strengths: Sequence[float | None]) -> str:
    own, former, raised = (float("inf") if each is None else each for each in strengths)
    worse = [name for name, other in (("raised", raised), ("former", former)) if own > other * SLACK * 1.01]
    return ", ".join(worse)


def _strength(value: float | None) -> str:
    return "none" if value is None else f"{value:.1e}"


def _places(records: Sequence[Record]) -> str:
    placed = [line for line in records if "place" in line]
    if not placed:
        return ""
    verdicts = ("right", "none", "wrong")
    rows = []
    labels = {"clear": "10 times what is refused", "just": "only just refused", "sound": "nothing wrong"}
    for what, label in labels.items():
        given = [line[what].partition(":")[0] for line in placed if what in line]
        rows.append((label, len(given), *(given.count(each) for each in verdicts)))
    return "\n".join(("First module that diverges", *_aligned(("fault", "files", *verdicts), rows)))


def _skipped(records: Sequence[Record]) -> str:
    skipped = {tuple(line["run"][:2]) for line in records if "skipped" in line}
    told = "; ".join(map(", ".join, sorted(skipped)))
    return f"Not judged, as there is no such file or PyTorch overflows: {told}" if told else ""


def _aligned(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
