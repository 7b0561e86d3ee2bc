"""What a person sees: results on stdout, progress and errors on stderr."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Table

from fope_export.errors import FopeError

WIDE = 160
"""Columns where nobody watches: a file or a pipe needs no folding."""
ERRORS = Console(stderr=True, highlight=False, soft_wrap=True)
PROGRESS = Console(stderr=True, highlight=False, soft_wrap=True)
"""What tells how far a command is; `--quiet` leaves it out."""
RESULTS = Console(highlight=False, soft_wrap=True, width=None if sys.stdout and sys.stdout.isatty() else WIDE)


def print_error(error: FopeError, code: int, *, as_json: bool = False, **more: str) -> None:
    """One message and its hint, or one JSON object with both, and with `more`."""
    if as_json:
        told = {"type": type(error).__name__, "message": str(error), "hint": error.hint, "exit_code": code, **more}
        ERRORS.out(json.dumps({"error": told}))
        return
    ERRORS.print("[bold red]error:[/] ", end="")
    ERRORS.print(str(error), markup=False)
    ERRORS.print("[bold]hint:[/]  ", end="")
    ERRORS.print(error.hint, markup=False)


def waiting(text: str) -> Status:
    """A spinner while something loads."""
    return PROGRESS.status(text)


class Stages:
    """Reports the stages of a longer task: a spinner while one runs, a line with its seconds when the next begins."""

    def __init__(self, title: str, status: Status) -> None:
        self._title, self._status, self._text, self._started = title, status, "", 0.0

    def __call__(self, text: str) -> None:
        self.finish()
        self._text, self._started = text, time.perf_counter()
        self._status.update(f"{self._title}: {text}")

    def progress(self, done: int, total: int) -> None:
        """Bytes of the running stage that are done, and of all."""
        self._status.update(f"{self._title}: {self._text}, {done / 1e6:,.0f} MB done ({done / max(total, 1):.0%})")

    def finish(self) -> None:
        if self._text:
            PROGRESS.print(f"[green]✓[/] {self._text} [dim]{time.perf_counter() - self._started:.1f} s[/]")


@contextmanager
def stages(title: str) -> Iterator[Stages]:
    """The stages of a task, the last of them over when the block ends well."""
    with PROGRESS.status(title) as status:
        running = Stages(title, status)
        yield running
        running.finish()


def print_sections(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Titles, and under each its names and values."""
    for title, rows in sections.items():
        if rows:
            RESULTS.print(f"[bold]{title}[/]")
            width = max(map(len, rows))
            for name, value in rows.items():
                RESULTS.print(f"  {name:<{width}}  {value}", markup=False)


def doctor_table(abilities: Mapping[str, str]) -> Table:
    """What a machine can do, and why not."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for what, reason in abilities.items():
        table.add_row(f"  {what}", "[yellow]no[/]" if reason else "[green]yes[/]", escape(reason))
    return table


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for a known number of steps: call it with what begins, how many are done, and how many there are."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=PROGRESS, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {what}", completed=done, total=total)

        yield report


@contextmanager
def report_speed() -> Iterator[Callable[[str], None]]:
    """Count tokens as they come; say how many there were and how fast."""
    tokens: list[str] = []
    started = time.perf_counter()
    yield tokens.append
    seconds = time.perf_counter() - started
    PROGRESS.print(f"\n[dim]{len(tokens)} tokens in {seconds:.1f} s, {len(tokens) / seconds:.0f} a second[/]")
