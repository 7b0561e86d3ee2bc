"""What other frequencies do to a model: its loss by length of context, before and after."""

from dataclasses import dataclass

from fope_export.backends.base import Backend
from fope_export.backends.eager import EagerBackend
from fope_export.bundle import Bundle
from fope_export.corpus import as_tokens, python_source
from fope_export.evaluation import loss_by_length
from fope_export.model.decoder import Decoder
from fope_export.parity.cases import FACTORS
from fope_export.parity.quantized import SCORED, takes_bytes


@dataclass(frozen=True)
class Reach:
    """Nats per byte of held-out Python by length of context."""

    before: dict[int, float]
    """Of the checkpoint as it was trained, in PyTorch."""
    after: dict[int, float]
    """Of the bundle."""


def reach_of(bundle: Bundle, original: Decoder, tested: Backend) -> Reach | None:
    """Loss at 1 to 16 times the training length, as far as the bundle was extended; `original` is the model as it was
    trained, in the bundle's dtype. Nothing where the vocabulary is not bytes: there is no text to take it on.
    """
    export, length = bundle.manifest.export, original.config.training_length
    if not takes_bytes(bundle):
        return None
    lengths = [length * factor for factor in FACTORS if length * factor <= min(export.extend_to or 0, SCORED)]
    text = as_tokens(python_source(held_out=True))[: SCORED + 1]
    return Reach(*(loss_by_length(backend, text, lengths) for backend in (EagerBackend(original), tested)))
