"""The fidelity certificate: may gradients of this shadow stand for this session? Its pass marks are constants here.

Four input sets of at least 256 images go through both: clean images; uniformly random ones; clean images moved 4, 8 or
16/255 towards a random class along the shadow's gradient sign; clean images with a random patch or a random blend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from qdefense.arithmetic import ArithmeticAgreement, OtherArithmetic
from qdefense.data.images import ImageSet, Pixels, on_grid
from qdefense.session import DeployedSession, Logits, rows_at_once

if TYPE_CHECKING:
    from torch import Tensor

    from qdefense.converters.shadow import Shadow

MIN_ROWS = 256
MIN_TOP1_AGREEMENT = 0.995
MAX_RELATIVE_RMS = 0.05
MIN_GRADIENT_ROWS = 0.99
GRADIENT_STEPS = (4, 8, 16)
"""Steps of the third input set, in units of 1/255."""
DIRECTIONAL_STEP = 1e-8
"""Small, because a ReLU that switches within it spoils the difference: at 1e-6 it hit 1 row of 256 on a right graph."""
DIRECTIONAL_TOLERANCE = 1e-4
"""Largest difference between a directional derivative and its central difference, over the gradient's norm."""

_BLEND = 0.2
_PATCHES = (3, 8)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


_SetName = Literal["clean", "uniform", "gradient-steps", "stamped"]


class InputSetFidelity(_Record):
    """Shadow against session on one input set; differences in logits, null where a logit is not finite."""

    name: _SetName
    n: int
    top1_agreement: float
    max_abs_logit_diff: float | None
    mean_abs_logit_diff: float | None
    rms_logit_diff: float | None
    relative_rms: float | None = Field(description="RMS difference over the standard deviation of the session's logits")
    bit_exact_rows: float
    passes: bool


class GradientCheck(_Record):
    """Whether gradients exist; for float graphs also whether they are right."""

    rows: int
    finite_rows: float
    nonzero_rows: float
    directional_rows: float | None = Field(
        default=None, description="float graphs: share of rows whose float64 directional derivative is right"
    )
    passes: bool


class MismatchCause(_Record):
    """Why the shadow and the session differ, and where."""

    kind: Literal["saturation", "batch", "optimization-level", "unsupported-operator", "numerics"]
    layers: tuple[str, ...]
    detail: str


class FidelityCertificate(_Record):
    """The permission to use a shadow, or the reason why not."""

    certified: bool
    reason: str
    source: Literal["optimized", "shipped"]
    saturation_emulated: bool = False
    sets: tuple[InputSetFidelity, ...] = ()
    gradients: GradientCheck | None = None
    cause: MismatchCause | None = None
    arithmetic: ArithmeticAgreement | None = Field(
        default=None,
        description="as-run against exact arithmetic on the same images; null for float files and where nothing ran",
    )


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """``session`` and ``shadow`` logits of the same rows, compared."""

    n: int
    top1_agreement: float
    max_abs: float
    mean_abs: float
    rms: float
    relative_rms: float
    bit_exact_rows: float
    not_finite_rows: int = 0

    @property
    def passes(self) -> bool:
        """Top-1 agreement of at least 0.995 and an RMS difference of at most 5 % of the logits' spread."""
        return self.top1_agreement >= MIN_TOP1_AGREEMENT and self.relative_rms <= MAX_RELATIVE_RMS

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.not_finite_rows:
            return f"{self.not_finite_rows} of {self.n} rows have values that are not finite"
        return (
            f"top-1 agreement {self.top1_agreement:.4f}, RMS difference {self.relative_rms:.2%} of the logits' spread"
        )


def compare_logits(session: Logits, shadow: Logits) -> LogitComparison:
    """Compare ``(N, K) float32`` logits; a value that is not finite on either side is a difference without bound.

    Its row has no top class and agrees in nothing.
    """
    finite = np.isfinite(session).all(axis=1) & np.isfinite(shadow).all(axis=1)
    if not finite.all():
        unbounded = float("inf")
        return LogitComparison(
            n=len(session),
            top1_agreement=float(np.mean((session.argmax(1) == shadow.argmax(1)) & finite)),
            max_abs=unbounded,
            mean_abs=unbounded,
            rms=unbounded,
            relative_rms=unbounded,
            bit_exact_rows=float(np.mean((session == shadow).all(axis=1) & finite)),
            not_finite_rows=int((~finite).sum()),
        )
    difference = np.abs(session.astype(np.float64) - shadow)
    spread = float(session.astype(np.float64).std())
    rms = float(np.sqrt((difference**2).mean()))
    return LogitComparison(
        n=len(session),
        top1_agreement=float(np.mean(session.argmax(1) == shadow.argmax(1))),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        rms=rms,
        relative_rms=rms / spread if spread else (0.0 if rms == 0 else float("inf")),
        bit_exact_rows=float(np.mean((session == shadow).all(axis=1))),
    )


def finite_or_none(value: float) -> float | None:
    """JSON has no infinity and no NaN: such a figure is null in a report."""
    return value if np.isfinite(value) else None


def shadow_logits(shadow: Shadow, x: Pixels, *, saturate: bool = False) -> Logits:
    """The shadow's exact logits of ``x: (N, 3, H, W)``, without gradients."""
    import torch  # noqa: PLC0415 (torch stays off the way to inspect)

    with torch.no_grad():
        parts = [
            shadow(torch.from_numpy(np.ascontiguousarray(x[rows])), exact=True, saturate=saturate)
            for rows in _chunks(x)
        ]
    return torch.cat(parts).numpy()


def _chunks(x: NDArray[np.floating]) -> Iterator[slice]:
    step = rows_at_once(*x.shape[2:])
    return (slice(start, start + step) for start in range(0, len(x), step))


def certify(
    session: DeployedSession, shadow: Shadow, clean: ImageSet, *, seed: int, saturate: bool | None = None
) -> FidelityCertificate:
    """Compare a shadow with the session it stands for.

    ``saturate`` emulates int16 saturation in the shadow's value; ``None`` does so where this runtime was measured to
    saturate, and the session's arithmetic is not exact.
    """
    from qdefense.converters.shadow import runtime_saturation  # noqa: PLC0415

    saturating = session.profile.arithmetic == "as-run" and bool(runtime_saturation())
    emulate = saturating if saturate is None else saturate
    if len(clean) < MIN_ROWS:
        return FidelityCertificate(
            certified=False,
            reason=f"{len(clean)} clean images; the certificate needs {MIN_ROWS}",
            source=shadow.source,
            saturation_emulated=emulate,
        )
    rng = np.random.default_rng([seed, len(clean)])
    pixels = clean.take(rng.permutation(len(clean))[:MIN_ROWS]).pixels
    gradients = check_gradients(shadow, pixels, rng)
    sets: list[InputSetFidelity] = []
    worst: InputSetFidelity | None = None
    differing = pixels
    other = OtherArithmetic(session)
    for name, x in _input_sets(shadow, pixels, rng):
        logits = session.logits(x)
        other.compare(x, logits)
        sets.append(_compare_set(name, logits, shadow_logits(shadow, x, saturate=emulate)))
        if not sets[-1].passes and (worst is None or _badness(sets[-1]) > _badness(worst)):
            worst, differing = sets[-1], x
    cause = None
    if worst is not None:
        from qdefense.mismatch import find_cause  # noqa: PLC0415

        cause = find_cause(session, shadow, differing, saturate=emulate)
    return FidelityCertificate(
        certified=worst is None and gradients.passes,
        reason=_reason(worst, gradients, cause),
        source=shadow.source,
        saturation_emulated=emulate,
        sets=tuple(sets),
        gradients=gradients,
        cause=cause,
        arithmetic=other.agreement,
    )


def _badness(compared: InputSetFidelity) -> tuple[bool, float]:
    """A value that is not finite is worse than any disagreement."""
    return compared.relative_rms is None, -compared.top1_agreement


def _reason(worst: InputSetFidelity | None, gradients: GradientCheck, cause: MismatchCause | None) -> str:
    if worst is not None:
        why = "" if cause is None else f"; cause: {cause.kind}, {cause.detail}"
        rms = "not finite" if worst.relative_rms is None else f"{worst.relative_rms:.2%} of the logits' spread"
        return f"{worst.name} images: top-1 agreement {worst.top1_agreement:.4f}, RMS difference {rms}{why}"
    if not gradients.passes:
        return (
            f"gradients: {gradients.nonzero_rows:.1%} of rows non-zero, {gradients.finite_rows:.1%} finite"
            + ("" if gradients.directional_rows is None else f", {gradients.directional_rows:.1%} right in float64")
            + ("" if gradients.nonzero_rows else "; no gradient reaches the images: the answers may not depend on them")
        )
    return "all four input sets and the gradient checks pass"


def _compare_set(name: _SetName, session: Logits, shadow: Logits) -> InputSetFidelity:
    found = compare_logits(session, shadow)
    return InputSetFidelity(
        name=name,
        n=found.n,
        top1_agreement=found.top1_agreement,
        max_abs_logit_diff=finite_or_none(found.max_abs),
        mean_abs_logit_diff=finite_or_none(found.mean_abs),
        rms_logit_diff=finite_or_none(found.rms),
        relative_rms=finite_or_none(found.relative_rms),
        bit_exact_rows=found.bit_exact_rows,
        passes=found.passes,
    )


def _input_sets(shadow: Shadow, pixels: Pixels, rng: np.random.Generator) -> Iterator[tuple[_SetName, Pixels]]:
    # One after the other: four sets of large images at once would be the largest thing in memory.
    yield "clean", pixels
    yield "uniform", on_grid(rng.random(pixels.shape, dtype=np.float32))
    yield "gradient-steps", _step_towards_random_classes(shadow, pixels, rng)
    yield "stamped", _stamp_at_random(pixels, rng)


def _step_towards_random_classes(shadow: Shadow, pixels: Pixels, rng: np.random.Generator) -> Pixels:
    gradient = input_gradients(shadow, pixels, _random_targets(shadow, pixels, rng))
    sizes = np.resize(np.array(GRADIENT_STEPS, dtype=np.float32) / 255, len(pixels)).reshape(-1, 1, 1, 1)
    return on_grid(np.clip(pixels + sizes * np.sign(np.nan_to_num(gradient)), 0, 1))


def _random_targets(shadow: Shadow, pixels: Pixels, rng: np.random.Generator) -> NDArray[np.int64]:
    """Random classes other than the shadow's own answer, where a confident network has no gradient left in float32."""
    logits = shadow_logits(shadow, pixels)
    others = rng.integers(1, max(logits.shape[1], 2), size=len(pixels))
    targets: NDArray[np.int64] = (logits.argmax(axis=1) + others) % logits.shape[1]
    return targets


def _stamp_at_random(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    stamped = pixels.copy()
    half, height, width = len(pixels) // 2, *pixels.shape[2:]
    for row in range(half):
        size = min(int(rng.integers(*_PATCHES, endpoint=True)), height, width)
        top, left = int(rng.integers(0, height - size + 1)), int(rng.integers(0, width - size + 1))
        stamped[row, :, top : top + size, left : left + size] = rng.random((3, 1, 1)).round()
    blended = rng.random(pixels[half:].shape, dtype=np.float32)
    stamped[half:] = (1 - _BLEND) * stamped[half:] + _BLEND * blended
    return on_grid(stamped)


def input_gradients(shadow: Shadow, pixels: NDArray[np.floating], targets: NDArray[np.int64]) -> NDArray[np.floating]:
    """Gradient of each row's target log-probability in its input, ``(N, 3, H, W)``; zeros where there is none."""
    import torch  # noqa: PLC0415

    gradients = np.zeros_like(pixels)
    for rows in _chunks(pixels):
        x = torch.from_numpy(np.ascontiguousarray(pixels[rows])).requires_grad_()
        loss = _log_probability(shadow(x), torch.from_numpy(targets[rows])[:, None]).sum()
        gradient = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
        if gradient is not None:
            gradients[rows] = gradient.numpy()
    return gradients


def _log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, targets)[:, 0]


def check_gradients(shadow: Shadow, pixels: Pixels, rng: np.random.Generator) -> GradientCheck:
    """Finite and non-zero on at least 99 % of clean rows; float graphs also right along random directions."""
    targets = _random_targets(shadow, pixels, rng)
    gradient = input_gradients(shadow, pixels, targets).reshape(len(pixels), -1)
    finite = float(np.isfinite(gradient).all(axis=1).mean())
    nonzero = float((np.nan_to_num(gradient) != 0).any(axis=1).mean())
    directional = None if shadow.is_quantized else _directional_share(shadow, pixels, targets, rng)
    return GradientCheck(
        rows=len(pixels),
        finite_rows=finite,
        nonzero_rows=nonzero,
        directional_rows=directional,
        passes=min(finite, nonzero, 1.0 if directional is None else directional) >= MIN_GRADIENT_ROWS,
    )


def _directional_share(shadow: Shadow, pixels: Pixels, targets: NDArray[np.int64], rng: np.random.Generator) -> float:
    """Share of rows with ``|(f(x + hv) - f(x - hv)) / 2h - g.v| <= 1e-4 |g|`` in float64, ``v`` a random direction."""
    twin = shadow.to_double()
    right = [_directions_right(twin, pixels[rows].astype(np.float64), targets[rows], rng) for rows in _chunks(pixels)]
    return float(np.mean(np.concatenate(right)))


def _directions_right(
    twin: Shadow, pixels: NDArray[np.float64], targets: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.bool_]:
    import torch  # noqa: PLC0415

    direction = rng.standard_normal(pixels.shape)
    direction /= np.sqrt((direction**2).sum(axis=(1, 2, 3), keepdims=True))
    gradient = input_gradients(twin, pixels, targets)
    chosen = torch.from_numpy(targets)[:, None]

    def value(x: NDArray[np.float64]) -> NDArray[np.float64]:
        with torch.no_grad():
            return _log_probability(twin(torch.from_numpy(x)), chosen).numpy()

    step = DIRECTIONAL_STEP * direction
    difference = (value(pixels + step) - value(pixels - step)) / (2 * DIRECTIONAL_STEP)
    slope = (gradient * direction).sum(axis=(1, 2, 3))
    norm = np.sqrt((gradient**2).sum(axis=(1, 2, 3)))
    right: NDArray[np.bool_] = np.abs(difference - slope) <= DIRECTIONAL_TOLERANCE * norm
    return right


def uncertified(reason: str, cause: MismatchCause | None = None) -> FidelityCertificate:
    """The certificate of a file that no shadow could be built for."""
    return FidelityCertificate(certified=False, reason=reason, source="optimized", cause=cause)
