"""What an edit of a graph is: a pass with a name, in memory, with what it needs and what it promises, both checked."""

import logging
from abc import abstractmethod

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, InvariantError, PassResult

log = logging.getLogger(__name__)


class Pass(InPlacePass):
    """An edit of a model in memory. A failure of what it needs or promises names it.

    Raises PreconditionError before it changes anything, or PostconditionError after it.
    """

    @abstractmethod
    def requires(self, model: ir.Model) -> None:
        """Raises PreconditionError where the pass cannot do what it is for."""

    @abstractmethod
    def ensures(self, model: ir.Model) -> None:
        """Raises PostconditionError where it has not done it."""

    def __call__(self, model_or_result: ir.Model | PassResult, /) -> PassResult:
        """The pass between its two checks."""
        log.debug("%s", type(self).__name__)
        try:
            return super().__call__(model_or_result)
        except InvariantError as cause:
            raise type(cause)(f"{type(self).__name__}: {cause}") from cause
