"""What fuzz.py damages: one small model in every form that is read, and the commands that read it."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

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
    """One small model as Hugging Face checkpoints (one file, several, pickled) with an adapter, one of the paper's, and
    a bundle.
    """
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
    (root / "adapter").mkdir()
    (root / "adapter/adapter_config.json").write_text(json.dumps(ADAPTER, indent=1))
    (root / "adapter/tokenizer.json").write_text(byte_tokenizer().to_str())
    save_file(adapter_tensors(), root / "adapter/adapter_model.safetensors")
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
ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "use_rslora": False, "use_dora": True,
    "rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {".*up_proj": 7}, "bias": "none",
    "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["model.norm"], "layers_to_transform": [0, 1],
    "layers_pattern": "layers", "trainable_token_indices": None, "layer_replication": None,
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


def adapter_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        for name, rank, rows in (("self_attn.q_proj", 2 + i, HIDDEN), ("mlp.up_proj", 2, 32)):
            module = f"model.layers.{i}.{name}.lora_"
            made |= {f"{module}A.weight": (rank, HIDDEN), f"{module}B.weight": (rows, rank)}
            made[f"{module}magnitude_vector"] = (rows,)
    return {f"base_model.model.{name}": torch.randn(shape) * 0.05 for name, shape in made.items()}


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
    """A command that reads a checkpoint, or an adapter and its base."""
    if folder.name == "adapter":
        return ["export", str(place.sources / "hugging_face"), str(place.out), "--adapter", str(folder)]
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


CONFIGURATIONS = {
    "hugging_face": "config.json", "olmo": "config.yaml", "sharded": "model.safetensors.index.json",
    "adapter": "adapter_config.json",
}  # fmt: skip


def document(rng: Rng, place: Place) -> tuple[Path, list[str]]:
    """A document from outside, and a command that reads it."""
    which = rng.choice((*CONFIGURATIONS, "tokenizer", "manifest", "inputs", "prompts", "calibration"))
    if file := CONFIGURATIONS.get(which):
        folder = place.copy(which)
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
    places = [spot for spot in spots(data) if not as_key or isinstance(spot[0], dict)]
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
    places = []
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        places += [(data, key), *spots(value)]
    return places
