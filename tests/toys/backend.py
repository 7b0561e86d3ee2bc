"""PyTorch under another name, as a backend of a file of its own would be."""

from fope_export.backends.base import Backend
from fope_export.backends.choose import Row, Settings, Variant
from fope_export.backends.eager import EagerBackend
from fope_export.backends.machine import Machine
from fope_export.bundle import Bundle
from fope_export.model.checkpoint import source_of

NAME = "toyland"


def load(bundle: Bundle, settings: Settings) -> Backend:
    return EagerBackend(source_of(bundle).model, name=NAME)


def missing(machine: Machine) -> str:
    return "" if machine.cores else "toys need a core"


ROW = Row("its checkpoint in toyland", missing, (Variant("checkpoint", load),))
