"""When shadow and session disagree: which of the known causes it is, and in which layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdefense.converters.reading import safe_text
from qdefense.data.images import Pixels
from qdefense.fidelity import MismatchCause, compare_logits, shadow_logits
from qdefense.session import DeployedSession, Logits, SessionError

if TYPE_CHECKING:
    from qdefense.converters.shadow import Shadow

_ROWS = 64
_SMALLEST_DIFFERENCE = 1e-3
_TAPS_AT_ONCE = 16


def find_cause(session: DeployedSession, shadow: Shadow, x: Pixels, *, saturate: bool) -> MismatchCause:
    """Try the causes one by one, each by the change that would cure it; what none cures is called numerics.

    ``x: (N, 3, H, W) float32 in [0, 1]`` are images on which the two disagree.
    """
    measured, expected = session.logits(x), shadow_logits(shadow, x, saturate=saturate)
    if not np.isfinite(measured).all():
        return _nonfinite(session)
    coupled = session.artifact.batch_coupled and session.profile.batch > 1
    if coupled and compare_logits(_one_by_one(session, x), expected).passes:
        return _batch(session)
    if compare_logits(measured, shadow_logits(shadow, x, saturate=not saturate)).passes:
        return _saturation(session, emulated=saturate)
    followed = _with(session, optimization="all" if shadow.source == "optimized" else "disable")
    if followed is not session and compare_logits(followed.logits(x), expected).passes:
        return _optimization(session, shadow)
    worst = np.argsort(-np.abs(measured - expected).max(axis=1), kind="stable")[:_ROWS]
    layer = next(_diverging(session, shadow, x[worst], saturate=saturate), None)
    where = "no tensor that can be tapped differs" if layer is None else f"first difference at {layer!r}"
    return MismatchCause(kind="numerics", layers=() if layer is None else (layer,), detail=where)


def _with(session: DeployedSession, **change: object) -> DeployedSession:
    profile = session.profile.with_changes(**change)
    return session if profile == session.profile else DeployedSession(session.artifact, profile)


def _one_by_one(session: DeployedSession, x: Pixels) -> Logits:
    fixed = session.artifact.contract.batch
    if fixed is None:
        return _with(session, batch=1).logits(x)
    return session.logits(np.repeat(x, fixed, axis=0))[::fixed]  # copies of one row share that row's scale


def _nonfinite(session: DeployedSession) -> MismatchCause:
    weights = session.artifact.inspection.nonfinite_initializers
    where = f", as are the weights {', '.join(map(repr, weights[:3]))}" if weights else ""
    return MismatchCause(kind="numerics", layers=weights, detail=f"the session's own logits are not finite{where}")


def _batch(session: DeployedSession) -> MismatchCause:
    layers = session.artifact.batch_coupled_layers
    return MismatchCause(
        kind="batch",
        layers=layers,
        detail=f"{len(layers)} dynamic quantizers scale a batch of {session.profile.batch} as one; "
        + ("run it at batch 1" if session.artifact.contract.batch is None else "export it with a batch of 1"),
    )


def _saturation(session: DeployedSession, *, emulated: bool) -> MismatchCause:
    layers = session.artifact.inspection.saturation_layers
    where = ", ".join(map(repr, layers[:3])) or "an unnamed layer"
    here = "emulated by the shadow but absent on this CPU" if emulated else "on this CPU, which the shadow left out"
    return MismatchCause(
        kind="saturation",
        layers=layers,
        detail=f"int16 saturation in {where}, {here}; quantize with reduce_range or set session.x64quantprecision",
    )


def _optimization(session: DeployedSession, shadow: Shadow) -> MismatchCause:
    shipped = shadow.source == "shipped"
    run_by_runtime = set(session.runtime_layers)
    replaced = tuple(safe_text(name) for name in shadow.node_names if name not in run_by_runtime) if shipped else ()
    remedy = "build the shadow from the optimized graph" if shipped else "run the session at 'all'"
    return MismatchCause(
        kind="optimization-level",
        layers=replaced,
        detail=f"the shadow follows the {shadow.source} graph, the session runs at {session.profile.optimization!r}, "
        f"which rounds elsewhere ({len(replaced)} of the shadow's nodes are replaced); {remedy}",
    )


def _diverging(session: DeployedSession, shadow: Shadow, x: Pixels, *, saturate: bool) -> Iterator[str]:
    """Names of tensors, in graph order, where the shadow leaves the session's value."""
    import torch  # noqa: PLC0415 (torch stays off the way to inspect)

    if session.artifact.batch_coupled and session.artifact.contract.batch is None:
        session = _with(session, batch=1)
    with torch.no_grad():
        values = shadow.activations(torch.from_numpy(x), shadow.tensor_names, exact=True, saturate=saturate)
    for name, tapped in _measured(session, x, list(values)):
        own, measured = values[name].double().numpy(), tapped.astype(np.float64)
        scale = max(float(np.abs(measured).max(initial=0)), 1e-12)
        if own.shape == measured.shape and not np.allclose(own, measured, atol=_SMALLEST_DIFFERENCE * scale, rtol=0):
            yield safe_text(name)


def _measured(session: DeployedSession, x: Pixels, names: list[str]) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """The session's values, several to a run; those that cannot be tapped are left out."""
    for start in range(0, len(names), _TAPS_AT_ONCE):
        yield from _tapped(session, x, names[start : start + _TAPS_AT_ONCE]).items()


def _tapped(session: DeployedSession, x: Pixels, names: list[str]) -> dict[str, NDArray[np.generic]]:
    try:
        return session.tap(x, names)
    except SessionError:
        half = len(names) // 2
        return _tapped(session, x, names[:half]) | _tapped(session, x, names[half:]) if half else {}
