from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from qdefense.data.images import ImageSet, Pixels, to_images
from qdefense.defenses.filters.judging import LEVEL, judge_inputs
from qdefense.defenses.filters.strip import Strip
from qdefense.defenses.interfaces import Need
from qdefense.evidence import Evidence
from qdefense.findings import FilterBoundary, FilterResult, Finding, Verdict
from qdefense.rates import binomial_tail, wilson_interval

from .corner_nets import evidence_of, images, network, stamp

BOUNDARY = FilterBoundary(
    value=0.5, nominal_frr=0.01, fitted_on=50, mean=1.0, sd=0.2, measured_frr=0.0, frr_interval=(0.0, 0.05),
    held_out_scores=(0.9, 1.1), lowest_score=0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Scripted:
    """A filter whose score of an input is the first value of its image over 100; 255 has none."""

    name: ClassVar[str] = "scripted"
    kind: ClassVar[Literal["filter"]] = "filter"
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset()
    revision: ClassVar[int] = 1
    most_held_out: ClassVar[int] = 500
    remedy: ClassVar[str] = "scripted:way=other"
    boundary: FilterBoundary = BOUNDARY
    settings: Any = None
    seen: Any = None

    def fit(self, evidence: Evidence) -> Scripted | Finding:
        if self.seen is not None:
            self.seen.append(evidence.clean)
        if not len(evidence.clean):
            return Finding(
                defense="scripted", kind="filter", verdict=Verdict.NOT_MEASURED, reason="no clean images", seed=0
            )
        return self

    def decide(self, x: Pixels) -> FilterResult:
        codes = to_images(x)[:, 0, 0, 0]
        scores = tuple(None if code == 255 else float(code) / 100 for code in codes)
        return FilterResult(decisions=tuple(map(self._decision, scores)), scores=scores, boundary=self.boundary)

    def _decision(self, score: float | None) -> Literal["accept", "reject", "unmeasured"]:
        if score is None:
            return "unmeasured"
        return "reject" if score < self.boundary.value else "accept"


def inputs(*codes: int) -> ImageSet:
    made = np.zeros((len(codes), 8, 8, 3), dtype=np.uint8)
    made[:, 0, 0, 0] = codes
    made[:, 1, 1, 0] = np.arange(len(codes)) % 256
    return ImageSet(
        images=made, labels=np.full(len(codes), -1, np.int64), class_names=(), source="given", labelled=False
    )


@pytest.fixture(scope="module", name="evidence")
def _evidence() -> Evidence:
    return evidence_of(network(backdoored=True), images(300))


def judged(evidence: Evidence, given: ImageSet | None, **boundary: Any) -> Finding:
    scripted = Scripted(boundary=BOUNDARY.model_copy(update=boundary), settings={"key": 1})
    return judge_inputs(scripted, replace(evidence, inputs=given))


def test_judge_inputs_alarms_when_more_are_rejected_than_the_null_rate_allows(evidence: Evidence) -> None:
    finding = judged(evidence, inputs(*[10] * 6, *[100] * 14))
    assert finding.verdict is Verdict.BACKDOORED
    assert finding.reason == (
        "6 of 20 inputs rejected, where at most 5.0% of clean ones would be, with 97.5% confidence (p = 0.00033 at "
        "that rate); rows 0, 1, 2, 3, 4 and 1 more. This judges the inputs given, not the model"
    )
    assert isinstance(finding.result, FilterResult)
    test = finding.result.test
    assert test is not None
    assert (test.rejected, test.measured, test.null_rate, test.level) == (6, 20, 0.05, LEVEL)
    assert test.p_value == binomial_tail(6, 20, 0.05)
    assert (finding.defense, finding.kind, finding.settings, finding.seed) == ("scripted", "filter", {"key": 1}, 0)
    assert finding.result.boundary == BOUNDARY


@pytest.mark.parametrize(("rejected", "verdict"), [(5, Verdict.BACKDOORED), (4, Verdict.NOT_MEASURED)])
def test_judge_inputs_draws_the_line_at_the_exact_p_value(evidence: Evidence, rejected: int, verdict: Verdict) -> None:
    """Of 20 at .05: P(X >= 5) = .0026, P(X >= 4) = .0159."""
    assert judged(evidence, inputs(*[10] * rejected, *[100] * (20 - rejected))).verdict is verdict


def test_judge_inputs_calls_inputs_clean_in_words_about_them_alone(evidence: Evidence) -> None:
    finding = judged(evidence, inputs(10, *[100] * 199), frr_interval=(0.0, 0.01))
    assert (finding.verdict, finding.reason) == (
        Verdict.CLEAN,
        "1 of 200 inputs rejected, where at most 1.0% of clean ones would be, with 97.5% confidence (p = 0.87 at that "
        "rate); the fewest that would be an alarm are 7 (3.5%); only scores below 0.5 are rejected, the median clean "
        "image scores 1. This judges the inputs given, not the model",
    )


def test_judge_inputs_tells_how_low_a_boundary_is_that_lets_nearly_everything_pass(evidence: Evidence) -> None:
    """Thousandths of a bit may still catch a perfect trigger, whose entropy is smaller yet: CLEAN, with the figures."""
    finding = judged(evidence, inputs(*[100] * 200), frr_interval=(0.0, 0.01), value=0.0031)
    assert finding.verdict is Verdict.CLEAN
    assert "; only scores below 0.0031 are rejected, the median clean image scores 1. This" in finding.reason


def test_judge_inputs_is_not_measured_when_less_poison_than_its_mark_would_be_no_alarm(evidence: Evidence) -> None:
    """50 triggered ones of 1,000, every one of them rejected: 50 held-out images without a rejection give 7.1 %."""
    given = inputs(*[10] * 50, *[100] * 950)
    finding = judged(evidence, given, **rejecting(0, 50))
    assert (finding.verdict, finding.reason) == (
        Verdict.NOT_MEASURED,
        "50 of 1,000 inputs rejected, but the fewest that would be an alarm are 92 (9.2%), more than 5%: less poison "
        "would not be seen; it takes 106 held-out clean images in place of 50",
    )
    assert judged(evidence, given, **rejecting(0, 106)).verdict is Verdict.BACKDOORED
    assert judged(evidence, given, **rejecting(0, 105)).verdict is Verdict.NOT_MEASURED
    assert judged(evidence, given, frr_interval=wilson_interval(0, 500)).verdict is Verdict.BACKDOORED


def rejecting(rejected: int, held_out: int) -> dict[str, Any]:
    return {
        "held_out_scores": (1.0,) * held_out,
        "measured_frr": rejected / held_out,
        "frr_interval": wilson_interval(rejected, held_out),
    }


@pytest.mark.parametrize(
    ("inputs_given", "rejected", "held_out", "lever"),
    [
        (99, 0, 500, "it takes 100 inputs"),
        (100, 0, 100, "it takes 1,320 inputs or 293 held-out clean images in place of 100"),
        (100, 2, 100, "it takes 1,200 inputs and up to 500 held-out clean images in place of 100"),
        (100, 20, 500, "4.0% of 500 held-out clean images are rejected, 500 are held out at most, and no number of "
         "inputs makes up for that: set a lower false-rejection-rate"),
        (100, 6, 100, "6.0% of 100 held-out clean images are rejected, 500 are held out at most, and no number of "
         "inputs makes up for that: set a lower false-rejection-rate"),
    ],
)  # fmt: skip
def test_judge_inputs_names_the_lever_that_binds(
    evidence: Evidence, inputs_given: int, rejected: int, held_out: int, lever: str
) -> None:
    finding = judged(evidence, inputs(*[100] * inputs_given), **rejecting(rejected, held_out))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.partition("less poison would not be seen; ")[2] == lever


@pytest.mark.parametrize(("count", "rejected", "held_out"), [(1320, 0, 100), (100, 0, 293), (1200, 10, 500)])
def test_judge_inputs_can_be_clean_with_what_it_asks_for(
    evidence: Evidence, count: int, rejected: int, held_out: int
) -> None:
    assert judged(evidence, inputs(*[100] * count), **rejecting(rejected, held_out)).verdict is Verdict.CLEAN


@pytest.mark.parametrize(("count", "verdict"), [(100, Verdict.CLEAN), (99, Verdict.NOT_MEASURED)])
def test_judge_inputs_may_need_a_twentieth_of_the_inputs_for_an_alarm(
    evidence: Evidence, count: int, verdict: Verdict
) -> None:
    """5 of either number: P(X >= 5) = .0034 of 100 at .01, P(X >= 4) = .018."""
    assert judged(evidence, inputs(*[100] * count), frr_interval=(0.0, 0.01)).verdict is verdict


def test_judge_inputs_is_not_measured_when_the_file_weakens_the_filter(evidence: Evidence) -> None:
    finding = judged(evidence, inputs(*[100] * 200), frr_interval=(0.0, 0.01), note="the file cuts pixels")
    assert (finding.verdict, finding.reason) == (
        Verdict.NOT_MEASURED,
        "0 of 200 inputs rejected, where at most 1.0% of clean ones would be, with 97.5% confidence (p = 1 at that "
        "rate): no alarm, but the file cuts pixels; ask --defense scripted:way=other",
    )
    assert judged(evidence, inputs(*[10] * 200), note="the file cuts pixels").verdict is Verdict.BACKDOORED


def test_judge_inputs_is_not_measured_when_every_clean_image_is_rejected(evidence: Evidence) -> None:
    finding = judged(evidence, inputs(*[10] * 20), measured_frr=1.0, frr_interval=(0.93, 1.0))
    assert (finding.verdict, finding.reason) == (
        Verdict.NOT_MEASURED,
        "the boundary (0.5) rejects every held-out clean image: it tells nothing apart",
    )


def test_judge_inputs_takes_the_nominal_rate_when_that_is_the_higher(evidence: Evidence) -> None:
    finding = judged(evidence, inputs(*[10] * 6, *[100] * 14), nominal_frr=0.2)
    assert finding.verdict is Verdict.NOT_MEASURED
    assert isinstance(finding.result, FilterResult)
    assert finding.result.test is not None
    assert finding.result.test.null_rate == 0.2


def test_judge_inputs_is_not_measured_when_an_input_has_no_score(evidence: Evidence) -> None:
    finding = judged(evidence, inputs(10, 255, *[100] * 18))
    assert (finding.verdict, finding.reason) == (
        Verdict.NOT_MEASURED, "the session's logits on 1 of 20 inputs are not finite",
    )  # fmt: skip
    assert isinstance(finding.result, FilterResult)
    assert finding.result.decisions[:3] == ("reject", "unmeasured", "accept")


def test_judge_inputs_alarms_whatever_else_has_no_score(evidence: Evidence) -> None:
    """Whoever can send an input that breaks the model must not be able to hide the others behind it."""
    assert judged(evidence, inputs(255, *[10] * 6, *[100] * 13)).verdict is Verdict.BACKDOORED


def test_judge_inputs_is_not_measured_when_no_input_has_a_score(evidence: Evidence) -> None:
    finding = judged(evidence, inputs(255, 255))
    assert finding.reason == "the session's logits on 2 of 2 inputs are not finite"
    assert finding.verdict is Verdict.NOT_MEASURED


@pytest.mark.parametrize("value", [0.0, -0.25])
def test_judge_inputs_is_not_measured_when_the_boundary_can_reject_nothing(evidence: Evidence, value: float) -> None:
    finding = judged(evidence, inputs(*[0] * 20), value=value)
    assert (finding.verdict, finding.reason) == (
        Verdict.NOT_MEASURED,
        f"the boundary ({value:.3g}) is not above the lowest score there is (0): no input could be rejected, however "
        "suspicious",
    )
    assert isinstance(finding.result, FilterResult)
    assert finding.result.scores == (0.0,) * 20


def test_judge_inputs_needs_as_many_inputs_as_could_alarm(evidence: Evidence) -> None:
    finding = judged(evidence, inputs(100))
    assert (finding.verdict, finding.reason) == (
        Verdict.NOT_MEASURED,
        "too few inputs (1): all of them rejected could still be chance (p = 0.05)",
    )
    assert judged(evidence, inputs(10, 10)).verdict is Verdict.BACKDOORED


@pytest.mark.parametrize("given", [None, inputs()])
def test_judge_inputs_is_not_measured_when_there_are_none(evidence: Evidence, given: ImageSet | None) -> None:
    finding = judged(evidence, given)
    assert (finding.verdict, finding.result) == (Verdict.NOT_MEASURED, None)
    assert finding.reason == "there are no inputs to judge; give some with --inputs"


def test_judge_inputs_keeps_inputs_out_of_the_clean_images(evidence: Evidence) -> None:
    """Thresholds are never fitted on what they judge (law 3)."""
    seen: list[ImageSet] = []
    given = evidence.clean.take(np.arange(5, 25)).without_labels()
    judge_inputs(Scripted(settings={}, seen=seen), replace(evidence, inputs=given))
    assert len(seen[0]) == 280
    assert {image.tobytes() for image in seen[0].images}.isdisjoint(image.tobytes() for image in given.images)
    every = judge_inputs(Scripted(settings={}), replace(evidence, inputs=evidence.clean))
    assert every.reason == "no clean images (300 that are among the inputs were left out: give other clean images)"


def test_judge_inputs_reads_large_sets_in_parts_and_tells_how_far_it_is(evidence: Evidence) -> None:
    told: list[tuple[str, int, int]] = []
    given = inputs(*[100] * 299, 10)
    finding = judged(replace(evidence, progress=lambda *step: told.append(step)), given)
    assert told == [("scripted", 0, 300), ("scripted", 256, 300), ("scripted", 300, 300)]
    assert isinstance(finding.result, FilterResult)
    assert len(finding.result.scores) == 300
    assert finding.result.decisions[299] == "reject"


# --- with STRIP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="twins")
def _twins() -> dict[bool, Evidence]:
    return {backdoored: evidence_of(network(backdoored=backdoored), images(300)) for backdoored in (True, False)}


def some_stamped(count: int) -> ImageSet:
    given = images(100, seed=5)
    pixels = given.pixels
    pixels[:count] = stamp(pixels[:count])
    return replace(given, images=to_images(pixels)).without_labels()


@pytest.mark.parametrize(("count", "verdict"), [(15, Verdict.BACKDOORED), (0, Verdict.NOT_MEASURED)])
def test_judge_inputs_with_strip_finds_the_triggered_ones(
    twins: dict[bool, Evidence], count: int, verdict: Verdict
) -> None:
    finding = judge_inputs(Strip(), replace(twins[True], inputs=some_stamped(count)))
    assert finding.verdict is verdict
    assert isinstance(finding.result, FilterResult)
    assert set(finding.result.decisions[:count]) <= {"reject"}
    assert finding.cost.forwards == 200 + (200 + 100) * 100


def test_judge_inputs_with_strip_raises_no_alarm_on_the_clean_twin(twins: dict[bool, Evidence]) -> None:
    finding = judge_inputs(Strip(), replace(twins[False], inputs=some_stamped(15)))
    assert finding.verdict is Verdict.NOT_MEASURED, "100 held-out images and 100 inputs are too few for CLEAN"
    assert "less poison would not be seen" in finding.reason


def test_judge_inputs_gives_the_filters_own_reason_when_it_cannot_be_fitted(twins: dict[bool, Evidence]) -> None:
    few = replace(twins[True], clean=images(60), inputs=some_stamped(3))
    finding = judge_inputs(Strip(), few)
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.startswith("60 clean images; at least 200 are needed")
