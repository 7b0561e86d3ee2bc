"""Everything, on the models that come along: export, parity, loss by length, text, one page."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rich.table import Table

from fope_export import plots, report
from fope_export.backends.base import Ids
from fope_export.backends.choose import load_backend
from fope_export.backends.eager import EagerBackend
from fope_export.backends.machine import read_machine
from fope_export.bundle import Bundle
from fope_export.corpus import as_tokens, python_source
from fope_export.evaluation import loss_by_length
from fope_export.generation import generate_text
from fope_export.graph.export import export
from fope_export.model.checkpoint import load_checkpoint
from fope_export.parity.cases import FACTORS
from fope_export.parity.results import ParityResult
from fope_export.parity.run import validate
from fope_export.records import DemoModel, DemoRecord
from fope_export.serving.sampling import SamplingParams
from fope_export.tokens import Tokenizer

NAMES = {"fope": "FoPE", "rope": "RoPE"}
PASSKEY_NAMES = {"fope-passkey": "FoPE", "rope-passkey": "RoPE"}
"""Of the pair that was trained to find passkeys."""
SCORED = 1 << 15
"""Bytes of held-out text that the loss is taken on."""
PROMPT = "def read_config(path):\n"
SAMPLING = SamplingParams(max_new_tokens=400, temperature=0.6, top_p=0.95, seed=1)


@dataclass(frozen=True)
class Shown:
    """What the demo found out about one model; losses are in nats per byte by context length."""

    name: str
    bundle: Bundle
    parity: ParityResult
    losses: dict[str, dict[int, float]]
    """By backend: PyTorch and the exported model."""


@dataclass(frozen=True)
class DemoResult:
    """All of it, and where the page is."""

    models: tuple[Shown, ...]
    text: str
    page: Path

    @property
    def passed(self) -> bool:
        return all(model.parity.passed for model in self.models)


def shipped(name: str) -> Path:
    """The folder of a shipped checkpoint: one of NAMES, or of PASSKEY_NAMES."""
    return Path(str(files("fope_export") / "data" / name))


def run_demo(out: Path, stage: Callable[[str], None]) -> DemoResult:
    """Write bundles and report.html into folder `out`; `stage` is told what begins."""
    text = as_tokens(python_source(held_out=True))[: SCORED + 1]
    models = tuple(_show(name, out / name, text, stage) for name in NAMES)
    stage("writing Python with the exported model")
    bundle = models[0].bundle
    pieces = generate_text(load_backend(bundle), Tokenizer(bundle.path), [PROMPT], SAMPLING)
    result = DemoResult(models, "".join(piece for _, piece in pieces), out / "report.html")
    result.page.write_text(_page(result))
    return result


def _show(name: str, out: Path, text: Ids, stage: Callable[[str], None]) -> Shown:
    label = NAMES[name]
    stage(f"{label}: exporting to ONNX")
    bundle = export(shipped(name), out)
    stage(f"{label}: comparing with PyTorch")
    parity = validate(bundle)
    bundle = report.write_parity(bundle, parity)
    lengths = [bundle.manifest.decoder().training_length * factor for factor in FACTORS]
    losses = {}
    for backend in (EagerBackend(load_checkpoint(shipped(name)).model), load_backend(bundle)):
        stage(f"{label}: loss by length of context, {backend.name}")
        losses[backend.name] = loss_by_length(backend, text, lengths)
    return Shown(label, bundle, parity, losses)


def demo_table(result: DemoResult) -> Table:
    """One line a model."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    lengths = list(result.models[0].losses["torch"])
    columns = ("model", "parity", "worst error / rounding", *(f"loss at {n}" for n in lengths), "ONNX - PyTorch")
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "parity") else "right")
    for model in result.models:
        torch, onnx = model.losses["torch"], model.losses["onnxruntime"]
        table.add_row(
            model.name,
            "[green]passed[/]" if model.parity.passed else "[red]FAILED[/]",
            f"{max(case.verdict.ratio for case in model.parity.cases):.2f}",
            *(f"{loss:.3f}" for loss in onnx.values()),
            f"{max(abs(onnx[n] - torch[n]) for n in lengths):.1e}",
        )
    return table


def demo_record(result: DemoResult) -> DemoRecord:
    """The same, and more, as plain data."""
    models: dict[str, DemoModel] = {
        model.name: {"parity": model.parity.passed, "nats_per_byte": model.losses} for model in result.models
    }
    return {"passed": result.passed, "models": models, "text": PROMPT + result.text, "report": str(result.page)}


def _page(result: DemoResult) -> str:
    first = result.models[0]
    trained = first.bundle.manifest.decoder().training_length
    curves = {model.name: model.losses["onnxruntime"] for model in result.models}
    return report.render(
        "demo.html",
        result=result,
        prompt=PROMPT,
        losses=plots.as_svg(plots.loss_figure(curves, trained)),
        errors=plots.as_svg(plots.error_figure(first.parity, trained)),
        scored=SCORED,
        machine=read_machine(),
    )
