"""What a mask of llguidance takes beside a step."""

from fope_export.benchmark.rounds import in_turn
from serving_bench.bench import Bench, Record, share, spread
from serving_bench.made import prompts
from serving_bench.processes import Inside

PERSON = """{"type": "object", "required": ["name", "age", "tags", "address"], "additionalProperties": false,
"properties": {"name": {"type": "string"}, "age": {"type": "integer"},
"tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 2},
"address": {"type": "object", "properties": {"street": {"type": "string"}, "city": {"type": "string"}}}}}"""
FORMS = {
    "JSON schema": ("json_schema", PERSON),
    "regular expression": ("regex", "([A-Za-z]+ [0-9]{1,4}[,;] ){200}"),
    "Lark grammar": (
        "grammar",
        'start: sum\nsum: product (("+" | "-") product)*\nproduct: /[0-9]+/ ("*" /[0-9]+/)* ";"',
    ),
}


def masks(bench: Bench) -> Record:
    """Of answers at the 60M shape, whose vocabulary has 50,304 tokens: a mask with what follows its token, as a share
    of the median step without any, and what a step with masks for all takes beside one without.
    """
    new, rounds = bench.few(64, 12), bench.few(3, 1)
    with Inside(bench.made.bundle("fope", "float32"), bench.threads, 8) as inside:
        record: Record = {"vocabulary": 50304, "rounds": rounds}
        for rows in (1, 8):
            tasks = {
                name: lambda form=form, rows=rows: inside.ask(
                    do="masks", prompts=prompts(0, rows, 32), new=new, form=form
                )
                for name, form in FORMS.items()
            }
            for name, taken in in_turn(tasks, rounds).items():
                record[f"{name}, {rows} at once"] = _told(taken)
    return record


def _told(taken: list[Record]) -> Record:
    plain = [share(each["plain"], 50) for each in taken]
    mask = [each for one in taken for each in one["masks"]]
    return {
        "a mask, ms": {f"p{p}": round(1e3 * share(mask, p), 3) for p in (50, 99)},
        "a step without, ms": spread([1e3 * each for each in plain], 2),
        "a mask over a step": {f"p{p}": spread([share(one["masks"], p) / step for one, step in zip(taken, plain, strict=True)], 4) for p in (50, 99)},
        "a step with masks over one without": spread([share(one["masked"], 50) / step for one, step in zip(taken, plain, strict=True)]),
        "to compile, ms": round(1e3 * share([one["compiled"] for one in taken], 50), 1),
    }  # fmt: skip
