"""What a record says of an engine."""

from typing import Any

HASH = "0" * 64
RECORD: dict[str, Any] = {
    "target": "tensorrt-rtx", "library": "tensorrt-rtx", "library_version": "1.7", "architectures": ["sm89"],
    "dtype": "fp32", "cache": "dynamic", "capacity": None, "decoder_layers": 2, "plugin_layers": 2, "layers": {},
    "profiles": {"decode": {"batch": [1, 1, 4], "total_sequence": [1, 8, 64]}}, "model_sha256": HASH,
    "plan_sha256": HASH, "plan_bytes": 1, "plugin_sha256": None, "plugin_embedded": False, "compiler": None,
    "headers": None, "seconds": {}, "options": {},
}  # fmt: skip
