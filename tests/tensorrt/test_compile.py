"""Finding compilers and keeping what they made, on made-up machines."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fope_export.errors import BackendError
from fope_export.tensorrt import compile as compiling

NVCC = """#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release 12.9, V12.9.41" ;;
    --list-gpu-code) printf 'sm_80\\nsm_89\\n' ;;
    --dryrun*) echo '#$ INCLUDES="-I{include}"' >&2 ;;
    *)
        echo compiled >> {log}
        while [ "$1" != -o ]; do shift; done
        echo "$*" > "$2" ;;
esac
"""
CXX = "#!/bin/sh\necho 13.1.0\n"
VERSION = """
#define TRT_MAJOR_ENTERPRISE 10
#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< TensorRT major version.
#define NV_TENSORRT_MINOR 14
#define NV_TENSORRT_PATCH 1
"""


class Machine:
    """A machine in a folder: a CUDA toolkit whose compiler writes down that it ran, and a C++ compiler in PATH."""

    def __init__(self, root: Path) -> None:
        self.root, self.log, self.cache = root, root / "log", root / "cache"
        self.include = root / "cuda" / "include"
        self.include.mkdir(parents=True)
        (self.include / "cuda_fp16.h").touch()
        self.nvcc = self.program("cuda/bin/nvcc", NVCC.format(include=self.include, log=self.log))
        self.program("bin/g++", CXX)
        self.environ = {"PATH": f"{root / 'bin'}:/bin:/usr/bin", "CUDA_HOME": str(root / "cuda")}
        self.packages: dict[str, list[Path]] = {}

    def program(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def headers(self, name: str = "tensorrt/include", text: str = VERSION) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        (path / "NvInferVersion.h").write_text(text)
        return path

    def find(self) -> compiling.Toolchain:
        return compiling.find_toolchain(self.environ, lambda name: self.packages.get(name, []), ())

    @property
    def compilations(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def refused(function: object, *arguments: object, **named: object) -> tuple[str, str]:
    with pytest.raises(BackendError) as caught:
        function(*arguments, **named)  # type: ignore[operator]
    return str(caught.value), caught.value.hint


def test_a_toolchain_states_its_versions(machine: Machine) -> None:
    machine.environ["TENSORRT_ROOT"] = str(machine.headers().parent)
    assert machine.find() == compiling.Toolchain(
        machine.nvcc, "12.9.41", machine.include, machine.root / "bin" / "g++", "13.1.0",
        machine.root / "tensorrt" / "include", "10.14.1",
    )  # fmt: skip


@pytest.mark.parametrize("place", ["CUDA_HOME", "CUDA_PATH", "PATH", "package"])
def test_the_compiler_is_found(machine: Machine, place: str) -> None:
    text = machine.nvcc.read_text()
    shutil.rmtree(machine.nvcc.parent)
    del machine.environ["CUDA_HOME"]
    nvcc = machine.program("site/nvidia/cu13/bin/nvcc", text)
    if place == "package":
        machine.packages["nvidia"] = [machine.root / "site" / "nvidia"]
        machine.environ["PATH"] = str(machine.root / "bin")
        (machine.root / "bin" / "sh").symlink_to("/bin/sh")
    else:
        machine.environ[place] = f"{nvcc.parent}:{machine.environ['PATH']}" if place == "PATH" else str(nvcc.parents[1])
    assert machine.find().nvcc == nvcc


def test_a_cuda_home_without_a_compiler_does_not_hide_another(machine: Machine) -> None:
    machine.environ |= {"CUDA_PATH": machine.environ["CUDA_HOME"], "CUDA_HOME": str(machine.root / "nothing")}
    assert machine.find().nvcc == machine.nvcc


def test_headers_come_from_a_package_without_importing_it(machine: Machine) -> None:
    folder = machine.headers("site/kernel_lens/include/tensorrt")
    machine.packages["kernel_lens"] = [machine.root / "site" / "kernel_lens"]
    assert machine.find().headers == folder


def test_packages_are_found_by_name() -> None:
    assert compiling.package_folders("fope_export") == [compiling.PACKAGE]
    assert compiling.package_folders("no_such_package") == []


def test_no_cuda_compiler(machine: Machine) -> None:
    machine.environ = {"PATH": str(machine.root / "bin")}
    message, hint = refused(machine.find)
    assert message == "no CUDA compiler: nvcc is not in CUDA_HOME, CUDA_PATH, PATH or an installed package"
    assert "pip install nvidia-cuda-nvcc nvidia-cuda-cccl" in hint


def test_no_cxx_compiler(machine: Machine) -> None:
    machine.environ |= {"CXX": "no-such-compiler"}
    message, hint = refused(machine.find)
    assert message == "no C++ compiler: no-such-compiler is not in PATH"
    assert "CXX" in hint


def test_a_compiler_without_headers(machine: Machine) -> None:
    (machine.include / "cuda_fp16.h").unlink()
    message, hint = refused(machine.find)
    assert message == f"{machine.nvcc} comes without CUDA's headers: no {machine.include / 'cuda_fp16.h'}"
    assert "nvidia-cuda-cccl" in hint


def test_a_compiler_that_does_not_start(machine: Machine) -> None:
    machine.nvcc.write_text("#!/no/such/shell\n")
    message, hint = refused(machine.find)
    assert message.startswith(f"{machine.nvcc} does not start: ")
    assert hint == "Reinstall the compiler."


def test_no_tensorrt_headers(machine: Machine) -> None:
    message, hint = refused(compiling.build_plugin, machine.find(), cache=machine.cache)
    assert message == "TensorRT's headers (NvInferVersion.h) are missing"
    assert "TENSORRT_ROOT" in hint and "pip install --no-deps kernel-lens==2.0.1" in hint


def test_headers_without_a_version(machine: Machine) -> None:
    machine.environ["TENSORRT_ROOT"] = str(machine.headers(text="#define NV_TENSORRT_MAJOR\n").parent)
    message, hint = refused(machine.find)
    assert message.endswith("NvInferVersion.h tells no version")
    assert hint == "Reinstall TensorRT's headers."


@pytest.mark.parametrize(
    ("headers", "library"), [("10.14.1", 10), ("10.14.1", 11), ("10.14.1", 1), ("11.1.0", 1), ("1.7.1", 1)]
)
def test_headers_that_suit_the_library(headers: str, library: int) -> None:
    compiling.check_headers(headers, library)


@pytest.mark.parametrize(("headers", "library"), [("11.1.0", 10), ("9.3.0", 10), ("1.7.1", 10), ("8.6.1", 1)])
def test_headers_that_do_not(headers: str, library: int) -> None:
    message, hint = refused(compiling.check_headers, headers, library)
    assert message == f"TensorRT's headers are version {headers}, and the TensorRT library is version {library}"
    assert "TENSORRT_ROOT" in hint


def test_unknown_architectures(machine: Machine) -> None:
    message, hint = refused(compiling.build, compiling.KERNEL, machine.find(), ("89", "121", "7"), cache=machine.cache)
    assert message == "nvcc 12.9.41 knows no architecture 121, 7; it knows 80, 89"
    assert hint == "Ask for others, or install another CUDA toolkit."
    assert not machine.compilations


def test_a_failing_compilation_shows_its_first_errors(machine: Machine) -> None:
    complaints = "\\n".join(["a note", *(f"rotary.cuh({i}): error: no {i}" for i in range(9))])
    machine.program("bin/g++", f"#!/bin/sh\n[ $1 = -dumpfullversion ] && exit\nprintf '{complaints}' >&2; exit 2\n")
    message, hint = refused(compiling.build, compiling.HOST, machine.find(), cache=machine.cache)
    assert message == "g++ failed (2): " + "\n".join(f"rotary.cuh({i}): error: no {i}" for i in range(5))
    assert "CUDA 13.0" in hint
    assert not list(machine.cache.iterdir())


def test_the_same_is_compiled_once(machine: Machine) -> None:
    one, other = (compiling.build(compiling.KERNEL, machine.find(), ("80",), cache=machine.cache) for _ in range(2))
    assert one == other
    assert machine.compilations == 1
    assert [file.suffix for file in machine.cache.iterdir()] == [".so"]


def test_anything_that_matters_makes_another_file(machine: Machine) -> None:
    sources = Path(shutil.copytree(compiling.SOURCES, machine.root / "sources"))
    tools = machine.find()

    def build(
        tools: compiling.Toolchain = tools, codes: tuple[str, ...] = ("80",), flags: tuple[str, ...] = ()
    ) -> Path:
        return compiling.build(compiling.KERNEL, tools, codes, cache=machine.cache, flags=flags, sources=sources)

    made = [build(), build(codes=("80", "89")), build(codes=("89", "80")), build(flags=("-lineinfo",))]
    made += [build(replace(tools, nvcc_version="1")), build(replace(tools, cxx_version="1"))]
    made.append(build(replace(tools, headers_version="1")))
    for name in ("rotary.cuh", "exports.map", "plan.h"):
        with (sources / name).open("a") as file:
            file.write("\n")
        made.append(build())
    (sources / "plan.h").rename(sources / "plans.h")
    made.append(build())
    assert len(set(made)) == len(made) == machine.compilations


def test_only_the_asked_architectures_are_compiled(machine: Machine) -> None:
    compiling.build(compiling.KERNEL, machine.find(), ("80", "89"), cache=machine.cache)
    machine.program("cuda/bin/nvcc", machine.nvcc.read_text().replace("echo compiled", 'echo "$@"'))
    compiling.build(compiling.KERNEL, machine.find(), ("89",), cache=machine.cache)
    codes = [word for word in machine.log.read_text().split() if word.startswith("-gencode")]
    assert codes == ["-gencode=arch=compute_89,code=sm_89", "-gencode=arch=compute_89,code=compute_89"]


def test_the_compilers_own_folders_are_not_named_again(machine: Machine) -> None:
    machine.program("cuda/bin/nvcc", machine.nvcc.read_text().replace("echo compiled", 'echo "$@"'))
    for folder in ("/usr/include", "/opt/tensorrt"):
        tools = replace(machine.find(), headers=Path(folder), headers_version="10.14.1")
        compiling.build_plugin(tools, ("80",), cache=machine.cache)
    assert machine.log.read_text().count("-isystem") == 1
    assert "-isystem /opt/tensorrt" in machine.log.read_text()


def test_the_environment_adds_no_flags(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "--use_fast_math")
    machine.program("cuda/bin/nvcc", machine.nvcc.read_text().replace("echo compiled", 'echo "got:$NVCC_APPEND_FLAGS"'))
    compiling.build(compiling.KERNEL, machine.find(), ("80",), cache=machine.cache)
    assert machine.log.read_text() == "got:\n"


def test_builds_at_the_same_time_leave_one_whole_file(machine: Machine) -> None:
    machine.program(
        "cuda/bin/nvcc", machine.nvcc.read_text().replace('> "$2" ;;', '> "$2"; sleep 0.3; echo end >> "$2" ;;')
    )
    tools = machine.find()
    with ThreadPoolExecutor(4) as pool:
        build = lambda _: compiling.build(compiling.KERNEL, tools, ("80",), cache=machine.cache)  # noqa: E731
        built = set(pool.map(build, range(4)))
    assert machine.compilations == 4
    assert [*built] == [*machine.cache.iterdir()]
    assert built.pop().read_text().endswith("end\n")


def test_the_cache_is_where_the_user_wants_it() -> None:
    wanted = {"FOPE_EXPORT_CACHE": "/one", "XDG_CACHE_HOME": "/two"}
    assert compiling.cache_folder(wanted) == Path("/one")
    assert compiling.cache_folder({"XDG_CACHE_HOME": "/two"}) == Path("/two/fope-export")
    assert compiling.cache_folder({}) == Path.home() / ".cache" / "fope-export"


def test_a_user_without_a_home_is_told_what_to_set(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # nobody's
    with pytest.raises(BackendError, match="no folder for what is compiled") as caught:
        compiling.cache_folder({})
    assert "FOPE_EXPORT_CACHE" in caught.value.hint


def test_a_cache_that_cannot_be_written_keeps_nothing_and_costs_nothing(machine: Machine) -> None:
    (machine.root / "file").write_text("")
    built = compiling.build(compiling.KERNEL, machine.find(), ("80",), cache=machine.root / "file" / "cache")
    assert built.is_file() and not built.is_relative_to(machine.root)


def test_the_sources_are_there() -> None:
    targets = (compiling.PLUGIN, compiling.KERNEL, compiling.HOST, compiling.THREADS, compiling.HARNESS)
    assert {name for target in targets for name in target.sources} <= {
        file.name for file in compiling.SOURCES.iterdir()
    }
