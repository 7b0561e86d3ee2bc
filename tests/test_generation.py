from typing import Any

import numpy as np
import pytest

from fope_export.backends.base import Backend, feeds_for
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.errors import ConfigError
from fope_export.generation import generate, generate_text, log_probabilities, logits, pad_left, prefill, prefill_rows
from fope_export.model.decoder import Decoder
from fope_export.serving.sampling import SamplingParams
from fope_export.tokens import Tokenizer
from tests.scripted import Companionable, Scripted
from tests.support import EPS, answers, same_function, truth_of


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> Backend:
    return load_backend(bundle)


def tokens(backend: Backend, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return answers(backend, prompts, SamplingParams(**options), eos=0)


def test_greedy_takes_the_likeliest_token_of_the_whole(backend: Backend) -> None:
    prompt = [5, 77, 31]
    (got,) = tokens(backend, [prompt], max_new_tokens=12)
    for i, token in enumerate(got):
        logits, _ = backend.step(feeds_for(np.array([prompt + got[:i]])), backend.empty_cache(1))
        assert token == logits[0, -1].argmax()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 4}], ids=["greedy", "drawn"])
def test_a_prompt_does_not_depend_on_its_neighbours(backend: Backend, options: dict[str, float]) -> None:
    prompts = [[9, 8, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [200]]
    together = tokens(backend, prompts, max_new_tokens=20, **options)
    if not options:
        assert together == [tokens(backend, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert together[0] == tokens(backend, prompts[:1], max_new_tokens=20, **options)[0]


def test_equal_seeds_give_equal_tokens_and_others_others(backend: Backend) -> None:
    first, again, other = (tokens(backend, [[5]], max_new_tokens=30, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_it_works_far_past_the_training_length(backend: Backend, bundle: Bundle) -> None:
    length = 16 * bundle.manifest.decoder().training_length
    prompt = list(np.random.default_rng(0).integers(1, 256, length))
    assert tokens(backend, [prompt], max_new_tokens=5) == tokens(
        load_backend(bundle, "torch"), [prompt], max_new_tokens=5
    )


@pytest.mark.parametrize("chunk", [0, 1, 7, 64, 1000])
def test_chunks_give_the_logits_of_the_whole(chunk: int, backend: Backend, decoder: Decoder) -> None:
    ids = np.arange(1, 150)
    whole, _ = backend.step(feeds_for(ids[None]), backend.empty_cache(1))
    logits = prefill(backend.slots(1), 0, ids, chunk)
    same_function(logits, whole[0, -1], truth_of(decoder, ids[None])[0, -1])


def test_a_row_ends_with_eos_and_the_others_go_on() -> None:
    backend = Scripted([[3, 0, 5, 5], [4, 4, 4, 0]])
    made = list(generate(backend, [[1], [1, 2]], SamplingParams(max_new_tokens=9), eos=0))
    assert made == [(0, 3), (1, 4), (0, 0), (1, 4), (1, 4), (1, 0)]


def test_any_of_several_tokens_ends_a_row() -> None:
    backend = Scripted([[3, 6, 5], [4, 4, 0, 4]])
    assert answers(backend, [[1], [1, 2]], SamplingParams(max_new_tokens=9), eos=(0, 6)) == [[3, 6], [4, 4, 0]]


def test_others_enter_when_some_leave() -> None:
    backend = Scripted([[3, 0], [4, 4, 4, 0], [5, 5, 0]])
    prompts = [[1], [9, 2], [9, 9, 9, 3], [1]]
    made = list(generate(backend, prompts, SamplingParams(max_new_tokens=9), eos=0, max_batch=2))
    steps = [[(0, 3), (1, 4)], [(0, 0), (1, 4)], [(1, 4), (2, 5)], [(1, 0), (2, 5)], [(2, 0), (3, 3)], [(3, 0)]]
    assert made == [each for step in steps for each in step]
    assert backend.log == [
        "prefill 0 [1] 0", "prefill 1 [9, 2] 0", "decode {0: 3, 1: 4}", "decode {1: 4}", "prefill 0 [9, 9, 9, 3] 0",
        "decode {0: 5, 1: 4}", "decode {0: 5}", "prefill 1 [1] 0", "decode {1: 3}", "close",
    ]  # fmt: skip


def test_leaving_early_closes_the_slots() -> None:
    backend = Scripted([[3], [4]])
    steps = generate(backend, [[1], [2]], SamplingParams(max_new_tokens=9))
    assert [next(steps), next(steps)] == [(0, 3), (1, 4)]
    steps.close()
    assert backend.log[-1] == "close"


def test_a_failure_is_raised() -> None:
    steps = generate(Scripted([[3], [4]], fails="decode"), [[1], [2]], SamplingParams(max_new_tokens=9))
    assert [next(steps), next(steps)] == [(0, 3), (1, 4)]
    with pytest.raises(RuntimeError, match="decode"):
        next(steps)


def test_stop_strings_end_the_text_before_them(bundle: Bundle, backend: Backend) -> None:
    text = Tokenizer(bundle.path)
    options = SamplingParams(max_new_tokens=60, temperature=1.0, seed=3)
    whole = "".join(piece for _, piece in generate_text(backend, text, ["x = "], options))
    stop = whole[20:23]
    cut = "".join(piece for _, piece in generate_text(backend, text, ["x = "], options, stop=[stop, "never said"]))
    assert cut == whole[: whole.index(stop)]


def test_a_stop_string_ends_its_own_text_alone(bundle: Bundle, backend: Backend) -> None:
    text, prompts = Tokenizer(bundle.path), ["x = ", "class "]
    options = SamplingParams(max_new_tokens=40, temperature=1.0, seed=3)

    def texts(*stop: str) -> list[str]:
        whole = ["", ""]
        for row, piece in generate_text(backend, text, prompts, options, stop=stop):
            whole[row] += piece
        return whole

    whole = texts()
    stop = next(whole[0][i : i + 3] for i in range(10, 30) if whole[0][i : i + 3] not in whole[1])
    assert texts(stop) == [whole[0][: whole[0].index(stop)], whole[1]]


def test_several_prompts_come_apart(bundle: Bundle, backend: Backend) -> None:
    text, options = Tokenizer(bundle.path), SamplingParams(max_new_tokens=15)
    texts = {0: "", 1: ""}
    for row, piece in generate_text(backend, text, ["a", "class"], options):
        texts[row] += piece
    for row, prompt in enumerate(["a", "class"]):
        assert texts[row] == "".join(piece for _, piece in generate_text(backend, text, [prompt], options))


def test_a_drawn_text_does_not_depend_on_its_place(backend: Backend) -> None:
    options = {"max_new_tokens": 12, "temperature": 3.0, "seed": 3}
    alone = tokens(backend, [[7, 5]], **options)
    assert tokens(backend, [[9, 5], [7, 5], [7, 5]], **options)[1:] == alone * 2


def test_room_for_far_more_tokens_than_come_is_not_taken(backend: Backend) -> None:
    steps = generate(backend, [[5]], SamplingParams(max_new_tokens=10**9))
    assert len([next(steps) for _ in range(3)]) == 3


@pytest.mark.parametrize("chunk", [None, 0, 3])
def test_logits_and_log_probabilities_of_a_sequence(chunk: int | None, backend: Backend, decoder: Decoder) -> None:
    ids = [5, 77, 31, 8, 8, 200, 3]
    wanted, _ = backend.step(feeds_for(np.array([ids])), backend.empty_cache(1))
    truth = truth_of(decoder, np.array([ids]))[0]
    same_function(logits(backend, ids, chunk=chunk), wanted[0], truth)
    odds = np.exp(truth) / np.exp(truth).sum(-1, keepdims=True)
    scores = np.log([odds[i, token] for i, token in enumerate(ids[1:])])
    got = log_probabilities(backend, ids, chunk=chunk)
    assert got.shape == (6,) and np.abs(got - scores).max() < 64 * EPS * np.abs(truth).max()
    with pytest.raises(ConfigError, match="there is no token"):
        logits(backend, [])


def test_padding_and_no_prompts() -> None:
    ids, mask = pad_left([[5], [1, 2, 3]])
    assert ids.tolist() == [[0, 0, 5], [1, 2, 3]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    for prompts in ([], [[1], []]):
        with pytest.raises(ConfigError, match="prompt"):
            next(generate(Scripted([[1]]), prompts, SamplingParams()))


@pytest.mark.parametrize(
    ("chunk", "calls"),
    [
        (9, ["together [0, 1]", "together [2]"]),
        (7, ["prefill 0 [9, 9, 9, 1] 0", "prefill 1 [9, 9, 9, 2] 0", "prefill 2 [9, 9, 9, 3] 0"]),
        (3, ["prefill 0 [9, 9, 9] 0", "prefill 0 [1] 3", "prefill 1 [9, 9, 9] 0"]),
    ],
)
def test_rows_are_filled_in_calls_of_no_more_than_a_chunk(chunk: int, calls: list[str]) -> None:
    backend = Companionable([[3], [4], [5]])
    prompts = np.array([[9, 9, 9, last] for last in (1, 2, 3)])
    assert prefill_rows(backend.slots(3), prompts, chunk).argmax(-1).tolist() == [3, 4, 5]
    own = [call for call in backend.log if call.startswith(calls[0].split()[0])]
    assert own[: len(calls)] == calls
