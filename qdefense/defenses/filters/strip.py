"""STRIP (Gao et al. 2019, ACSAC, arXiv 1902.06531): an input whose prediction survives any overlay carries a trigger.

N clean images are laid over an input, one at a time, and the entropy of the N predictions is averaged,
``H = -(1/N) sum_n sum_c p_nc log2 p_nc`` (section 4). A trigger that works on every image forces one class whatever
else is in the picture, so that H is low. The boundary is the quantile at the chosen false rejection rate of a normal
distribution fitted to the entropies of clean images; an input below it is rejected (section 5).

Deviations from the paper and its code:
- Superimposing is ``x + overlay``, as the code does it (``cv2.addWeighted`` with weights 1 and 1 on images in [0, 1]):
  no average and no clipping, so that pixels reach 2. ``blend`` averages the two. What the file does to such pixels is
  part of what is measured, on clean images as on inputs: a float input takes them as they are; a uint8 input holds
  nothing above 255, so the sum is cut there, as ``addWeighted`` cuts it on uint8 images; the first quantizer of a
  static INT8 file cuts at the range that it was calibrated for. A white trigger then drowns in overlays cut to white:
  an AUROC of .97 in FP32 fell to .68, the same as with sums clipped in FP32 (small signs), one of .998 to .94 (GTSRB,
  `benchmarks/strip_latency.md`). Of a file that cuts every sum at 1 the boundary's ``note`` says so, and without
  an alarm an audit calls it NOT_MEASURED: a static INT8 file, whose first quantizer is calibrated on pixels of at most
  1, cannot pass with ``add``. So is a file that cuts at another place per channel, as one scale for channels of
  different mean and deviation does (ImageNet's: 1.09, 1.05 and 1), if no sum half way from 1 to the peaks is told from
  a higher one. ``blend`` stays in range and loses nothing there, but halves the trigger: it
  kept .92 on the first network, and .68 on the second in every form.
- Entropies are not normal, so that the real false rejection rate differs from the nominal one. The clean set is cut
  into overlays, up to 500 images for the fit, and up to 500 held-out ones, on which the real rate is measured, with
  an interval that takes images for independent. 500 bound a rate of .03 by .05, above which no number of inputs lets an
  audit say CLEAN; a lower ``false_rejection_rate`` does.
- The overlays are drawn once, by the seed, and are the same for every input, so that scores can be compared; the code
  draws anew for each.
- The entropies are computed from the logits or the log-probabilities of the file's head in float64.
- Near-chance accuracy, too few images, logits that are no numbers or entropies that do not differ: NOT_MEASURED. A
  boundary at or below 0 can reject nothing: scores are given, and an audit calls it NOT_MEASURED.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from math import ceil, gcd
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings

from qdefense.data.images import ImageSet, Pixels
from qdefense.data.selection import disjoint_parts
from qdefense.defenses.admission import NOT_FINITE, answers_near_chance
from qdefense.defenses.entropies import mean_entropies, normal_boundary
from qdefense.defenses.interfaces import Need
from qdefense.defenses.registered import DEFENSES
from qdefense.evidence import Evidence
from qdefense.findings import Cost, FilterBoundary, FilterResult, Finding, Verdict
from qdefense.rates import wilson_interval
from qdefense.session import DeployedSession, Logits

Superimposition = Literal["add", "blend"]

MIN_CLASSES = 2
MIN_PART = 50
"""Images that the fit and the held-out part must each hold."""
MOST_PART = 500

_VALUES_AT_ONCE = 2**23


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Clean images that share no image, nor a group of them."""

    overlays: ImageSet
    fitted: ImageSet
    held_out: ImageSet


class _CannotFitError(ValueError):
    """There is no boundary; the message is the reason of a finding."""

    def __init__(self, reason: str, verdict: Verdict = Verdict.NOT_MEASURED) -> None:
        super().__init__(reason)
        self.verdict = verdict


@DEFENSES.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Strip:
    """Entropy of the predictions under overlays of clean images, and a boundary fitted to clean entropies.

    ``false_rejection_rate`` is the share of clean inputs that the boundary is set to reject.
    """

    name: ClassVar[str] = "strip"
    kind: ClassVar[Literal["filter"]] = "filter"
    paper: ClassVar[str] = "Gao et al. 2019, arXiv 1902.06531"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LOGITS, Need.CLEAN_SET})
    revision: ClassVar[int] = 1

    overlays: Annotated[int, Field(ge=1)] = 100
    superimposition: Superimposition = "add"
    false_rejection_rate: Annotated[float, Field(gt=0, lt=0.5)] = 0.01

    @property
    def settings(self) -> dict[str, Any]:
        """As the finding stores them."""
        return asdict(self)

    def fit(self, evidence: Evidence) -> FittedStrip | Finding:
        """Fit the boundary, from at least 100 clean images and as many as there are overlays.

        Deterministic: threads share out the work, and change no score.
        """
        before = evidence.session.forwards
        try:
            return self._fit(evidence)
        except _CannotFitError as error:
            return Finding(
                defense=self.name,
                kind=self.kind,
                verdict=error.verdict,
                reason=str(error),
                settings=self.settings,
                seed=evidence.seed,
                cost=Cost(forwards=evidence.session.forwards - before),
            )

    def _fit(self, evidence: Evidence) -> FittedStrip:
        _refuse(evidence)
        parts = self._cut(evidence.clean, evidence.seed)
        _refuse_accuracy(evidence, parts)
        overlays = _Overlays(
            session=evidence.session,
            pixels=parts.overlays.pixels,
            superimposition=self.superimposition,
            threads=evidence.threads,
        )
        entropies = np.concatenate([overlays.entropies(pixels) for pixels in self._watched(evidence, parts)])
        boundary = self._boundary(entropies, len(parts.fitted))
        cut = overlays.cut(_brightest(parts.fitted))
        note = None if cut is None else f"the file cuts pixels at {cut}, {_DROWNED}"
        return FittedStrip(overlays=overlays, boundary=boundary.model_copy(update={"note": note}))

    def _watched(self, evidence: Evidence, parts: _Parts) -> Iterator[Pixels]:
        """The images of the fit, then the held-out ones."""
        done, total = 0, len(parts.fitted) + len(parts.held_out)
        for pixels in chain(parts.fitted.in_pixels(), parts.held_out.in_pixels()):
            evidence.progress(f"{self.name}: clean images", done, total)
            yield pixels
            done += len(pixels)
        evidence.progress(f"{self.name}: clean images", done, total)

    def _cut(self, clean: ImageSet, seed: int) -> _Parts:
        needed = self.overlays + 2 * MIN_PART
        if len(clean) < needed:
            raise _CannotFitError(
                f"{len(clean)} clean images; at least {needed} are needed: {self.overlays} overlays, {MIN_PART} to fit "
                f"the boundary and {MIN_PART} to measure its false rejections"
            )
        part = min((len(clean) - self.overlays) // 2, MOST_PART)
        rows = disjoint_parts(len(clean), (self.overlays, part, part), seed=seed, groups=clean.groups)
        for found, least, name in zip(rows, (self.overlays, MIN_PART, MIN_PART), _PART_NAMES, strict=True):
            if len(found) < least:
                raise _CannotFitError(
                    f"{len(found)} images are left {name}, {least} are needed: images that show the same thing stay "
                    "together, so give more clean images"
                )
        overlays, fitted, held_out = (clean.take(found) for found in rows)
        return _Parts(overlays=overlays, fitted=fitted, held_out=held_out)

    def _boundary(self, entropies: NDArray[np.float64], fitted: int) -> FilterBoundary:
        broken = int(np.isnan(entropies).sum())
        if broken:
            raise _CannotFitError(
                f"the session's logits on {broken} of {len(entropies)} clean images with overlays are not finite"
            )
        try:
            value, mean, sd = normal_boundary(entropies[:fitted], self.false_rejection_rate)
        except ValueError as error:
            raise _CannotFitError(f"{error}, so that no boundary can be fitted") from error
        held_out = entropies[fitted:]
        rejected = int(np.sum(held_out < value))
        return FilterBoundary(
            value=value,
            nominal_frr=self.false_rejection_rate,
            fitted_on=fitted,
            mean=mean,
            sd=sd,
            measured_frr=rejected / len(held_out),
            frr_interval=wilson_interval(rejected, len(held_out)),
            held_out_scores=tuple(held_out.tolist()),
            lowest_score=0.0,
        )


def _brightest(images: ImageSet) -> Pixels:
    """Those whose sums are the likeliest to pass 1: of dark ones nobody sees where a file cuts."""
    order = np.argsort(-images.images.mean(axis=(1, 2, 3)), kind="stable")
    return images.take(order[:_LOOKED_AT]).pixels


_LOOKED_AT = 4
"""Images that are looked at for a cut."""
_DROWNED = "where a bright trigger drowns among bright overlays: triggered inputs may pass"
_PART_NAMES = ("to be overlays", "to fit the boundary", "to measure its false rejections")


@dataclass(frozen=True, kw_only=True)
class FittedStrip:
    """STRIP with its overlays and its boundary."""

    most_held_out: ClassVar[int] = MOST_PART
    remedy: ClassVar[str] = "strip:superimposition=blend"

    overlays: _Overlays
    boundary: FilterBoundary

    def decide(self, x: Pixels) -> FilterResult:
        """Reject every input whose entropy, in bits, is below the boundary.

        ``x: (N, 3, H, W) float32 in [0, 1]``. An input on which a logit is not finite has no score and is not accepted.
        """
        entropies = self.overlays.entropies(x)
        return FilterResult(
            decisions=tuple(_decision(entropy, self.boundary.value) for entropy in entropies),
            scores=tuple(None if np.isnan(entropy) else float(entropy) for entropy in entropies),
            boundary=self.boundary,
        )


def _decision(entropy: float, boundary: float) -> Literal["accept", "reject", "unmeasured"]:
    if np.isnan(entropy):
        return "unmeasured"
    return "reject" if entropy < boundary else "accept"


@dataclass(frozen=True, kw_only=True)
class _Overlays:
    """Overlays and the session that is shown them on every image; ``pixels: (N, 3, H, W) float32 in [0, 1]``."""

    session: DeployedSession
    pixels: Pixels
    superimposition: Superimposition
    threads: int

    def entropies(self, x: Pixels) -> NDArray[np.float64]:
        """Entropy in bits of each of ``x: (M, 3, H, W)``; NaN where a logit is not finite.

        Images go side by side in blocks that do not depend on the number of threads.
        """
        starts = range(0, len(x), self._block)
        with ThreadPoolExecutor(max_workers=self.threads) as pool:
            parts = pool.map(lambda start: self._entropies_of_block(x[start : start + self._block]), starts)
            return np.concatenate([np.empty(0), *parts])

    def cut(self, x: Pixels) -> str | None:
        """Where the file cuts the sums with ``x: (M, 3, H, W)``: at "1", at "1.45 or below", or nowhere.

        The second is half way from 1 to the median peak of the sums that pass 1, so that half of these pass it, too.
        """
        sums = self._superimpose(x).reshape(-1, *x.shape[1:])
        peaks = sums.max(axis=(1, 2, 3))
        if peaks.max() <= 1:
            return None
        half_way = (1 + float(np.median(peaks[peaks > 1]))) / 2
        logits = self.session.logits(sums)
        if not self._cuts_at(half_way, sums, logits):
            return None
        return "1" if self._cuts_at(1, sums, logits) else f"{ceil(100 * half_way) / 100:.2f} or below"

    def _cuts_at(self, level: float, sums: Pixels, logits: Logits) -> bool:
        """Whether ``logits`` of the sums are those of sums cut there."""
        return np.array_equal(logits, self.session.logits(np.minimum(sums, np.float32(level))), equal_nan=True)

    @property
    def _block(self) -> int:
        """Images at once: as many as fill the session's batches to the last row, but within memory.

        Where the rows of a batch share a scale, one: an image's entropy must not depend on its neighbours.
        """
        if self.session.artifact.batch_coupled:
            return 1
        batch = self.session.profile.batch
        return max(1, min(batch // gcd(batch, len(self.pixels)), _VALUES_AT_ONCE // self.pixels.size))

    def _entropies_of_block(self, x: Pixels) -> NDArray[np.float64]:
        logits = self.session.logits(self._superimpose(x).reshape(-1, *x.shape[1:]))
        return mean_entropies(logits.reshape(len(x), len(self.pixels), -1))

    def _superimpose(self, x: Pixels) -> Pixels:
        both: Pixels = x[:, np.newaxis] + self.pixels
        return both if self.superimposition == "add" else both * np.float32(0.5)


def _refuse(evidence: Evidence) -> None:
    contract = evidence.session.artifact.contract
    if contract.head == "sigmoid":
        raise _CannotFitError(
            "the file answers with a sigmoid per class: its answers are no distribution over classes, and have no "
            "entropy",
            Verdict.NOT_APPLICABLE,
        )
    if contract.classes < MIN_CLASSES:
        raise _CannotFitError(
            f"{contract.classes} class; an entropy needs at least {MIN_CLASSES}", Verdict.NOT_APPLICABLE
        )
    if not evidence.clean.labelled and evidence.stated_accuracy is None:
        raise _CannotFitError(
            "the images have no labels, so the clean accuracy was not measured; give labelled images, or vouch for it "
            "with --expected-accuracy"
        )


def _refuse_accuracy(evidence: Evidence, parts: _Parts) -> None:
    """``stated_accuracy`` counts where the labels are the session's own answers, whose accuracy would be 1."""
    judged = (parts.fitted, parts.held_out)
    logits = np.concatenate([evidence.session.logits_of(part) for part in judged])
    if not np.isfinite(logits.max(axis=1)).all():
        raise _CannotFitError(NOT_FINITE)
    labels = np.concatenate([part.labels for part in judged])
    stated = None if evidence.clean.labelled else evidence.stated_accuracy
    problem = answers_near_chance(logits, labels, stated=stated)
    if problem is not None:
        raise _CannotFitError(problem)
