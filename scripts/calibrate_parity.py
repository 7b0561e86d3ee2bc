#!/usr/bin/env python
"""How often the parity rule refuses a correct export, and how small a fault it still refuses. Takes hours, in pieces.

    scripts/calibrate_parity.py --fit               correct exports of the models that the limits are fixed on
    scripts/calibrate_parity.py --count             of others: the false alarms that are counted
    ATEN_CPU_CAPABILITY=default … --count           the same with PyTorch's plainest instructions
    scripts/calibrate_parity.py --power             planted faults, by this rule and by the former one
    scripts/calibrate_parity.py --places            planted faults, and which module is named
    scripts/calibrate_parity.py --summary           what the result file says; changes nothing

Every run is written at once to scripts/results/calibrate_parity.jsonl; the same command, here or on another machine,
goes on where the file ends. A changed rule starts anew.
"""

import argparse
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave the processor to others
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's never wait passively

from calibrate.places import place_all
from calibrate.power import try_all
from calibrate.records import RESULT, Book, last_rule, lines_of, of_rule
from calibrate.runs import judge_all
from calibrate.summary import heading, tables


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for stage in ("fit", "count", "power", "places", "summary"):
        parser.add_argument(f"--{stage}", action="store_true")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after as many")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th model, for N processes beside each other")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "calibrate-parity", help="checkpoints and bundles"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    until, (own, parts) = time.monotonic() + args.seconds, map(int, args.part.split("/"))
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    for role in ("fit", "count"):
        if getattr(args, role):
            judge_all(role, Book(args.out), args.work, until, (own, parts))
    if args.power:
        try_all(Book(args.out), args.work, until)
    if args.places:
        place_all(Book(args.out), args.work, until)
    if args.summary:
        print(heading(lines_of(args.out)) + "\n")
        print(tables(list(of_rule(args.out, last_rule(args.out)))))


if __name__ == "__main__":
    main()
