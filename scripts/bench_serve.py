#!/usr/bin/env python
"""Measure the server, beside the engine alone and beside others' servers.

    scripts/bench_serve.py                      everything; writes scripts/results/bench_serve.json
    scripts/bench_serve.py --only masks ties    the other sections of the record stay
    scripts/bench_serve.py --quick --out FILE   a trial of the whole way: its numbers say nothing

Everything stays on this machine, and whatever is started is ended. Weights of the 60M shape are random, and bundles are
served without a report. llama.cpp and OpenVINO GenAI, on a RoPE twin, come from `scripts/venv serving`. Of each number
the median of the rounds stands beside the least and the greatest.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
from serving_bench.arrival import arrival
from serving_bench.bench import Bench, Record
from serving_bench.company import clients, prefix, start
from serving_bench.made import Made
from serving_bench.masks import masks
from serving_bench.processes import Clients
from serving_bench.throughput import throughput
from serving_bench.ties import ties

from fope_export.bench_report import processor

OUT = Path(__file__).parent / "results" / "bench_serve.json"
SECTIONS: dict[str, Callable[[Bench], Record]] = {
    "arrival": arrival, "throughput": throughput, "prefix": prefix, "clients": clients, "start": start,
    "masks": masks, "ties": ties,
}  # fmt: skip


def measured(section: Callable[[Bench], Record], bench: Bench) -> Record:
    """With what it was measured on."""
    began, load = time.monotonic(), os.getloadavg()[0]
    record = section(bench)
    return {
        "what": " ".join((section.__doc__ or "").split()), "processor": processor(), "cores": os.cpu_count(),
        "threads": bench.threads, "onnxruntime": onnxruntime.__version__, "load before": round(load, 1),
        "quick": bench.quick, "took, s": round(time.monotonic() - began), **record,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS], metavar="NAME")
    parser.add_argument("--threads", type=int, default=1, help="of one operator, everybody's (default: 1)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    records: dict[str, Record] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder, Clients() as asking:
        bench = Bench(Made(Path(folder)), asking, args.threads, args.quick)
        for name in args.only:
            records[name] = measured(SECTIONS[name], bench)
            print(f"{name}: {json.dumps(records[name], indent=1)}", flush=True)
            args.out.write_text(json.dumps(records, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
