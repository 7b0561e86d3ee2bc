"""Planted faults. Each is made in float64, small or whole, and gives what it adds to the right logits of each case; how
strong it is, is a factor on that. L layers, B rows, S tokens, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from fope_export.backends.base import Feeds
from fope_export.backends.eager import EagerBackend
from fope_export.fope import rotary as rotation
from fope_export.model.decoder import Attention, Block, Cache, Decoder, FeedForward, Step
from fope_export.parity.cases import Case, Floats

SMALL = 1e-6
"""So that a fault's effect is in proportion to it; float64 still has ten digits of it."""
WHOLE = 1.0


@dataclass(frozen=True)
class Scene:
    """Where a fault is planted: the model in float64, and a generator that chooses the place."""

    double: EagerBackend
    cases: list[Case]
    truths: list[Floats]
    rng: np.random.Generator

    @property
    def model(self) -> Decoder:
        return self.double.model

    def one(self, size: int) -> int:
        return int(self.rng.integers(size))

    def place(self, prefix: str) -> int:
        """The number of the case whose name begins so, the longest of several."""
        return max(i for i, case in enumerate(self.cases) if case.name.startswith(prefix))


Effect = dict[int, Floats]
"""What is added to the logits [N, V] of the cases with these numbers."""


@dataclass(frozen=True)
class Fault:
    """`effect` is that of strength `made`."""

    name: str
    unit: str
    made: float
    effect: Callable[[Scene], Effect]


def _everywhere(change: Callable[[Decoder, Scene], object]) -> Callable[[Scene], Effect]:
    """A changed model, in all cases."""

    def effect(scene: Scene) -> Effect:
        wrong = copy.deepcopy(scene.model)
        change(wrong, scene)
        return _differences(scene, wrong)

    return effect


def _differences(scene: Scene, wrong: Decoder) -> Effect:
    backend = EagerBackend(wrong)
    return {i: case.prefilled(backend) - scene.truths[i] for i, case in enumerate(scene.cases)}


def _attention(model: Decoder, scene: Scene) -> Attention:
    return model.attentions()[scene.one(len(model.attentions()))]


def _block(model: Decoder, scene: Scene) -> Block:
    block = model.layers[scene.one(len(model.layers))]
    assert isinstance(block, Block)
    return block


def _feed_forward(model: Decoder, scene: Scene) -> FeedForward:
    part = _block(model, scene).feed_forward
    assert isinstance(part, FeedForward)
    return part


def _pad(attention: Attention) -> None:
    config = attention.rotary.config
    attention.rotary.config = msgspec.structs.replace(config, sin_pad=config.sin_pad + SMALL)


def _all_pads(model: Decoder, _: Scene) -> None:
    for attention in model.attentions():
        _pad(attention)


def _coefficients(attention: Attention, change: Callable[[Tensor], object]) -> None:
    for name in ("sin_coef", "cos_coef"):
        coef = getattr(attention.rotary, name).detach().double()
        change(coef)
        setattr(attention.rotary, name, nn.Parameter(coef, requires_grad=False))


def _head(model: Decoder, scene: Scene) -> None:
    attention = _attention(model, scene)
    group = scene.one(attention.rotary.config.groups)
    _coefficients(attention, lambda coef: coef[group].mul_(1 + SMALL))


def _one_coefficient(model: Decoder, scene: Scene) -> None:
    place = scene.rng.random(3)

    def change(coef: Tensor) -> None:
        coef[tuple(int(share * size) for share, size in zip(place, coef.shape, strict=True))] += SMALL

    _coefficients(_attention(model, scene), change)


def _epsilon(model: Decoder, scene: Scene) -> None:
    norm = _block(model, scene).ff_norm
    assert norm.eps is not None
    norm.eps *= 1 + 1e4 * SMALL


def _weight(weight: Tensor, scene: Scene) -> None:
    """One number changes by a share of all numbers' root mean square."""
    weight[scene.one(weight.shape[0]), scene.one(weight.shape[1])] += SMALL * weight.square().mean().sqrt()


def _exchanged(model: Decoder, scene: Scene) -> None:
    head = copy.deepcopy(model.lm_head)
    model.lm_head = head
    a, b = scene.rng.choice(len(head.weight), 2, replace=False)
    difference = head.weight.data[a] - head.weight.data[b]
    head.weight.data[a] -= SMALL * difference
    head.weight.data[b] += SMALL * difference


def _row(model: Decoder, scene: Scene) -> None:
    model.lm_head = copy.deepcopy(model.lm_head)
    model.lm_head.weight.data[scene.one(len(model.lm_head.weight))] *= 1 + SMALL


def _head_weight(model: Decoder, scene: Scene) -> None:
    model.lm_head = copy.deepcopy(model.lm_head)
    _weight(model.lm_head.weight.data, scene)


def _embedding(model: Decoder, scene: Scene) -> None:
    model.embed = copy.deepcopy(model.embed)
    _weight(model.embed.weight.data, scene)


def _gain(model: Decoder, scene: Scene) -> None:
    norm = _block(model, scene).attn_norm
    norm.weight.data[scene.one(len(norm.weight))] *= 1 + SMALL


def _scale(model: Decoder, scene: Scene) -> None:
    """Of the scores: queries are scaled before or by their norm."""
    attention = _attention(model, scene)
    queries = attention.heads * attention.head_dim
    if isinstance(attention.q_norm, nn.RMSNorm):
        attention.q_norm.weight.data *= 1 + SMALL
        return
    for parameter in attention.att_proj.parameters():
        parameter.data[:queries] *= 1 + SMALL


def _angles(wrong: Callable[[Tensor], Tensor]) -> Callable[[Scene], Effect]:
    """Wrong angles of every layer, from the right ones in float32, in the cases where they are finite."""

    def basis(positions: Tensor, freq: Tensor, wave: Callable[[Tensor], Tensor], wide: torch.dtype) -> Tensor:
        return wave(wrong(positions.to(torch.float32)[..., None] * freq).to(wide))

    def effect(scene: Scene) -> Effect:
        with mock.patch.object(rotation, "_basis", basis):
            return {i: each for i, each in _differences(scene, scene.model).items() if np.isfinite(each).all()}

    return effect


Meddle = Callable[[int, Feeds, Cache], tuple[Feeds, Cache]]


def _stepped(scene: Scene, number: int, meddle: Meddle) -> Effect:
    """A case in its steps, with something done to what step `i` is given."""
    case, start, kept = scene.cases[number], 0, []
    cache = scene.double.empty_cache(len(case.feeds.input_ids))
    for i, step in enumerate(case.steps):
        feeds, cache = meddle(i, case.feeds.part(start, start + step), cache)
        logits, cache = scene.double.step(feeds, cache)
        kept.append(logits)
        start += step
    compared = np.concatenate(kept, axis=1)[:, -case.kept :][case.feeds.attention_mask[:, -case.kept :] != 0]
    return {number: compared - scene.truths[number]}


def _late(prefix: str) -> Callable[[Scene], Effect]:
    """In one of a case's steps after its first, one row's tokens stand one position too far."""

    def effect(scene: Scene) -> Effect:
        number = scene.place(prefix)
        case = scene.cases[number]
        chosen, row = 1 + scene.one(len(case.steps) - 1), scene.one(len(case.feeds.input_ids))

        def meddle(i: int, feeds: Feeds, cache: Cache) -> tuple[Feeds, Cache]:
            positions = feeds.position_ids.copy()
            positions[row] += i == chosen
            return feeds._replace(position_ids=positions), cache

        return _stepped(scene, number, meddle)

    return effect


def _cached(change: Callable[[Tensor, int], None]) -> Callable[[Scene], Effect]:
    """In one step of decoding and one layer, the keys of one place in the cache [B, K, P, E] change."""

    def effect(scene: Scene) -> Effect:
        number = scene.place("decode across")
        chosen, layer = 1 + scene.one(len(scene.cases[number].steps) - 1), scene.one(len(scene.model.layers))
        share = scene.rng.random()

        def meddle(i: int, feeds: Feeds, cache: Cache) -> tuple[Feeds, Cache]:
            if i != chosen:
                return feeds, cache
            keys, values = cache[layer][0].clone(), cache[layer][1]
            change(keys, int(share * keys.shape[2]))
            return feeds, [(keys, values) if j == layer else each for j, each in enumerate(cache)]

        return _stepped(scene, number, meddle)

    return effect


def _swap_rows(part: Tensor, place: int) -> None:
    part[[0, 1], :, place] = part[[1, 0], :, place]


def _lose(part: Tensor, place: int) -> None:
    part[0, :, place] = 0


def _masked(seen: bool) -> Callable[[Scene], Effect]:
    """In one layer one token sees the next one, or misses one before it."""

    def effect(scene: Scene) -> Effect:
        number = scene.place("uneven chunks")
        query = 2 + scene.one(scene.cases[number].length - 3)
        key, block = query + 1 if seen else scene.one(query), scene.one(len(scene.model.layers))
        with _mask(scene.model.attentions()[block], query, key, seen):
            return {number: scene.cases[number].prefilled(scene.double) - scene.truths[number]}

    return effect


@contextmanager
def _mask(attention: nn.Module, query: int, key: int, seen: bool) -> Iterator[None]:
    def wrong(_: nn.Module, inputs: tuple[Tensor, Step, object]) -> tuple[Tensor, Step, object]:
        x, step, past = inputs
        mask = step.mask.expand(len(x), -1, -1, -1).clone()
        mask[0, 0, query, key] = 0.0 if seen else torch.finfo(mask.dtype).min / 2
        return x, step._replace(mask=mask), past

    handle = attention.register_forward_pre_hook(wrong)
    try:
        yield
    finally:
        handle.remove()


def _one_token(logits: int) -> Callable[[Scene], Effect]:
    """One token's logits in a random direction, all (0) or so many of them."""

    def effect(scene: Scene) -> Effect:
        number = scene.place("uneven chunks")
        truth = scene.truths[number]
        added, token = np.zeros_like(truth), scene.one(len(truth))
        wrong = scene.rng.standard_normal(truth.shape[1:])
        if logits:
            wrong *= np.arange(len(wrong)) < logits
            scene.rng.shuffle(wrong)
        added[token] = wrong * np.linalg.norm(truth[token]) / np.linalg.norm(wrong)
        return {number: added}

    return effect


OF_RMS, RELATIVE, SHARE = "of the weights' root mean square", "relative", "of the whole mistake"
FAULTS = (
    Fault("padding's sine, every layer", "absolute", SMALL, _everywhere(_all_pads)),
    Fault("padding's sine, one layer", "absolute", SMALL, _everywhere(lambda m, s: _pad(_attention(m, s)))),
    Fault("one head's coefficients", RELATIVE, SMALL, _everywhere(_head)),
    Fault("one coefficient", "absolute", SMALL, _everywhere(_one_coefficient)),
    Fault("one layer's epsilon", RELATIVE, 1e4 * SMALL, _everywhere(_epsilon)),
    Fault("frequencies", RELATIVE, 1e-4 * SMALL, _angles(lambda angle: angle.double() * (1 + 1e-4 * SMALL))),
    Fault("angles in float16", SHARE, WHOLE, _angles(Tensor.half)),
    Fault("angles in bfloat16", SHARE, WHOLE, _angles(Tensor.bfloat16)),
    Fault("attention's scale, one layer", RELATIVE, SMALL, _everywhere(_scale)),
    Fault("one weight of att_proj", OF_RMS, SMALL,
          _everywhere(lambda m, s: _weight(_attention(m, s).att_proj.weight.data, s))),
    Fault("one weight of ff_out", OF_RMS, SMALL,
          _everywhere(lambda m, s: _weight(_feed_forward(m, s).ff_out.weight.data, s))),
    Fault("one weight of a norm", RELATIVE, SMALL, _everywhere(_gain)),
    Fault("one weight of the embedding", OF_RMS, SMALL, _everywhere(_embedding)),
    Fault("one weight of lm_head", OF_RMS, SMALL, _everywhere(_head_weight)),
    Fault("a row of lm_head", RELATIVE, SMALL, _everywhere(_row)),
    Fault("two rows of lm_head exchanged", SHARE, SMALL, _everywhere(_exchanged)),
    Fault("positions +1 in one chunk", SHARE, WHOLE, _late("uneven chunks")),
    Fault("positions +1 in one decoding step", SHARE, WHOLE, _late("decode across")),
    Fault("a cached key from the other row, once", SHARE, WHOLE, _cached(_swap_rows)),
    Fault("a cached key lost, once", SHARE, WHOLE, _cached(_lose)),
    Fault("one token misses one key, one layer", SHARE, WHOLE, _masked(seen=False)),
    Fault("one token sees the next, one layer", SHARE, WHOLE, _masked(seen=True)),
    Fault("one token's logits", RELATIVE, WHOLE, _one_token(0)),
    Fault("one logit of one token", RELATIVE, WHOLE, _one_token(1)),
)  # fmt: skip
