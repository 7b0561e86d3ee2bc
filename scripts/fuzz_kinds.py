"""The kinds of damage that fuzz.py tries: each changes a good checkpoint or bundle, and says what to call on it."""

import hashlib
import json
import os
import random
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import yaml
from safetensors.torch import load_file, save_file

Rng = random.Random
MANIFEST = "fope_export.json"
VOCAB, HIDDEN, HEADS, LAYERS, FREQUENCIES = 256, 64, 4, 2, 3


class Place:
    """A folder for one input: copies of the sources, and everything that a run may touch. `out` may be written."""

    def __init__(self, root: Path, sources: Path) -> None:
        self.root, self.sources, self.out, self.logs = root, sources, root / "out", root / "logs"
        for folder in (self.logs, root / "tmp", root / "home"):
            folder.mkdir(parents=True)

    def copy(self, name: str) -> Path:
        """A source to damage. A bundle is what commands on it may write."""
        copied = Path(shutil.copytree(self.sources / name, self.root / name))
        self.out = copied if name == "bundle" else self.out
        return copied

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def make_sources(root: Path) -> Path:
    """One small model as Hugging Face checkpoints (one file, several, pickled), one of the paper's, and a bundle."""
    from fope_export.cli import main
    from fope_export.tokens import byte_tokenizer

    for name in ("hugging_face", "sharded", "pickled", "olmo"):
        (root / name).mkdir(parents=True)
        (root / name / "tokenizer.json").write_text(byte_tokenizer().to_str())
        if name != "olmo":
            (root / name / "config.json").write_text(json.dumps(CONFIG, indent=1))
    tensors = hugging_face_tensors()
    save_file(tensors, root / "hugging_face/model.safetensors")
    torch.save(tensors, root / "pickled/pytorch_model.bin")
    shards = [f"model-{i + 1}.safetensors" for i in range(2)]
    index = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensors[name] for name in tensors if index[name] == shard}, root / "sharded" / shard)
    (root / "sharded/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (root / "olmo/config.yaml").write_text(yaml.safe_dump({"run_name": "small", "model": FLAGS}))
    torch.save(olmo_tensors(), root / "olmo/model.pt")
    assert main(["export", str(root / "hugging_face"), str(root / "bundle")]) == 0
    assert main(["optimize", str(root / "bundle")]) == 0
    return root


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "default", "fope_init_factor": 0.1, "fope_sep_head": True},
    "tie_word_embeddings": False, "torch_dtype": "float32", "eos_token_id": 0,
}  # fmt: skip
FLAGS = {
    "d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "mlp_hidden_size": 64, "vocab_size": VOCAB,
    "embedding_size": VOCAB, "weight_tying": True, "max_sequence_length": 64, "layer_norm_type": "rms",
    "include_bias": False, "rope": True, "rope_clamp_floor_freq": True, "rope_clamp_floor_to_zero": True,
    "fourier": True, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def hugging_face_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        made |= {layer + f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        made |= {layer + f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        made |= {layer + f"mlp.{name}_proj.weight": (32, HIDDEN) for name in ("gate", "up")}
        made[layer + "mlp.down_proj.weight"] = (HIDDEN, 32)
    made |= {f"model.rotary_emb.{name}_coef": (HEADS, FREQUENCIES, FREQUENCIES) for name in ("sin", "cos")}
    return {name: torch.randn(shape) * 0.05 for name, shape in made.items()}


def olmo_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {"transformer.wte.weight": (VOCAB, HIDDEN), "transformer.ln_f.weight": (HIDDEN,)}
    shapes = {
        "att_proj": (3 * HIDDEN, HIDDEN),
        "attn_out": (HIDDEN, HIDDEN),
        "ff_proj": (64, HIDDEN),
        "ff_out": (HIDDEN, 32),
    }
    for block in (f"transformer.blocks.{i}." for i in range(LAYERS)):
        made |= {f"{block}{name}.weight": shape for name, shape in shapes.items()}
        made |= {f"{block}{name}.weight": (HIDDEN,) for name in ("attn_norm", "ff_norm")}
        made |= {f"{block}pos_emb.{name}_coef": (HEADS, FREQUENCIES, FREQUENCIES) for name in ("sin", "cos")}
    return {name: torch.randn(shape) * 0.05 for name, shape in made.items()}


def on_checkpoint(rng: Rng, place: Place, folder: Path) -> list[str]:
    """A command that reads a checkpoint."""
    command = rng.choice(("inspect", "export", "export", "validate"))
    if command == "validate":
        return ["validate", str(place.copy("bundle")), "--lengths", "5", "--checkpoint", str(folder)]
    return [command, str(folder), *([str(place.out)] if command == "export" else [])]


def on_bundle(rng: Rng, folder: Path) -> list[str]:
    """A command that reads a bundle."""
    options = {
        "inspect": [], "optimize": [], "build": ["--no-plugin", "--no-timing-cache", "--max-length", "64"],
        "run": ["--prompt", "def ", "--max-new-tokens", "4"], "validate": ["--lengths", "5"],
    }  # fmt: skip
    command = rng.choice(list(options))
    return [command, str(folder), *options[command]]


def calibrated(place: Place, file: Path) -> list[str]:
    """An export that reads `file` for calibration."""
    source = str(place.sources / "hugging_face")
    return ["export", source, str(place.out), "--quantize", "int8-qdq", "--calibration", str(file)]


def seal(folder: Path) -> None:
    """Make a bundle's manifest say what its files now are, so that no hash stops what reads them."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))


def document(rng: Rng, place: Place) -> tuple[Path, list[str]]:
    """A document from outside, and a command that reads it."""
    which = rng.choice(("config", "yaml", "index", "tokenizer", "manifest", "inputs", "prompts", "calibration"))
    if which in ("config", "yaml", "index"):
        name = {"config": "hugging_face", "yaml": "olmo", "index": "sharded"}[which]
        folder = place.copy(name)
        file = {"config": "config.json", "yaml": "config.yaml", "index": "model.safetensors.index.json"}[which]
        return folder / file, on_checkpoint(rng, place, folder)
    if which == "tokenizer":
        folder = place.copy("hugging_face")
        return folder / "tokenizer.json", ["export", str(folder), str(place.out)]
    if which == "calibration":
        path = place.root / "ids.json"
        path.write_text(json.dumps([1, 2, 3] * 40))
        return path, calibrated(place, path)
    folder = place.copy("bundle")
    if which == "manifest":
        return folder / MANIFEST, on_bundle(rng, folder)
    path = place.root / ("inputs.json" if which == "inputs" else "prompts.jsonl")
    path.write_text('["abc"]' if which == "inputs" else '"abc"')
    command = ["validate", "--load-inputs"] if which == "inputs" else ["run", "--max-new-tokens", "3", "--prompts"]
    return path, [command[0], str(folder), *command[1:], str(path)]


MARK = "@here@"


def put(rng: Rng, path: Path, raw: str, *, as_key: bool = False) -> None:
    """Write `raw` into a document, in the place of one of its values, as a key, or of the whole."""
    text = path.read_text()
    data = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    places = [found for found in spots(data) if not as_key or isinstance(found[0], dict)]
    if rng.random() < 0.2 or not places:
        path.write_text(f"{{{raw}: 1}}" if as_key else raw)
        return
    holder, key = rng.choice(places)
    if as_key:
        holder[MARK] = holder.pop(key)
    else:
        holder[key] = MARK
    path.write_text(json.dumps(data).replace(json.dumps(MARK), raw, 1))


def spots(data: Any) -> list[tuple[Any, Any]]:
    """Every place in a document, as what holds it and its key or index."""
    found = []
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        found += [(data, key), *spots(value)]
    return found


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
    count, unit = rng.choice((3_000, 30_000, 250_000)), rng.choice(("x", "é", " ", "\\n", "\\u0007", "../"))
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
    path = folder / rng.choice(("model.onnx", "model.onnx", "model.cpu.onnx"))
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
    folder = place.copy("hugging_face")
    path = folder / "model.safetensors"
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
        content = bytearray(path.read_bytes())
        at = content.rindex(b"PK\x01\x02", 0, content.rindex(largest.encode()))
        content[at + 20 : at + 28] = struct.pack("<II", *[rng.choice((2**31, 2**32 - 2))] * 2)
        path.write_bytes(content)
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
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
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
    name = rng.choice(("hugging_face", "pickled", "olmo"))
    folder = place.copy(name)
    path = folder / {"hugging_face": "model.safetensors", "pickled": "pytorch_model.bin", "olmo": "model.pt"}[name]
    tensors = load_file(path) if name == "hugging_face" else torch.load(path)
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
    save_file(tensors, path) if name == "hugging_face" else torch.save(tensors, path)
    return on_checkpoint(rng, place, folder)


def no_files(rng: Rng, place: Place) -> list[str]:
    """A pipe, a device, a folder, a socket or a link to nowhere in the place of a file."""
    if rng.random() < 0.4:
        path, argv = document(rng, place)
    elif rng.random() < 0.5:
        folder = place.copy(rng.choice(("hugging_face", "sharded", "pickled", "olmo")))
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
