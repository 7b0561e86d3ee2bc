"""Manifests whose fields have the right types and impossible values: refused when read, whatever reads them."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from fope_export.bundle import Bundle
from fope_export.errors import BundleError
from fope_export.manifest import MANIFEST

Change = Callable[[dict[str, Any]], object]
HASH = "0" * 64


def at(*path: str | int, value: Any) -> Change:
    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


REFUSED: dict[str, tuple[Change, str]] = {
    "a file above": (at("files", "../model.onnx", value=HASH), "'?../model.onnx'?, which is no file of the folder"),
    "an absolute file": (at("files", "/etc/passwd", value=HASH), "/etc/passwd"),
    "another system's file": (at("files", r"C:\x", value=HASH), "no file of the folder"),
    "itself": (at("files", MANIFEST, value=HASH), "no file of the folder"),
    "no hash": (at("files", "config.json", value="0" * 63), r"at `\$.files\[...\]`"),
    "a hash with a line after it": (at("files", "config.json", value=HASH + "\n"), r"at `\$.files\[...\]`"),
    "no hash of a source": (at("source", "files", "config.json", value=""), "source.files"),
    "unknown dtype": (at("inputs", 0, "dtype", value="int65"), "unknown dtype int65"),
    "another dtype": (at("inputs", 3, "dtype", value="int64"), "inputs has Port"),
    "negative size": (at("inputs", 3, "shape", 1, value=-1), r"Expected `int` >= 0 - at `\$.inputs"),
    "another size": (at("inputs", 3, "shape", 1, value=2), "expected Port"),
    "unknown size": (at("inputs", 0, "shape", 0, value="rows"), "unknown size rows"),
    "no sum": (at("inputs", 0, "shape", 0, value="batch ** 9"), "expected a sum"),
    "input missing": (lambda manifest: manifest["inputs"].pop(), "inputs has or lacks past_key_values.1.value"),
    "input twice": (lambda manifest: manifest["inputs"].append(manifest["inputs"][0]), "inputs has or lacks"),
    "outputs missing": (at("outputs", value=[]), "outputs has or lacks logits"),
    "another vocabulary": (at("model", "vocab_size", value=300), "outputs has Port.*logits.*256.*300"),
    "output missing": (lambda manifest: manifest["outputs"].pop(), "outputs has or lacks present.1.value"),
    "layer without spectrum": (lambda manifest: manifest["spectra"].pop(), "spectra has"),
    "spectrum without numbers": (at("spectra", 0, value={}), "spectra has"),
    "frequencies too few": (lambda manifest: manifest["spectra"][0]["freq"].pop(), "spectra has"),
    "too many layers": (at("model", "num_layers", value=1 << 40), "num_layers|Expected `int` <="),
    "one layer more": (at("model", "num_layers", value=3), "spectra has"),
    "capacity of a growing cache": (at("export", "capacity", value=64), "a dynamic cache has no capacity"),
    "static without capacity": (at("export", value={"cache": "static", "opset": 24}), "without a capacity"),
    "no opset": (at("export", "opset", value=None), "opset"),
    "format of another kind": (at("format_version", value=["x" * 5000]), "format version"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_impossible_manifest_is_refused(kind: str, spoilable: Bundle) -> None:
    change, message = REFUSED[kind]
    path = spoilable.path / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(spoilable.path, verify=False)
    assert MANIFEST in str(caught.value) and caught.value.hint
