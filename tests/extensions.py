"""Decoders whose spectrum has several axes of positions, coefficients over both bases, or both."""

from typing import Any

import msgspec
import numpy as np
import torch

from fope_export.backends.base import Feeds
from fope_export.fope import frequencies
from fope_export.fope.rotary import FopeRotary
from fope_export.fope.spectrum import Spectrum
from fope_export.model.decoder import Decoder
from fope_export.parity.axes import image_between
from tests.conftest import small_decoder


def extended(plain: Spectrum, *, axes: int = 1, bases: int = 1, seed: int = 0) -> Spectrum:
    """The same series, to which the other basis adds."""
    count = plain.config.frequencies
    axis = frequencies.axis_by_turns([count] * axes, count) if axes > 1 else ()
    config = msgspec.structs.replace(plain.config, axes=axes, axis=axis, bases=bases)
    if bases == 1:
        return Spectrum(config, plain.freq, plain.sin_coef, plain.cos_coef)
    rng = np.random.default_rng(seed)
    sines, cosines = (0.5 * rng.standard_normal(plain.sin_coef.shape).astype(np.float32) for _ in range(2))
    coefs = np.concatenate((plain.sin_coef, sines), axis=1), np.concatenate((cosines, plain.cos_coef), axis=1)
    return Spectrum(config, plain.freq, *coefs)


def extended_decoder(*, axes: int = 1, bases: int = 1, **fields: Any) -> Decoder:
    """See `small_decoder`."""
    plain = small_decoder(**fields)
    spectra = [
        extended(attention.rotary.spectrum, axes=axes, bases=bases, seed=i)
        for i, attention in enumerate(plain.attentions())
    ]
    model = Decoder(msgspec.structs.replace(plain.config, spectrum=spectra[0].config)).eval().requires_grad_(False)
    own = {name: tensor for name, tensor in plain.state_dict().items() if ".rotary." not in name}
    model.load_state_dict(own, strict=False)
    for attention, spectrum in zip(model.attentions(), spectra, strict=True):
        attention.rotary = FopeRotary.from_spectrum(spectrum)
    return model


def seen(feeds: Feeds, axes: int) -> Feeds:
    """The same tokens with an image between them."""
    rows, length = feeds.input_ids.shape
    return feeds._replace(position_ids=np.stack([image_between(length, axes) + row for row in range(rows)]))


def truth_at(model: Decoder, feeds: Feeds) -> torch.Tensor:
    """Logits of whole sequences in float64."""
    exact = model.sharing().double()
    inputs = [torch.from_numpy(np.ascontiguousarray(array)) for array in feeds]
    if inputs[2].ndim > 2:
        inputs[2] = inputs[2].movedim(-1, 0)
    with torch.inference_mode():
        logits: torch.Tensor = exact(*inputs, exact.empty_cache(len(feeds.input_ids)))[0]
    return logits
