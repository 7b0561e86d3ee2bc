"""lm-eval's log-likelihoods, asked of the server, are `evaluation`'s."""

from typing import Any

import numpy as np
import pytest

from fope_export.backends.base import Backend
from fope_export.bundle import Bundle
from fope_export.corpus import as_tokens, python_source
from fope_export.evaluation import loss_by_length
from tests.serving.served import Served

needs = "needs scripts/venv serving"
completions = pytest.importorskip("lm_eval.models.openai_completions", reason=needs)
instance = pytest.importorskip("lm_eval.api.instance", reason=needs)

LENGTH, WINDOWS = 64, 12


@pytest.fixture
def asking(server: Served, asked: Bundle) -> Any:
    """lm-eval's client, by its name local-completions."""
    return completions.LocalCompletionsAPI(
        model="model", base_url=f"{server.url}/v1/completions", tokenizer=str(asked.path), max_retries=1,
        num_concurrent=4,
    )  # fmt: skip


def test_log_likelihoods_are_the_evaluations(asking: Any, backend: Backend) -> None:
    text = b"".join(
        python_source(held_out=True)[: 2 * LENGTH * WINDOWS].split()
    )  # lm-eval moves blanks that end a context
    assert text.isascii() and len(text) > LENGTH * WINDOWS
    windows = [text[i : i + LENGTH + 1].decode() for i in range(0, LENGTH * WINDOWS, LENGTH)]
    requests = [
        instance.Instance(request_type="loglikelihood", doc={}, arguments=(window[0], window[1:]), idx=number)
        for number, window in enumerate(windows)
    ]
    told = [likelihood for likelihood, _ in asking.loglikelihood(requests, disable_tqdm=True)]
    wanted = loss_by_length(backend, as_tokens(text[: LENGTH * WINDOWS + 1]), [LENGTH])[LENGTH]
    # windows at once or in the engine's chunks: the same sums in another order
    np.testing.assert_allclose(-sum(told) / (LENGTH * WINDOWS), wanted, rtol=1e-5)
