"""The table of contenders, which is who a benchmark times. The backends in `backends.choose` become rows by themselves;
PyTorch and other libraries (the peers) have rows written here.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from fope_export.backends.base import Backend, Ids, Logits, Slots, feeds_for
from fope_export.backends.choose import BACKENDS, USUAL, Settings, load_backend
from fope_export.backends.machine import Machine
from fope_export.benchmark.greedy import Contender, Greedy
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig, ModelConfig
from fope_export.dtypes import BF16, DTYPES, FP32
from fope_export.errors import BackendError, install
from fope_export.generation import prefill_rows
from fope_export.manifest import OPENVINO
from fope_export.quantizations import INT4, INT8, QUANTIZATIONS

EAGER, COMPILED, TWIN = "torch", "torch.compile", "torch, RoPE twin"
GRAPH = ", CUDA graph"
"""Ends the name of a contender that records its decoding in a CUDA graph."""
ALLOWED = {name: row.apart for name, row in DTYPES.items()} | {name: row.apart for name, row in QUANTIZATIONS.items()}
"""How far a contender may be from eager PyTorch (`greedy.distance`), by the dtype or quantization of its arithmetic."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to make a contender. `folder` holds the twin and what is exported of it."""

    contender: str
    bundle: str
    checkpoint: str | None
    adapter: str | None
    folder: str
    threads: int
    device: str = "cpu"
    """Of PyTorch: cpu or cuda."""

    @property
    def twin(self) -> Path:
        return Path(self.folder) / "twin"

    @property
    def product(self) -> Path:
        """What the contender's own exporter makes of the twin."""
        return Path(self.folder) / self.contender.replace(" ", "-")


class Loaded(NamedTuple):
    """A contender, and the bytes of weights that one token reads."""

    contender: Contender
    weight_bytes: int


class Slotted(Greedy):
    """A backend as a contender, as `serve` uses it: slots stay, and prompts come together where they can."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._size = backend, (0, 0)
        self._slots: Slots | None = None

    def begin(self, prompts: Ids, new: int) -> Logits:
        batch, length = prompts.shape
        if self._slots is None or self._size != (batch, length + new):
            if self._slots:
                self._slots.close()
            self._size = batch, length + new
            self._slots = self._backend.slots(*self._size)
        return prefill_rows(self._slots, prompts, self._backend.chunk)

    def feed(self, tokens: Ids) -> Logits:
        assert self._slots
        return self._slots.decode(range(len(tokens)), tokens)


class Stepping(Greedy):
    """A backend as a contender that takes all prompts at once: eager PyTorch at its best."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def begin(self, prompts: Ids, new: int) -> Logits:  # noqa: ARG002 (its cache grows)
        feeds, self._cache = feeds_for(prompts), self._backend.empty_cache(len(prompts))
        self._mask, size = feeds.attention_mask, self._backend.chunk
        for start in range(0, prompts.shape[1], size):
            part = feeds.part(start, start + size)
            logits, self._cache = self._backend.step(part, self._cache, last=True)
        return logits[:, -1]

    def feed(self, tokens: Ids) -> Logits:
        self._mask = np.ones((len(tokens), self._mask.shape[1] + 1), np.int64)
        logits, self._cache = self._backend.step(feeds_for(tokens[:, None], self._mask), self._cache, last=True)
        return logits[:, -1]


def _eager(job: Job) -> Loaded:
    from fope_export.backends.eager import EagerBackend

    model = _model(job)
    size = _read_by_a_token(model.config, sum(p.nbytes for p in model.parameters()), model.embed.weight.itemsize)
    return Loaded(Stepping(EagerBackend(model)), size)


def _compiled(cuda_graph: bool, job: Job) -> Loaded:
    from fope_export.benchmark.compiled import Compiled

    # PyTorch's own place is shared with runs under other instructions (ATEN_CPU_CAPABILITY), whose code it takes.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(job.folder) / "inductor")
    model = _model(job)
    size = _read_by_a_token(model.config, sum(p.nbytes for p in model.parameters()), model.embed.weight.itemsize)
    return Loaded(Compiled(model, cuda_graph=cuda_graph), size)


def _model(job: Job) -> Any:
    """The checkpoint's decoder as the bundle has it, dtype, spectrum and rounded weights included; or the twin's."""
    from fope_export.model.checkpoint import load_checkpoint, source_of
    from fope_export.parity.quantized import place_weights

    if job.contender == TWIN:
        return load_checkpoint(job.twin).model.to(job.device)
    bundle = Bundle.open(job.bundle, verify=False)
    model = source_of(bundle, job.checkpoint, job.adapter).model.converted(bundle.manifest.export)
    if bundle.manifest.export.quantize:
        place_weights(bundle, model)
    return model.to(job.device)


def _backend(name: str, variant: str, job: Job, *, cuda_graph: bool = False) -> Loaded:
    bundle = Bundle.open(job.product if job.product.exists() else job.bundle, verify=False)
    settings = Settings(threads=job.threads, cuda_graph=cuda_graph)
    return Loaded(Slotted(load_backend(bundle, name, settings, variant=variant)), _of_bundle(bundle))


def _of_bundle(bundle: Bundle) -> int:
    width = DTYPES[bundle.manifest.export.dtype].itemsize
    return _read_by_a_token(bundle.manifest.decoder(), _bytes(bundle.path.glob("model.onnx*")), width)


def _genai(job: Job) -> Loaded:
    from fope_export.benchmark.peers import GenAI

    return Loaded(GenAI(job.product, job.threads), _of_product(job))


def _genai_ours(job: Job) -> Loaded:
    from fope_export.benchmark.peers import GenAI

    bundle = Bundle.open(job.bundle, verify=False)
    if bundle.manifest.export.position_axes:
        raise BackendError(
            f"ONNX Runtime GenAI feeds tokens one position, and {bundle.path} takes several",
            hint="Export without --position-axes, or leave genai out of --peers.",
        )
    return Loaded(GenAI(bundle.path, job.threads), _of_bundle(bundle))


def _optimum(job: Job) -> Loaded:
    from fope_export.benchmark.peers import Optimum

    return Loaded(Optimum(job.product, job.threads), _of_product(job))


def _openvino_genai(folder: Path, settings: dict[str, str], size: int, job: Job) -> Loaded:
    from fope_export.benchmark.peers import OpenVinoGenAI

    return Loaded(OpenVinoGenAI(folder, job.threads, settings), size)


def _openvino_genai_ours(job: Job) -> Loaded:
    from fope_export.backends.openvino import hints

    bundle = Bundle.open(job.bundle, verify=False)
    if OPENVINO not in bundle.manifest.files:
        raise BackendError(f"{bundle.path} has no {OPENVINO}", hint="fope-export optimize --for openvino.")
    return _openvino_genai(bundle.path / "openvino", hints(bundle), _of_bundle(bundle), job)


def _openvino_genai_twin(settings: dict[str, str], job: Job) -> Loaded:
    return _openvino_genai(job.product / "openvino", settings, _of_bundle(Bundle.open(job.product, verify=False)), job)


def _optimum_intel(settings: dict[str, str], job: Job) -> Loaded:
    return _openvino_genai(job.product, settings, _of_product(job), job)


def _llama(job: Job) -> Loaded:
    from fope_export.benchmark.peers import LlamaCpp

    config = Bundle.open(job.bundle, verify=False).manifest.decoder()
    return Loaded(LlamaCpp(job.product, job.threads), _read_by_a_token(config, _bytes([job.product]), 4))


def _of_product(job: Job) -> int:
    config = Bundle.open(job.bundle, verify=False).manifest.decoder()
    return _read_by_a_token(config, _bytes(each for name in ("*.onnx*", "*.bin") for each in job.product.glob(name)), 4)


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _read_by_a_token(config: ModelConfig, weights: int, width: int) -> int:
    """All weights but the embedding, of which a token reads one row; unless it is the head's too."""
    return weights if config.tie_embeddings else weights - config.vocab_size * config.hidden_size * width


def _export_ours(target: str, job: Job) -> None:
    like = Bundle.open(job.bundle, verify=False).manifest.export
    _export_twin(target, ExportConfig(dtype=like.dtype, quantize=like.quantize, block=like.block), job)


def _export_twin(target: str, config: ExportConfig, job: Job) -> None:
    from fope_export.graph.export import export
    from fope_export.graph.optimize import optimize

    optimize(export(job.twin, job.product, config), target)


def _write_gguf(kind: str, job: Job) -> None:
    from fope_export.benchmark.gguf_twin import write_gguf

    write_gguf(job.twin, kind, job.product)


def _build_genai(precision: str, job: Job) -> None:
    from fope_export.benchmark.peers import build_genai

    build_genai(job.twin, job.product, precision)


def _export_optimum(job: Job) -> None:
    from fope_export.benchmark.peers import export_optimum

    export_optimum(job.twin, job.product)


def _export_optimum_intel(quantized: bool, job: Job) -> None:
    from fope_export.benchmark.peers import export_optimum_intel

    config = Bundle.open(job.bundle, verify=False).manifest.decoder()
    widths = config.hidden_size, config.intermediate_size
    group = next(size for size in GROUPS if not any(width % size for width in widths)) if quantized else None
    export_optimum_intel(job.twin, job.product, group)


def _without(package: str, hint: str = "") -> Callable[[Machine], str]:
    return lambda machine: (
        "" if package in machine.packages else f"{package} is not installed: {hint or install('peers')}"
    )


@dataclass(frozen=True)
class Row:
    """A contender: what it is, how a worker makes it, and why a machine cannot. One with a `peer` is timed when that is
    asked for; `prepare` runs the exporter that it has for the `twin`. `rounds` is what its arithmetic rounds to, where
    that is not the bundle's dtype; one with a `cache` rounds keys and values too. One with a `device` is timed where
    PyTorch has that device; one with a `backend` runs a `variant` of the bundle there.
    """

    what: str
    load: Callable[[Job], Loaded]
    missing: Callable[[Machine], str] = lambda machine: ""
    peer: str = ""
    twin: bool = False
    prepare: Callable[[Job], None] | None = None
    rounds: str = ""
    device: str = ""
    backend: str = ""
    variant: str = ""
    cache: bool = False


def _of_backends() -> Iterator[tuple[str, Row]]:
    """A row for each variant of every backend but PyTorch, whose name the plainest has."""
    for name, row in BACKENDS.items():
        for variant in row.variants if name != EAGER else ():
            plain, alone = variant is row.variants[0], len(row.variants) == 1
            own, load = name if plain else f"{name}, {variant.name}", partial(_backend, name, variant.name)
            made = Row(
                row.what if alone else f"{row.what}, {variant.name}", load, row.missing, backend=name,
                variant=variant.name, cache=variant.cache,
            )  # fmt: skip
            yield own, made
            if variant.captured:
                recorded = partial(load, cuda_graph=True)
                yield own + GRAPH, replace(made, what="the same, decoding recorded", device="cuda", load=recorded)


OF_BACKENDS = dict(_of_backends())
OURS = [name for name, row in OF_BACKENDS.items() if row.backend == USUAL and not row.cache][-1]
"""What runs a bundle unless another is asked for, as fast as it can."""


IN_OPENVINO = next(name for name, row in OF_BACKENDS.items() if row.backend == "openvino")
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
"""OpenVINO's settings for float32."""
IN_GENAI: dict[str, tuple[str, dict[str, str], ExportConfig, str]] = {
    FP32.name: ("all in float32", EXACT, ExportConfig(), FP32.name),
    "default": ("in its own choice of precision", {}, ExportConfig(), BF16.name),
    INT4.name: (f"the same with {INT4.name} weights", {}, ExportConfig(quantize=INT4.name), INT4.name),
}
"""The twin in OpenVINO GenAI: in words, its settings, how the twin is exported, and what that rounds to."""
GROUPS = (128, 64, 32, -1)
"""Inputs that share a step in optimum-intel's weights of 4 bits, the first that divides all; -1 are all of a row's."""

CONTENDERS: dict[str, Row] = {
    EAGER: Row("the checkpoint in PyTorch, eager; logits of the last position", _eager),
    COMPILED: Row(
        "the same with torch.compile: static cache written in place, a graph for each shape", partial(_compiled, False)
    ),
    COMPILED + GRAPH: Row("the same, recorded", partial(_compiled, True), device="cuda"),
    **OF_BACKENDS,
    TWIN: Row("a RoPE twin in PyTorch, eager", _eager, peer="any", twin=True, rounds=FP32.name),
    f"{OURS}, RoPE twin": replace(
        OF_BACKENDS[OURS], what="the twin, exported and optimized as the bundle was", peer="any", twin=True,
        prepare=partial(_export_ours, USUAL),
    ),
    f"{IN_OPENVINO}, RoPE twin": replace(
        OF_BACKENDS[IN_OPENVINO], what="the same for OpenVINO", peer="openvino", twin=True,
        prepare=partial(_export_ours, "openvino"),
    ),
    "genai": Row("the bundle in ONNX Runtime GenAI", _genai_ours, _without("onnxruntime-genai"), "genai"),
    f"genai {FP32.name}": Row(
        "the twin in ONNX Runtime GenAI, by its model builder", _genai, _without("onnxruntime-genai"), "genai",
        True, partial(_build_genai, FP32.name), FP32.name,
    ),
    f"genai {INT4.name}": Row(
        f"the same with {INT4.name} weights", _genai, _without("onnxruntime-genai"), "genai", True,
        partial(_build_genai, INT4.name), INT4.name,
    ),
    f"optimum {FP32.name}": Row(
        "the twin in Optimum's ORTModelForCausalLM, by its exporter", _optimum, _without("optimum-onnx"), "optimum",
        True, _export_optimum, FP32.name,
    ),
    "openvino genai": Row(
        "the bundle in OpenVINO GenAI", _openvino_genai_ours, _without("openvino-genai"), "openvino"
    ),
    **{
        f"openvino genai {name}": Row(
            f"the twin, exported as bundles are, in OpenVINO GenAI, {what}", partial(_openvino_genai_twin, settings),
            _without("openvino-genai"), "openvino", True, partial(_export_twin, "openvino", config), rounds,
        )
        for name, (what, settings, config, rounds) in IN_GENAI.items()
    },
    **{
        f"optimum-intel {name}": Row(
            f"the twin, exported by optimum-intel, in OpenVINO GenAI, {what}", partial(_optimum_intel, settings),
            _without("nncf" if config.quantize else "optimum-intel", "scripts/venv intel"), "openvino", True,
            partial(_export_optimum_intel, bool(config.quantize)), rounds,
        )
        for name, (what, settings, config, rounds) in IN_GENAI.items()
    },
    **{
        f"llama.cpp {kind}": Row(
            f"the twin in llama.cpp, {what}", _llama, _without("llama-cpp-python", "pip install llama-cpp-python gguf"),
            "llamacpp", True, partial(_write_gguf, kind), kind,
        )
        for kind, what in ((FP32.name, "all in float32"), (INT8.name, "Q8_0"), (INT4.name, "Q4_0"))
    },
}  # fmt: skip
"""In the order in which they are shown; eager PyTorch, which the others are compared with, comes first."""
PEERS = tuple(dict.fromkeys(row.peer for row in CONTENDERS.values() if row.peer not in ("", "any")))
