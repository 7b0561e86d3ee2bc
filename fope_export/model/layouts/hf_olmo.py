"""The Hugging Face wrapper of the paper's repository: its flags in `config.json`, its tensors under `model.`."""

from pathlib import Path

from fope_export.model.layouts.base import CONFIG, Layout, WeightMap, model_type, read_json
from fope_export.model.layouts.olmo import read_flags

WRAPPER_KEYS = frozenset(
    "architectures auto_map bos_token_id dtype model_type tie_word_embeddings tokenizer_class torch_dtype "
    "transformers_version use_cache _name_or_path".split()
)
"""What Hugging Face adds to a config.json; none of it describes the model."""


def _read(folder: Path) -> WeightMap:
    path = folder / CONFIG
    data = {key: value for key, value in read_json(path).items() if key not in WRAPPER_KEYS}
    return read_flags(data, str(path), prefix="model.")


LAYOUT = Layout(
    evidence='config.json with model_type "hf_olmo"',
    configuration=CONFIG,
    weights=("model.safetensors", "pytorch_model.bin"),
    recognize=lambda folder: model_type(folder) == "hf_olmo",
    read=_read,
)
