"""What the adapter_config.json of a LoRA adapter says about its tensors, as PEFT 0.21 reads it (peft/tuners/lora)."""

import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from fope_export.config import Checked, Count, convert
from fope_export.documents import read_object
from fope_export.errors import CheckpointError, ConfigError, cut
from fope_export.model.layouts import ADAPTER

MERGE = "Merge it with PEFT (merge_and_unload), save_pretrained what that gives, and export that folder."
ENDING, IN_LAYER = r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<layer>\d+)\."
"""What PEFT makes of the expressions in rank_pattern and alpha_pattern, and of those in layers_pattern."""
FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")
REPEATS = 3
"""Of things in an expression, at most: more could search for hours, as a group that repeats could."""
PATTERNS = 10_000
"""Of each kind, at most."""
T = TypeVar("T")

WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path corda_config enable_lora eva_config fan_in_fan_out inference_mode "
    "loftq_config lora_dropout lora_ga_config megatron_core merge_weights peft_version qalora_group_size revision "
    "runtime_config task_type".split()
)
"""Fields that say how it was trained, and `fan_in_fan_out`, which PEFT itself sets to false for linear layers."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": ([],),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),  # the others change the base
    "layer_replication": ([],),
    "lora_bias": (False,),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "use_qalora": (False,),
}
"""Values with which fields that are not read here change nothing; null never does."""


class LoraFlags(Checked, frozen=True, kw_only=True):
    """The fields that decide what is merged, with PEFT's defaults."""

    r: Count = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, Count] = msgspec.field(default_factory=dict)
    alpha_pattern: dict[str, float] = msgspec.field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = _listed(self.layers_pattern)
        for patterns, form in ((self.rank_pattern, ENDING), (self.alpha_pattern, ENDING), (layers, IN_LAYER)):
            if len(patterns) > PATTERNS:
                raise ConfigError(f"{len(patterns)} patterns, expected {PATTERNS} at most", hint=MERGE)
            for each in patterns:
                _expression(form, each)

    def rank(self, module: str) -> int:
        """Of the matrices of `module`, which is PEFT's name."""
        return _matching(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What the product of its matrices is multiplied by."""
        rank = self.rank(module)
        return _matching(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool | None:
        """Whether `module` is adapted; None where only an expression says so."""
        if not isinstance(self.target_modules, list) or isinstance(self.exclude_modules, str):
            return None
        whole = any(f".{name}." in f".{module}." for name in self.modules_to_save or ())
        excluded = whole or _ends(module, self.exclude_modules or ())
        return _ends(module, self.target_modules) and not excluded and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        """Whether the first number in a module's name is one of layers_to_transform."""
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        tried = [_expression(IN_LAYER, each) for each in _listed(self.layers_pattern)] or [FIRST_NUMBER]
        found = next((match for each in tried if (match := each.match(module))), None)
        number = found["layer"] if found else None
        return number is not None and int(number) in ([layers] if isinstance(layers, int) else layers)

    def saves(self, module: str) -> bool:
        """Whether `module`, or one that it is in, was trained whole, in the place of being adapted."""
        parts, ends = module.split("."), tuple(self.modules_to_save or ())
        return any(".".join(parts[: i + 1]).endswith(ends) for i in range(len(parts)))


def _listed(names: list[str] | str | None) -> list[str]:
    return [names] if isinstance(names, str) and names else list(names or ())


def _ends(module: str, names: Iterable[str]) -> bool:
    """Whether `module` has one of these names, or its last parts have."""
    return f".{module}".endswith(tuple(f".{name}" for name in names))


@cache
def _expression(form: str, given: str) -> re.Pattern[str]:
    """A regular expression of a `form`, with what was `given` in it. Raises ConfigError where that is none, or could be
    one that never ends.
    """
    if sum(map(given.count, "*+{")) > REPEATS or re.search(r"\)[*+{]", given):
        raise ConfigError(f"the pattern {cut(given)} could take for ever", hint="Write out the names that it means.")
    try:
        return re.compile(form.format(given))
    except (re.error, OverflowError, RecursionError) as cause:
        raise ConfigError(f"{cut(given)} is no pattern: {cut(cause)}", hint="It is a regular expression.") from cause


def _matching(patterns: Mapping[str, T], module: str, default: T) -> T:
    """What the first pattern says that matches the last parts of `module`."""
    found = (value for pattern, value in patterns.items() if _expression(ENDING, pattern).match(module))
    return next(found, patterns.get(module, default))


def read_flags(path: Path) -> LoraFlags:
    """What the adapter_config.json at `path` says. Raises CheckpointError where it is not there, and ConfigError naming
    all fields that mean more than is merged here, or that nobody here knows.
    """
    if not path.exists():
        raise CheckpointError(f"{path.parent}: no {ADAPTER}", hint="Give the folder that PEFT's save_pretrained wrote.")
    data = {name: value for name, value in read_object(path, raises=CheckpointError).items() if value is not None}
    if (kind := data.pop("peft_type", None)) != "LORA":
        raise ConfigError(f"{path}: peft_type is {cut(kind)}, and only LORA is merged", hint=MERGE)
    given = {
        name: value for name, value in data.items() if name not in WITHOUT_EFFECT and value not in NEUTRAL.get(name, ())
    }
    if more := sorted(given.keys() - set(LoraFlags.__struct_fields__)):
        told = ", ".join(f"{cut(name, 50)} is {cut(given[name], 50)}" for name in more)
        raise ConfigError(f"{path}: {told}: that could mean another model", hint=MERGE)
    return convert(given, LoraFlags, where=str(path))
