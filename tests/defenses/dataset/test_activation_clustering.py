from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import threadpoolctl

from qdefense.defenses import DEFENSES
from qdefense.defenses.clustering import two_clusters
from qdefense.defenses.dataset import activation_clustering as module
from qdefense.defenses.dataset.activation_clustering import ActivationClustering
from qdefense.defenses.training_features import read_training_set
from qdefense.findings import DatasetResult, Finding, Verdict
from qdefense.registry import SpecError

from .pixel_sets import CLASSES, NAMES, TARGET, evidence, pixel_session, pixel_set
from .small_training import PRECISIONS, small_evidence

EXRE = ActivationClustering(rule="exclusionary-reclassification")


def result_of(finding: Finding) -> DatasetResult:
    assert isinstance(finding.result, DatasetResult)
    return finding.result


# --- power, level, vacuity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scan_finds_badnets_and_its_images_when_a_tenth_of_the_set_is_poison(
    small_files: Any, small_signs: Any, precision: str
) -> None:
    gathered, poisoned = small_evidence(small_files, small_signs, f"second{precision}")
    finding = ActivationClustering().scan(gathered)
    result = result_of(finding)
    assert finding.verdict is Verdict.BACKDOORED
    assert [entry.target_class for entry in result.classes if entry.suspicious] == [7]
    assert result.classes[7].score == result.score
    assert poisoned[list(result.flagged)].mean() > 0.9
    assert len(result.flagged) > 50


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scan_of_a_clean_training_set_does_not_name_the_target(
    small_files: Any, small_signs: Any, precision: str
) -> None:
    """The published line of .15 alarms on clean networks, too: a CPU with AVX2 trains one at .155."""
    finding = ActivationClustering().scan(small_evidence(small_files, small_signs, f"first{precision}")[0])
    result = result_of(finding)
    assert result.score is not None
    assert result.score < 0.2
    assert not result.classes[7].suspicious
    assert finding.verdict is (Verdict.CLEAN if result.score <= 0.15 else Verdict.BACKDOORED)
    assert (result.flagged == ()) == (finding.verdict is Verdict.CLEAN)
    if finding.verdict is Verdict.CLEAN:
        assert finding.reason == f"no class scores above 0.15 by silhouette; highest {result.score:.2f}"


def test_scan_flags_exactly_the_planted_rows_when_they_are_far_apart() -> None:
    images, poisoned = pixel_set(poison=15)
    finding = ActivationClustering().scan(evidence(images))
    result = result_of(finding)
    assert result.flagged == tuple(np.flatnonzero(poisoned))
    target = images.labels == TARGET
    assert np.array_equal(np.array(result.sample_scores)[target] > 0, poisoned[target])
    entry = result.classes[TARGET]
    assert (entry.n, entry.flagged, entry.suspicious, entry.class_name) == (135, 15, True, "zone 3")
    assert entry.statistics["relative_size"] == pytest.approx(15 / 135)
    assert entry.statistics["silhouette"] == entry.score
    assert finding.reason == (
        f"training images of class 3 ('zone 3'): the smaller cluster holds 11% of it, silhouette {entry.score:.2f}"
    )
    assert result.layer == "gemm"


def test_scan_loses_the_signal_when_the_poison_is_left_out() -> None:
    images, _ = pixel_set(poison=15)
    before = result_of(ActivationClustering().scan(evidence(images))).score
    clean, _ = pixel_set(poison=0)
    after = ActivationClustering().scan(evidence(clean))
    assert after.verdict is Verdict.CLEAN
    assert before is not None
    assert result_of(after).score < before / 2


# --- rules ------------------------------------------------------------------------------------------------------------


def test_scan_judges_by_size_alone_when_told_so() -> None:
    images, poisoned = pixel_set(poison=15)
    finding = DEFENSES.create("activation-clustering:rule=relative-size,size-threshold=0.25").scan(evidence(images))
    result = result_of(finding)
    assert result.classes[TARGET].score == pytest.approx(1 - 15 / 135)
    assert finding.threshold is not None
    assert (finding.threshold.value, finding.threshold.source) == (0.75, "user")
    suspicious = [entry for entry in result.classes if entry.suspicious]
    assert suspicious == [entry for entry in result.classes if entry.statistics["relative_size"] < 0.25]
    assert set(np.flatnonzero(poisoned)) <= set(result.flagged)


def test_exclusionary_reclassification_asks_a_network_without_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    images, poisoned = pixel_set(poison=15)
    reference = pixel_session()
    monkeypatch.setattr(reference, "logits_of", lambda part: part.images.reshape(-1, 16, 3)[:, :CLASSES, 0])
    rule = DEFENSES.create("activation-clustering:rule=exclusionary-reclassification")
    finding = rule.scan(evidence(images, reference=reference))
    result = result_of(finding)
    assert finding.verdict is Verdict.BACKDOORED
    assert (finding.threshold.value, finding.threshold.source) == (0.5, "paper")
    entry = result.classes[TARGET]
    assert result.flagged == tuple(np.flatnonzero(poisoned))
    assert (entry.score, entry.statistics["reclassified_own"], entry.statistics["exre"]) == (1.0, 0, 0)
    assert "; without it 0 of its images go to their own class, " in entry.reason
    # no other rule asks
    alone = result_of(ActivationClustering().scan(evidence(images, reference=reference))).classes[TARGET]
    assert set(alone.statistics) == {"relative_size", "silhouette"}


@pytest.mark.parametrize("other", [{}, {"name": "same weights, other bytes"}])
def test_exclusionary_reclassification_is_not_measured_when_the_network_is_a_copy(other: dict[str, str]) -> None:
    """It learned from the planted rows, gives them the planted label, and would clear them all."""
    images, _ = pixel_set(poison=15)
    assert ActivationClustering().scan(evidence(images)).verdict is Verdict.BACKDOORED
    finding = EXRE.scan(evidence(images, reference=pixel_session(**other)))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.startswith(
        "the reference answers as the audited file does: 100.0% of the small clusters, 100.0% of the training set and "
        "100.0% of the clean images alike; a copy of it, of whatever precision, learned from the rows in question"
    )


def test_exclusionary_reclassification_clears_by_a_network_that_differs_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It agrees on the rows, and is another network all the same: 2 % of the clean images tell."""
    images, _ = pixel_set(poison=15)
    reference = pixel_session()
    honest = reference.logits_of
    clean = evidence(images).clean

    def differing(part: Any) -> Any:
        logits = honest(part)
        if len(part) == len(clean):
            logits[:2] = np.roll(logits[:2], 1, axis=1)
        return logits

    monkeypatch.setattr(reference, "logits_of", differing)
    assert EXRE.scan(evidence(images, reference=reference)).verdict is Verdict.CLEAN


def test_exclusionary_reclassification_is_not_applicable_when_there_is_no_such_network() -> None:
    rule = DEFENSES.create("activation-clustering:rule=exclusionary-reclassification")
    finding = rule.scan(evidence(pixel_set()[0]))
    assert finding.verdict is Verdict.NOT_APPLICABLE
    assert "trained anew without the small clusters, and no such reference was given" in finding.reason
    assert finding.cost.forwards == 0


def test_exclusionary_reclassification_is_not_measured_when_the_network_answers_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = pixel_session()
    monkeypatch.setattr(reference, "logits_of", lambda part: np.full((len(part), CLASSES), np.nan))
    given = evidence(pixel_set(poison=15)[0], reference=reference)
    finding = EXRE.scan(given)
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == "the reference answers with values that are not finite"


def test_a_reference_that_guesses_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pixel_session()
    monkeypatch.setattr(reference, "logits_of", lambda part: np.eye(CLASSES)[np.zeros(len(part), int)])
    given = evidence(pixel_set(poison=15)[0], reference=reference)
    finding = EXRE.scan(given)
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.startswith("the reference guesses on the clean images: clean accuracy ")
    assert ActivationClustering().scan(given).verdict is Verdict.BACKDOORED, "a rule that asks none is not voided by it"
    unlabelled = replace(given, clean=replace(given.clean, labelled=False), stated_accuracy=0.9)
    finding = EXRE.scan(unlabelled)
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.startswith("the reference guesses on the training set: clean accuracy ")


@pytest.mark.parametrize("threshold", [1e-17, 1e-300])
def test_exclusionary_reclassification_alarms_at_any_line_when_nothing_goes_to_its_class(
    monkeypatch: pytest.MonkeyPatch, threshold: float
) -> None:
    """``l / p`` is 0; ``1 / (1 + T)`` would round to 1, above which no score is."""
    images, poisoned = pixel_set(poison=15)
    reference = pixel_session()
    monkeypatch.setattr(reference, "logits_of", lambda part: part.images.reshape(-1, 16, 3)[:, :CLASSES, 0])
    finding = replace(EXRE, exre_threshold=threshold).scan(evidence(images, reference=reference))
    assert finding.verdict is Verdict.BACKDOORED
    assert result_of(finding).flagged == tuple(np.flatnonzero(poisoned))
    assert finding.threshold is not None
    assert finding.threshold.value < 1


def test_exclusionary_reclassification_says_when_no_cluster_was_small_enough_to_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The published rule passes such classes; that no network had a say is told."""
    split = two_clusters(np.random.default_rng(0).normal(size=(120, 10)), starts=1, seed=0)
    halves = split._replace(smaller=np.arange(120) < 60, relative_size=0.5)
    monkeypatch.setattr(module, "two_clusters", lambda points, **_: halves)
    finding = EXRE.scan(evidence(pixel_set()[0], reference=pixel_session()))
    assert (finding.verdict, finding.reason) == (
        Verdict.CLEAN,
        "no class scores above 0.50 by exclusionary-reclassification; highest 0.00; the reference was asked about no "
        "cluster: none is below 35% of its class",
    )


@pytest.mark.parametrize("rule", ["relative-size", "exclusionary-reclassification"])
@pytest.mark.parametrize(("threshold", "percent"), [(0.01, "1%"), (5 / 120, "4.17%")])
def test_scan_is_not_measured_when_no_cluster_can_be_as_small_as_asked_for(
    rule: Any, threshold: float, percent: str
) -> None:
    """Of 120 images a cluster holds at least 5."""
    scan = ActivationClustering(rule=rule, size_threshold=threshold, starts=1)
    finding = scan.scan(evidence(pixel_set()[0], reference=pixel_session()))
    assert (finding.verdict, finding.reason) == (
        Verdict.NOT_MEASURED,
        "8 of 8 classes were not measured; class 0 ('zone 0'): a cluster holds at least 5 of its 120 images, so that "
        f"none could be smaller than the size threshold of {percent}: set a higher size-threshold",
    )


def test_scan_is_measured_when_a_cluster_can_just_be_as_small_as_asked_for() -> None:
    scan = ActivationClustering(rule="relative-size", size_threshold=0.042, starts=1)
    assert scan.scan(evidence(pixel_set()[0])).verdict is Verdict.CLEAN
    unasked = ActivationClustering(size_threshold=0.01, starts=1)
    assert unasked.scan(evidence(pixel_set()[0])).verdict is Verdict.CLEAN, "the silhouette's rule asks for no size"


@pytest.mark.parametrize(
    ("spec", "value", "source"),
    [
        ("", 0.15, "paper"),
        ("silhouette-threshold=0.1", 0.1, "user"),
        ("size-threshold=0.2", 0.15, "paper"),
        ("rule=relative-size", 0.65, "paper"),
        ("rule=exclusionary-reclassification,exre-threshold=3", 0.25, "user"),
    ],
)
def test_threshold_is_that_of_the_rule(spec: str, value: float, source: str) -> None:
    line = DEFENSES.create(f"activation-clustering:{spec}").threshold
    assert (line.value, line.source, line.false_alarm_rate) == (value, source, None)


@pytest.mark.parametrize("setting", [
    "rule=size", "size-threshold=0.6", "dimensions=0", "starts=0", "reduction=tsne", "silhouette-threshold=1",
])  # fmt: skip
def test_settings_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(SpecError, match=setting.partition("=")[0].replace("-", "_")):
        DEFENSES.create(f"activation-clustering:{setting}")


# --- the same answer --------------------------------------------------------------------------------------------------


def test_scan_gives_the_same_finding_again_whatever_the_threads() -> None:
    images, _ = pixel_set(poison=15)
    first = ActivationClustering().scan(evidence(images))
    with threadpoolctl.threadpool_limits(2):
        second = ActivationClustering().scan(evidence(images, threads=2))
    assert first == second


def test_scan_does_not_depend_on_the_order_of_the_rows() -> None:
    images, _ = pixel_set(poison=15)
    order = np.random.default_rng(5).permutation(len(images))
    straight = result_of(ActivationClustering().scan(evidence(images)))
    mixed = result_of(ActivationClustering().scan(evidence(images.take(order))))
    assert sorted(order[list(mixed.flagged)]) == list(straight.flagged)


def test_scan_tells_its_progress_and_its_cost() -> None:
    heard: list[tuple[str, int, int]] = []
    images, _ = pixel_set()
    finding = ActivationClustering().scan(evidence(images, progress=lambda *each: heard.append(each)))
    assert heard[0] == ("activation-clustering", 0, len(images))
    assert heard[-1] == ("activation-clustering", len(images), len(images))
    assert finding.cost.forwards == 2 * (len(images) + 1), "each image twice, once of them to see that no tap disturbs"


# --- what is not measured ---------------------------------------------------------------------------------------------


def without(images: Any, label: int, kept: int) -> Any:
    rows = np.flatnonzero(images.labels == label)[kept:]
    return images.take(np.setdiff1d(np.arange(len(images)), rows))


def test_scan_is_not_measured_when_a_label_has_too_few_images() -> None:
    images, _ = pixel_set()
    finding = ActivationClustering().scan(evidence(without(images, 5, 49)))
    assert finding.verdict is Verdict.NOT_MEASURED
    expected = "1 of 8 classes were not measured; class 5 ('zone 5'): 49 images; at least 50 are needed"
    assert finding.reason == expected
    result = result_of(finding)
    assert result.classes[5].score is None
    assert [score is None for score in result.sample_scores].count(True) == 49


def test_scan_passes_over_a_label_that_has_no_image() -> None:
    images, _ = pixel_set()
    finding = ActivationClustering().scan(evidence(without(images, 5, 0)))
    assert finding.verdict is Verdict.CLEAN
    assert result_of(finding).classes[5].reason == "no image carries this label"
    assert finding.reason.endswith("; 1 of 8 labels have no image: 5 ('zone 5')")


def test_scan_says_which_labels_have_no_image() -> None:
    images, _ = pixel_set()
    few = replace(images.take(np.flatnonzero(images.labels < 2)), class_names=(*NAMES[:3], "red\x1b[31m", *NAMES[4:]))
    finding = ActivationClustering(starts=1).scan(evidence(few))
    assert finding.verdict is Verdict.CLEAN
    assert finding.reason.endswith(
        "; 6 of 8 labels have no image: 2 ('zone 2'), 3 ('red\\x1b[31m'), 4 ('zone 4') and 3 more"
    )


def test_scan_still_alarms_when_another_label_has_too_few_images() -> None:
    images, _ = pixel_set(poison=15)
    assert ActivationClustering().scan(evidence(without(images, 5, 20))).verdict is Verdict.BACKDOORED


def test_scan_is_not_measured_when_the_features_of_a_label_do_not_differ() -> None:
    images, _ = pixel_set()
    pixels = images.images.copy()
    pixels[images.labels == 2] = pixels[images.labels == 2][0]
    finding = ActivationClustering().scan(evidence(replace(images, images=pixels)))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.endswith("class 2 ('zone 2'): the features of its 120 images do not differ")


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_scan_is_not_measured_when_the_features_of_a_label_span_too_few_dimensions(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Noise of few dimensions has a silhouette above any line: .56 of 1, .16 of 4."""
    reading = read_training_set(evidence(pixel_set()[0]), "any")
    noise = np.random.default_rng(0).normal(size=(len(reading.labels), rank)).astype(np.float32)
    flat = np.random.default_rng(1).normal(size=(rank, 48)).astype(np.float32)
    monkeypatch.setattr(module, "read_training_set", lambda *_: replace(reading, features=noise @ flat))
    finding = ActivationClustering(starts=5).scan(evidence(pixel_set()[0]))
    assert (finding.verdict, result_of(finding).score) == (Verdict.NOT_MEASURED, None)
    assert finding.reason == (
        f"8 of 8 classes were not measured; class 0 ('zone 0'): the features of its 120 images span {rank} dimensions; "
        "10 are needed"
    )
    fewer = ActivationClustering(starts=5, dimensions=rank).scan(evidence(pixel_set()[0]))
    assert fewer.verdict is not Verdict.NOT_MEASURED, "who asks for so few gets them"


def with_outliers(monkeypatch: pytest.MonkeyPatch, *groups: int) -> Any:
    """Noise in which so many rows of the target lie far from all others, each group three times as far as the last."""
    reading = read_training_set(evidence(pixel_set()[0]), "any")
    features = np.random.default_rng(0).normal(size=(len(reading.labels), 12)).astype(np.float32)
    rows = np.flatnonzero(reading.labels == TARGET)[: sum(groups)]
    distances = np.repeat(100 * 3.0 ** np.arange(len(groups)), groups)
    features[rows, 0] += distances.astype(np.float32)
    monkeypatch.setattr(module, "read_training_set", lambda *_: replace(reading, features=features))
    return rows


def test_scan_takes_five_rows_for_a_part_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = with_outliers(monkeypatch, 5)
    finding = ActivationClustering(starts=20, reduction="pca").scan(evidence(pixel_set()[0]))
    assert finding.verdict is Verdict.BACKDOORED
    assert result_of(finding).flagged == tuple(rows)


@pytest.mark.parametrize("groups", [(1,), (4,), (1, 3, 1)])
def test_scan_sets_a_few_outliers_aside_and_judges_the_rest(
    monkeypatch: pytest.MonkeyPatch, groups: tuple[int, ...]
) -> None:
    rows = with_outliers(monkeypatch, *groups)
    finding = ActivationClustering(starts=20, reduction="pca").scan(evidence(pixel_set()[0]))
    assert finding.verdict is Verdict.CLEAN
    result = result_of(finding)
    entry = result.classes[TARGET]
    assert entry.reason.endswith(f" ({len(rows)} outlying images were set aside)")
    assert finding.reason.endswith(f"; {len(rows)} outlying images were set aside, and nothing is said of them")
    assert entry.n == 120
    assert [row for row, score in enumerate(result.sample_scores) if score is None] == list(rows)


def test_scan_is_not_measured_when_outlier_after_outlier_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with_outliers(monkeypatch, *[1] * 6)
    finding = ActivationClustering(starts=20, reduction="pca").scan(evidence(pixel_set()[0]))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == (
        "1 of 8 classes were not measured; class 3 ('zone 3'): 5 times the smaller of its two clusters held fewer than "
        "5 of 120 images; look for outliers in it"
    )


def test_scan_is_not_applicable_when_there_is_no_training_set() -> None:
    finding = ActivationClustering().scan(evidence(None))
    assert finding.verdict is Verdict.NOT_APPLICABLE
    assert finding.reason == "no training data was given; name it with --training-data"
    assert finding.result is None


def test_scan_is_not_applicable_when_the_training_set_has_no_labels() -> None:
    images, _ = pixel_set()
    bare = replace(images, labels=np.full(len(images), -1), class_names=(), labelled=False)
    finding = ActivationClustering().scan(evidence(bare))
    assert finding.verdict is Verdict.NOT_APPLICABLE
    assert "the training data has no labels" in finding.reason


def test_scan_is_not_measured_when_the_classes_are_others() -> None:
    images, _ = pixel_set()
    finding = ActivationClustering().scan(evidence(replace(images, class_names=(*NAMES, "more"))))
    assert (finding.verdict, finding.reason) == (
        Verdict.NOT_MEASURED,
        "the training data has 9 classes, the model answers with 8",
    )


def test_scan_is_not_measured_when_all_images_carry_one_label() -> None:
    images, _ = pixel_set()
    finding = ActivationClustering().scan(evidence(images.take(np.flatnonzero(images.labels == 1))))
    assert (finding.verdict, finding.reason) == (Verdict.NOT_MEASURED, "the training data holds 1 of 8 classes")


def test_scan_is_not_measured_when_the_model_was_trained_on_other_data() -> None:
    images, _ = pixel_set()
    finding = ActivationClustering().scan(evidence(images, pixel_session(deaf=True)))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert "agrees with 12.5% of the training labels, little more than by chance" in finding.reason


def test_scan_is_not_measured_when_features_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    session = pixel_session()
    honest = session.tap

    def broken(x: Any, tensors: Any) -> Any:
        found = honest(x, tensors)
        first = found[tensors[0]].copy()
        first[0] = np.nan
        return {**found, tensors[0]: first}

    monkeypatch.setattr(session, "tap", broken)
    finding = ActivationClustering().scan(evidence(pixel_set(60)[0], session))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == "features or logits of 1 of 480 training images are not finite"
