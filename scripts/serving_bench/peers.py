"""Others on the RoPE twin, in a process of their own, with what `scripts/venv serving` installs.

peers.py write llama|openvino CHECKPOINT BUNDLE KIND OUT
peers.py llama FILE THREADS SLOTS LENGTH     # prints its port, and serves until it is ended
peers.py openvino FOLDER THREADS SLOTS       # then prompts a line of JSON in, times out
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner

from fope_export.model.checkpoint import load_checkpoint

PAST, PRESENT = "past_key_values", "present"


def write_llama(checkpoint: Path, kind: str, out: Path) -> None:
    """A GGUF of the checkpoint; int4 is Q4_0, and the embedding stays."""
    import gguf

    model = load_checkpoint(checkpoint).model
    config, head = model.config, model.config.spectrum.head_dim
    writer, small = gguf.GGUFWriter(out, "llama"), gguf.GGMLQuantizationType.Q4_0
    writer.add_context_length(config.training_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, checkpoint, config.vocab_size)
    for name, tensor in _llama_tensors({name: each.numpy() for name, each in model.state_dict().items()}, head):
        if kind == "int4" and tensor.ndim == 2 and name != "token_embd":
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(tensor, small), raw_dtype=small)
        else:
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, checkpoint: Path, size: int) -> None:
    learnt = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    texts = {number: text for text, number in learnt["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(number, f"<unused{number}>") for number in range(size)])
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in learnt["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _llama_tensors(ours: dict[str, Any], head: int) -> list[tuple[str, Any]]:
    """By llama.cpp's names; its queries and keys have the two halves of a head's channels by turns."""

    def by_turns(matrix: Any) -> Any:
        return matrix.reshape(-1, 2, head // 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)

    theirs = {"token_embd": "embed", "output_norm": "norm", "output": "lm_head"}
    tensors = [(name, ours[f"{own}.weight"]) for name, own in theirs.items()]
    for i in range(sum(name.endswith("attn_norm.weight") for name in ours)):
        layer = {name.removeprefix(f"layers.{i}.").removesuffix(".weight"): each for name, each in ours.items()}
        q, k, v = np.split(layer["attention.att_proj"], 3)
        up, gate = np.split(layer["feed_forward.ff_proj"], 2)
        named = {
            "attn_norm": layer["attn_norm"], "attn_q": by_turns(q), "attn_k": by_turns(k), "attn_v": v,
            "attn_output": layer["attention.attn_out"], "ffn_norm": layer["ff_norm"], "ffn_up": up, "ffn_gate": gate,
            "ffn_down": layer["feed_forward.ff_out"],
        }  # fmt: skip
        tensors += [(f"blk.{i}.{name}", each) for name, each in named.items()]
    return [(name, np.ascontiguousarray(each, np.float32)) for name, each in tensors]


def write_openvino(bundle: Path, out: Path) -> None:
    """OpenVINO's own conversion of the bundle's portable file, with its cache as the state that its server expects."""
    import openvino
    from openvino import opset13 as op

    out.mkdir()
    plain = out / "inlined.onnx"
    onnx.save(onnx.inliner.inline_local_functions(onnx.load(bundle / "model.onnx")), plain, save_as_external_data=True)
    model = openvino.convert_model(plain)
    _simplify(model)
    inputs = {each.get_friendly_name(): each for each in model.get_parameters()}
    results = {name: each for each in model.get_results() for name in each.input_value(0).names}
    beam = op.parameter([-1], openvino.Type.i32, "beam_idx")
    beam.output(0).set_names({"beam_idx"})
    batch = op.gather(op.shape_of(inputs["input_ids"]), np.array([0]), np.array(0))
    stored = []
    for name in [name for name in inputs if name.startswith(PAST)]:
        shape = inputs[name].get_partial_shape()
        _, heads, _, head = (each.get_length() if each.is_static else -1 for each in shape)
        empty = op.broadcast(np.float32(0), op.concat([batch, np.array([heads, 0, head])], 0))
        state = op.read_value(empty, name, openvino.Type.f32, openvino.PartialShape([-1, heads, -1, head]))
        inputs.pop(name).output(0).replace(op.gather(state, beam, np.array(0)).output(0))
        grown = results[name.replace(PAST, PRESENT)].input_value(0).get_node()
        stored.append(op.assign(grown, name))
    kept = openvino.Model([results["logits"]], stored, [*inputs.values(), beam])
    openvino.save_model(kept, out / "openvino_model.xml", compress_to_fp16=False)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundle / name, out)
    for file in out.glob("inlined.onnx*"):
        file.unlink()


def _simplify(model: Any) -> None:
    """Take out what changes no number and hides attention: casts to the type that is there, and care for NaN."""
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "ConvertLike":
            node.output(0).replace(node.input_value(0))
        elif kind == "Select" and node.input_value(0).get_node().get_type_name() == "IsNaN":
            node.output(0).replace(node.input_value(2))


def llama(file: str, threads: int, slots: int, length: int) -> None:
    """llama.cpp's server, with a cache in float32 as everybody here."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = file, slots, slots * length
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_ram_mib, params.hostnames = 0, ["127.0.0.1"]
    server = xllamacpp.Server(params)
    told = {"port": int(server.listening_address.rpartition(":")[2]), "system": xllamacpp.get_system_info()}
    print(json.dumps(told), flush=True)
    sys.stdin.read()


class OpenVINO:
    """Its continuous batching, without a server."""

    def __init__(self, folder: str, threads: int, slots: int) -> None:
        import openvino
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs, scheduler.enable_prefix_caching = 1, slots, False
        settings = {
            "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"
        }  # fmt: skip
        self._tensor, self._config = openvino.Tensor, openvino_genai.GenerationConfig
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", settings)

    def answers(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        config = self._config()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        given = [self._tensor(np.array([prompt], np.int64)) for prompt in prompts]
        began, cpu = time.perf_counter(), time.process_time()
        results = self._pipeline.generate(given, [config] * len(given))
        taken = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        return taken | {"answers": [list(result.m_generation_ids[0]) for result in results]}


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "write":
        peer, checkpoint, bundle, kind, out = rest
        if peer == "llama":
            write_llama(Path(checkpoint), kind, Path(out))
        else:
            write_openvino(Path(bundle), Path(out))
        print("{}", flush=True)
    elif what == "llama":
        llama(rest[0], *map(int, rest[1:]))
    else:
        running = OpenVINO(rest[0], int(rest[1]), int(rest[2]))
        print("{}", flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(running.answers(asked["prompts"], asked["new"])), flush=True)


if __name__ == "__main__":
    main()
