"""Copies of a bundle's files that only a comparison needs, in the place of these while a backend loads them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from fope_export.bundle import Bundle
from fope_export.graph.base import Pass
from fope_export.graph.passes import rewritten, widening
from fope_export.graph.ways import way_of
from fope_export.manifest import MODEL, plain_file
from fope_export.scratch import scratch


@contextmanager
def exact(bundle: Bundle, name: str) -> Iterator[Bundle]:
    """The bundle with a file `name` whose linear layers read their inputs as they are."""
    with _copied(bundle, name, name, _exact(bundle)) as made:
        yield made


@contextmanager
def portable(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle with the portable file itself, inputs as they are, where a runtime that lacks its dtype has what was
    made of that at export (`plain_file`).
    """
    export = bundle.manifest.export
    with _copied(bundle, MODEL, plain_file(export), [*widening(export), *_exact(bundle)]) as made:
        yield made


def _exact(bundle: Bundle) -> list[Pass]:
    row = bundle.manifest.export.quantization
    return way_of(row).exact() if row else []


@contextmanager
def _copied(bundle: Bundle, source: str, name: str, edits: Sequence[Pass]) -> Iterator[Bundle]:
    if not edits:
        yield bundle
        return
    with scratch() as folder:
        rewritten(bundle.loadable(source), folder / name, edits)
        yield replace(bundle, path=folder)
