"""Seven streams while an eighth arrives with a long prompt."""

from statistics import median

from serving_bench.bench import Bench, Record, answered, body, ratio, share, spread
from serving_bench.made import prompts
from serving_bench.processes import Inside, Server

RUNNING, SHORT, MORE = 7, 64, 256


def arrival(bench: Bench) -> Record:
    """The time between two tokens of the seven until the eighth has its first, over one chunk and one step of an engine
    that has nothing else to do. The chunk is the prompt's slowest one: attention grows with what stands before it. A
    server is new in every round: the first long prompt finds no room made for it.
    """
    long = bench.few(4096, 1024)
    limits = ("--slots", "8", "--max-model-len", str(long + MORE))
    between, alone = list[list[float]](), list[Record]()
    bundle = bench.made.bundle("fope", "float32")
    with Inside(bundle, bench.threads, 8, long + MORE) as inside:
        for number in range(bench.few(5, 1)):
            arriving, running = prompts(number, 1, long)[0], prompts(100 + number, RUNNING, SHORT)
            alone.append(inside.ask(do="arrival", running=running, arriving=arriving, steps=12))
            with Server(bundle, bench.threads, *limits) as server:
                between.append(_between(bench, server, running, arriving))
    slowest, steps = [max(each["chunks"]) for each in alone], [each["step"] for each in alone]
    worst = [share(each, 99) for each in between]
    return {
        "prompt": long,
        "tokens of a chunk": alone[0]["chunk"],
        "intervals": sum(map(len, between)),
        "a chunk, ms": spread([1e3 * median(each["chunks"]) for each in alone], 1),
        "the slowest chunk, ms": spread([1e3 * each for each in slowest], 1),
        "a step of the seven, ms": spread([1e3 * each for each in steps], 1),
        "between tokens, p50, ms": spread([1e3 * share(each, 50) for each in between], 1),
        "between tokens, p99, ms": spread([1e3 * each for each in worst], 1),
        "p99 over the slowest chunk and a step": ratio(worst, [a + b for a, b in zip(slowest, steps, strict=True)]),
        "rows copied": sum(each["copies"] for each in alone),
        "moves of all rows to a larger memory": [each["moves"] for each in alone],
    }


def _between(bench: Bench, server: Server, running: list[list[int]], arriving: list[int]) -> list[float]:
    """Seconds between the tokens of those that run, while the other waits for its first."""
    streams = [body(prompt, 128, stream=True, model=server.model) for prompt in running]
    last = body(arriving, 2, stream=True, model=server.model, after=2.0)
    answers = answered(bench.clients.load(server, [*streams, last], len(streams) + 1))
    began, first = answers[-1]["began"], answers[-1]["times"][0]
    pairs = [pair for each in answers[:-1] for pair in zip(each["times"], each["times"][1:], strict=False)]
    found = [after - before for before, after in pairs if after > began and before < first]
    if not found:
        raise RuntimeError("the streams were over before the long prompt came")
    return found
