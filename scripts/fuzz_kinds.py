"""The kinds of damage that fuzz.py tries: each changes a good checkpoint or bundle, and says what to call on it."""

import json
import os
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from fuzz_sources import MANIFEST, Place, Rng, calibrated, document, on_bundle, on_checkpoint, put, seal, spots
from safetensors.torch import load_file, save_file


def deep(rng: Rng, place: Place) -> list[str]:
    path, argv = document(rng, place)
    count, (left, right) = rng.choice((90, 900, 5_000, 200_000)), rng.choice((("[", "]"), ('{"a": ', "}")))
    put(rng, path, left * count + "1" + right * count * rng.choice((0, 1)))
    return argv


def surrogates(rng: Rng, place: Place) -> list[str]:
    path, argv = document(rng, place)
    put(rng, path, rng.choice((r'"\ud800"', r'"a\udfffb"', r'"\udc00\ud800"')), as_key=rng.random() < 0.4)
    return argv


def long_values(rng: Rng, place: Place) -> list[str]:
    path, argv = document(rng, place)
    count = 3_000 if path.suffix == ".jsonl" else rng.choice((3_000, 30_000, 250_000))  # a long prompt is but work
    unit = rng.choice(("x", "é", " ", "\\n", "\\u0007", "../"))
    raw = rng.choice((f'"{unit * count}"', json.dumps(["x"] * count), json.dumps({f"k{i}": i for i in range(count)})))
    put(rng, path, raw, as_key=raw.startswith('"') and rng.random() < 0.4)
    return argv


HUGE = (
    "1e999", "-1e999", "1" + "0" * 30, "-1" + "0" * 30, "9" * 400, "9" * 5000, "2147483648", "9223372036854775808",
    "18446744073709551616", "1e308", "1e-320", "NaN", "Infinity", "1000000000", "-9223372036854775809", "123456789.5",
)  # fmt: skip


def huge_numbers(rng: Rng, place: Place) -> list[str]:
    path, argv = document(rng, place)
    put(rng, path, rng.choice(HUGE))
    return argv


def impossible(rng: Rng, place: Place) -> list[str]:
    """Fields of a manifest with a value of the right type that cannot be."""
    folder = place.copy("bundle")
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    for holder, key in rng.sample(spots(data), rng.choice((1, 1, 2))):
        holder[key] = other(rng, holder.get(key) if isinstance(holder, dict) else holder[key])
    path.write_text(json.dumps(data))
    return on_bundle(rng, folder)


def other(rng: Rng, value: Any) -> Any:
    """A value of the same type."""
    if isinstance(value, dict):
        kept = rng.sample(list(value), rng.randrange(len(value))) if value else []
        return {key: value[key] for key in kept} | rng.choice(({}, {"../x": next(iter(value.values()), 1)}))
    if isinstance(value, list):
        return rng.choice(([], value[:-1], value * 2, value[::-1]))
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return rng.choice((0, -1, 1, 7, value + 1, 2**31, 2**63))
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, 1e30, -value))
    return rng.choice(("", "nonsense", "../x", "/etc/passwd", "0" * 64, "batch", "static", "fp16", "int8", value[:-1]))


def flipped(rng: Rng, place: Place) -> list[str]:
    """Bytes of an ONNX file that are others, or gone."""
    folder = place.copy("bundle")
    path = folder / rng.choice(("model.onnx", "model.onnx", "model.ort.onnx"))
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 4, 64))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.3:
        at = rng.randrange(len(content))
        content[at : at + rng.choice((1, 100, len(content)))] = b""
    path.write_bytes(content)
    return on_onnx(rng, folder, path)


def on_onnx(rng: Rng, folder: Path, path: Path) -> list[str]:
    """A command that reads an ONNX file of a bundle, whose hash mostly fits."""
    if rng.random() < 0.8:
        seal(folder)
    return ["inspect", str(path)] if rng.random() < 0.15 else on_bundle(rng, folder)


def promises(rng: Rng, place: Place) -> list[str]:
    """A header that claims more than there is."""
    which = rng.choice((promise_safetensors, promise_safetensors, promise_zip, promise_array, promise_onnx))
    return which(rng, place)


def promise_safetensors(rng: Rng, place: Place) -> list[str]:
    folder = place.copy(rng.choice(("hugging_face", "adapter")))
    path = next(folder.glob("*.safetensors"))
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = rng.choice(list(header))
    many = rng.choice((2**20, 2**33, 2**60))
    damage = rng.randrange(5)
    if damage == 0:
        path.write_bytes(struct.pack("<Q", rng.choice((2**62, 10**10, 10**8, 10**6))) + content[8:])
        return on_checkpoint(rng, place, folder)
    if damage == 1:
        header[name]["shape"] = [many, *header[name]["shape"][1:]]
    elif damage == 2:
        header[name]["data_offsets"] = [0, many]
    elif damage == 3:
        header[name] |= {"shape": [many, 0], "data_offsets": [0, 0]}
    else:
        header["more"] = {"dtype": "F32", "shape": [many // 4], "data_offsets": [len(rest), len(rest) + many // 4 * 4]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    if damage == 4 and many == 2**33:
        os.truncate(path, 8 + len(text) + len(rest) + many)
    return on_checkpoint(rng, place, folder)


def promise_zip(rng: Rng, place: Place) -> list[str]:
    """A pickled checkpoint whose largest part is packed zeros, or whose parts claim to be large."""
    folder = place.copy("pickled")
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as old:
        parts = {info.filename: old.read(info) for info in old.infolist()}
    largest = max(parts, key=lambda name: len(parts[name]))
    if rng.random() < 0.5:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in parts.items():
                new.writestr(name, content if name != largest else bytes(rng.choice((1 << 20, 1 << 28))))
    else:
        whole = bytearray(path.read_bytes())
        at = whole.rindex(b"PK\x01\x02", 0, whole.rindex(largest.encode()))
        whole[at + 20 : at + 28] = struct.pack("<II", *[rng.choice((2**31, 2**32 - 2))] * 2)
        path.write_bytes(whole)
    return on_checkpoint(rng, place, folder)


def promise_array(rng: Rng, place: Place) -> list[str]:
    path, shape = place.root / "ids.npy", rng.choice(((2**40,), (2**20, 2**20), (2**62, 4), (-1,), (2**31,)))
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(64))
    return calibrated(place, path)


def promise_onnx(rng: Rng, place: Place) -> list[str]:
    folder = place.copy("bundle")
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor, many = rng.choice(model.graph.initializer), rng.choice((2**31, 2**40, 2**60))
    if tensor.external_data and rng.random() < 0.6:
        entry = rng.choice(tensor.external_data[1:])
        entry.value = rng.choice((str(many), "-8", "nonsense", ""))
    else:
        tensor.dims[:] = [many, *tensor.dims[1:]]
    onnx.save(model, path)
    return on_onnx(rng, folder, path)


STRANGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "meta": lambda t: torch.empty(t.shape, device="meta"),
    "expanded": lambda t: torch.ones(1).expand(t.shape),
    "expanded far": lambda t: torch.ones(1).expand(1 << 20, 1 << 20),
    "sparse": lambda t: t.reshape(t.shape[0], -1).to_sparse(),
    "compressed": lambda t: t.reshape(t.shape[0], -1).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "booleans": lambda t: t > 0,
    "integers": lambda t: t.int(),
    "bytes": lambda t: t.to(torch.uint8),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "nothing": lambda t: torch.empty(0, 5),
    "overlapping": lambda t: torch.as_strided(torch.ones(8), t.shape, [0] * t.ndim),
    "transposed": lambda t: t.t() if t.ndim == 2 else t.flip(0),
}


def strange_tensors(rng: Rng, place: Place) -> list[str]:
    """Tensors that hold no numbers, or others than they seem to."""
    name, file = rng.choice((("pickled", "pytorch_model.bin"), ("olmo", "model.pt")))
    folder = place.copy(name)
    tensors = torch.load(folder / file)
    for key in rng.sample(list(tensors), rng.choice((1, 1, 3))):
        tensors[key] = STRANGE[rng.choice(list(STRANGE))](tensors[key])
    torch.save(tensors, folder / file)
    return on_checkpoint(rng, place, folder)


def shapes(rng: Rng, place: Place) -> list[str]:
    """Tensors whose shapes do not go together."""
    folder = place.copy(rng.choice(("hugging_face", "pickled", "olmo", "adapter", "adapter")))
    path = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt"))
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    for key in rng.sample(list(tensors), rng.choice((1, 2, 5))):
        t = tensors[key]
        others = [
            t[:-1],
            t[:, None] if t.ndim > 1 else t[None],
            t.flatten(),
            t.sum(),
            t[:0],
            t.repeat(2, *[1] * (t.ndim - 1)),
        ]
        tensors[key] = rng.choice([*others, t.transpose(0, -1), t[..., :-1]]).contiguous()
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return on_checkpoint(rng, place, folder)


def no_files(rng: Rng, place: Place) -> list[str]:
    """A pipe, a device, a folder, a socket or a link to nowhere in the place of a file."""
    if rng.random() < 0.4:
        path, argv = document(rng, place)
    elif rng.random() < 0.5:
        folder = place.copy(rng.choice(("hugging_face", "sharded", "pickled", "olmo", "adapter")))
        path, argv = rng.choice(sorted(folder.iterdir())), on_checkpoint(rng, place, folder)
    else:
        folder = place.copy("bundle")
        path = rng.choice(sorted(folder.iterdir()))
        argv = ["inspect", str(path)] if rng.random() < 0.2 else on_bundle(rng, folder)
    path.unlink()
    match rng.randrange(6):
        case 0 | 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(rng.choice(("/dev/zero", "/dev/full", "/dev/random")))
        case 3:
            path.mkdir()
        case 4:
            path.symlink_to(rng.choice((path.name, "nowhere", "/proc/self/mem")))
        case 5:
            here = Path.cwd()
            os.chdir(path.parent)  # a socket's name is short
            socket.socket(socket.AF_UNIX).bind(path.name)
            os.chdir(here)
    return argv


def external(rng: Rng, place: Place) -> list[str]:
    """Weights outside of the folder, missing, short or behind a link, and functions that never end."""
    folder = place.copy("bundle")
    path, data = folder / "model.onnx", folder / "model.onnx.data"
    match rng.randrange(6):
        case 0:
            data.unlink()
        case 1:
            os.truncate(data, data.stat().st_size // rng.choice((2, 10)))
        case 2:
            data.rename(place.root / "moved")
            data.symlink_to(place.root / "moved")
        case 3:
            circle(path)
        case 4 | 5:
            shutil.copy(data, place.root / "moved")
            names = (
                "../moved",
                str(place.root / "moved"),
                "",
                "a/../../moved",
                "C:\\x",
                "/dev/zero",
                "model.onnx",
                "x" * 5000,
            )
            relocate(path, rng.choice(names), every=rng.random() < 0.5)
    return on_onnx(rng, folder, path)


def circle(path: Path) -> None:
    """Let the rotation's function call itself."""
    model = onnx.load(path, load_external_data=False)
    call = next(node for node in model.graph.node if node.domain == "fope")
    model.functions[0].node.append(
        onnx.helper.make_node(call.op_type, model.functions[0].input, ["again"], domain="fope")
    )
    model.functions[0].opset_import.append(onnx.helper.make_opsetid("fope", 1))
    onnx.save(model, path)


def relocate(path: Path, name: str, *, every: bool) -> None:
    model = onnx.load(path, load_external_data=False)
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    for tensor in tensors if every else tensors[:1]:
        next(entry for entry in tensor.external_data if entry.key == "location").value = name
    onnx.save(model, path)


KINDS: dict[str, Callable[[Rng, Place], list[str]]] = {
    "deep documents": deep,
    "surrogates": surrogates,
    "long values": long_values,
    "impossible manifest": impossible,
    "flipped ONNX bytes": flipped,
    "huge numbers": huge_numbers,
    "promises of headers": promises,
    "strange tensors": strange_tensors,
    "inconsistent shapes": shapes,
    "pipes and devices": no_files,
    "external data": external,
}
