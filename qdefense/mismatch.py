"""When shadow and session disagree: which of the known causes it is, and in which layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from qdefense.data.images import Pixels
from qdefense.fidelity import MismatchCause, compare_logits, shadow_logits
from qdefense.session import DeployedSession, SessionError, SessionProfile

if TYPE_CHECKING:
    from qdefense.converters.shadow import Shadow

_ROWS = 64
_SMALLEST_DIFFERENCE = 1e-3


def find_cause(session: DeployedSession, shadow: Shadow, pixels: Pixels, *, saturate: bool) -> MismatchCause:
    """Try the causes one by one, each by the change that would cure it; what none cures is called numerics."""
    x = pixels[:_ROWS]
    expected = shadow_logits(shadow, x, saturate=saturate)
    if _agrees(session, {"batch": 1}, x, expected):
        return _batch(session)
    if compare_logits(session.logits(x), shadow_logits(shadow, x, saturate=not saturate)).passes:
        return _saturation(session)
    if _agrees(session, {"optimization": "disable"}, x, expected):
        return _optimization(session, shadow)
    layer = next(_diverging(session, shadow, x, saturate=saturate), None)
    where = "no tensor that can be tapped differs" if layer is None else f"first difference at {layer!r}"
    return MismatchCause(kind="numerics", layers=() if layer is None else (layer,), detail=where)


def _agrees(session: DeployedSession, change: dict[str, object], x: Pixels, expected: np.ndarray) -> bool:
    profile = SessionProfile.model_validate({**session.profile.model_dump(), **change})
    if profile == session.profile:
        return False
    return compare_logits(DeployedSession(session.artifact, profile).logits(x), expected).passes


def _batch(session: DeployedSession) -> MismatchCause:
    layers = session.artifact.batch_coupled_layers
    return MismatchCause(
        kind="batch",
        layers=layers,
        detail=f"{len(layers)} dynamic quantizers scale a batch of {session.profile.batch} as one; run it at batch 1",
    )


def _saturation(session: DeployedSession) -> MismatchCause:
    layers = session.artifact.inspection.saturation_layers
    return MismatchCause(
        kind="saturation",
        layers=layers,
        detail=f"int16 saturation in {', '.join(map(repr, layers[:3])) or 'an unnamed layer'}; "
        "quantize with reduce_range or set session.x64quantprecision",
    )


def _optimization(session: DeployedSession, shadow: Shadow) -> MismatchCause:
    run_by_runtime = set(session.artifact.runtime_layers)
    fused = tuple(name for name in shadow.node_names if name not in run_by_runtime)
    return MismatchCause(
        kind="optimization-level",
        layers=fused,
        detail=f"the shadow follows the unoptimized graph, the session runs at {session.profile.optimization!r}, "
        f"which replaces {len(fused)} nodes; build the shadow from the optimized graph",
    )


def _diverging(session: DeployedSession, shadow: Shadow, x: Pixels, *, saturate: bool) -> Iterator[str]:
    """Names of tensors, in graph order, where the shadow leaves the session's value."""
    import torch  # noqa: PLC0415 (torch stays off the way to inspect)

    with torch.no_grad():
        values = shadow.activations(torch.from_numpy(x), shadow.tensor_names, saturate=saturate)
    for name, value in values.items():
        try:
            measured = session.activations(x, name).astype(np.float64)
        except SessionError:
            continue
        own = value.double().numpy()
        scale = max(float(np.abs(measured).max(initial=0)), 1e-12)
        if own.shape == measured.shape and not np.allclose(own, measured, atol=_SMALLEST_DIFFERENCE * scale, rtol=0):
            yield name
