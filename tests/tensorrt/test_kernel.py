"""The kernel's arithmetic, run block by block on the CPU, against the definition.

One ulp is the spacing of the output's type at the size of what is added: |left| * sum |cos * coef| + |right| * sum
|sin * coef|. A sum that cancels is thereby not asked for digits that its terms never had.
"""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_suite.cases import Shape

from fope_export.fope import contract, reference
from fope_export.fope.spectrum import Spectrum
from fope_export.tensorrt import compile as compiling
from tests.fields import Changes, Results, changed, forgetting, held
from tests.tensorrt.kernel import (
    GENERAL_REFUSALS,
    KINDS,
    PLAN,
    REFUSALS,
    SHAPES,
    ULPS,
    Call,
    Fenced,
    arguments,
    code_of,
    make,
    mutated,
    plans,
    run,
    spectrum,
    worst,
)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_computes_the_definition(host: ctypes.CDLL, shape: str, kind: str, pairing: str) -> None:
    call = make(SHAPES[shape], KINDS[kind], spectrum(SHAPES[shape], pairing=pairing))
    outputs = run(host, call, 0, 0, 0)
    assert worst(call, outputs) <= ULPS


@pytest.mark.parametrize("setting", sorted(contract.SETTINGS.keys() - {"full_precision"}))
def test_the_kernel_follows_every_field(host: ctypes.CDLL, setting: str) -> None:
    """But the precision: it rotates in float32 always."""
    call = make(SHAPES["gqa"], KINDS["fp32"], spectrum(SHAPES["gqa"]))

    def render(changes: Changes) -> Results:
        return run(host, replace(call, spectrum=changed(call.spectrum, changes)), 0, 0, 0)

    def truth(changes: Changes) -> Results:
        return [reference.rotate(changed(call.spectrum, changes), x, call.position_ids) for x in (call.q, call.k)]

    held(setting, render, truth)
    with pytest.raises(AssertionError, match=setting):
        held(setting, forgetting(setting, render), truth)


EXTENSIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "axes": ({"axes": 3}, True),
    "phases": ({"bases": 2}, True),
    "floats": ({}, False),
    "all": ({"axes": 2, "bases": 2, "pairing": "interleaved", "sign": -1}, False),
}
"""With whether positions are whole."""


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_general_kernel_computes_the_definition(host: ctypes.CDLL, shape: str, kind: str, extension: str) -> None:
    fields, whole = EXTENSIONS[extension]
    call = make(SHAPES[shape], KINDS[kind], spectrum(SHAPES[shape], **fields), whole=whole)
    assert call.general
    assert worst(call, run(host, call, 0, 0, 0)) <= ULPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", sorted(SHAPES.keys() - {"long", "wide-basis"}))
def test_the_general_plan_does_not_change_a_bit(host: ctypes.CDLL, shape: str, kind: str) -> None:
    call = make(SHAPES[shape], KINDS[kind], spectrum(SHAPES[shape], axes=3, bases=2))
    chosen = run(host, call, 0, 0, 0)
    for plan in plans(call):
        for got, wanted in zip(run(host, call, *plan), chosen, strict=True):
            assert got.tobytes() == wanted.tobytes(), plan


@pytest.mark.parametrize("kind", KINDS)
def test_the_general_kernel_of_a_plain_call_gives_the_plain_ones_bits(host: ctypes.CDLL, kind: str) -> None:
    call = make(SHAPES["gqa"], KINDS[kind], spectrum(SHAPES["gqa"]))
    outputs = Fenced(call.q), Fenced(call.k)
    assert host.fope_rotary_host_general(ctypes.byref(arguments(call, outputs, general=True)), 0, 0, 0) == 0
    for got, wanted in zip(outputs, run(host, call, 0, 0, 0), strict=True):
        assert got.value.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", sorted(SHAPES.keys() - {"long", "wide-basis"}))
def test_the_plan_does_not_change_a_bit(host: ctypes.CDLL, shape: str, kind: str, pairing: str) -> None:
    call = make(SHAPES[shape], KINDS[kind], spectrum(SHAPES[shape], pairing=pairing))
    chosen = run(host, call, 0, 0, 0)
    for plan in plans(call):
        for got, wanted in zip(run(host, call, *plan), chosen, strict=True):
            assert got.tobytes() == wanted.tobytes(), plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("pads", [(1.0, 1.0), (0.0, 1.0), (0.25, -3.0)], ids=str)
def test_pads_and_sign(host: ctypes.CDLL, kind: str, sign: int, pads: tuple[float, float]) -> None:
    for pairing in ("half", "interleaved"):
        numbers = spectrum(SHAPES["gqa"], pairing=pairing, sign=sign, sin_pad=pads[0], cos_pad=pads[1])
        call = make(SHAPES["gqa"], KINDS[kind], numbers)
        assert worst(call, run(host, call, 0, 0, 0)) <= ULPS


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rotary_dim"), [("gqa", 10), ("mha", 32), ("mha", 48), ("19-padded", 96)])
def test_channels_that_form_no_pair_are_copied(
    host: ctypes.CDLL, shape: str, rotary_dim: int, kind: str, pairing: str
) -> None:
    call = make(SHAPES[shape], KINDS[kind], spectrum(SHAPES[shape], pairing=pairing, rotary_dim=rotary_dim))
    chosen = run(host, call, 0, 0, 0)
    assert worst(call, chosen) <= ULPS
    for x, got in zip((call.q, call.k), chosen, strict=True):
        assert got[..., rotary_dim:].tobytes() == x[..., rotary_dim:].tobytes()
    for plan in plans(call):
        for got, wanted in zip(run(host, call, *plan), chosen, strict=True):
            assert got.tobytes() == wanted.tobytes(), plan


@pytest.mark.parametrize("kind", KINDS)
def test_rope(host: ctypes.CDLL, kind: str) -> None:
    freq = (1e4 ** -(np.arange(32) / 32)).astype(np.float32)
    call = make(Shape(2, 5, 4, 2, 64, 32, 32, 1), KINDS[kind], Spectrum.rope(freq, 64))
    assert worst(call, run(host, call, 0, 0, 0)) <= ULPS


@pytest.mark.parametrize("kind", KINDS)
def test_nope_changes_nothing(host: ctypes.CDLL, kind: str) -> None:
    call = make(Shape(2, 5, 4, 2, 48, 0, 0, 1), KINDS[kind], Spectrum.nope(48))
    q, k = run(host, call, 0, 0, 0)
    assert (q == call.q).all() and (k == call.k).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_unaligned_tensor_is_read_by_the_element(host: ctypes.CDLL, kind: str) -> None:
    call = make(SHAPES["gqa"], KINDS[kind], spectrum(SHAPES["gqa"]))
    for got, wanted in zip(run(host, call, 0, 0, 0, shift=1), run(host, call, 0, 0, 0), strict=True):
        assert got.tobytes() == wanted.tobytes()
    outputs = Fenced(call.q, 1), Fenced(call.k, 1)
    widest = 16 // call.kind.numpy.itemsize
    assert host.fope_rotary_host(ctypes.byref(arguments(call, outputs)), 0, widest, 0) == PLAN


@pytest.mark.parametrize("refusal", REFUSALS)
def test_wrong_arguments_are_refused(host: ctypes.CDLL, refusal: str) -> None:
    changes, code = REFUSALS[refusal]
    assert code_of(host.fope_rotary_host, changes, 0, 0, 0) == code


@pytest.mark.parametrize("refusal", GENERAL_REFUSALS)
def test_wrong_general_arguments_are_refused(host: ctypes.CDLL, refusal: str) -> None:
    changes, code = GENERAL_REFUSALS[refusal]
    assert code_of(host.fope_rotary_host_general, changes, 0, 0, 0, general=True) == code


@pytest.mark.parametrize("plan", [(2, 0, 0), (0, 2, 0), (0, 0, 257), (0, 0, -1)], ids=str)
def test_plans_that_do_not_exist_are_refused(host: ctypes.CDLL, plan: tuple[int, int, int]) -> None:
    assert code_of(host.fope_rotary_host, {}, *plan) == PLAN


def test_no_tokens_are_no_work(host: ctypes.CDLL) -> None:
    assert code_of(host.fope_rotary_host, {"tokens": 0, "q": None}, 0, 0, 0) == 0


MUTATIONS = {
    "direction": ("-(right * by[v].sin)", "right * by[v].sin"),
    "sign": ("a.sign * sum.at[t].sin", "sum.at[t].sin"),
    "sine pad 0": ("a.sign * a.sin_pad}", "0.0F}"),
    "group": ("(first_group + group) * rows(a)", "(first_group) * rows(a)"),
    "position": ("a.position_ids[token]", "a.position_ids[0]"),
    "last frequency": ("for (; d < end; ++d)", "for (; d + 1 < end; ++d)"),
    "key heads": ("member : member - of.heads", "member : 0"),
    "pairing": ("i = Interleaved ? 2 * v : v", "i = v"),
    "column": ("return pair % Vector * of.stride + pair / Vector;", "return pair;"),
    "token of a piece": ("first = part * kTogether", "first = 0 * part"),
    "wide angle": ("float const angle = static_cast<float>(", "double const angle = static_cast<double>("),
    "half a series": ("sum.at[t].cos += terms.at[t].cos", "sum.at[t].cos += float(__half(terms.at[t].cos))"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_a_broken_kernel_is_noticed(toolchain: compiling.Toolchain, tmp_path: Path, mutation: str | None) -> None:
    sources = mutated(tmp_path, *MUTATIONS[mutation]) if mutation else compiling.SOURCES
    built = compiling.build(compiling.HOST, toolchain, cache=tmp_path, flags=("-O0",), sources=sources)
    shape = SHAPES["two-key-heads-a-group"]
    call = make(shape, KINDS["fp32"], spectrum(shape, sign=-1, pairing="interleaved"))
    assert (error_of(ctypes.CDLL(str(built)), call) > ULPS) == bool(mutation)


def error_of(library: ctypes.CDLL, call: Call) -> float:
    try:
        return worst(call, run(library, call, 8, 4, 256))
    except AssertionError:  # not everything written, or more than that
        return np.inf


GENERAL_MUTATIONS = {
    "axes swapped": ("a.axis[d] * a.tokens", "(2 - a.axis[d]) * a.tokens"),
    "one axis": ("a.axis[d] * a.tokens + token", "token"),
    "phases dropped": ("if (!kGeneral<Arguments> || !other()) return;", "return;"),
    "phase of the other sign": ("fmaf(turns.at[t].sin, of_sin,", "fmaf(-turns.at[t].sin, of_sin,"),
    "bases exchanged": ("+ first(group) + other();", "+ first(group);"),
    "rows of one basis": ("{ return a.rows; }", "{ return a.frequencies; }"),
    "positions rounded": (
        "static_cast<float const*>(a.positions)[place]", "std::rint(static_cast<float const*>(a.positions)[place])"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", [None, *GENERAL_MUTATIONS])
def test_a_broken_general_kernel_is_noticed(
    toolchain: compiling.Toolchain, tmp_path: Path, mutation: str | None
) -> None:
    sources = mutated(tmp_path, *GENERAL_MUTATIONS[mutation]) if mutation else compiling.SOURCES
    built = compiling.build(compiling.HOST, toolchain, cache=tmp_path, flags=("-O0",), sources=sources)
    shape = SHAPES["two-key-heads-a-group"]
    call = make(shape, KINDS["fp32"], spectrum(shape, axes=3, bases=2), whole=False)
    assert (error_of(ctypes.CDLL(str(built)), call) > ULPS) == bool(mutation)
