"""Positions on several axes: the cases in which a decoder has an image between its tokens.

S tokens, A axes.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fope_export.backends.base import Feeds, Ids
from fope_export.parity.cases import Case


def image_between(length: int, axes: int) -> Ids:
    """Positions [S, A] of text whose middle third is an image's: its tokens stand at one time, and side by side on the
    other axes; the text goes on behind its widest.
    """
    begin, end = length // 3, 2 * length // 3
    side = max(math.isqrt(end - begin), 1)
    positions = np.repeat(np.arange(length)[:, None], axes, axis=1)
    image = np.arange(end - begin)
    positions[begin:end] = begin
    for axis in range(1, axes):
        positions[begin:end, axis] += image // side if axis % 2 else image % side
    positions[end:] += positions[begin:end].max(initial=begin) + 1 - end
    return positions


def image_in(feeds: Feeds, axes: int) -> Feeds:
    """The same tokens without a past, each row's with an image between them."""
    _, mask, positions = feeds
    spread = np.repeat(positions[..., None], axes, axis=-1)
    for row, count in enumerate(np.count_nonzero(mask, axis=1)):
        spread[row, -count:] = positions[row, -count] + image_between(count, axes)
    return feeds._replace(position_ids=spread)


def with_image(case: Case, axes: int) -> Case:
    """The case with the feeds of `image_in`, named for it."""
    return replace(case, name=f"{case.name}, an image in it", feeds=image_in(case.feeds, axes))


def with_images(cases: Iterable[Case], axes: int) -> list[Case]:
    """Those of the cases that are fed in several steps, each with an image."""
    return [with_image(case, axes) for case in cases if len(case.steps) > 1]
