"""The page that people see, in a real browser."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import NEEDED, browser
from tests.serving.served import Served

__all__ = ["browser"]
pytestmark = NEEDED


@pytest.fixture
def page(browser: Browser, server: Served) -> Iterator[Page]:
    """It, on a small dark screen; that a script fails is a failure."""
    opened = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
    failures: list[object] = []
    opened.on("pageerror", lambda failure: failures.append(failure))
    opened.goto(server.url)
    expect(opened.get_by_role("checkbox")).to_be_checked()  # the models are known
    yield opened
    opened.close()
    assert not failures


def test_an_answer_streams_and_each_token_tells_how_likely_it_was(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("abc")
    page.get_by_role("spinbutton", name="Tokens").fill("20")
    page.get_by_role("button", name="Continue").click()
    answer = page.get_by_role("group", name="Answer of model")
    expect(page.get_by_role("status")).to_have_text("done")
    tokens = answer.locator("span").count()
    expect(page.locator(".speed")).to_contain_text(f"{tokens} tokens, ")
    expect(page.locator(".speed")).to_contain_text(f"context {tokens + 3} tokens · ")
    answer.locator("span").first.focus()
    page.keyboard.press("ArrowRight")
    detail = page.get_by_label("The chosen token")
    expect(detail).to_contain_text("%")
    assert detail.locator("tr").count() in (5, 6)


def test_an_answer_can_be_stopped(page: Page) -> None:
    page.route("**/v1/completions", lambda route: None)  # it takes for ever
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Continue")).to_be_enabled()


def test_a_prompt_is_scored_by_position(page: Page) -> None:
    page.get_by_role("button", name="Score the prompt").click()
    expect(page.locator("#chart polyline")).to_have_count(1)
    expect(page.locator("#chart title")).to_contain_text("nats")


def test_what_is_wrong_is_shown(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("a" * 2000)
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("status")).to_contain_text("fit together")


def test_somebody_has_to_answer(page: Page) -> None:
    page.get_by_role("checkbox").uncheck()
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("status")).to_have_text("no model is chosen")


def test_nothing_is_wider_than_a_small_screen(page: Page) -> None:
    for name in ("Continue", "Stop", "Score the prompt"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 400
