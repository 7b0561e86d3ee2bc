from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fope_export.backends.base import Backend, Feeds, Part, feeds_for
from fope_export.backends.choose import load_backend
from fope_export.bundle import Bundle
from fope_export.errors import ConfigError
from fope_export.generation import complete, generate, pad_left, prefill
from fope_export.model.decoder import Decoder
from fope_export.sampling import Sampling
from fope_export.tokens import Text
from tests.support import same_function, truth_of


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> Backend:
    return load_backend(bundle)


def tokens(backend: Backend, prompts: list[list[int]], **options: Any) -> list[list[int | None]]:
    steps = generate(backend, prompts, Sampling(**options), eos=0)
    return [list(row) for row in zip(*steps, strict=True)]


def test_greedy_takes_the_likeliest_token_of_the_whole(backend: Backend) -> None:
    prompt = [5, 77, 31]
    (got,) = tokens(backend, [prompt], max_new_tokens=12)
    for i, token in enumerate(got):
        ids = np.array([prompt + got[:i]])
        feeds = Feeds(ids, np.ones_like(ids), np.arange(ids.shape[1])[None])
        logits, _ = backend.step(feeds, backend.empty_cache(1))
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
    ids, mask = pad_left([list(range(1, 150)), [5, 6, 7]])
    whole, _ = backend.step(feeds_for(ids, mask), backend.empty_cache(2))
    logits, cache = prefill(backend, feeds_for(ids, mask), chunk)
    same_function(logits[:, -1], whole[:, -1], truth_of(decoder, ids, mask)[:, -1])
    assert cache[0].shape()[2] == 149


class Scripted:
    """A backend whose rows say what the script says: a prompt that ends in 1 the first line, in 2 the second."""

    name, vocab_size, chunk = "scripted", 8, 512

    def __init__(self, script: list[list[int]]) -> None:
        self.script = script
        self.fed: list[Feeds] = []

    def empty_cache(self, batch: int, room: int = 0) -> list[tuple[int, int]]:
        """What each row has been fed: its script's number, by its first token, and how many steps."""
        return [(-1, 0)] * batch

    def assemble(self, parts: Sequence[Part], room: int = 0) -> list[tuple[int, int]]:
        return [part.cache[part.row] for part in parts]

    def step(self, feeds: Feeds, cache: list[tuple[int, int]], *, last: bool = False) -> tuple[np.ndarray, object]:
        self.fed.append(feeds)
        logits = np.zeros((len(cache), 1, self.vocab_size))
        both = zip(feeds.input_ids, cache, strict=True)
        rows = [(ids[-1] - 1 if row < 0 else row, steps) for ids, (row, steps) in both]
        for i, (row, steps) in enumerate(rows):
            logits[i, 0, self.script[row][min(steps, len(self.script[row]) - 1)]] = 1
        return logits, [(row, steps + 1) for row, steps in rows]


def test_a_row_ends_with_eos_and_the_others_go_on() -> None:
    backend = Scripted([[3, 0, 5, 5], [4, 4, 4, 0]])
    assert list(generate(backend, [[1], [1, 2]], Sampling(max_new_tokens=9), eos=0)) == [
        [3, 4],
        [0, 4],
        [None, 4],
        [None, 0],
    ]


def test_steps_feed_one_token_and_a_growing_mask() -> None:
    backend = Scripted([[3], [4]])
    list(generate(backend, [[1], [1, 2]], Sampling(max_new_tokens=3)))
    assert [f.input_ids.tolist() for f in backend.fed] == [[[1]], [[1, 2]], [[3], [4]], [[3], [4]]]
    assert backend.fed[3].attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert backend.fed[3].position_ids.tolist() == [[2], [3]]


def test_others_enter_when_some_leave() -> None:
    backend = Scripted([[3, 0], [4, 4, 4, 0], [5, 5, 0]])
    prompts = [[1], [9, 2], [9, 9, 9, 3], [1]]
    assert list(generate(backend, prompts, Sampling(max_new_tokens=9), eos=0, max_batch=2)) == [
        [3, 4, None, None],
        [0, 4, None, None],
        [None, 4, 5, None],
        [None, 0, 5, None],
        [None, None, 0, 3],
        [None, None, None, 0],
    ]
    widths = [feeds.attention_mask.sum(axis=1).tolist() for feeds in backend.fed]
    assert widths == [[1], [2], [2, 3], [4], [4], [5, 5], [6], [1], [2]]
    assert backend.fed[-1].attention_mask.tolist() == [[1, 1]]  # no column that is padding in every row


def test_what_waits_can_be_ended_too() -> None:
    steps = generate(Scripted([[3], [4]]), [[1], [2]], Sampling(max_new_tokens=2), max_batch=1)
    assert next(steps) == [3, None]
    assert steps.send([1]) == [3, None]
    with pytest.raises(StopIteration):
        next(steps)


def test_ending_rows_early() -> None:
    steps = generate(Scripted([[3], [4]]), [[1], [2]], Sampling(max_new_tokens=9))
    assert next(steps) == [3, 4]
    assert steps.send([0]) == [None, 4]
    with pytest.raises(StopIteration):
        steps.send([1])


def test_stop_strings_end_the_text_before_them(bundle: Bundle, backend: Backend) -> None:
    text = Text(bundle.path)
    options = Sampling(max_new_tokens=60, temperature=1.0, seed=3)
    whole = "".join(piece for _, piece in complete(backend, text, ["x = "], options))
    stop = whole[20:23]
    cut = "".join(piece for _, piece in complete(backend, text, ["x = "], options, stop=[stop, "never said"]))
    assert cut == whole[: whole.index(stop)]


def test_several_prompts_come_apart(bundle: Bundle, backend: Backend) -> None:
    text, options = Text(bundle.path), Sampling(max_new_tokens=15)
    texts = {0: "", 1: ""}
    for row, piece in complete(backend, text, ["a", "class"], options):
        texts[row] += piece
    for row, prompt in enumerate(["a", "class"]):
        assert texts[row] == "".join(piece for _, piece in complete(backend, text, [prompt], options))


def test_any_of_several_tokens_ends_a_row() -> None:
    backend = Scripted([[3, 6, 5], [4, 4, 0, 4]])
    steps = generate(backend, [[1], [1, 2]], Sampling(max_new_tokens=9), eos=(0, 6))
    assert list(steps) == [[3, 4], [6, 4], [None, 0]]


def test_a_drawn_text_does_not_depend_on_its_place(backend: Backend) -> None:
    options = {"max_new_tokens": 12, "temperature": 3.0, "seed": 3}
    alone = tokens(backend, [[7, 5]], **options)
    assert tokens(backend, [[9, 5], [7, 5], [7, 5]], **options)[1:] == alone * 2


def test_room_for_far_more_tokens_than_come_is_not_taken(backend: Backend) -> None:
    steps = generate(backend, [[5]], Sampling(max_new_tokens=10**9))
    assert len([next(steps) for _ in range(3)]) == 3


def test_what_all_prompts_begin_with_is_fed_once() -> None:
    backend, prefix = Scripted([[3]] * 7), [7] * 20
    list(generate(backend, [[*prefix, 1], [*prefix, 5, 2]], Sampling(max_new_tokens=1), chunk=8))
    assert [f.input_ids.shape[1] for f in backend.fed] == [8, 8, 4, 1, 2]
    assert [f.attention_mask.shape[1] for f in backend.fed] == [8, 16, 20, 21, 22]
    for prompts in ([[*prefix, 1]], [[*prefix[:3], 1], [*prefix[:3], 2]]):
        backend = Scripted([[3], [4]])
        list(generate(backend, prompts, Sampling(max_new_tokens=1)))
        assert [f.input_ids.tolist() for f in backend.fed] == [[prompt] for prompt in prompts]


def test_padding_and_empty_prompts() -> None:
    ids, mask = pad_left([[5], [1, 2, 3]])
    assert ids.tolist() == [[0, 0, 5], [1, 2, 3]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    for prompts in ([], [[1], []]):
        with pytest.raises(ConfigError, match="empty"):
            next(generate(Scripted([[1]]), prompts, Sampling()))
