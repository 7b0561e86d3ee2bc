"""PEFT's LoRA adapters, merged into the stored tensors of the checkpoint that they were trained on.

What `merge_and_unload` of PEFT 0.21 computes (peft/tuners/lora), in float32 and in its order of operations. V rows of
the embedding, H its width, r an adapter's rank.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from fope_export.errors import BundleError, CheckpointError, ConfigError
from fope_export.model.assembly import check_copy, in_float32, listed, named, wanted_names
from fope_export.model.fp8 import SCALE
from fope_export.model.layouts import ADAPTER
from fope_export.model.layouts.base import Layout, WeightMap
from fope_export.model.lora import LoraFlags, read_flags
from fope_export.model.tensors import read_tensors
from fope_export.tokens import Tokenizer

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER = "tokenizer.json"
PREFIX = "base_model.model."
"""What PEFT puts before every name."""
INSIDE = ".base_layer."
"""Where PEFT keeps a layer's own tensors, below what it trains."""
EXPERTS = ".experts."
"""Where none of these is adapted, the model that was trained may have had all in one tensor, which is no target."""
PART = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)")
AGAIN = "Save it again with PEFT's save_pretrained, on one device with all that was trained."
OTHER = "Was it trained on another base? Export with the one that adapter_config.json names."


@dataclass(frozen=True)
class LowRank:
    """The product of two matrices, which is added to a weight: a [r, in], b [out, r], for a weight [out, in]; of an
    `embedding` [V, H] a [r, V], b [H, r]. With a `magnitude` (DoRA), [out] or [H], that is then the length of each row
    of the sum, or of each column of an embedding's.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None
    embedding: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = len(self.b), self.a.shape[1]
        return shape[::-1] if self.embedding else shape

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged weight; float32, as all of them."""
        product = self.b.float() @ self.a.float()
        merged: Tensor = weight + (product.T if self.embedding else product) * self.scale
        if self.magnitude is None:
            return merged
        factor: Tensor = self.magnitude.float() / torch.linalg.norm(merged, dim=0 if self.embedding else 1)
        return merged * (factor if self.embedding else factor[:, None])


@dataclass(frozen=True)
class Change:
    """What becomes of one stored tensor: another in its place, a product added, or both. `module` is PEFT's name."""

    module: str
    whole: Tensor | None = None
    low_rank: LowRank | None = None

    def made_of(self, stored: Tensor, where: str, *, embedding: bool, grows: bool) -> Tensor:
        """The tensor in the place of `stored`, of its shape but for the number of rows where it `grows`. Raises
        CheckpointError where it is of another shape, or not what PEFT trains of an `embedding`, or of another layer.
        """
        if self.whole is not None:
            _check_shape(self.whole.shape[grows:], stored.shape[grows:], where)
            _check_numbers(self.whole, where)
            stored = self.whole.float()
        if (low_rank := self.low_rank) is not None:
            if low_rank.embedding != embedding:
                raise CheckpointError(f"{where}: lora_embedding_A and _B are of an embedding alone", hint=OTHER)
            _check_shape(low_rank.shape, stored.shape, where)
            for name, tensor in (("A", low_rank.a), ("B", low_rank.b), ("magnitude_vector", low_rank.magnitude)):
                if tensor is not None:
                    _check_numbers(tensor, f"{where}.lora_{name}")
            stored = low_rank.added_to(stored)
        return stored


def _check_shape(found: tuple[int, ...], wanted: tuple[int, ...], where: str) -> None:
    if found != wanted:
        raise CheckpointError(f"{where} is for shape {tuple(found)}, the base has {tuple(wanted)}", hint=OTHER)


def _check_numbers(tensor: Tensor, where: str) -> None:
    """Only of a tensor whose shape was found right: it reads all of it."""
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise CheckpointError(
            f"{where} holds NaN or infinity", hint="The training run diverged, or the file is damaged."
        )


@dataclass(frozen=True)
class Adapter:
    """A folder that PEFT wrote, read and found consistent in itself. `changes` are by the names of the base's tensors,
    as PEFT sees them.
    """

    folder: Path
    weights: Path
    flags: LoraFlags
    changes: Mapping[str, Change]

    def merged(
        self, stored: Mapping[str, Tensor], layout: Layout, weight_map: WeightMap, path: Path
    ) -> tuple[dict[str, Tensor], WeightMap]:
        """The tensors `stored` in `path`, by the map's names, with the adapter in them; and the map of what that gives:
        of another vocabulary where tokens were added, and with a head of its own where it is no longer the embedding.

        Raises CheckpointError where it is no adapter of this base, or lacks a tensor that it says it has.
        """
        changes = named(self.changes, layout, weight_map, self.weights)
        self._check_names(changes, stored, weight_map, path)
        embed = weight_map.sources["embed.weight"][0]
        head = next((name for name, of in weight_map.copies.items() if of == embed), "")
        rows = {embed, head, *weight_map.sources.get("lm_head.weight", ())}
        tensors = dict(stored)
        if apart := bool(head and changes.keys() & {embed, head}):
            tensors |= _both(weight_map, stored, embed, head, path)
        for name in sorted(changes.keys() & tensors.keys()):
            own, where = in_float32(weight_map, tensors, name, path), f"{self.weights}: {changes[name].module}"
            tensors[name] = changes[name].made_of(own, where, embedding=name == embed, grows=name in rows)
            tensors.pop(name + SCALE, None)
        if apart and embed in tensors and not torch.equal(tensors[head], tensors[embed]):
            weight_map = _untied(weight_map, head)
        if embed in changes.keys() & tensors.keys():
            weight_map = _of_vocabulary(weight_map, len(tensors[embed]), self.weights)
        return tensors, weight_map

    def _check_names(
        self, changes: Mapping[str, Change], stored: Mapping[str, Tensor], weight_map: WeightMap, path: Path
    ) -> None:
        """Raises CheckpointError unless the base, the file and the flags have the same parts."""
        known = wanted_names(weight_map) | weight_map.copies.keys()
        if unknown := changes.keys() - known - weight_map.checksums.keys():
            names = listed(changes[name].module for name in unknown)
            raise CheckpointError(f"{self.weights} changes {names}, which {path} has not", hint=OTHER)
        strange, lacking = set[str](), set[str]()
        experts = any(EXPERTS in name for name in changes)
        for name in known:
            change = changes.get(name, Change(name.rpartition(".")[0]))
            linear = name.endswith(".weight") and (name not in stored or stored[name].ndim == 2)
            targeted = self.flags.targets(change.module) if linear else False
            tied = self.flags.ensure_weight_tying and name in weight_map.copies
            if change.low_rank and targeted is False and not tied:
                strange.add(change.module)
            if not change.low_rank and targeted and (experts or EXPERTS not in name):
                lacking.add(name)
            if change.whole is None and self._is_whole(name, change, changes):
                lacking.add(name)
        for told, what in ((lacking, "is not there"), (strange, "is there")):
            if told:
                raise CheckpointError(f"{self.weights}: {listed(told)} {what}, against {ADAPTER}", hint=AGAIN)

    def _is_whole(self, name: str, change: Change, changes: Mapping[str, Change]) -> bool:
        """Whether the flags say that the tensor `name` was trained itself."""
        adapted = changes.get(f"{name.removesuffix('.bias')}.weight", change).low_rank is not None
        biased = self.flags.bias == "all" or (self.flags.bias == "lora_only" and adapted)
        return self.flags.saves(change.module) or (biased and name.endswith(".bias"))

    def check_tokenizer(self, vocabulary: int) -> bool:
        """Whether it has a tokenizer. Raises CheckpointError where that has tokens for which the model has no row."""
        if not (self.folder / TOKENIZER).exists():
            return False
        try:
            tokens = Tokenizer(self.folder).tokenizer.get_vocab()
        except BundleError as cause:
            raise CheckpointError(
                str(cause), hint="Save the tokenizer again, or remove it here to use the base's."
            ) from cause
        if (highest := max(tokens.values(), default=0)) >= vocabulary:
            raise CheckpointError(
                f"{self.folder / TOKENIZER} has token {highest}, the embedding has {vocabulary} rows",
                hint="Save the resized embedding with the adapter: save_pretrained(..., save_embedding_layers=True).",
            )
        return True


def _both(weight_map: WeightMap, stored: Mapping[str, Tensor], embed: str, head: str, path: Path) -> dict[str, Tensor]:
    """Embedding and head of a tied model, whichever is stored; none where neither is."""
    found = [name for name in (embed, head) if name in stored]
    if len(found) == 2:
        check_copy(weight_map, stored, head, embed, path)
    return dict.fromkeys((embed, head), in_float32(weight_map, stored, found[0], path)) if found else {}


def _untied(weight_map: WeightMap, head: str) -> WeightMap:
    """The same model, with a head of its own."""
    config = msgspec.structs.replace(weight_map.config, tie_embeddings=False)
    copies = {name: of for name, of in weight_map.copies.items() if name != head}
    return replace(weight_map, config=config, sources={**weight_map.sources, "lm_head.weight": (head,)}, copies=copies)


def _of_vocabulary(weight_map: WeightMap, rows: int, path: Path) -> WeightMap:
    """The same model, whose embedding has so many rows. Raises ConfigError where a token that it needs has none."""
    try:
        return replace(weight_map, config=msgspec.structs.replace(weight_map.config, vocab_size=rows))
    except ConfigError as cause:
        raise ConfigError(f"{path}: the embedding has {rows} rows: {cause}", hint=OTHER) from cause


def read_adapter(folder: Path) -> Adapter:
    """The LoRA adapter in `folder`. Nothing in it is executed.

    Raises CheckpointError where files are missing or damaged, and where tensors are not those of its rank; ConfigError
    naming all fields of its configuration that mean more than is merged here.
    """
    flags = read_flags(folder / ADAPTER)
    weights = next((path for name in WEIGHTS if (path := folder / name).exists()), None)
    if weights is None:
        raise CheckpointError(f"{folder}: no {' or '.join(WEIGHTS)}", hint="Copy all files of the adapter.")
    tensors, _ = read_tensors(weights)
    return Adapter(folder, weights, flags, _changes(tensors, flags, weights))


def _changes(tensors: Mapping[str, Tensor], flags: LoraFlags, path: Path) -> dict[str, Change]:
    """What becomes of the base's tensors, by their names there. Raises CheckpointError for a tensor that PEFT would not
    read, and for two that are one.
    """
    changes: dict[str, Change] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX).replace(INSIDE, ".")
        part = PART.fullmatch(bare)
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype}, expected floating point of 16 bits or more", hint=AGAIN
            )
        if not part and ".lora_" in bare:
            raise CheckpointError(f"{path}: {name} is not of a LoRA adapter as PEFT saves it", hint=AGAIN)
        if bare in changes or (part and part[2] in parts.get(part[1], {})):
            raise CheckpointError(f"{path}: two tensors are {bare}", hint=AGAIN)
        if part:
            parts.setdefault(part[1], {})[part[2]] = tensor
        else:
            changes[bare] = Change(bare.rpartition(".")[0], tensor)
    for module, found in parts.items():
        low_rank = _low_rank(found, flags, module, path)
        changes[f"{module}.weight"] = replace(changes.get(f"{module}.weight", Change(module)), low_rank=low_rank)
    return changes


def _low_rank(parts: Mapping[str, Tensor], flags: LoraFlags, module: str, path: Path) -> LowRank:
    """Raises CheckpointError unless the tensors `parts` of a module are those that are needed, and of its rank."""
    embedding, rank, where = "lora_embedding_A" in parts, flags.rank(module), f"{path}: {module}"
    names = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A.weight", "lora_B.weight"]
    names += ["lora_magnitude_vector"] * flags.use_dora
    if different := sorted(parts.keys() ^ set(names)):
        what = "is not there" if different[0] in names else "is there"
        raise CheckpointError(f"{where}.{different[0]} {what}, against {ADAPTER}", hint=AGAIN)
    a, b, *magnitude = (parts[name] for name in names)
    if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == rank:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise CheckpointError(f"{where} has matrices {shapes}, expected rank {rank} of {ADAPTER}", hint=AGAIN)
    if magnitude and magnitude[0].shape != b.shape[:1]:
        raise CheckpointError(f"{where} has {tuple(magnitude[0].shape)} lengths, expected {len(b)}", hint=AGAIN)
    return LowRank(a, b, flags.scale(module), magnitude[0] if magnitude else None, embedding)
