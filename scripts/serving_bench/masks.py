"""What a mask of llguidance takes beside a step."""

from fope_export.benchmark.rounds import in_turn
from serving_bench.bench import Bench, Record, ratio, share, spread
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
    with Inside(bench.made.bundle("fope", "float32"), bench.threads, 8, 512) as inside:
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
    made = [each for one in taken for each in one["masks"]]
    record: Record = {"a step without, ms": spread([1e3 * each for each in plain], 2)}
    for percent in (50, 99):
        of_step = [share(one["masks"], percent) / step for one, step in zip(taken, plain, strict=True)]
        record[f"a mask, p{percent}, ms"] = round(1e3 * share(made, percent), 3)
        record[f"a mask, p{percent}, over a step"] = spread(of_step, 4)
    masked = [share(each["masked"], 50) for each in taken]
    return record | {
        "a step with masks over one without": ratio(masked, plain),
        "to compile, ms": round(1e3 * share([each["compiled"] for each in taken], 50), 1),
    }
