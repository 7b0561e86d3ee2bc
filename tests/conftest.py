"""Fixtures: checkpoints on disk, a small decoder, exported bundles made once."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import yaml

from fope_export.bundle import Bundle
from fope_export.config import ExpertsConfig, ExportConfig, ModelConfig
from fope_export.errors import BackendError
from fope_export.fope import frequencies
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.spectrum import Spectrum
from fope_export.graph.export import export
from fope_export.model.checkpoint import load_checkpoint
from fope_export.model.decoder import Decoder
from fope_export.model.layouts import olmo
from fope_export.model.layouts.native import save
from fope_export.tensorrt import compile as compiling
from fope_export.tokens import byte_tokenizer

DATA = Path(__file__).parent / "data"
VARIANTS = json.loads((DATA / "olmo_variants.json").read_text())

torch.set_num_threads(int(os.environ.get("FOPE_EXPORT_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def olmo_fope() -> Path:
    """The reference checkpoint."""
    return DATA / "olmo-fope"


@pytest.fixture
def editable(olmo_fope: Path, tmp_path: Path) -> Path:
    """A copy of the reference checkpoint that a test may spoil."""
    return Path(shutil.copytree(olmo_fope, tmp_path / "checkpoint"))


def spectra(kind: str, layers: int, heads: int, head_dim: int, length: int) -> list[Spectrum]:
    generator = torch.Generator().manual_seed(1)
    if kind == "rope":
        return [Spectrum.rope(frequencies.exponential(1e4, head_dim).numpy(), head_dim)] * layers
    made = [
        FopeRotary.create(head_dim=head_dim, groups=heads, training_length=length, generator=generator)
        for _ in range(layers)
    ]
    return [rotary.spectrum for rotary in made]


def mixture(**fields: Any) -> ExpertsConfig:
    """Of 8 experts, of which a token has 4, in the second layer of two."""
    usual: dict[str, Any] = {
        "count": 8, "per_token": 4, "intermediate_size": 64, "groups": 1, "normalize": True, "layers": (1,)
    }  # fmt: skip
    return ExpertsConfig(**usual | fields)


def small_decoder(kind: str = "fope", *, heads: int = 4, kv_heads: int = 4, length: int = 64, **fields: Any) -> Decoder:
    """Two layers unless told otherwise, head_dim 16, 256 bytes of vocabulary, random weights."""
    made = spectra(kind, fields.get("num_layers", 2), kv_heads, 16, length)
    usual: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": heads * 16, "intermediate_size": 48, "num_layers": 2, "num_heads": heads,
        "num_kv_heads": kv_heads, "norm_eps": 1e-6, "tie_embeddings": False, "training_length": length,
        "rope_theta": 1e4, "floored": kind == "fope", "eos_token_id": 0, "pad_token_id": 0, "spectrum": made[0].config,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**usual | fields)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape))
        if parameter.dim() == 3 and "feed_forward" in name:
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    for attention, spectrum in zip(model.attentions(), made, strict=True):
        attention.rotary = FopeRotary.from_spectrum(spectrum)
    return model


def write_native(model: Decoder, folder: Path) -> Path:
    """A native checkpoint with the byte tokenizer."""
    folder.mkdir(parents=True)
    save(model, folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native FoPE checkpoint."""
    return write_native(small_decoder(), tmp_path_factory.mktemp("native") / "fope")


@pytest.fixture(scope="session")
def decoder(native: Path) -> Decoder:
    """Its model."""
    return load_checkpoint(native).model


@pytest.fixture(scope="session")
def bundle(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle. Not to be changed: tests that spoil one take `spoilable`."""
    return export(native, tmp_path_factory.mktemp("bundles") / "fope")


@pytest.fixture(scope="session")
def static_bundle(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same model with a static cache."""
    return export(native, tmp_path_factory.mktemp("static") / "fope", ExportConfig(cache="static", capacity=200))


@pytest.fixture(scope="session")
def rope_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The RoPE twin's bundle."""
    folder = tmp_path_factory.mktemp("rope")
    return export(write_native(small_decoder("rope"), folder / "checkpoint"), folder / "bundle")


@pytest.fixture(scope="session")
def reference_bundle(olmo_fope: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The reference checkpoint's bundle."""
    return export(olmo_fope, tmp_path_factory.mktemp("bundles") / "olmo-fope")


@pytest.fixture
def spoilable(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the bundle that a test may change."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def toolchain() -> compiling.Toolchain:
    """What compiles the kernel."""
    try:
        return compiling.find_toolchain()
    except BackendError as missing:
        pytest.skip(f"{missing}. {missing.hint}")


def variant_flags(name: str) -> dict[str, Any]:
    return {**VARIANTS["base"], **VARIANTS["cases"][name]["flags"]}


def variant_tensors(name: str) -> dict[str, torch.Tensor]:
    """The weights that the expected logits were computed with, in the checkpoint's names and shapes."""
    flags = msgspec.convert(variant_flags(name), olmo.OlmoFlags, strict=False)
    plan = olmo.weight_map(flags)
    with torch.device("meta"):
        state = Decoder(plan.config).state_dict()
    shapes = {}
    for ours, (theirs,) in plan.sources.items():
        shape = tuple(state[ours].shape)
        shapes[theirs] = shape[1:] if ours.endswith("_coef") and not flags.fourier_separate_head else shape
    return draw(VARIANTS["cases"][name]["seed"], shapes)


def _draw(rng: np.random.Generator, key: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape)
    if key.endswith("_coef"):
        coef: np.ndarray = np.eye(shape[-2], shape[-1]) + 0.3 * noise / np.sqrt(shape[-2])
        return coef
    return ("bias" not in key) + 0.1 * noise if len(shape) == 1 else noise / np.sqrt(shape[-1])


def draw(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights as the expected logits were computed with: one generator, tensors in the order of their names."""
    rng = np.random.default_rng(seed)
    return {key: torch.from_numpy(_draw(rng, key, shapes[key]).astype(np.float32)) for key in sorted(shapes)}


@pytest.fixture
def write_variant(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a variant as the paper's code would save it."""

    def write(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"run_name": name, "model": variant_flags(name)}))
        torch.save(variant_tensors(name), folder / "model.pt")
        return folder

    return write


NO_GPU = "no NVIDIA GPU here"


def pytest_itemcollected(item: pytest.Item) -> None:
    """What needs a GPU is skipped where there is none."""
    if "gpu" in item.keywords and not torch.cuda.is_available():
        item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_addoption(parser: pytest.Parser) -> None:
    """An environment that was made to have a part must not skip for want of it."""
    parser.addoption(
        "--may-skip", metavar="REGEX", help="a skip for another reason is a failure; want of a GPU is none"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a test was skipped that may not be."""
    allowed, reporter = (
        session.config.getoption("may_skip"),
        session.config.pluginmanager.get_plugin("terminalreporter"),
    )
    if allowed is None or reporter is None:
        return
    reasons = {str(report.longrepr[2]) for report in reporter.stats.get("skipped", [])}
    pattern = "|".join(filter(None, (NO_GPU, allowed)))
    if missing := sorted(reason for reason in reasons if not re.search(pattern, reason)):
        reporter.write_line(f"\nskipped, and may not be: {'; '.join(missing)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
