"""Modules that cannot be exported or compared, each with a message that says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fope_export.config import ExportConfig
from fope_export.errors import ExportError, FopeError, ParityError
from fope_export.fope.rotary import FopeRotary
from fope_export.graph.module import export_module
from fope_export.parity.module import validate_module
from tests.graph.pairs import Pair, pair_inputs, tokens


class Wrong(nn.Module):
    """A rotation, and a result that `give` makes."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.rotary = FopeRotary.create(head_dim=16, groups=1, training_length=64)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(1))
        self.give = give

    def forward(self, x: Tensor) -> Any:
        q, _ = self.rotary(x, x, torch.arange(x.shape[1]).expand(x.shape[0], -1))
        return self.give(q)


X = torch.randn(2, 4, 2, 16)
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "no rotation": (lambda: nn.Linear(2, 2), (X,), {}, "Linear has no FopeRotary inside"),
    "training": (lambda: Wrong(lambda q: q).train(), (X,), {}, "Wrong is in training mode"),
    "one tensor": (lambda: Wrong(lambda q: q), X, {}, "the inputs are a Tensor, expected a tuple or a dictionary"),
    "two inputs": (lambda: Wrong(lambda q: q), (X, X), {}, "forward does not take these inputs: too many"),
    "no tensor": (lambda: Wrong(lambda q: q), (3,), {}, "input x is int, expected a tensor"),
    "branch": (lambda: Wrong(lambda q: q if q.sum() > 0 else -q), (X,), {}, "does not trace Wrong: .*ata-dep"),
    "a number": (lambda: Wrong(lambda q: (q, 3)), (X,), {}, r"output\.1 is no tensor"),
    "none": (lambda: Wrong(lambda q: {"a": q, "b": None}), (X,), {}, "b is no tensor"),
    "twice": (lambda: Wrong(lambda q: (q, q)), (X,), {}, r"output\.1 is an input, or the same"),
    "sizes": (lambda: Wrong(lambda q: q[q > 0]), (X,), {}, "output has the size u0, and u0 follows from no"),
    "unused": (lambda: Wrong2(), (X,), {}, "the model makes no call of fope::FopeRotary"),
    "names": (lambda: Wrong(lambda q: q), (X,), {"input_names": ["a", "b"]}, "2 input_names for 1 inputs: x"),
    "clash": (lambda: Wrong(lambda q: q), (X,), {"output_names": ["x"]}, "the name 'x' stands for two things"),
    "weight": (lambda: Wrong(lambda q: q), (X,), {"output_names": ["seen"]}, "the name 'seen' stands for two things"),
    "unknown dim": (lambda: Wrong(lambda q: q), (X,), {"dynamic_shapes": {"y": {}}}, "names y; the inputs are x"),
    "dim": (
        lambda: Wrong(lambda q: q.unflatten(1, (2, 2))), (X,), {"dynamic_shapes": {"x": {1: Dim("length")}}}, "length"
    ),
    "heads": (lambda: Wrong(lambda q: q), (X,), {"dynamic_shapes": {"x": {2: Dim("heads")}}}, "heads .* must be fixed"),
    "cache": (lambda: Wrong(lambda q: q), (X,), {"config": ExportConfig(cache="static")}, "without cache"),
    "dtype": (lambda: Wrong(lambda q: q), (X,), {"config": ExportConfig(dtype="fp16")}, "without dtype"),
    "double": (lambda: Doubled(), (X,), {}, "has weights in torch.float64"),
}  # fmt: skip


class Wrong2(Wrong):
    def __init__(self) -> None:
        super().__init__(lambda q: q)

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Doubled(Wrong2):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(("make", "inputs", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported(
    make: Callable[[], nn.Module], inputs: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module = make()
    with pytest.raises(FopeError, match=message) as caught:
        export_module(module.eval() if "training" not in message else module, inputs, tmp_path / "out", **options)
    assert caught.value.hint and len(str(caught.value)) < 900 and not list(tmp_path.iterdir())


def test_a_module_that_writes_its_buffer_is_refused(tmp_path: Path) -> None:
    module = Wrong(lambda q: q + module.seen.add_(1)).eval()
    with pytest.raises(ExportError, match="writes to its buffer seen"):
        export_module(module, (X,), tmp_path / "out")


@pytest.mark.parametrize(("dtype", "last"), [(torch.float16, 65520.0), (torch.bfloat16, 3.4e38)], ids=str)
def test_a_weight_that_a_cast_made_infinite_is_named(dtype: torch.dtype, last: float, tmp_path: Path) -> None:
    model = Pair().eval()
    with torch.no_grad():
        model.embed.weight[3, 5] = last
    with pytest.raises(ExportError, match=r"embed\.weight holds NaN or infinity in torch\."):
        export_module(model.to(dtype), pair_inputs(), tmp_path / "out", dynamic_shapes=tokens())
    assert not (tmp_path / "out").exists()


def test_a_module_that_float64_does_not_run_is_told_so(tmp_path: Path) -> None:
    module = Wrong(lambda q: q.float() @ torch.eye(16).to(q.device)).eval()
    bundle = export_module(module, (X,), tmp_path / "out")
    module.give = lambda q: q @ torch.eye(16)  # as a weight that stays float32
    with pytest.raises(ParityError, match="does not run the module") as caught:
        validate_module(bundle, module)
    assert "x.to(weight.dtype)" in caught.value.hint
    module = Wrong(lambda q: q * 0).eval()
    bundle = export_module(module, (X,), tmp_path / "zero")
    with pytest.raises(ParityError, match="output is zero everywhere"):
        validate_module(bundle, module)
