"""What a bundle's parity report says, and whether it is about the files that the bundle has now."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fope_export.bundle import Bundle
from fope_export.documents import as_record, read_object
from fope_export.errors import BundleError, DocumentError
from fope_export.manifest import REPORTS, judged_files

REPORT = "parity.json"


@dataclass(frozen=True)
class Tested:
    """What the cases ran on: a backend, its variant of the bundle, and the hashes of the files that this is made of."""

    backend: str
    variant: str
    files: dict[str, str]


def require_green(bundle: Bundle, folder: Path | None = None) -> tuple[Tested, ...]:
    """What of the bundle was validated, by the report in `folder` (None: the bundle's own). Raises BundleError unless
    that is what the files are now, and passed.
    """
    path = (folder or bundle.path / REPORTS) / REPORT
    hint = f"Run `fope-export validate {bundle.path}` first."
    if not path.is_file():
        raise BundleError(f"{bundle.path} was not validated: there is no {path}", hint=hint)
    try:
        report = read_object(path)
        tested = as_record(report.get("tested"), tuple[Tested, ...], "tested")
    except DocumentError as cause:
        raise BundleError(f"{path} is not a report: {cause}", hint=hint) from cause
    if report.get("files") != judged_files(bundle.manifest) or not _are(tested, bundle):
        raise BundleError(f"{path} is about other files than the bundle's", hint=hint)
    if report.get("passed") is not True:
        raise BundleError(f"{path} says that the bundle FAILED", hint=hint)
    return tested


def require_tested(bundle: Bundle, folder: Path | None, backend: str, variant: str, *, otherwise: str) -> None:
    """Raises BundleError unless the report in `folder` (None: the bundle's own) says that this backend computes this
    variant of the bundle right; `otherwise` is what else can be done.
    """
    tested = require_green(bundle, folder)
    if (backend, variant) not in {(each.backend, each.variant) for each in tested}:
        passed = ", ".join(f"{each.variant} in {each.backend}" for each in tested)
        raise BundleError(
            f"{bundle.path}: the report is about {passed}, and {variant} in {backend} is to be served",
            hint=f"Run `fope-export validate {bundle.path} --backend {backend}`, or {otherwise}.",
        )


def _are(tested: Sequence[Tested], bundle: Bundle) -> bool:
    """Whether what was tested is what the bundle has."""
    return bool(tested) and all(each.files.items() <= bundle.manifest.files.items() for each in tested)
