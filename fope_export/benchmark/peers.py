"""Other runtimes on the RoPE twin, each exported by its own exporter."""

import json
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np

from fope_export.backends.base import Ids, Logits
from fope_export.benchmark.greedy import Greedy
from fope_export.errors import BackendError, require

NEWER = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
"""Classes of transformers 5 that GenAI's builder imports whatever it builds; optimum-onnx needs transformers 4."""


def build_genai(twin: Path, out: Path, precision: str) -> None:
    """GenAI's own model builder, by its own command line."""
    transformers = require("transformers", "peers")
    for name in NEWER:
        if not hasattr(transformers, name):
            setattr(transformers, name, type(name, (), {}))
    folders = ["-i", str(twin), "-o", str(out), "-c", str(out / "cache")]
    with patch.object(sys, "argv", ["builder", *folders, "-p", precision, "-e", "cpu"]):
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def export_optimum(twin: Path, out: Path) -> None:
    """Optimum's own exporter."""
    optimum = require("optimum.onnxruntime", "peers")
    optimum.ORTModelForCausalLM.from_pretrained(twin, export=True).save_pretrained(out)


class GenAI:
    """ONNX Runtime GenAI: its generator, its buffers, its choice of the next token."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._genai = require("onnxruntime_genai", "peers")
        config = self._genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = self._genai.Model(config)

    def begin(self, prompts: Ids, new: int) -> Logits:
        self._append(prompts, new)
        return self._logits()

    def feed(self, tokens: Ids) -> Logits:
        """A generator with several rows goes on with its own choice only.

        Raises BackendError where that is another than `tokens`.
        """
        if (chosen := self.next()).tolist() != tokens.tolist():
            raise BackendError(f"it now chooses {chosen}, and before {tokens}", hint="Is it deterministic?")
        return self._logits()

    def first(self, prompts: Ids, new: int) -> Ids:
        self._append(prompts, new)
        return self.next()

    def next(self) -> Ids:
        self._generator.generate_next_token()
        tokens: Ids = self._generator.get_next_tokens().astype(np.int64)
        return tokens

    def _append(self, prompts: Ids, new: int) -> None:
        params = self._genai.GeneratorParams(self._model)
        batch, room = len(prompts), prompts.shape[1] + new
        params.set_search_options(batch_size=batch, min_length=room, max_length=room, do_sample=False)
        self._generator = self._genai.Generator(self._model, params)
        self._generator.append_tokens(prompts.astype(np.int32))

    def _logits(self) -> Logits:
        logits: Logits = self._generator.get_logits()[:, -1]
        return logits.copy()


class Optimum(Greedy):
    """ORTModelForCausalLM's forward, its cache handed from step to step, without what `generate` adds."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._torch = require("torch", "peers")
        options = require("onnxruntime", "run").SessionOptions()
        options.intra_op_num_threads = threads
        optimum = require("optimum.onnxruntime", "peers")
        self._model = optimum.ORTModelForCausalLM.from_pretrained(folder, session_options=options)

    def begin(self, prompts: Ids, new: int) -> Logits:  # noqa: ARG002
        self._length, self._past = 0, None
        return self._advance(prompts)

    def feed(self, tokens: Ids) -> Logits:
        return self._advance(tokens[:, None])

    def _advance(self, ids: Ids) -> Logits:
        batch, new = ids.shape
        start, self._length = self._length, self._length + new
        mask = self._torch.ones(batch, self._length, dtype=self._torch.int64)
        positions = self._torch.arange(start, self._length).expand(batch, -1)
        with self._torch.inference_mode():
            out = self._model(
                self._torch.from_numpy(np.ascontiguousarray(ids)),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._past,
            )
        self._past = out.past_key_values
        logits: Logits = out.logits[:, -1].numpy()
        return logits
