"""What is measured on sample text before linear layers are rounded, and whether anything is."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from fope_export.config import ExportConfig
from fope_export.dtypes import either
from fope_export.errors import ConfigError
from fope_export.graph.calibration import calibrate, calibration_windows, smoothed
from fope_export.graph.compensation import Moments
from fope_export.graph.ways import Measured
from fope_export.model.checkpoint import Checkpoint
from fope_export.model.conversion import ConvertedWeights
from fope_export.model.decoder import Decoder
from fope_export.quantizations import COMPENSATED, NEAREST, QUANTIZATIONS, calibrated, in_blocks


def sampled(
    source: Checkpoint, config: ExportConfig, file: Path | None
) -> tuple[ExportConfig, NDArray[np.int64] | None]:
    """The config with a rounding where it has blocks, and the tokens on which its way to round needs measurements."""
    row = config.quantization
    if not row or config.rounding == NEAREST or not (row.calibrated or row.block):
        if file:
            raise ConfigError(
                f"{file} calibrates nothing",
                hint=f"Choose quantize {either([*calibrated(), *in_blocks()])}, or leave it out.",
            )
        return config, None
    asked = row.calibrated or config.rounding or file
    if not (asked or row.compensates):
        return msgspec.structs.replace(config, rounding=NEAREST), None
    try:
        windows = calibration_windows(
            source.tokenizer_folder, file, source.config.vocab_size, source.config.training_length
        )
    except ConfigError:
        if asked:
            raise
        return msgspec.structs.replace(config, rounding=NEAREST), None
    return msgspec.structs.replace(config, rounding=COMPENSATED if row.block else None), windows


def measured_on(
    windows: NDArray[np.int64] | None, weights: ConvertedWeights, outline: Decoder, report: Callable[[str], None]
) -> Measured:
    """What linear layers are rounded by, on sample tokens; moments are measured as they are asked for."""
    source, config = weights.source, weights.config
    if windows is None or config.quantize is None:
        return None
    row = QUANTIZATIONS[config.quantize]
    if not row.calibrated:
        return Moments(outline, weights, torch.from_numpy(windows))
    report("calibrating")
    measure = calibrate if row.rounds_inputs else smoothed
    return measure(source.model.converted(config), config.quantize, windows)
