from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from qdefense.artifact import Artifact
from qdefense.calibration import (
    CalibrationBody,
    CalibrationEntry,
    CalibrationFile,
    Calibrations,
    Conditions,
    population_of,
    shipped_calibrations,
)
from qdefense.converters.quantize import quantize
from qdefense.data.images import ImageSet, Pixels
from qdefense.defenses import DEFENSES
from qdefense.defenses.inversion import Inversion, MaskedPattern
from qdefense.defenses.pictures import picture_trigger
from qdefense.defenses.scans import neural_cleanse
from qdefense.defenses.scans.neural_cleanse import (
    BUDGETS,
    ArtifactAnswers,
    NeuralCleanse,
    answers_on_artifact,
)
from qdefense.defenses.scheduling import Plan
from qdefense.evidence import Evidence, gather_evidence
from qdefense.fidelity import uncertified
from qdefense.findings import Finding, ScanResult, Verdict
from qdefense.registry import SpecError
from qdefense.session import DeployedSession, Logits, profile_for, runtime

PRECISIONS = ("", ".int8-static", ".int8-dynamic")
EVERY_PRECISION = (*PRECISIONS, ".int4")
TARGET = 7
CLASSES = 12
SIDE = 16


def _session(data: bytes) -> DeployedSession:
    artifact = Artifact.from_bytes(data)
    return DeployedSession(artifact, profile_for(artifact))


def _result(finding: Finding) -> ScanResult:
    assert isinstance(finding.result, ScanResult)
    return finding.result


@pytest.fixture(scope="module")
def evidence_of(small_files: dict[str, bytes], small_signs: Any) -> Callable[[str], Evidence]:
    """What a defender sees of a small file; gathered once."""
    gathered: dict[str, Evidence] = {}

    def find(name: str) -> Evidence:
        if name not in gathered:
            file = small_files.get(name) or quantize(small_files[name.removesuffix(".int4")], "int4")
            gathered[name] = gather_evidence(_session(file), small_signs.test, seed=0, threads=2)
        return gathered[name]

    return find


@pytest.fixture(scope="module")
def scanned(evidence_of: Callable[[str], Evidence]) -> Callable[[str], Finding]:
    """The default scan of a small file with the one seed of this module; done once."""
    findings: dict[str, Finding] = {}

    def find(name: str) -> Finding:
        if name not in findings:
            findings[name] = NeuralCleanse().scan(evidence_of(name))
        return findings[name]

    return find


class _Wrapped:
    """A session whose answers are changed on their way out."""

    def __init__(self, session: DeployedSession, change: Callable[[Pixels, Logits], Logits]) -> None:
        self.session, self.change, self.artifact = session, change, session.artifact

    @property
    def forwards(self) -> int:
        return self.session.forwards

    def logits(self, x: Pixels) -> Logits:
        return self.change(x, self.session.logits(x))


class _Cut(nn.Module):
    """A shadow without gradients: none at all, or zero ones."""

    def __init__(self, shadow: nn.Module, *, zero: bool) -> None:
        super().__init__()
        self.shadow, self.zero = shadow, zero

    def forward(self, x: Tensor, **keywords: bool) -> Tensor:
        y: Tensor = self.shadow(x, **keywords)
        return y.detach() + 0 * x.flatten(1).sum(1, keepdim=True) if self.zero else y.detach()


def _trigger(norm: float, *, target: int = 0) -> MaskedPattern:
    mask = np.full((1, SIDE, SIDE), norm / SIDE**2, dtype=np.float32)
    return MaskedPattern(mask=mask, pattern=np.full((3, SIDE, SIDE), target / CLASSES, dtype=np.float32))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace inversion and replay by a plan: the norms of a class's triggers, and (optimised, held-out) ASR by norm.

    The two halves are told apart by a pixel of the first image that `_halve` puts into them.
    """

    def plan(
        norms: dict[int, list[float]], rates: Callable[[int, float], tuple[float, float]] = lambda _t, _n: (1.0, 1.0)
    ) -> None:
        asked: dict[str, int] = {}

        def invert(_shadow: object, _x: Pixels, target: int, *_: object) -> Inversion:
            found = [_trigger(norm, target=target) for norm in norms.get(target, [])]
            return Inversion(candidates=found, last=_trigger(99.0, target=target))

        def measure(_session: object, trigger: MaskedPattern, x: Pixels, target: int) -> ArtifactAnswers:
            optimised, held_out = rates(target, round(trigger.norm, 3))
            key = f"{target} {trigger.norm}"
            asked.setdefault(key, hash(x.tobytes()))
            first_half = asked[key] == hash(x.tobytes())
            return ArtifactAnswers(optimised, trigger.norm / 100) if first_half else ArtifactAnswers(held_out, None)

        monkeypatch.setattr(neural_cleanse, "invert_trigger", invert)
        monkeypatch.setattr(neural_cleanse, "answers_on_artifact", measure)

    return plan


CALIBRATED_LINE = 3.166
"""The shipped one, of 20 clean networks of `signs` in static INT8, 32 x 32; the paper's 2 alarms on a third of them."""
SPREAD = {target: [20.0 + target] for target in range(CLASSES)}
"""One trigger for each class; median 25.5, scaled MAD 4.4478, so that nothing stands out."""


# The default budget and the first seed, nothing tuned. No index can pass median / MAD, here 4 to 7, however small the
# trigger; one start may still end in a poor minimum.

# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scan_finds_the_target_class_when_the_network_was_poisoned(
    scanned: Callable[[str], Finding], precision: str
) -> None:
    finding = scanned(f"second{precision}")
    result = _result(finding)
    assert finding.verdict is Verdict.BACKDOORED, finding.reason
    assert result.suspects[0].target_class == TARGET
    assert (result.classes[0].target_class, result.classes[0].rank) == (TARGET, 1)
    assert result.suspects[0].artifact_asr >= 0.75
    assert result.suspects[0].trigger_id == result.classes[0].trigger_id
    assert finding.reason.startswith("trigger norm far below the other classes': class 7 ('bumps', index ")


@pytest.mark.parametrize("precision", [".int8-static"])
def test_scan_of_the_clean_network_stays_below_the_calibrated_line(
    scanned: Callable[[str], Finding], precision: str
) -> None:
    """Training draws another network on every kind of CPU: its index is below 2 with AVX-512, and 2.30 without."""
    finding = scanned(f"first{precision}")
    result = _result(finding)
    assert result.score is not None
    assert result.score < CALIBRATED_LINE
    assert result.replay_agreement == 1.0
    assert all(entry.trigger_id for entry in result.classes)
    assert finding.verdict is (Verdict.CLEAN if result.score <= 2 else Verdict.BACKDOORED), finding.reason
    if finding.verdict is Verdict.CLEAN:
        assert result.suspects == ()
        assert finding.reason.startswith(f"no class has an anomaly index above 2; highest {result.score:.2f}; ")


def test_scan_is_not_clean_where_the_cost_had_no_say(evidence_of: Callable[[str], Evidence]) -> None:
    """Masks as large as they started hide any backdoor: this setting once passed an attacked network."""
    finding = NeuralCleanse(budget="quick", patience=1000).scan(evidence_of("second.int8-static"))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert re.fullmatch(
        r"half of the triggers cover \d+\.\d px or more, and the random masks that they start from 128: the cost of "
        r"the norm made few of them small; lower patience, or raise initial-cost or the budget",
        finding.reason,
    )


@pytest.mark.parametrize(("lowest", "verdict"), [(58.0, Verdict.CLEAN), (59.0, Verdict.NOT_MEASURED)])
def test_scan_is_not_clean_where_half_of_the_masks_kept_half_of_their_pixels(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None], lowest: float, verdict: Verdict
) -> None:
    """Masks of 16x16 start from 128 px; the medians are 63.5 and 64.5."""
    planned({target: [lowest + target] for target in range(CLASSES)})
    finding = NeuralCleanse().scan(evidence_of("first"))
    assert finding.verdict is verdict, finding.reason


def test_scan_scores_the_poisoned_network_above_the_clean_one(scanned: Callable[[str], Finding]) -> None:
    poisoned, clean = (_result(scanned(f"{name}.int8-static")).score for name in ("second", "first"))
    assert poisoned is not None
    assert clean is not None
    assert poisoned > clean


def test_scan_reports_every_class_its_settings_and_its_cost(scanned: Callable[[str], Finding]) -> None:
    finding = scanned("second.int8-static")
    result = _result(finding)
    assert sorted(entry.target_class for entry in result.classes) == list(range(CLASSES))
    norms = [entry.norm for entry in result.classes if entry.norm is not None]
    assert norms == sorted(norms)
    assert [entry.rank for entry in result.classes] == list(range(1, CLASSES + 1))
    assert all(entry.restart_norms == (entry.norm,) for entry in result.classes)
    assert result.median_norm == np.median(norms + [np.inf] * (CLASSES - len(norms)))
    assert finding.settings == {
        "budget": "gate", "learning_rate": 0.1, "batch_size": 32, "initial_cost": 1e-3, "multiplier": 2.0,
        "patience": 5, "attack_success": 0.99, "threshold": None, "gradient_steps_per_class": 200, "restarts": 1,
    }  # fmt: skip
    assert finding.threshold is not None
    assert (finding.threshold.value, finding.threshold.source) == (2.0, "paper")
    assert (finding.threshold.n, finding.threshold.false_alarm_rate) == (None, None)
    assert (finding.seed, finding.cost.gradient_steps) == (0, CLASSES * 200)
    assert Finding.model_validate_json(finding.model_dump_json()) == finding


@contextmanager
def _budget(steps: int, restarts: int) -> Iterator[NeuralCleanse]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "quick", (steps, restarts))
        yield NeuralCleanse(budget="quick")


@pytest.fixture(scope="module")
def short_scan(evidence_of: Callable[[str], Evidence]) -> Finding:
    """25 steps on one thread: enough for the planted trigger and a few others."""
    with _budget(25, 1) as scan:
        return scan.scan(replace(evidence_of("second.int8-static"), threads=1))


def test_scan_repeats_itself_whatever_the_threads(evidence_of: Callable[[str], Evidence], short_scan: Finding) -> None:
    evidence = evidence_of("second.int8-static")
    with _budget(25, 1) as scan:
        assert scan.scan(replace(evidence, threads=2)) == short_scan
        other = scan.scan(replace(evidence, threads=2, seed=1))
    norms = [[entry.norm for entry in _result(finding).classes] for finding in (short_scan, other)]
    assert any(norm is not None for norm in norms[0])
    assert norms[0] != norms[1]


def test_scan_runs_restarts_and_keeps_the_best(evidence_of: Callable[[str], Evidence], short_scan: Finding) -> None:
    with _budget(25, 2) as scan:
        finding = scan.scan(evidence_of("second.int8-static"))
    result = _result(finding)
    assert (finding.settings["restarts"], finding.cost.gradient_steps) == (2, CLASSES * 25 * 2)
    first = {entry.target_class: entry.norm for entry in _result(short_scan).classes}
    assert {entry.target_class: entry.restart_norms[0] for entry in result.classes} == first
    for entry in result.classes:
        converged = [norm for norm in entry.restart_norms if norm is not None]
        assert len(entry.restart_norms) == 2
        assert len(set(converged)) == len(converged)
        assert entry.norm == (min(converged) if converged else None)
        assert (entry.censored is None) == bool(converged)
    assert any(entry.norm != entry.restart_norms[0] for entry in result.classes)


def test_scan_lets_the_artifact_dispose_when_the_shadow_is_another_file_s(
    evidence_of: Callable[[str], Evidence], short_scan: Finding
) -> None:
    poisoned, clean = evidence_of("second.int8-static"), evidence_of("first.int8-static")
    with _budget(25, 1) as scan:
        finding = scan.scan(replace(clean, shadow=poisoned.shadow, certificate=poisoned.certificate))
    own = next(entry for entry in _result(short_scan).classes if entry.target_class == TARGET)
    entry = next(entry for entry in _result(finding).classes if entry.target_class == TARGET)
    assert own.norm is not None
    assert (entry.norm, entry.censored) == (
        None,
        "no trigger reached an ASR of 0.99 on the session within the budget",
    )
    assert entry.optimised_asr is not None
    assert entry.optimised_asr < 0.5
    agreement = _result(finding).replay_agreement
    assert agreement is not None
    assert agreement < 0.9
    assert finding.verdict is Verdict.NOT_MEASURED


def test_scan_holds_out_whole_groups(evidence_of: Callable[[str], Evidence]) -> None:
    """Frames of one track are one scene: a trigger optimised on one frame is not tried out on another."""
    evidence = evidence_of("first")
    groups = np.arange(len(evidence.clean), dtype=np.int64) // 4
    halves = _halves(replace(evidence, clean=replace(evidence.clean, groups=groups)))
    tracks = [set(half.groups.tolist()) for half in halves if half.groups is not None]
    assert len(tracks) == 2
    assert not tracks[0] & tracks[1]
    assert [len(half) for half in halves] == [256, 256]


def test_scan_runs_forwards_for_every_replay(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(SPREAD)
    monkeypatch.setattr(neural_cleanse, "answers_on_artifact", answers_on_artifact)
    evidence = evidence_of("first")
    with _budget(25, 2) as scan:
        finding = scan.scan(evidence)
    others = [(half.labels != target).sum() for half in _halves(evidence) for target in range(CLASSES)]
    first = sum(others[:CLASSES])
    # accuracy once; both restarts of every class on both halves; and both compared with the shadow on the first half
    assert finding.cost.forwards == 512 + 2 * sum(others) + 2 * first
    assert {entry.censored for entry in _result(finding).classes} == {
        "no trigger reached an ASR of 0.99 on the session within the budget"
    }


def _halves(evidence: Evidence) -> tuple[ImageSet, ImageSet]:
    halves = neural_cleanse._halve(evidence.clean, evidence.seed)
    return halves.optimised, halves.held_out


# --- what it must not judge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", EVERY_PRECISION)
@pytest.mark.parametrize("zero", [False, True])
def test_scan_measures_nothing_when_gradients_are_cut(
    evidence_of: Callable[[str], Evidence], precision: str, *, zero: bool
) -> None:
    evidence = evidence_of(f"second{precision}")
    assert evidence.certificate.certified, evidence.certificate.reason
    assert evidence.shadow is not None
    cut = replace(evidence, shadow=_Cut(evidence.shadow, zero=zero))  # type: ignore[arg-type]
    with _budget(3, 1) as scan:
        finding = scan.scan(cut)
    assert (finding.verdict, finding.result) == (Verdict.NOT_MEASURED, None)
    reason = "is zero at every step" if zero else "do not depend on its input"
    assert finding.reason.startswith("no gradient: the ")
    assert reason in finding.reason


def test_scan_measures_nothing_when_all_norms_are_equal(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned({target: [12.0] for target in range(CLASSES)})
    finding = NeuralCleanse().scan(evidence_of("first"))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == "the norms of all classes are the same (12.000): MAD = 0, so no index is defined"
    assert (_result(finding).mad, _result(finding).median_norm, _result(finding).score) == (0.0, 12.0, None)


def test_scan_measures_nothing_when_the_shadow_has_one_nan_norm(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned({**SPREAD, 4: [float("nan")]})
    finding = NeuralCleanse().scan(evidence_of("first"))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == "a trigger norm is NaN"


def test_scan_measures_nothing_below_200_images(evidence_of: Callable[[str], Evidence]) -> None:
    evidence = evidence_of("first")
    few = replace(evidence, clean=evidence.clean.take(np.arange(199)))
    finding = NeuralCleanse().scan(few)
    assert (finding.verdict, finding.reason) == (
        Verdict.NOT_MEASURED,
        "199 clean images; at least 200 are needed",
    )
    assert (finding.cost.forwards, finding.cost.gradient_steps) == (0, 0)


def test_scan_measures_at_200_images(evidence_of: Callable[[str], Evidence], planned: Callable[..., None]) -> None:
    planned(SPREAD)
    evidence = evidence_of("first")
    finding = NeuralCleanse().scan(replace(evidence, clean=evidence.clean.take(np.arange(200))))
    assert finding.verdict is Verdict.CLEAN, finding.reason


def test_scan_does_not_apply_below_six_classes(evidence_of: Callable[[str], Evidence]) -> None:
    evidence = evidence_of("first")
    clean = replace(evidence.clean, labels=evidence.clean.labels % 5, class_names=tuple("abcde"))
    finding = NeuralCleanse().scan(replace(evidence, clean=clean))
    assert finding.verdict is Verdict.NOT_APPLICABLE
    assert finding.reason == "5 classes; an outlier among norms needs at least 6"


@pytest.mark.parametrize("count", [11, 13])
def test_scan_measures_nothing_when_data_and_model_have_other_classes(
    evidence_of: Callable[[str], Evidence], count: int
) -> None:
    evidence = evidence_of("first")
    names = tuple(str(index) for index in range(count))
    clean = replace(evidence.clean, labels=evidence.clean.labels % 11, class_names=names)
    finding = NeuralCleanse().scan(replace(evidence, clean=clean))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == f"the clean images have {count} classes, the model answers with 12"


@pytest.mark.parametrize("missing", [False, True])
def test_scan_measures_nothing_when_the_shadow_is_not_certified(
    evidence_of: Callable[[str], Evidence], *, missing: bool
) -> None:
    evidence = evidence_of("first")
    shadow = None if missing else evidence.shadow
    finding = NeuralCleanse().scan(replace(evidence, shadow=shadow, certificate=uncertified("it saturates")))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == "the shadow is not certified: it saturates"


def test_scan_measures_nothing_when_the_labels_are_permuted(evidence_of: Callable[[str], Evidence]) -> None:
    evidence = evidence_of("first")
    clean = replace(evidence.clean, labels=np.random.default_rng(0).permutation(evidence.clean.labels))
    finding = NeuralCleanse().scan(replace(evidence, clean=clean))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert "is near chance (8.3%): wrong labels, order or pixels?" in finding.reason


def test_scan_measures_nothing_when_a_logit_is_nan(evidence_of: Callable[[str], Evidence]) -> None:
    def poke(_x: Pixels, logits: Logits) -> Logits:
        logits[0, 3] = np.nan
        return logits

    evidence = evidence_of("first")
    wrapped: Any = _Wrapped(evidence.session, poke)
    finding = NeuralCleanse().scan(replace(evidence, session=wrapped))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == "the session's logits on clean images are not finite (NaN or infinite weights?)"


def test_scan_measures_nothing_when_nearly_all_images_are_of_one_class(evidence_of: Callable[[str], Evidence]) -> None:
    evidence = evidence_of("first")
    rows = np.flatnonzero(evidence.clean.labels == 3)
    clean = evidence.clean.take(np.resize(rows, 400))
    finding = NeuralCleanse().scan(replace(evidence, clean=clean))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == "0 of 200 images are outside the most frequent class; at least 50 are needed"


def test_scan_judges_all_classes_when_the_images_are_sorted_by_class(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned(SPREAD)
    evidence = evidence_of("first")
    clean = evidence.clean.take(np.argsort(evidence.clean.labels, kind="stable"))
    finding = NeuralCleanse().scan(replace(evidence, clean=clean))
    assert finding.verdict is Verdict.CLEAN, finding.reason
    for half in _halves(replace(evidence, clean=clean)):
        assert np.bincount(half.labels, minlength=CLASSES).min() > 5


@pytest.mark.parametrize(("censored", "verdict"), [(3, Verdict.CLEAN), (4, Verdict.NOT_MEASURED)])
def test_scan_measures_nothing_above_a_quarter_censored(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None], censored: int, verdict: Verdict
) -> None:
    planned({target: norms for target, norms in SPREAD.items() if target >= censored})
    finding = NeuralCleanse().scan(evidence_of("first"))
    assert finding.verdict is verdict
    if verdict is Verdict.NOT_MEASURED:
        assert finding.reason == "4 of 12 classes are censored, more than 25%"
        assert len(_result(finding).classes) == CLASSES
    else:
        assert finding.reason.endswith("; 3 of 12 classes have none ('speed_30', 'speed_50', 'ahead_only')")


def test_scan_measures_nothing_when_no_class_has_a_trigger(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned({})
    finding = NeuralCleanse().scan(evidence_of("first"))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == "12 of 12 classes are censored, more than 25%"
    result = _result(finding)
    assert result.replay_agreement == 1.0
    assert {(entry.norm, entry.optimised_asr, entry.artifact_asr) for entry in result.classes} == {(None, 1.0, 1.0)}
    assert {entry.censored for entry in result.classes} == {
        "no trigger reached an ASR of 0.99 on the shadow within the budget"
    }


def test_scan_measures_nothing_when_no_class_could_be_a_suspect(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned(SPREAD)  # median / MAD is 5.73
    assert NeuralCleanse(threshold=5.7).scan(evidence_of("first")).verdict is Verdict.CLEAN
    finding = NeuralCleanse(threshold=5.8).scan(evidence_of("first"))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == (
        "the norms scatter so widely (median 25.5, scaled MAD 4.4) that no class could reach an index of 5.8, however "
        "small its trigger"
    )
    assert _result(finding).score is not None


def test_refuse_norms_needs_six_converged_classes() -> None:
    assert neural_cleanse._refuse_norms(np.array([1.0, 2, 3, 4, 5, np.inf])) == (
        "5 classes converged; at least 6 are needed"
    )
    assert neural_cleanse._refuse_norms(np.array([1.0, 2, 3, 4, 5, 6])) is None
    assert neural_cleanse._refuse_norms(np.array([1.0, 2, 3, 4, 5, 6, np.inf, np.inf])) is None


# --- how it judges ----------------------------------------------------------------------------------------------------


def test_scan_raises_the_alarm_on_the_low_side_only(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned({**SPREAD, 11: [200.0]})
    high = NeuralCleanse().scan(evidence_of("first"))
    assert high.verdict is Verdict.CLEAN
    planned({**SPREAD, 11: [2.0]})
    low = NeuralCleanse().scan(evidence_of("first"))
    result = _result(low)
    # norms 2, 20..30: median 24.5, deviations 22.5 and .5 to 5.5, scaled MAD 1.4826 * 3
    assert (result.median_norm, result.mad) == (pytest.approx(24.5), pytest.approx(4.4478))
    assert result.score == pytest.approx(22.5 / 4.4478)
    assert (low.verdict, low.reason) == (
        Verdict.BACKDOORED,
        "trigger norm far below the other classes': class 11 ('priority_road', index 5.06)",
    )
    assert [(suspect.target_class, suspect.class_name) for suspect in result.suspects] == [(11, "priority_road")]
    assert result.suspects[0].trigger_id == _trigger(2.0, target=11).trigger_id


@pytest.mark.parametrize("value", ["0.99", "-1"])
def test_a_multiplier_that_shrinks_the_cost_is_refused(value: str) -> None:
    with pytest.raises(SpecError, match=r"multiplier=.*greater than or equal to 1"):
        DEFENSES.create(f"neural-cleanse:multiplier={value}")


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize("key", ["learning-rate", "initial-cost", "multiplier", "attack-success", "threshold"])
def test_settings_are_refused_when_they_are_not_finite(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^defense 'neural-cleanse:{key}={value}': .*Input should be "):
        DEFENSES.create(f"neural-cleanse:{key}={value}")


@pytest.mark.parametrize(
    ("threshold", "value", "source"), [(None, 2.0, "paper"), (2.0, 2.0, "user"), (1.1, 1.1, "user")]
)
def test_scan_names_the_source_of_its_threshold(
    evidence_of: Callable[[str], Evidence],
    planned: Callable[..., None],
    threshold: float | None,
    value: float,
    source: str,
) -> None:
    planned(SPREAD)
    finding = NeuralCleanse(threshold=threshold).scan(evidence_of("first"))
    assert finding.threshold is not None
    assert (finding.threshold.value, finding.threshold.source) == (value, source)
    assert finding.settings["threshold"] == threshold
    assert finding.verdict is {2.0: Verdict.CLEAN, 1.1: Verdict.BACKDOORED}[value]  # the highest index is 1.24


@pytest.mark.parametrize(
    ("clean", "verdict", "suspects", "p", "reason"),
    [
        ([1.3] * 19, Verdict.CLEAN, [], 1.0, "no class has an anomaly index above 1.3; highest 1.24"),
        ([1.1] * 19, Verdict.BACKDOORED, [0], 1 / 20, "trigger norm far below the other classes': class 0 ("),
        ([*[1.0] * 18, 1.3], Verdict.CLEAN, [], 2 / 20, "no class has an anomaly index above 1.3; highest 1.24"),
    ],
)
def test_scan_judges_by_a_calibration_that_fits(
    evidence_of: Callable[[str], Evidence],
    planned: Callable[..., None],
    clean: list[float],
    verdict: Verdict,
    suspects: list[int],
    p: float,
    reason: str,
) -> None:
    planned(SPREAD)  # indices 1.24, 1.01, 0.79, ...
    evidence = evidence_of("first")
    finding = NeuralCleanse().scan(replace(evidence, calibrations=_calibrations(evidence, clean)))
    assert (finding.verdict, [suspect.target_class for suspect in _result(finding).suspects]) == (verdict, suspects)
    assert finding.reason.startswith(reason)
    threshold = finding.threshold
    assert threshold is not None
    assert (threshold.value, threshold.source, threshold.n) == (clean[-1], "calibrated", 19)
    assert (threshold.false_alarm_rate, threshold.p_value) == (0.05, p)


def test_scan_claims_no_p_value_when_there_is_no_score(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned({})
    evidence = evidence_of("first")
    finding = NeuralCleanse().scan(replace(evidence, calibrations=_calibrations(evidence, [1.0] * 19)))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.threshold is not None
    assert (finding.threshold.source, finding.threshold.p_value) == ("calibrated", None)


@pytest.mark.parametrize("changed", [{"patience": 6}, {"budget": "quick"}])
def test_scan_is_calibrated_under_its_own_settings_only(
    evidence_of: Callable[[str], Evidence], changed: dict[str, Any]
) -> None:
    calibrations = _calibrations(evidence_of("first"), [1.0] * 19)
    assert NeuralCleanse().line(calibrations).threshold.source == "calibrated"
    assert NeuralCleanse(**changed).line(calibrations).threshold.source == "paper"
    assert NeuralCleanse(threshold=3).line(calibrations).threshold.source == "user"


def _calibrations(evidence: Evidence, clean: list[float]) -> Calibrations:
    population = population_of(evidence.session.artifact, "d" * 64)
    made = Conditions(seed=0, versions={}, runtime=runtime(), profile=None, saturating_operators=())
    entry = CalibrationEntry(
        defense="neural-cleanse",
        settings=NeuralCleanse().calibrated_settings,
        population=population,
        conditions=made,
        scores=tuple(clean),
        artifacts=tuple(sorted(f"{index:064x}" for index in range(len(clean)))),
        not_measured=0,
    )
    file = CalibrationFile(name="c.json", sha256="s", body=CalibrationBody(command=(), entries=(entry,)))
    return Calibrations(artifact="another", population=population, conditions=made, files=(file,))


@pytest.mark.parametrize(
    ("optimised", "held_out", "censored"),
    [
        (0.99, 0.75, None),
        (0.989, 1.0, "no trigger reached an ASR of 0.99 on the session within the budget"),
        (1.0, 0.749, "held-out artifact ASR 0.75 is below 0.75"),
        (1.0, 0.5, "held-out artifact ASR 0.50 is below 0.75"),
    ],
)
def test_scan_counts_a_norm_only_when_the_trigger_works_on_both_halves(
    evidence_of: Callable[[str], Evidence],
    planned: Callable[..., None],
    optimised: float,
    held_out: float,
    censored: str | None,
) -> None:
    planned({**SPREAD, 5: [1.0]}, lambda target, _norm: (optimised, held_out) if target == 5 else (1.0, 1.0))
    finding = NeuralCleanse().scan(evidence_of("first"))
    entry = next(entry for entry in _result(finding).classes if entry.target_class == 5)
    assert (entry.censored, entry.norm) == (censored, None if censored else 1.0)
    assert (entry.optimised_asr, entry.artifact_asr) == (optimised, held_out)
    assert entry.cross_entropy == pytest.approx(0.01), "that of the images it was optimised on"
    assert entry.trigger_id == _trigger(1.0, target=5).trigger_id
    assert finding.verdict is (Verdict.CLEAN if censored else Verdict.BACKDOORED)
    assert entry.rank == (12 if censored else 1)


def test_scan_ranks_censored_classes_last_and_counts_them_by_rank(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned({**SPREAD, 0: [], 1: []})
    result = _result(NeuralCleanse().scan(evidence_of("first")))
    assert [entry.target_class for entry in result.classes] == [*range(2, CLASSES), 0, 1]
    # 22 to 31 and two above: the sixth and seventh of twelve are 27 and 28
    assert result.median_norm == pytest.approx(27.5)
    assert [entry.index for entry in result.classes[-2:]] == [None, None]


def test_scan_takes_the_smallest_trigger_that_works_on_the_session(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    norms = [10.0, 10.4, 11.0, 22.0, 30.0]  # 10.4 is within 5 % of a failed one
    planned({**SPREAD, 5: norms}, lambda target, norm: (1.0 if target != 5 or norm in {10.4, 22.0, 30.0} else 0.9, 1.0))
    result = _result(NeuralCleanse().scan(evidence_of("first")))
    assert next(entry.norm for entry in result.classes if entry.target_class == 5) == pytest.approx(22.0)


def test_scan_tries_the_largest_trigger_before_it_says_that_none_works(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned({**SPREAD, 5: [10.0, 10.4]}, lambda target, norm: (0.9 if target == 5 and norm == 10 else 1.0, 1.0))
    result = _result(NeuralCleanse().scan(evidence_of("first")))
    entry = next(entry for entry in result.classes if entry.target_class == 5)
    assert (entry.norm, entry.censored) == (pytest.approx(10.4), None)


def test_scan_takes_a_larger_trigger_where_the_smallest_fails_on_held_out_images(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned({**SPREAD, 5: [6.0, 6.5, 7.0]}, lambda target, norm: (1.0, 0.74 if target == 5 and norm == 6 else 0.95))
    finding = NeuralCleanse().scan(evidence_of("first"))
    entry = next(entry for entry in _result(finding).classes if entry.target_class == 5)
    assert (entry.norm, entry.artifact_asr, finding.verdict) == (pytest.approx(6.5), 0.95, Verdict.BACKDOORED)


def test_clean_says_how_small_a_trigger_would_have_stood_out(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned(SPREAD)
    finding = NeuralCleanse().scan(evidence_of("first"))  # 25.5 - 2 x 4.4478
    assert finding.reason == "no class has an anomaly index above 2; highest 1.24; a trigger stands out below 16.6 px"


def test_scan_measures_nothing_when_one_track_holds_most_images(evidence_of: Callable[[str], Evidence]) -> None:
    """The other half would be empty."""
    clean = evidence_of("first").clean.take(np.arange(256))
    groups = np.array([0] * 60 + [1] * 196, dtype=np.int64)
    finding = NeuralCleanse().scan(replace(evidence_of("first"), clean=replace(clean, groups=groups)))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert "images are outside the most frequent class" in finding.reason


def test_scan_blocks_clean_but_not_an_alarm_when_a_node_is_gradient_blind(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    blind = replace(evidence_of("first"), gradient_blind_nodes=("floor\x1b", "where", "if", "argmax"))
    planned(SPREAD)
    finding = NeuralCleanse().scan(blind)
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == r"no gradient can look through 'floor\x1b', 'where', 'if' (4 such nodes)"
    planned({**SPREAD, 5: [1.0]})
    assert NeuralCleanse().scan(blind).verdict is Verdict.BACKDOORED


def test_scan_blocks_clean_but_not_an_alarm_when_shadow_and_session_disagree_on_stamped_images(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    evidence = evidence_of("first")
    known = {image.tobytes() for image in evidence.clean.pixels}

    def turned(x: Pixels, logits: Logits) -> Logits:
        stamped = np.array([image.tobytes() not in known for image in x])
        return np.where(stamped[:, None], -logits, logits)

    session: Any = _Wrapped(evidence.session, turned)
    planned(SPREAD)
    finding = NeuralCleanse().scan(replace(evidence, session=session))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.startswith("shadow and session disagree on the stamped images: top-1 agreement 0.0")
    planned({**SPREAD, 5: [1.0]})
    assert NeuralCleanse().scan(replace(evidence, session=session)).verdict is Verdict.BACKDOORED


def test_scan_compares_shadow_and_session_where_a_trigger_failed_too(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    """A class that the shadow reaches and the session does not is where the two part."""
    evidence = evidence_of("first")
    assert evidence.shadow is not None
    failed = {image.tobytes() for image in _trigger(99.0, target=5).stamp(evidence.clean.pixels)}

    def turned(x: Pixels, logits: Logits) -> Logits:
        return np.where(np.array([image.tobytes() in failed for image in x])[:, None], -logits, logits)

    session: Any = _Wrapped(evidence.session, turned)
    planned({**SPREAD, 5: [99.0]}, lambda target, _norm: (0.0 if target == 5 else 1.0, 1.0))
    finding = NeuralCleanse().scan(replace(evidence, session=session))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.startswith("shadow and session disagree on the stamped images")


def test_answers_on_artifact_count_no_row_without_finite_logits(evidence_of: Callable[[str], Evidence]) -> None:
    evidence = evidence_of("first")
    x = evidence.clean.pixels[:4]

    def answer(_x: Pixels, logits: Logits) -> Logits:
        fixed = np.zeros_like(logits)
        fixed[:, 0] = [5, np.nan, np.inf, -5]
        return fixed

    session: Any = _Wrapped(evidence.session, answer)
    assert answers_on_artifact(session, _trigger(3.0), x, 0) == (0.25, None)
    assert answers_on_artifact(session, _trigger(3.0), x, 1) == (0.25, None)


def test_answers_on_artifact_give_the_mean_cross_entropy_of_the_target(evidence_of: Callable[[str], Evidence]) -> None:
    """With all logits 0 but one at log 11, of 12 classes: 1/22 for each of the others, and a half."""

    def answer(_x: Pixels, logits: Logits) -> Logits:
        fixed = np.zeros_like(logits)
        fixed[:2, 0] = np.log(11)
        return fixed

    evidence = evidence_of("first")
    session: Any = _Wrapped(evidence.session, answer)
    asr, loss = answers_on_artifact(session, _trigger(3.0), evidence.clean.pixels[:4], 0)
    assert (asr, loss) == (1.0, pytest.approx((2 * np.log(2) + 2 * np.log(12)) / 4, rel=1e-6))
    asr, loss = answers_on_artifact(session, _trigger(3.0), evidence.clean.pixels[:2], 5)
    assert (asr, loss) == (0.0, pytest.approx(np.log(22), rel=1e-6))


def test_answers_on_artifact_stamp_on_the_uint8_grid(evidence_of: Callable[[str], Evidence]) -> None:
    seen: list[Pixels] = []

    def watch(x: Pixels, logits: Logits) -> Logits:
        seen.append(x)
        return logits

    evidence = evidence_of("first")
    session: Any = _Wrapped(evidence.session, watch)
    answers_on_artifact(session, _trigger(33.3, target=5), evidence.clean.pixels[:9], 5)
    np.testing.assert_array_equal(seen[0] * 255, np.rint(seen[0] * 255))


@pytest.mark.parametrize(("count", "half"), [(200, 100), (401, 200), (600, 256)])
def test_halve_keeps_optimised_and_held_out_images_apart(
    evidence_of: Callable[[str], Evidence], count: int, half: int
) -> None:
    clean = evidence_of("first").clean
    numbered = replace(clean, images=clean.images.copy())
    numbered.images[:, 0, 0, 0], numbered.images[:, 0, 0, 1] = np.arange(600) // 256, np.arange(600) % 256
    halves = neural_cleanse._halve(numbered.take(np.arange(count)), 0)
    ids = [{image.tobytes() for image in part.images} for part in (halves.optimised, halves.held_out)]
    assert [len(part) for part in ids] == [half, half]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("batch_size", [1, 250])
def test_scan_runs_with_any_batch_size(evidence_of: Callable[[str], Evidence], batch_size: int) -> None:
    evidence = evidence_of("first")
    evidence = replace(evidence, clean=evidence.clean.take(np.arange(210)))
    with _budget(2, 1) as scan:
        finding = replace(scan, batch_size=batch_size).scan(evidence)
    assert finding.verdict is Verdict.NOT_MEASURED
    assert "censored" in finding.reason


def test_scan_optimises_and_replays_without_images_of_the_target_class(
    evidence_of: Callable[[str], Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = evidence_of("first")
    label_of = {image.tobytes(): int(label) for image, label in zip(evidence.clean.pixels, evidence.clean.labels)}
    given: dict[int, set[int]] = {}

    def invert(_shadow: object, x: Pixels, target: int, *_: object) -> Inversion:
        given[target] = {label_of[image.tobytes()] for image in x}
        return Inversion(candidates=[], last=_trigger(20.0 + target, target=target))

    monkeypatch.setattr(neural_cleanse, "invert_trigger", invert)
    NeuralCleanse().scan(evidence)
    assert given == {target: set(range(CLASSES)) - {target} for target in range(CLASSES)}


# --- restarts and the scheduler ---------------------------------------------------------------------------------------


@pytest.fixture
def planned_starts(planned: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A plan of norms by class and start; none at all is a start without a trigger."""

    def plan(norms: dict[int, list[float | None]]) -> None:
        planned({})
        begun = dict.fromkeys(norms, 0)

        def invert(_shadow: object, _x: Pixels, target: int, *_: object) -> Inversion:
            norm = norms[target][begun[target]]
            begun[target] += 1
            found = [] if norm is None else [_trigger(norm, target=target)]
            return Inversion(candidates=found, last=_trigger(99.0, target=target))

        monkeypatch.setattr(neural_cleanse, "invert_trigger", invert)

    return plan


ONCE: dict[int, list[float | None]] = {target: [20.0 + target] for target in range(CLASSES)}
"""As `SPREAD`: median 25.5, scaled MAD 4.4478, class 0 lowest with an index of 1.24."""


def test_scan_tells_the_index_of_each_start_alone(
    evidence_of: Callable[[str], Evidence], planned_starts: Callable[..., None]
) -> None:
    # the second start: 40 to 51 but class 3 at 10, median 45.5; deviations .5 .5 1.5 1.5 2.5 3.5 3.5 4.5 ... 35.5
    planned_starts({target: [20.0 + target, 10.0 if target == 3 else 40.0 + target] for target in range(CLASSES)})
    result = _result(NeuralCleanse(restarts=2).scan(evidence_of("first")))
    first, second = result.restarts
    assert (first.score, first.median_norm, first.mad, first.lowest_class) == pytest.approx(
        (5.5 / 4.4478, 25.5, 4.4478, 0), abs=1e-5
    )
    assert (second.score, second.median_norm, second.lowest_class) == pytest.approx((35.5 / (1.4826 * 3.5), 45.5, 3))
    # what is judged takes the better start of every class: 20, 21, 22, 10, 24, ...
    assert [entry.norm for entry in result.classes[:2]] == pytest.approx([10.0, 20.0])


def test_scan_tells_nothing_of_starts_when_there_was_one(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned(SPREAD)
    assert _result(NeuralCleanse().scan(evidence_of("first"))).restarts == ()


def test_scan_gives_a_start_no_index_when_too_many_of_its_classes_are_censored(
    evidence_of: Callable[[str], Evidence], planned_starts: Callable[..., None]
) -> None:
    planned_starts({target: [20.0 + target, None if target < 4 else 30.0] for target in range(CLASSES)})
    result = _result(NeuralCleanse(restarts=2).scan(evidence_of("first")))
    assert result.score is not None
    censored = result.restarts[1]
    assert (censored.score, censored.median_norm, censored.lowest_class) == (None, None, 4)


@pytest.mark.parametrize("further", [0.5, 19.0, 60.0, None])
def test_screened_scan_judges_by_the_first_starts_whatever_the_further_ones_find(
    evidence_of: Callable[[str], Evidence], planned_starts: Callable[..., None], further: float | None
) -> None:
    """A class that is started more often finds smaller triggers by chance alone: they must not count against it."""
    evidence = evidence_of("first")
    planned_starts(ONCE)
    once = NeuralCleanse(restarts=1).scan(evidence)
    planned_starts(ONCE | {0: [20.0, further, further, further]})
    screened = NeuralCleanse(restarts=4, scheduler="screened").scan(evidence)
    assert (screened.verdict, screened.reason) == (once.verdict, once.reason) == (Verdict.CLEAN, once.reason)
    ours, theirs = _result(screened), _result(once)
    assert (ours.score, ours.median_norm, ours.mad) == (theirs.score, theirs.median_norm, theirs.mad)
    assert [entry.model_copy(update={"restart_norms": ()}) for entry in ours.classes] == [
        entry.model_copy(update={"restart_norms": ()}) for entry in theirs.classes
    ]
    assert ours.pictures == theirs.pictures


def test_screened_scan_starts_only_the_lowest_class_again(
    evidence_of: Callable[[str], Evidence], planned_starts: Callable[..., None]
) -> None:
    planned_starts(ONCE | {0: [20.0, 18.0, None, 23.0]})
    finding = NeuralCleanse(restarts=4, scheduler="screened").scan(evidence_of("first"))
    result = _result(finding)
    assert {entry.target_class: len(entry.restart_norms) for entry in result.classes} == {
        target: 4 if target == 0 else 1 for target in range(CLASSES)
    }
    # further starts against the first one's median 25.5 and scaled MAD 4.4478; a censored one ranks above all
    expected = [5.5 / 4.4478, 7.5 / 4.4478, 0, 2.5 / 4.4478]
    assert [one.score for one in result.restarts] == pytest.approx(expected, abs=1e-5)
    assert [one.lowest_class for one in result.restarts] == [0, 0, None, 0]
    assert finding.cost.gradient_steps == 200 * (CLASSES + 3)
    assert 3 * finding.cost.gradient_steps <= 200 * 4 * CLASSES
    assert (finding.settings["scheduler"], finding.settings["restarts"]) == ("screened", 4)


def test_screened_scan_repeats_the_exhaustive_one_s_starts(
    evidence_of: Callable[[str], Evidence], short_scan: Finding
) -> None:
    """The first starts bit for bit, whose index is thus one of the exhaustive scan's spread."""
    evidence = evidence_of("second.int8-static")
    with _budget(25, 4) as scan:
        screened = replace(scan, scheduler="screened")
        finding = screened.scan(replace(evidence, threads=2))
        assert screened.scan(replace(evidence, threads=1)) == finding
    ours, theirs = _result(finding), _result(short_scan)
    assert [(entry.target_class, entry.norm, entry.index, entry.trigger_id) for entry in ours.classes] == [
        (entry.target_class, entry.norm, entry.index, entry.trigger_id) for entry in theirs.classes
    ]
    again = ours.classes[0]
    assert (len(again.restart_norms), again.restart_norms[0]) == (4, again.norm)
    assert len(set(again.restart_norms)) == 4
    assert finding.cost.gradient_steps == 25 * (CLASSES + 3)


@pytest.mark.parametrize(
    "setting", ["budget=quick", "budget=gate", "budget=gate,restarts=3", "budget=exhaustive", "restarts=1"]
)
def test_registry_refuses_a_screened_scan_whose_starts_would_be_shorter_than_it_says(setting: str) -> None:
    expected = r"scheduler: screened needs starts of full length, [13] are too few; add restarts=4$"
    with pytest.raises(SpecError, match=expected):
        DEFENSES.create(f"neural-cleanse:scheduler=screened,{setting}")


def test_screened_scan_measures_nothing_when_its_starts_would_be_too_short(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 classes here, as it is of 8 with 4 restarts: the plan leaves each start fewer steps than the budget."""
    planned(SPREAD)
    monkeypatch.setattr(
        neural_cleanse, "screened_plan", lambda _classes, steps, _restarts: Plan(steps=steps - 1, compared=1)
    )
    finding = NeuralCleanse(restarts=4, scheduler="screened").scan(evidence_of("first"))
    assert (finding.verdict, finding.cost.gradient_steps, finding.result) == (Verdict.NOT_MEASURED, 0, None)
    assert finding.reason == (
        "of 12 classes the screened scheduler leaves each start 199 of 200 gradient steps; ask for restarts >= 4"
    )


def test_screened_scan_reports_progress(
    evidence_of: Callable[[str], Evidence], planned_starts: Callable[..., None]
) -> None:
    planned_starts(ONCE | {0: [20.0] * 4})
    steps: list[int] = []
    scan = NeuralCleanse(restarts=4, scheduler="screened")
    scan.scan(replace(evidence_of("first"), progress=lambda _name, done, _total: steps.append(done)))
    assert steps == [*range(CLASSES + 1), CLASSES, CLASSES + 1]


def test_scan_starts_no_class_again_when_none_has_a_norm(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    planned({})
    finding = NeuralCleanse(restarts=4, scheduler="screened").scan(evidence_of("first"))
    assert finding.reason == "12 of 12 classes are censored, more than 25%"
    assert finding.cost.gradient_steps == 200 * CLASSES


def test_settings_of_the_shipped_calibrations_are_those_of_the_default_scan() -> None:
    entries = [entry for file in shipped_calibrations() for entry in file.body.entries]
    assert entries
    assert {json.dumps(entry.settings, sort_keys=True) for entry in entries} == {
        json.dumps(NeuralCleanse().calibrated_settings, sort_keys=True)
    }


def test_scan_is_calibrated_apart_from_the_exhaustive_one_when_it_is_screened(
    evidence_of: Callable[[str], Evidence],
) -> None:
    calibrations = _calibrations(evidence_of("first"), [1.0] * 19)
    assert NeuralCleanse(scheduler="exhaustive", restarts=1).line(calibrations).threshold.source == "calibrated"
    assert NeuralCleanse(restarts=2).line(calibrations).threshold.source == "paper"
    assert NeuralCleanse(scheduler="screened", restarts=4).line(calibrations).threshold.source == "paper"


def test_scan_reports_progress(evidence_of: Callable[[str], Evidence], planned: Callable[..., None]) -> None:
    planned(SPREAD)
    steps: list[tuple[str, int, int]] = []
    NeuralCleanse().scan(replace(evidence_of("first"), progress=lambda *step: steps.append(step)))
    assert steps == [("neural-cleanse", done, CLASSES) for done in range(CLASSES + 1)]


# --- what it shows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norms", "shown"),
    [
        ({5: [1.0]}, [5]),
        ({5: [1.0], 9: [0.5]}, [9, 5]),
        ({}, [0]),
        ({0: [], 1: []}, [2]),
        ({target: [] for target in range(6)}, [6]),
        ({target: [] for target in range(CLASSES)}, []),
    ],
    ids=["a suspect", "two suspects", "no suspect", "censored ones", "too many censored", "all censored"],
)
def test_scan_pictures_every_suspect_or_else_the_smallest_trigger(
    evidence_of: Callable[[str], Evidence],
    planned: Callable[..., None],
    norms: dict[int, list[float]],
    shown: list[int],
) -> None:
    planned({**SPREAD, **norms})
    evidence = evidence_of("first")
    result = _result(NeuralCleanse().scan(evidence))
    assert [picture.target_class for picture in result.pictures] == shown
    ids = {entry.target_class: entry.trigger_id for entry in result.classes}
    assert [picture.trigger_id for picture in result.pictures] == [ids[target] for target in shown]


def test_scan_stamps_a_held_out_image_of_another_class_for_the_picture(
    evidence_of: Callable[[str], Evidence], planned: Callable[..., None]
) -> None:
    evidence = evidence_of("first")
    held_out = neural_cleanse._halve(evidence.clean, evidence.seed).held_out
    target = int(held_out.labels[0])
    planned({**SPREAD, target: [1.0]})
    (picture,) = _result(NeuralCleanse().scan(evidence)).pictures
    first = int(np.flatnonzero(held_out.labels != target)[0])
    assert first > 0
    assert picture == picture_trigger(_trigger(1.0, target=target), target, held_out.pixels[first])


# --- its settings -----------------------------------------------------------------------------------------------------


def test_budgets_are_those_of_the_issue() -> None:
    assert BUDGETS == {"quick": (60, 1), "gate": (200, 1), "exhaustive": (400, 3)}


def test_marks_are_those_of_the_issue() -> None:
    marks = (neural_cleanse.MIN_IMAGES, neural_cleanse.MIN_CLASSES, neural_cleanse.MAX_CENSORED)
    assert marks == (200, 6, 0.25)
    assert (neural_cleanse.MIN_ARTIFACT_ASR, neural_cleanse.PAPER_THRESHOLD) == (0.75, 2.0)


def test_registry_makes_the_scan_with_the_paper_s_defaults() -> None:
    assert DEFENSES.create("neural-cleanse") == NeuralCleanse()
    assert DEFENSES.create("neural-cleanse:budget=exhaustive,threshold=3").budget == "exhaustive"
    screened = DEFENSES.create("neural-cleanse:scheduler=screened,restarts=4")
    assert screened == NeuralCleanse(scheduler="screened", restarts=4)
    assert (NeuralCleanse().scheduler, NeuralCleanse().restarts) == ("exhaustive", None)
    defaults = NeuralCleanse()
    schedule = defaults._schedule(200)
    assert (schedule.steps, schedule.learning_rate, schedule.betas, schedule.batch_size) == (200, 0.1, (0.5, 0.9), 32)
    assert (schedule.initial_cost, schedule.multiplier, schedule.patience) == (1e-3, 2.0, 5)
    assert (schedule.attack_success, defaults.threshold) == (0.99, None)


@pytest.mark.parametrize(
    "setting",
    [
        "budget=endless",
        "learning_rate=0",
        "batch_size=0",
        "attack_success=1.1",
        "threshold=0",
        "steps=9",
        "restarts=0",
        "scheduler=lazy",
    ],
)
def test_registry_refuses_settings_out_of_range(setting: str) -> None:
    with pytest.raises(SpecError, match="neural-cleanse"):
        DEFENSES.create(f"neural-cleanse:{setting}")
