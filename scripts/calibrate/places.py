"""Which module is named first when one module of the checkpoint in PyTorch is another than the file's."""

import copy
import time
from pathlib import Path

import numpy as np
from torch import nn

from calibrate.models import Recipe, bundle_of, pool
from calibrate.power import SEEDS, least
from calibrate.records import Book
from calibrate.runs import Bench
from fope_export.backends.eager import EagerBackend
from fope_export.fope.rotary import FopeRotary
from fope_export.model.decoder import Decoder
from fope_export.parity.cases import prefill
from fope_export.parity.localize import first_divergence
from fope_export.parity.run import SHORTEST_CONTROL
from fope_export.parity.yardstick import Yardstick

MODELS = ("count 2", "count 8", "count 27", "count 50", "count 62")
CLEAR = 10.0
"""Times the strength that is refused at all."""
NONE, RIGHT, WRONG = "none", "right", "wrong"


def planted(model: Decoder, module: str, strength: float) -> Decoder:
    """A copy in which all numbers of one module are too large by a share of themselves, in float32."""
    wrong = copy.deepcopy(model)
    part = wrong.get_submodule(module)
    names = ("sin_coef", "cos_coef") if isinstance(part, FopeRotary) else ("weight",)
    for name in names:
        parameter = getattr(part, name)
        setattr(part, name, nn.Parameter(parameter.detach() * (1 + strength), requires_grad=False))
    return wrong


def places_of(model: Decoder) -> list[str]:
    """Modules with numbers of their own whose output the graph names."""
    return [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.RMSNorm, FopeRotary))]


def place_all(book: Book, work: Path, until: float) -> None:
    """Add what the book lacks: of every model a seed after the other."""
    known = {tuple(line["place"]) for line in book.records() if "place" in line}
    recipes = {model.name: model for model in pool("count") if isinstance(model, Recipe)}
    for seed in range(SEEDS):
        for name in MODELS:
            if (name, seed) not in known and time.monotonic() < until:
                book.add({"place": [name, seed]} | _named(recipes[name], seed, work))


def _named(recipe: Recipe, seed: int, work: Path) -> dict[str, object]:
    """The module, and what is named where nothing is wrong, where the fault is only just refused, and where clearly."""
    bundle = bundle_of(recipe, "float32", work)
    bench = Bench.of(bundle, (7,), seed, 1)
    model = bench.yardstick.single.model
    module = str(np.random.default_rng((seed, 5)).choice(places_of(model)))
    length = max(recipe.length, SHORTEST_CONTROL)
    case = prefill(model.config, length, seed)
    got = case.run(bench.files["portable"])

    def held_against(strength: float) -> Yardstick:
        wrong = planted(model, module, strength)
        return Yardstick(EagerBackend(wrong), EagerBackend.in_float64(wrong))

    def named(strength: float) -> str:
        divergence = first_divergence(bundle, held_against(strength), case.feeds)
        return NONE if divergence is None else RIGHT if divergence.module == module else f"{WRONG}: {divergence.module}"

    just = least(lambda strength: not held_against(strength).look(case).judge(got).passed)
    told: dict[str, object] = {"module": module, "least": just, "sound": named(0.0)}
    return told if just is None else told | {"just": named(just), "clear": named(CLEAR * just)}
