"""Finds a CUDA compiler and TensorRT's headers, and compiles the plugin once for each configuration."""

import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fope_export.errors import BackendError
from fope_export.processes import environment, output
from fope_export.scratch import KEPT, scratch

PACKAGE = Path(__file__).parent.parent
SOURCES = next(
    (folder for root in (PACKAGE, PACKAGE.parent) if (folder := root / "plugins" / "fope_rotary").is_dir()),
    PACKAGE / "plugins" / "fope_rotary",
)
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
"""Ampere to Blackwell: code for each, and intermediate code of the last for what comes after it."""
HEADER_FOLDERS = tuple(map(Path, ("/usr/include/x86_64-linux-gnu", "/usr/include", "/usr/local/tensorrt/include")))
VERSION_HEADER = "NvInferVersion.h"
CHOOSE_CACHE = "Set FOPE_EXPORT_CACHE to a folder that you can write."
GET_HEADERS = "Set TENSORRT_ROOT to a TensorRT that has them, or: pip install --no-deps kernel-lens==2.0.1"
OLDEST = 10  # the first TensorRT with plugins of this kind


@dataclass(frozen=True)
class Toolchain:
    """What compiles: the CUDA and C++ compilers, CUDA's headers and, for the plugin only, TensorRT's."""

    nvcc: Path
    nvcc_version: str
    cuda_include: Path
    cxx: Path
    cxx_version: str
    headers: Path | None = None
    headers_version: str | None = None


@dataclass(frozen=True)
class Target:
    """One thing to compile. `cuda` sources need nvcc and architectures, `tensorrt` ones TensorRT's headers."""

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...]
    cuda: bool = False
    tensorrt: bool = False


CUDA = tuple("-O3 -std=c++17 --threads 0 --cudart static -shared -Xcompiler -fPIC,-fvisibility=hidden".split())
CPLUSPLUS = ("-O2", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off")
PLUGIN = Target("plugin", ("launch.cu", "plugin.cpp"), CUDA, cuda=True, tensorrt=True)
KERNEL = Target("kernel", ("launch.cu",), CUDA, cuda=True)
HOST = Target("host", ("host.cpp",), (*CPLUSPLUS, "-shared", "-fPIC"))
THREADS = Target("threads", ("threads.cpp", "host.cpp"), (*CPLUSPLUS, "-g", "-pthread", "-fsanitize=thread"))
HARNESS = Target("harness", ("harness.cpp",), (*CPLUSPLUS, "-ldl"), tensorrt=True)
OPENED = Target("opened", ("opened.cpp",), (*CPLUSPLUS, "-ldl", "-rdynamic"), tensorrt=True)


def package_folders(name: str) -> list[Path]:
    """Where an installed Python package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def find_toolchain(
    environ: Mapping[str, str] = os.environ,
    packages: Callable[[str], Iterable[Path]] = package_folders,
    header_folders: Iterable[Path] = HEADER_FOLDERS,
) -> Toolchain:
    """The compilers and headers of this machine, as `environ` and the installed `packages` tell.

    Raises BackendError where a compiler is missing. TensorRT's headers may be missing.
    """
    nvcc, cxx = _find_nvcc(environ, packages), _which(environ.get("CXX", "g++"), environ)
    if cxx is None:
        raise BackendError(
            f"no C++ compiler: {environ.get('CXX', 'g++')} is not in PATH", hint="Install g++, or name another in CXX."
        )
    plan = _run([nvcc, "--dryrun", "-x", "cu", os.devnull])  # nvcc may be a wrapper, and its headers anywhere
    include = Path(match.group(1) if (match := re.search(r'INCLUDES="-I([^"]+)"', plan)) else "include").resolve()
    if not (include / "cuda_fp16.h").is_file():
        raise BackendError(
            f"{nvcc} comes without CUDA's headers: no {include / 'cuda_fp16.h'}",
            hint="Install the whole CUDA toolkit, or: pip install nvidia-cuda-nvcc nvidia-cuda-cccl",
        )
    release = re.search(r"V(\d[\d.]*)", _run([nvcc, "--version"]))
    headers = _find_headers(environ, packages, header_folders)
    return Toolchain(
        nvcc, release.group(1) if release else "unknown", include, cxx, _run([cxx, "-dumpfullversion"]).strip(),
        headers, headers_version(headers) if headers else None,
    )  # fmt: skip


def _find_nvcc(environ: Mapping[str, str], packages: Callable[[str], Iterable[Path]]) -> Path:
    homes = [Path(environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    wheels = [nvcc for folder in packages("nvidia") for nvcc in sorted(folder.glob("cu*/bin/nvcc"), reverse=True)]
    for nvcc in (*homes, _which("nvcc", environ), *wheels):
        if nvcc is not None and os.access(nvcc, os.X_OK):
            return nvcc.resolve()
    raise BackendError(
        "no CUDA compiler: nvcc is not in CUDA_HOME, CUDA_PATH, PATH or an installed package",
        hint="Install the CUDA toolkit, or: pip install nvidia-cuda-nvcc nvidia-cuda-cccl",
    )


def _which(command: str, environ: Mapping[str, str]) -> Path | None:
    executable = shutil.which(command, path=environ.get("PATH", ""))
    return Path(executable) if executable else None


def _find_headers(
    environ: Mapping[str, str], packages: Callable[[str], Iterable[Path]], folders: Iterable[Path]
) -> Path | None:
    root = environ.get("TENSORRT_ROOT")
    wheels = (folder / "include" / "tensorrt" for folder in packages("kernel_lens"))
    places = (*([Path(root) / "include"] if root else ()), *folders, *wheels)
    return next((folder for folder in places if (folder / VERSION_HEADER).is_file()), None)


def headers_version(folder: Path) -> str:
    """The version of the TensorRT headers in `folder`, as in "10.14.1". Raises BackendError where it is not told."""
    text = (folder / VERSION_HEADER).read_text()
    macros: dict[str, str] = dict(re.findall(r"#define\s+(\w+)[ \t]+(\w+)", text))
    named = [macros.get(f"NV_TENSORRT_{part}", "") for part in ("MAJOR", "MINOR", "PATCH")]
    parts = [macros.get(name, name) for name in named]
    if not all(part.isdigit() for part in parts):
        raise BackendError(f"{folder / VERSION_HEADER} tells no version", hint="Reinstall TensorRT's headers.")
    return ".".join(parts)


def check_headers(version: str, library_major: int) -> None:
    """Refuse headers that are newer than the TensorRT library that will load the plugin.

    TensorRT-RTX counts from 1 and takes plugins made with TensorRT's headers of version 10 and later.
    Raises BackendError.
    """
    major = int(version.partition(".")[0])
    newest = library_major if library_major >= OLDEST else major
    if major != library_major and not OLDEST <= major <= newest:
        raise BackendError(
            f"TensorRT's headers are version {version}, and the TensorRT library is version {library_major}",
            hint=f"Point TENSORRT_ROOT at the headers of that library, or at older ones from version {OLDEST} on.",
        )


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where compiled libraries are kept. Raises BackendError for a user without a home."""
    if chosen := environ.get("FOPE_EXPORT_CACHE"):
        return Path(chosen)
    try:
        return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fope-export"
    except RuntimeError as cause:  # no HOME, and a user that the system does not know
        raise BackendError(f"no folder for what is compiled: {cause}", hint=CHOOSE_CACHE) from cause


def build_plugin(
    toolchain: Toolchain, architectures: tuple[str, ...] = ARCHITECTURES,
    *, cache: Path | None = None, flags: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """The TensorRT plugin as a shared library, for some GPUs ("86"); `cache` and `flags` are as for `build`."""
    return build(PLUGIN, toolchain, architectures, cache=cache, flags=flags)


def build(
    target: Target, toolchain: Toolchain, architectures: tuple[str, ...] = ARCHITECTURES,
    *, cache: Path | None = None, flags: tuple[str, ...] = (), sources: Path = SOURCES,
) -> Path:  # fmt: skip
    """The file that `target` compiles to; at once where the same was compiled before.

    `architectures` are compute capabilities without the dot ("89"); `flags` are added to the compiler's.
    Its name holds a hash of everything that decides its content, and it appears whole or not at all.

    Raises BackendError when TensorRT's headers are missing, when the compiler refuses, or when `cache` does.
    """
    if target.tensorrt and toolchain.headers is None:
        raise BackendError(
            f"TensorRT's headers ({VERSION_HEADER}) are missing",
            hint=GET_HEADERS,
        )
    command = [*_command(target, toolchain, architectures, sources), *flags]
    suffix = ".so" if "-shared" in target.flags else ""
    folder = cache or cache_folder()
    built = folder / f"fope-rotary-{target.name}-{_digest(command, toolchain, sources)}{suffix}"
    if built.is_file():
        return built
    if target.cuda:
        _check_architectures(toolchain, architectures)
    if not _writable(folder):
        built = KEPT.folder() / built.name
    with scratch(built.parent) as temporary:
        product = temporary / built.name
        _run([*command, "-o", str(product)], temporary)
        product.replace(built)
    return built


def _writable(folder: Path) -> bool:
    """Whether what is compiled can be kept in this folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _command(target: Target, toolchain: Toolchain, architectures: tuple[str, ...], sources: Path) -> list[str]:
    files = [str(sources / name) for name in target.sources]
    includes = _includes(*([toolchain.headers] if target.tensorrt else []))
    if not target.cuda:
        return [str(toolchain.cxx), *files, *target.flags, *_includes(toolchain.cuda_include), *includes]
    exports = ("-Xlinker", f"--version-script={sources / 'exports.map'}")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    ahead = f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"
    return [
        str(toolchain.nvcc),
        *files,
        *target.flags,
        *exports,
        *includes,
        "-ccbin",
        str(toolchain.cxx),
        *codes,
        ahead,
    ]


def _includes(*folders: Path | None) -> list[str]:
    """Options for `folders`, but for the compiler's own: named again, these hide the C library from C++'s headers."""
    own = HEADER_FOLDERS[:2]
    return [word for folder in folders if folder and folder not in own for word in ("-isystem", str(folder))]


def _digest(command: list[str], toolchain: Toolchain, sources: Path) -> str:
    """Of the command, the versions behind its paths and every source, their names included."""
    digest = hashlib.sha256(repr((command, toolchain)).encode())
    for file in sorted(path for path in sources.iterdir() if path.is_file()):
        digest.update(repr((file.name, file.read_bytes())).encode())
    return digest.hexdigest()[:20]


def _check_architectures(toolchain: Toolchain, architectures: tuple[str, ...]) -> None:
    known = re.findall(r"sm_(\w+)", _run([toolchain.nvcc, "--list-gpu-code"]))
    if unknown := [architecture for architecture in architectures if architecture not in known]:
        raise BackendError(
            f"nvcc {toolchain.nvcc_version} knows no architecture {', '.join(unknown)}; it knows {', '.join(known)}",
            hint="Ask for others, or install another CUDA toolkit.",
        )


def _run(command: Sequence[str | Path], temporary: Path | None = None) -> str:
    """What a compiler prints. Raises BackendError with its first complaints.

    Its own files lie in folder `temporary`. Flags that the environment would add are kept from it: a file's name could
    not tell them.
    """
    environ = {name: value for name, value in environment().items() if not name.startswith("NVCC_")}
    try:
        done = output(command, env=environ | ({"TMPDIR": str(temporary)} if temporary else {}))
    except OSError as cause:
        raise BackendError(f"{command[0]} does not start: {cause}", hint="Reinstall the compiler.") from cause
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)] or lines
        raise BackendError(
            f"{Path(command[0]).name} failed ({done.returncode}): " + "\n".join(errors[:5]),
            hint="Are the compilers too old or too new? CUDA 13.0 with g++ 12 is known to fit.",
        )
    return done.stdout + done.stderr
