"""Other runtimes on the RoPE twin, each exported by its own exporter."""

import json
import runpy
import sys
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fope_export.backends.base import Ids, Logits, feeds_for
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


def export_optimum_intel(twin: Path, out: Path, group: int | None) -> None:
    """Optimum's own exporter for OpenVINO; with a `group`, weights have 4 bits, and so many inputs share a step."""
    optimum = require("optimum.intel", "peers")
    four = group and optimum.OVWeightQuantizationConfig(bits=4, group_size=group, sym=False, ratio=1.0)
    options = {"quantization_config": four} if four else {"load_in_8bit": False}
    made = optimum.OVModelForCausalLM.from_pretrained(twin, export=True, compile=False, **options)
    made.save_pretrained(out)


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


class OpenVinoGenAI:
    """OpenVINO GenAI: its continuous batching, its pages, its choice of the next token. Logits, which it does not give,
    are those of the same folder as OpenVINO itself runs it.
    """

    def __init__(self, folder: Path, threads: int, settings: dict[str, str]) -> None:
        self._openvino, self._genai = require("openvino", "openvino"), require("openvino_genai", "peers")
        settings = settings | {"INFERENCE_NUM_THREADS": str(threads)}
        self._folder, self._settings = folder, settings
        self._request: Any = None
        scheduler = self._genai.SchedulerConfig()
        scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = 1 << 30, False  # a prompt at once
        self._pipeline = self._genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", settings)
        self._asked = count()

    def begin(self, prompts: Ids, new: int) -> Logits:  # noqa: ARG002 (its state grows)
        if self._request is None:
            model = self._openvino.Core().compile_model(self._folder / "openvino_model.xml", "CPU", self._settings)
            self._request = model.create_infer_request()
        self._request.reset_state()
        self._past = 0
        return self.feed(prompts)

    def feed(self, tokens: Ids) -> Logits:
        assert self._request
        ids = tokens.reshape(len(tokens), -1)
        self._past += ids.shape[1]
        mask = np.ones((len(ids), self._past), np.int64)
        inputs = feeds_for(ids, mask)._asdict() | {"beam_idx": np.arange(len(ids), dtype=np.int32)}
        logits: Logits = self._request.infer(inputs)["logits"][:, -1]
        return logits.astype(np.float32)

    def first(self, prompts: Ids, new: int) -> Ids:
        self._request = None
        config = self._genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        given = [self._openvino.Tensor(prompt[None]) for prompt in prompts]
        self._handles = [self._pipeline.add_request(next(self._asked), ids, config) for ids in given]
        return self.next()

    def next(self) -> Ids:
        while not all(handle.can_read() for handle in self._handles):
            self._pipeline.step()
        outputs = (next(iter(handle.read().values())) for handle in self._handles)
        return np.array([output.generated_ids[-1] for output in outputs], np.int64)


class LlamaCpp(Greedy):
    """llama.cpp in this process, by its C interface: a cache in float32, rows as its sequences."""

    def __init__(self, file: Path, threads: int) -> None:
        self._lib, self._threads, self._room = require("llama_cpp", "peers"), threads, (0, 0)
        self._lib.llama_backend_init()
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise BackendError(f"llama.cpp does not load {file}", hint="It says why on stderr.")
        self._size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

    def begin(self, prompts: Ids, new: int) -> Logits:
        rows, self._past = prompts.shape
        if self._room != (rows, self._past + new):
            self._seat(rows, self._past + new)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return np.concatenate([self._decode(prompts[row : row + 1], row, 0) for row in range(rows)])

    def feed(self, tokens: Ids) -> Logits:
        self._past += 1
        return self._decode(tokens[:, None], 0, self._past - 1)

    def _seat(self, rows: int, length: int) -> None:
        params = self._lib.llama_context_default_params()
        room = -(-length // 256) * 256
        params.n_seq_max, params.n_ctx, params.n_batch = rows, rows * room, room
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._lib.GGML_TYPE_F32
        params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it keeps sums in float16
        self._context, self._room = self._lib.llama_init_from_model(self._model, params), (rows, length)

    def _decode(self, ids: Ids, first: int, past: int) -> Logits:
        """Tokens [N, S] of the rows from `first` on, after `past` others; logits [N, V] of the last."""
        rows, new = ids.shape
        batch = self._lib.llama_batch_init(ids.size, 0, 1)
        batch.n_tokens = ids.size
        for i, (row, place) in enumerate(np.ndindex(rows, new)):
            batch.token[i], batch.pos[i] = int(ids[row, place]), past + place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, first + row
            batch.logits[i] = place == new - 1
        failed = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if failed:
            raise BackendError(f"llama_decode says {failed}", hint="Is there memory for its cache?")
        found = [self._lib.llama_get_logits_ith(self._context, (row + 1) * new - 1) for row in range(rows)]
        return np.stack([np.ctypeslib.as_array(each, (self._size,)).copy() for each in found])
