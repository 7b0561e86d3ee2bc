from collections import Counter

import numpy as np
import pytest
import torch

from fope_export.backends.base import Feeds, Logits
from fope_export.backends.eager import EagerBackend
from fope_export.corpus import as_tokens, python_source
from fope_export.errors import ParityError
from fope_export.evaluation import loss_by_length
from tests.conftest import small_decoder
from tests.support import Forgetful


def test_it_is_the_cross_entropy_of_the_windows() -> None:
    model = small_decoder()
    tokens = np.random.default_rng(0).integers(0, 256, 65)
    losses = loss_by_length(EagerBackend(model), tokens, [16, 64])
    for length, loss in losses.items():
        windows = torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in range(0, 64, length)]))
        mask, positions = torch.ones_like(windows[:, 1:]), torch.arange(length).expand(len(windows), -1)
        logits, _ = model(windows[:, :-1], mask, positions, model.empty_cache(len(windows)))
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
        assert loss == pytest.approx(wanted, rel=1e-5)


def test_every_length_scores_the_same_tokens() -> None:
    asked: Counter[int] = Counter()

    def uniform(feeds: Feeds) -> Logits:
        asked[feeds.input_ids.shape[1]] += feeds.input_ids.size
        return np.zeros((*feeds.input_ids.shape, 256), np.float32)

    losses = loss_by_length(Forgetful(uniform, 256), np.zeros(1000, np.int64), [10, 50, 250])
    assert losses == pytest.approx(dict.fromkeys((10, 50, 250), np.log(256)))
    assert asked == {10: 750, 50: 750, 250: 750}


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ParityError, match="fill no window"):
        loss_by_length(EagerBackend(small_decoder()), np.zeros(64, np.int64), [64])


def test_held_out_files_are_never_trained_on() -> None:
    train_on, held_out = (python_source(held_out=side) for side in (False, True))
    assert len(train_on) > 10 * len(held_out) > 1e6
    files = held_out.split(b"\0")
    assert not any(text in train_on for text in files if len(text) > 1000)
    assert as_tokens(b"\x00\xff").tolist() == [0, 255]
