"""The checks that must be green before anything is timed, and the checks of these checks."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gpu_suite.cases import (
    CONTROLLED,
    CONTROLS,
    GENERAL_CONTROLS,
    KINDS,
    ULPS,
    Call,
    Case,
    Finding,
    Launch,
    check,
    define,
    make,
)

PLANS = ((1, 0, 0), (4, 0, 0), (8, 0, 0), (1, 1, 32), (4, 1, 96), (8, 1, 256))
PLANNED = (CONTROLLED, CONTROLLED._replace(E=128, D=31, F=31))
WRONG = Case(CONTROLLED, sin_pad=0.5)


def prove(
    launch: Launch, chosen: Sequence[Case], device: torch.device,
    planned: Callable[[int, int, int], Launch] | None = None,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Check all `chosen` cases, then every plan, then that wrong calls are noticed. The record, and what failed."""
    findings = [examine(launch, case, device) for case in chosen]
    for plan, shape, kind in product(PLANS if planned else (), PLANNED, KINDS):
        assert planned is not None
        case = Case(shape, kind, interleaved=plan[0] == 4)
        findings.append(examine(planned(*plan), case, device, name=f"plan {plan}: {case}"))
    failed = [finding for finding in findings if finding.fault]
    definition = "not compared: red" if failed else against_reference(device)
    controls = [] if failed else controlled(launch, device)
    passed = [finding for finding in controls if not finding.fault]
    worst = {
        kind: max((f.ulps for f in findings if kind in f.name and f.ulps is not None), default=None) for kind in KINDS
    }
    record = {
        "bound_ulps": ULPS, "count": len(findings), "failed": len(failed), "worst_ulps": worst,
        "controls": len(controls), "controls_passed": len(passed), "definition": definition,
        "findings": [f.record() for f in findings], "control_findings": [f.record() for f in controls],
    }  # fmt: skip
    faults = [f"{f.name}: {f.fault}" for f in failed] + [f"not noticed: {f.name}" for f in passed]
    if definition.startswith("differs"):
        faults.append(f"definition: {definition}")
    return record, faults


def examine(launch: Launch, case: Case, device: torch.device, name: str = "") -> Finding:
    """Check one case. A kernel that went astray may have left a GPU on which nothing works any more."""
    try:
        return check(launch, make(case, device), name=name)
    except RuntimeError as error:
        return Finding(name or str(case), None, f"{type(error).__name__}: {error}"[:500])


def controlled(launch: Launch, device: torch.device) -> list[Finding]:
    """Wrong calls, in every type; and a launch that does nothing, or too much. Each must have a fault."""
    findings = []
    for kind in KINDS:
        call = make(Case(WRONG.shape, kind, sin_pad=WRONG.sin_pad), device)
        general = make(replace(call.case, axes=3, bases=2, whole=False), device)
        for right, wrong in ((call, CONTROLS), (general, GENERAL_CONTROLS)):
            for name, spoil in wrong.items():
                findings.append(check(launch, right, spoil(right), name=f"{kind}: {name}"))
        findings.append(check(lambda *_: None, call, name=f"{kind}: nothing written"))
        findings.append(check(_beyond(launch), call, name=f"{kind}: one element too many"))
    return findings


def _beyond(launch: Launch) -> Launch:
    """Right, but for one element behind k's result."""

    def spoilt(call: Call, q_rotated: Tensor, k_rotated: Tensor) -> None:
        launch(call, q_rotated, k_rotated)
        k_rotated.as_strided((1,), (1,), k_rotated.storage_offset() + k_rotated.numel()).zero_()

    return spoilt


def against_reference(device: torch.device) -> str:
    """Whether the definition here is that of fope_export, which needs packages that may be missing."""
    try:
        from fope_export.fope import reference
        from fope_export.fope.spectrum import Spectrum
    except ImportError as missing:
        return f"not compared: {missing}"
    gaps = []
    plain = Case(CONTROLLED, "fp32", sin_pad=0.25)
    for case in (plain, replace(plain, interleaved=True, sign=-1), replace(plain, axes=3, bases=2, whole=False)):
        call = make(case, device)
        freq, sin_coef, cos_coef = (t.cpu().numpy() for t in (call.freq, call.sin_coef, call.cos_coef))
        fields = {
            "sin_pad": 0.25, "sign": int(case.sign), "pairing": "interleaved" if case.interleaved else "half",
            "axes": case.axes, "bases": case.bases, "axis": () if call.axis is None else tuple(call.axis.tolist()),
        }  # fmt: skip
        spectrum = Spectrum.fope(freq, sin_coef, cos_coef, call.case.shape.E, **fields)
        for x in (call.q, call.k):
            wanted = torch.from_numpy(reference.rotate(spectrum, x.cpu().numpy(), call.position_ids.cpu().numpy()))
            gaps.append(float((define(call, x, call.position_ids)[0].cpu() - wanted).abs().max()))
    return "agrees" if max(gaps) < 1e-12 else f"differs by {max(gaps):.3g}"


def line(record: dict[str, Any]) -> str:
    """The record in a line."""
    return (
        f"{record['count'] - record['failed']} of {record['count']} checks hold, worst ulps "
        f"{json.dumps(record['worst_ulps'])}; {record['controls'] - record['controls_passed']} of "
        f"{record['controls']} wrong ones noticed; definition {record['definition']}"
    )
