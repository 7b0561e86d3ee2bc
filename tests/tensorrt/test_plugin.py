"""The TensorRT plugin: compiled for every architecture, then driven through its interfaces without TensorRT."""

import ctypes
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fope_export.fope import contract
from fope_export.tensorrt import compile as compiling
from tests.tensorrt.conftest import Build
from tests.tensorrt.kernel import GENERAL_REFUSALS, REFUSALS, code_of

KERNELS = {"fope_rotary_launch", "fope_rotary_launch_general"}
EXPORTS = {"getCreators", "setLoggerFinder", *KERNELS}
KINDS = {float: "float", int: "int"}
FLOAT, HALF, INT64, BF16 = 0, 1, 8, 7  # TensorRT's DataType
VALUES = {
    "sin_pad": 0.25, "cos_pad": 0.5, "sign": -1, "interleaved": 1, "rotary_dim": 8, "compute_dtype": 1, "head_dim": 8,
    "heads_per_group": 3, "kv_heads_per_group": 2,
}  # fmt: skip
"""What the harness makes its plugin with."""


def exports(library: Path) -> set[str]:
    done = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def needed(library: Path) -> str:
    done = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return "\n".join(line for line in done.stdout.splitlines() if "NEEDED" in line)


@pytest.fixture(scope="session")
def harness(build: Build, headers: Path) -> Path:
    return build(compiling.HARNESS, flags=("-O0", "-Wall", "-Wextra", "-Werror"))


@pytest.fixture(scope="session")
def all_seen(plugin: Path, harness: Path) -> dict[str, Any]:
    """What the harness saw."""
    done = subprocess.run([harness, plugin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == 2 * "FopeRotary layer 0: the node has no sin_pad\n"  # from before there was a logger
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture(params=contract.VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def seen(all_seen: dict[str, Any], version: int) -> dict[str, Any]:
    """What it saw of one version."""
    told: dict[str, Any] = all_seen[str(version)]
    return told


def test_the_library_shows_three_functions_and_needs_no_tensorrt(plugin: Path) -> None:
    assert exports(plugin) == EXPORTS
    assert "libc.so" in needed(plugin)
    assert not {"nvinfer", "cudart", "tensorrt"} & set(needed(plugin).replace("[lib", " ").replace(".", " ").split())


def test_the_kernel_compiles_without_tensorrt(toolchain: compiling.Toolchain, cache: Path) -> None:
    bare = replace(toolchain, headers=None, headers_version=None)
    assert exports(compiling.build(compiling.KERNEL, bare, ("89",), cache=cache)) == KERNELS


def test_a_library_that_is_only_opened_registers_itself_once(plugin: Path, build: Build, headers: Path) -> None:
    """Where it finds a registry; both versions are there, also after getCreators and when nobody has it open."""
    opened = build(compiling.OPENED, flags=("-O0", "-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations"))
    done = subprocess.run([opened, plugin], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {when: [2, True, True] for when in ("opened", "asked", "closed")}


OPENING = """
import ctypes, json, sys
from pathlib import Path
from fope_export.fope import contract
from fope_export.tensorrt import api
path, *order = sys.argv[1:]
trt = api.load("tensorrt-rtx")
log = api.make_log(trt)
builder, registry = trt.Builder(log), trt.get_plugin_registry()
versions = [str(version) for version in contract.VERSIONS]
do = {
    "open": lambda: ctypes.CDLL(path),
    "ask": lambda: ctypes.CDLL(path).getCreators(ctypes.byref(ctypes.c_int())),
    "load": lambda: api.load_plugin(
        trt, Path(path), log, name=contract.NAME, versions=versions, namespace=contract.DOMAIN
    ),
}
for step in order:
    do[step]()
    print(json.dumps(sorted(each.plugin_version for each in registry.all_creators if each.name == contract.NAME)))
"""


@pytest.mark.parametrize("order", ["open", "load", "open load", "open ask load", "load open"])
def test_it_is_once_in_tensorrts_own_registry(order: str, plugin: Path) -> None:
    """Opened, loaded by TensorRT, which refuses what is there already, or both."""
    steps = order.split()
    done = subprocess.run([sys.executable, "-c", OPENING, plugin, *steps], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ['["1", "2"]'] * len(steps)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_the_launch_refuses_what_the_host_refuses(plugin: Path, refusal: str) -> None:
    changes, code = REFUSALS[refusal]
    assert code_of(ctypes.CDLL(str(plugin)).fope_rotary_launch, changes, None) == code


@pytest.mark.parametrize("refusal", GENERAL_REFUSALS)
def test_the_general_launch_refuses_what_the_host_refuses(plugin: Path, refusal: str) -> None:
    changes, code = GENERAL_REFUSALS[refusal]
    assert code_of(ctypes.CDLL(str(plugin)).fope_rotary_launch_general, changes, None, general=True) == code


def test_no_tokens_are_no_launch(plugin: Path) -> None:
    library = ctypes.CDLL(str(plugin))
    assert code_of(library.fope_rotary_launch, {"tokens": 0}, None) == 0
    assert code_of(library.fope_rotary_launch_general, {"tokens": 0}, None, general=True) == 0


def test_the_creators_are_the_contract(all_seen: dict[str, Any]) -> None:
    assert all_seen["creators"] == [
        {
            "kind": "PLUGIN CREATOR_V3ONE",
            "namespace": contract.DISPATCH[version]["plugin_namespace"],
            "name": contract.NAME,
            "version": contract.DISPATCH[version]["plugin_version"],
            "fields": [[name, KINDS[kind]] for name, kind in contract.ATTRIBUTES.items()],
        }
        for version in contract.VERSIONS
    ]


def test_a_plugin_is_of_its_creators_version(seen: dict[str, Any], version: int) -> None:
    assert seen["plugin"] == [contract.DOMAIN, contract.NAME, str(version)]
    assert seen["timing_cache"] == str(version)


def test_capabilities(seen: dict[str, Any]) -> None:
    assert seen["capabilities"] == ["PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"]
    assert seen["outputs"] == len(contract.OUTPUTS)


def test_settings_survive_serialization_clones_and_contexts(seen: dict[str, Any]) -> None:
    assert list(VALUES) == list(contract.ATTRIBUTES)
    fields = [[name, KINDS[kind], VALUES[name]] for name, kind in contract.ATTRIBUTES.items()]
    assert seen["copies"] == {"fields": [fields] * 4, "apart": True}


def test_outputs_have_the_contracts_shapes_and_types(seen: dict[str, Any]) -> None:
    assert seen["shapes"] == [list(port.shape) for port in contract.OUTPUTS]
    assert seen["types"] == [[kind] * 3 for kind in (FLOAT, HALF, BF16)]


def test_only_the_contracts_types_are_taken(seen: dict[str, Any], version: int) -> None:
    """Of every type and format at every port; formats other than linear would show as repetitions."""
    ports = (*contract.INPUTS[version], *contract.OUTPUTS)
    positions = (INT64,) if version == contract.PLAIN else (FLOAT, INT64)
    taken = [
        {"int64": INT64, "float32": FLOAT, "P": position, "T": kind}
        for kind in (FLOAT, HALF, BF16)
        for position in positions
    ]
    assert seen["formats"] == [[codes[port.dtype] for port in ports] for codes in taken]


def spoilt_fields() -> dict[str, str | None]:
    """What the creator is asked for, and what it should say about it; None where it should make a plugin."""
    said: dict[str, str | None] = {"none": None, "int64": None, "reversed": None}
    for name, kind in contract.ATTRIBUTES.items():
        said[f"{name} missing"] = f"the node has no {name}"
        said[f"{name} empty"] = f"{name} has no value"
        said[f"{name} twice"] = f"{name} has 2 values, expected one"
        wanted = "float32" if kind is float else "int32 or int64"
        said[f"{name} of another type"] = f"{name} is of type 6, expected {wanted}"
    return said | {
        "sin_pad nan": "sin_pad is not finite",
        "cos_pad infinite": "cos_pad is not finite",
        "sign nan": "sign is not finite",
        "interleaved 2": "interleaved is 2, expected 0 or 1",
        "compute_dtype 11": "compute_dtype is 11, expected 1, 10 or 16 (float, half, bfloat16)",
        "head_dim 0": "head_dim is 0, and channel pairs need an even one",
        "head_dim 7": "head_dim is 7, and channel pairs need an even one",
        "rotary_dim 0": "rotary_dim is 0, expected an even number up to head_dim, 8",
        "rotary_dim 5": "rotary_dim is 5, expected an even number up to head_dim, 8",
        "rotary_dim 10": "rotary_dim is 10, expected an even number up to head_dim, 8",
        "heads_per_group 0": "heads_per_group is 0, expected 1 or more",
        "kv_heads_per_group -1": "kv_heads_per_group is -1, expected 1 or more",
    }


def test_a_node_without_proper_settings_is_refused_with_one_line(seen: dict[str, Any]) -> None:
    assert seen["fields"] == {
        id: {"made": said is None, "said": [f"FopeRotary layer 0: {said}"] if said else []}
        for id, said in spoilt_fields().items()
    }


CALLS = {
    "none": None,
    "unknown": None,
    "dynamic": None,
    "no tokens": None,
    "nothing rotated": None,
    "both bases": "sin_coef has 8 on axis 1, expected 4 (the number of frequencies)",
    "dynamic q heads": "q has 5 on axis 2, expected 6 (heads_per_group times the groups of sin_coef)",
    "q rank": "q has 3 dimensions, expected 4",
    "freq rank": "freq has 2 dimensions, expected 1",
    "q head_dim": "q has 6 on axis 3, expected 8 (head_dim)",
    "k head_dim": "k has 6 on axis 3, expected 8 (head_dim)",
    "q heads": "q has 5 on axis 2, expected 6 (heads_per_group times the groups of sin_coef)",
    "k heads": "k has 2 on axis 2, expected 4 (kv_heads_per_group times the groups of sin_coef)",
    "k batch": "k has 1 on axis 0, expected 2 (the batch of q)",
    "k sequence": "k has 4 on axis 1, expected 5 (the sequence of q)",
    "position batch": "position_ids has 1 on axis 0, expected 2 (the batch of q)",
    "position sequence": "position_ids has 1 on axis 1, expected 5 (the sequence of q)",
    "frequencies": "sin_coef has 4 on axis 1, expected 3 (the number of frequencies)",
    "cos groups": "cos_coef has 1 on axis 0, expected 2 (as in sin_coef)",
    "cos frequencies": "cos_coef has 3 on axis 1, expected 4 (as in sin_coef)",
    "cos pairs": "cos_coef has 2 on axis 2, expected 3 (as in sin_coef)",
    "pairs": "sin_coef turns 5 pairs, and rotary_dim has 4",
    "5 inputs": "the node has 5 inputs and 2 outputs, expected 6 and 2",
    "1 output": "the node has 6 inputs and 1 outputs, expected 6 and 2",
}


GENERAL_CALLS = CALLS | {
    "both bases": None,
    "one axis": None,
    "positions on no axis": "position_ids has 2 dimensions, expected 3",
    "an axis for others": "axis has 3 on axis 0, expected 4 (the number of frequencies)",
    "rows": "sin_coef has 7 on axis 1, expected 4 (the number of frequencies, or twice that)",
    "position batch": "position_ids has 1 on axis 1, expected 2 (the batch of q)",
    "position sequence": "position_ids has 1 on axis 2, expected 5 (the sequence of q)",
    "frequencies": "sin_coef has 4 on axis 1, expected 3 (the number of frequencies, or twice that)",
    "5 inputs": "the node has 5 inputs and 2 outputs, expected 7 and 2",
    "1 output": "the node has 7 inputs and 1 outputs, expected 7 and 2",
}


def test_shapes_that_contradict_the_settings_are_refused_with_one_line(seen: dict[str, Any], version: int) -> None:
    """When the engine is built, and again when its shapes change."""
    assert seen["calls"] == {
        id: {"codes": [-1 if said else 0] * 2, "said": [[f"FopeRotary layer 0: {said}"] if said else []] * 2}
        for id, said in (CALLS if version == contract.PLAIN else GENERAL_CALLS).items()
    }


def test_a_launch_that_fails_says_so(seen: dict[str, Any]) -> None:
    said = "FopeRotary layer 0: the kernel refuses its arguments: {code}, see arguments.h"
    assert seen["launches"] == {
        id: {"code": code, "said": [said.format(code=code)]} for id, code in (("no addresses", -1), ("int8", -3))
    }


@pytest.mark.whole
def test_cmake_builds_the_plugin(toolchain: compiling.Toolchain, headers: Path, tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is missing")
    settings = (
        "-DCMAKE_CUDA_ARCHITECTURES=89-real", f"-DCMAKE_CUDA_COMPILER={toolchain.nvcc}",
        f"-DCMAKE_CXX_COMPILER={toolchain.cxx}", f"-DNVINFER_INCLUDE_DIR={headers}",
    )  # fmt: skip
    for command in ((cmake, "-S", compiling.SOURCES, "-B", tmp_path, *settings), (cmake, "--build", tmp_path, "-j2")):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert exports(tmp_path / "libfope_rotary.so") == EXPORTS
