"""Imports run one way (the contracts are in pyproject.toml), and nothing heavy loads before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fope_export
from fope_export.bundle import Bundle
from fope_export.config import ExportConfig
from fope_export.graph.export import export
from fope_export.graph.optimize import optimize

ROOT = Path(__file__).parent.parent
EXPORTER = {"torch", "onnx", "onnx_ir", "onnxscript", "sympy", "safetensors", "matplotlib", "polygraphy"}
EXTRA = EXPORTER | {"numpy", "onnxruntime", "tokenizers", "jinja2"}
HEAVY = EXTRA | {"google", "rich", "msgspec", "yaml"}


def test_imports_run_one_way() -> None:
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def modules(*roots: tuple[Path, Path]) -> dict[str, Path]:
    """Module -> file, of those below the second of each pair, named as seen from the first."""
    files = [(path.relative_to(root), path) for root, folder in roots for path in folder.rglob("*.py")]
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for name, path in files}


def imported(path: Path) -> Iterator[str]:
    """What a file imports anywhere, in functions too; what type checkers alone see is left out."""
    tree = ast.parse(path.read_text())
    unseen = {
        id(each)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for each in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in unseen:
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and id(node) not in unseen:
            assert node.module and not node.level, f"{path}: a relative import"
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def cycle(known: dict[str, Path]) -> list[str]:
    """Modules that import each other in a ring, or none."""
    graph = {name: known.keys() & {*imported(path)} - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_by_way_of_others(tmp_path: Path) -> None:
    scripts = ROOT / "scripts"
    known = modules((ROOT, ROOT / "fope_export"), (ROOT, ROOT / "tests"), (scripts, scripts))
    assert {"fope_export.parity.run", "tests.conftest", "gpu_suite.dry", "bench_export"} <= known.keys()
    assert cycle(known) == []
    for name, text in {"a": "def f():\n    from b import g", "b": "import c", "c": "import a"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert {*cycle(modules((tmp_path, tmp_path)))} == {"a", "b", "c"}


def test_no_test_is_imported_by_another() -> None:
    tests = modules((ROOT, ROOT / "tests"))
    borrowed = {
        name: [each for each in imported(path) if each.rpartition(".")[2].startswith("test_")]
        for name, path in tests.items()
    }
    assert {name: others for name, others in borrowed.items() if others} == {}


@pytest.mark.parametrize("code", ["import fope_export", "from fope_export.cli import main; main(['--help'])"])
def test_nothing_heavy_loads_early(code: str) -> None:
    script = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stderr.split())


def without(packages: set[str], *command: str) -> subprocess.CompletedProcess[str]:
    """The program where some packages are not installed."""
    script = (
        f"import sys\nsys.modules.update(dict.fromkeys({sorted(packages)!r}))\nfrom fope_export.cli import main\n"
        f"sys.exit(main({list(command)!r}))"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_the_doctor_and_inspect_need_no_extra(bundle: Bundle) -> None:
    for command in (["doctor"], ["inspect", str(bundle.path)]):
        done = without(EXTRA, *command)
        assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_bundle_runs_without_the_exporter(optimized: bool, dtype: str, native: Path, tmp_path: Path) -> None:
    made = export(native, tmp_path / "out", ExportConfig(dtype=dtype))
    if optimized:
        optimize(made)
    done = without(EXPORTER, "run", str(made.path), "--prompt-ids", "1,2,3", "--max-new-tokens", "3")
    assert done.returncode == 0 and done.stdout.count(",") == 2, done.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("export CKPT OUT", "export"), ("inspect CKPT", "export"), ("optimize BUNDLE", "export"),
        ("validate BUNDLE", "validate"), ("demo --out OUT", "cpu"), ("bench BUNDLE", "cpu"),
    ],
)  # fmt: skip
def test_a_command_names_the_extra_that_it_lacks(
    command: str, extra: str, native: Path, bundle: Bundle, tmp_path: Path
) -> None:
    places = {"CKPT": str(native), "OUT": str(tmp_path / "new"), "BUNDLE": str(bundle.path)}
    done = without(EXPORTER, *(places.get(word, word) for word in command.split()))
    assert done.returncode == 2 and f"[{extra}]'" in done.stderr, done.stderr
    assert " not installed" in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "new").exists()


def test_a_broken_package_is_no_missing_one() -> None:
    done = without({"rich.table"}, "doctor")
    assert done.returncode == 70 and "rich.table" in done.stderr


def test_the_public_door_opens_on_every_name() -> None:
    assert 8 <= len(fope_export.__all__) <= 40
    for name in fope_export.__all__:
        assert getattr(fope_export, name).__name__ == name
        assert name in dir(fope_export)
    with pytest.raises(AttributeError):
        fope_export.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_former_names_work_for_a_version() -> None:
    for former, now in {"Sampling": "SamplingParams", "Text": "Tokenizer", "complete": "generate_text"}.items():
        with pytest.warns(DeprecationWarning, match=f"fope_export.{former} is called {now}"):
            assert getattr(fope_export, former) is getattr(fope_export, now)


def test_type_checkers_see_through_the_door(tmp_path: Path) -> None:
    """Each name as it is where it is at home, and no other name."""
    right = tmp_path / "right.py"
    uses = "".join(f"taken.append(fope_export.{name})\n" for name in fope_export.__all__)
    right.write_text(f"import fope_export\n\ntaken: list[object] = []\n{uses}")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import fope_export\n\nfope_export.exprot('in', 'out')\nfope_export.export('in', 'out', dtpe=3)\n"
        "fope_export.ExportConfig(dtype=3)\nfope_export.export('in', 'out').modle\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache")]
    done = {
        file: subprocess.run([*command, file], cwd=ROOT, capture_output=True, text=True).stdout
        for file in (right, wrong)
    }
    assert "Success" in done[right], done[right]
    codes = [line.rpartition("[")[2] for line in done[wrong].splitlines() if "error" in line and "[" in line]
    assert codes == ["attr-defined]", "call-arg]", "arg-type]", "attr-defined]"], done[wrong]


def test_the_package_runs_as_a_program() -> None:
    for module in ("fope_export", "fope_export.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
