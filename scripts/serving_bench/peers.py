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

from fope_export.benchmark.gguf_twin import write_gguf
from fope_export.graph.optimize import optimize


def write_openvino(bundle: Path, out: Path) -> None:
    """The folder that `optimize --for openvino` makes of the twin's bundle."""
    shutil.copytree(optimize(bundle, "openvino").path / "openvino", out)


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
            write_gguf(Path(checkpoint), kind, Path(out))
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
