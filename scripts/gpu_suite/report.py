"""What a run found, as plain text."""

from typing import Any

COLUMNS = {"us": None, "GB/s": "gigabytes_per_second", "of copy": "share_of_copy", "/ empty": "over_empty",
           "/ Triton RoPE": "over_triton", "eager /": "speed_over_eager", "compile /": "speed_over_compile",
           "again": "again_over_ours"}  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Timings and aims as plain text."""
    head = ["what", *COLUMNS]
    lines = [head]
    for r in record["timings"]:
        shape = " ".join(f"{letter}{r[letter]}" for letter in "BSHKEDF")
        name = f"{r['phase']}{' warm' * r['warm']} {r['kind']} {shape}"
        cells = [r.get("microseconds", {}).get("ours") if key is None else r.get(key) for key in COLUMNS.values()]
        lines.append([name, *("" if cell is None else f"{cell:.2f}" for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    goals = [
        f"{a['aim']}: worst {a['worst']}, median {a['median']}, reached in {a['reached_in']} of {a['rows']}"
        for a in record["aims"]
    ]
    verdicts = [f"sanitizer, {name}: {result['verdict']}" for name, result in record["sanitizer"].items()]
    return "\n".join(
        (*map("  ".join, padded), "", *goals, *verdicts, f"TensorRT-RTX: {record['tensorrt_rtx']['status']}")
    )
