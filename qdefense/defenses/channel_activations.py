"""Mean activation of each channel of the last feature map, as the deployed file has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from qdefense.converters.channels import FeatureMap
from qdefense.converters.shadow import Shadow
from qdefense.data.images import ImageSet, Pixels
from qdefense.defenses.dormancy import channel_sums
from qdefense.evidence import Evidence
from qdefense.session import DeployedSession, SessionError, rows_at_once

Source = Literal["session", "shadow"]
_Read = Callable[[Pixels], NDArray[np.generic]]


class ActivationError(RuntimeError):
    """Neither session nor shadow gives the feature map's values."""


@dataclass(frozen=True, kw_only=True)
class ChannelActivations:
    """What clean images wake.

    Attributes:
        means: ``(C,) float64``, in units of the tensor: its codes where it holds codes, which share one scale.
        tensor: its name.
        measured_on: the deployed session, or the certified shadow.
    """

    means: NDArray[np.float64]
    tensor: str
    measured_on: Source


def mean_activations(evidence: Evidence, feature_map: FeatureMap, images: ImageSet) -> ChannelActivations:
    """Mean over images and places, read off the session where a tap reaches the map, else off the certified shadow.

    Raises:
        ActivationError: the map is fused away in both, or the shadow is not certified.
    """
    session, certificate = evidence.session, evidence.certificate
    shadow = evidence.shadow if certificate.certified else None
    known = {name for node in onnx.load_from_string(session.graph).graph.node for name in node.output}
    for tensor in feature_map.tensors:
        if tensor in known:
            try:
                means = _means(_tap(session, tensor), images, feature_map.channels)
            except SessionError:
                continue  # the tap would break a fusion; an earlier tensor may be free
            if means is not None:
                return ChannelActivations(means=means, tensor=tensor, measured_on="session")
    for tensor in feature_map.tensors:
        if shadow is not None and tensor in shadow.tensor_names:
            means = _means(
                _look(shadow, tensor, saturate=certificate.saturation_emulated), images, feature_map.channels
            )
            if means is not None:
                return ChannelActivations(means=means, tensor=tensor, measured_on="shadow")
    raise ActivationError("the last feature map can be read neither from the session nor from a certified shadow")


def _means(read: _Read, images: ImageSet, channels: int) -> NDArray[np.float64] | None:
    """None where the runtime keeps the map in another layout."""
    total, count = np.zeros(channels), 0
    for pixels in images.in_pixels():
        values = read(pixels)
        if values.ndim != 4 or values.shape[1] != channels:
            return None
        total += channel_sums(values)
        count += values.size // channels
    return total / count


def _tap(session: DeployedSession, tensor: str) -> _Read:
    return lambda pixels: session.activations(pixels, tensor)


def _look(shadow: Shadow, tensor: str, *, saturate: bool) -> _Read:
    @torch.no_grad()
    def read(pixels: Pixels) -> NDArray[np.generic]:
        parts = torch.split(torch.from_numpy(pixels), rows_at_once(*pixels.shape[2:]))
        found = [shadow.activations(part, [tensor], saturate=saturate)[tensor] for part in parts]
        values: NDArray[np.generic] = torch.cat(found).numpy()
        return values

    return read
