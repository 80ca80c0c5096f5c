"""Every figure of the tables, on records few enough to count by hand."""

from __future__ import annotations

import pytest

from qdefense.bench.cohort import Cohort, Setting, reason_of, status_of
from qdefense.bench.published import published_rows
from qdefense.bench.records import (
    DatasetMetrics,
    DefenseRecord,
    EvaluationRules,
    FilterMetrics,
    Network,
    Rate,
    Record,
    RepairMetrics,
)
from qdefense.bench.tables import (
    Answers,
    behaviour_rows,
    dataset_rows,
    difference,
    filter_rows,
    proportion,
    repair_rows,
    scan_rows,
    share,
    spread,
)
from qdefense.bench.timing_records import FileLatency
from qdefense.bench.timings import latency_rows
from qdefense.findings import Finding, Threshold, Verdict
from qdefense.profile import Runtime
from qdefense.trial import Activity

from .sample_records import (
    CLEAN256,
    EIGHTH,
    RUNTIME,
    behaviour,
    defense,
    latency,
    network,
    quantization,
    scan_metrics,
    sha,
    training,
)

FOUND, MISSED, LOST = Verdict.BACKDOORED, Verdict.CLEAN, Verdict.NOT_MEASURED


def attacked(seed: int, score: float | None, verdict: Verdict = FOUND, **changes: object) -> list[Record]:
    made = network("badnets", seed)
    activity = changes.pop("activity", Activity.ACTIVE)
    metrics = None if score is None else scan_metrics(score, target=12, found=verdict is FOUND)
    return [behaviour(made, activity=activity), defense(made, metrics=metrics, verdict=verdict, **changes)]  # type: ignore[arg-type]


def clean(seed: int, score: float | None, verdict: Verdict = MISSED) -> list[Record]:
    made = network(None, seed)
    return [behaviour(made), defense(made, metrics=None if score is None else scan_metrics(score), verdict=verdict)]


def dataset_trial(made: Network, metrics: DatasetMetrics, line: float | None) -> DefenseRecord:
    """Of a scan of training data without a verdict; ``line`` is where it draws one, if it does."""
    threshold = None if line is None else Threshold(value=line, source="paper")
    facts = {"verdict": LOST, "reason": "class 3: 20 images"}
    found = Finding(defense="spectral-signatures", kind="dataset", threshold=threshold, seed=0, **facts)
    return defense(made, metrics=metrics, name="spectral-signatures", kind="dataset", finding=found, **facts)


def cohort(*groups: list[Record]) -> Cohort:
    return Cohort([record for group in groups for record in group])


# --- parts ------------------------------------------------------------------------------------------------------------


def test_proportion_pools_counts_and_has_the_wilson_interval_of_three_of_three() -> None:
    pooled = proportion([Rate(hits=1, n=1), None, Rate(hits=2, n=2)])
    assert pooled is not None
    assert (pooled.hits, pooled.n, pooled.value) == (3, 3, 1.0)
    assert (pooled.low, pooled.high) == (pytest.approx(0.4385, abs=1e-4), 1.0)


def test_proportion_of_several_networks_has_the_lowest_and_the_highest_and_shows_no_interval() -> None:
    pooled = proportion([Rate(hits=0, n=500), Rate(hits=500, n=500), Rate(hits=0, n=0), None])
    assert pooled is not None
    assert (pooled.hits, pooled.n, pooled.networks) == (500, 1000, 2)
    assert pooled.margins == (pooled.lowest, pooled.highest) == (0.0, 1.0)
    alone = proportion([Rate(hits=250, n=500)])
    assert alone is not None
    assert (alone.networks, alone.lowest, alone.highest) == (1, None, None)
    assert alone.margins == (alone.low, alone.high) == pytest.approx((0.4563, 0.5437), abs=1e-4)


def test_rates_and_means_of_nothing_are_none() -> None:
    assert proportion([]) is None
    assert proportion([None, Rate(hits=0, n=0)]) is None
    assert share([None]) is None
    assert spread([None, float("nan"), float("inf")]) is None
    assert difference([(0.5, None), (None, 0.5), (float("nan"), 0.1)]) is None


def test_spread_is_the_mean_and_range_of_what_is_known() -> None:
    found = spread([0.2, None, 0.6])
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (pytest.approx(0.4), 0.2, 0.6, 2)


# --- scans ------------------------------------------------------------------------------------------------------------


def test_scan_row_counts_active_files_against_clean_twins() -> None:
    # Scores 3 and 1 against 0 and 2: of four pairs 3>0, 3>2, 1>0 are right: AUROC 3/4.
    _, row = scan_rows(cohort(attacked(0, 3.0), attacked(1, 1.0, MISSED), clean(0, 0.0), clean(1, 2.0, FOUND)))
    assert row.setting.attack == "badnets"
    assert row.auroc == 0.75
    assert row.scored == (2, 2)
    assert row.tpr is not None
    assert (row.tpr.hits, row.tpr.n) == (1, 2)
    assert row.fpr is not None
    assert (row.fpr.hits, row.fpr.n) == (1, 2)
    assert row.target_first is not None
    assert (row.target_first.hits, row.target_first.n) == (1, 2)
    assert row.target_named is not None
    assert (row.target_named.hits, row.target_named.n) == (1, 2)


def test_scan_row_counts_what_has_no_answer_apart_and_never_as_a_miss() -> None:
    broken = attacked(4, None, LOST, failed=True)
    groups = [attacked(0, 3.0), attacked(1, -1.0, LOST), attacked(2, None, Verdict.NOT_APPLICABLE), broken]
    _, row = scan_rows(cohort(*groups, clean(0, 0.0), clean(1, None, LOST)))
    assert row.answers == Answers(measured=1, not_measured=1, not_applicable=1, failed=1)
    assert row.clean == Answers(measured=1, not_measured=1)
    assert row.tpr is not None
    assert (row.tpr.hits, row.tpr.n) == (1, 1)
    assert row.scored == (2, 1)
    assert row.auroc == 0.5, "a file without an answer keeps its rank: left out, it would make the defense look better"


def test_scan_row_without_an_active_file_has_no_rate() -> None:
    _, row = scan_rows(cohort(attacked(0, 3.0, activity=Activity.DORMANT), clean(0, 0.0)))
    assert row.tpr is None
    assert row.auroc is None
    assert row.fpr is not None
    assert row.answers == Answers()
    assert row.dormant is not None
    assert (row.dormant.hits, row.dormant.n) == (1, 1)
    assert row.attenuated is None
    assert row.inactive == Answers(measured=1)


def test_scan_row_counts_inactive_files_without_an_answer() -> None:
    _, row = scan_rows(cohort(attacked(0, None, LOST, activity=Activity.DORMANT), clean(0, 0.0)))
    assert (row.answers, row.inactive, row.dormant) == (Answers(), Answers(not_measured=1), None)


def test_scan_row_keeps_attenuated_files_out_of_tpr() -> None:
    weak = attacked(1, 0.5, MISSED, activity=Activity.ATTENUATED)
    _, row = scan_rows(cohort(attacked(0, 3.0), weak, clean(0, 0.0)))
    assert row.tpr is not None
    assert (row.tpr.hits, row.tpr.n) == (1, 1)
    assert row.attenuated is not None
    assert (row.attenuated.hits, row.attenuated.n) == (0, 1)


def test_scan_row_counts_files_of_unknown_activity_in_no_rate() -> None:
    _, trial = attacked(0, 3.0)
    _, row = scan_rows(cohort([trial], clean(0, 0.0)))
    assert row.unknown_activity == 1
    assert row.tpr is None


def test_scan_row_without_clean_twins_has_no_false_alarm_rate() -> None:
    (row,) = scan_rows(cohort(attacked(0, 3.0)))
    assert row.fpr is None
    assert row.auroc is None


def test_twins_are_of_the_same_precision() -> None:
    made = network(None, 0)
    other = [behaviour(made, "int4"), defense(made, "int4", scan_metrics(1.0))]
    (*_, row) = scan_rows(cohort(attacked(0, 3.0), other))
    assert (row.setting.attack, row.setting.precision) == ("badnets", "fp32")
    assert row.fpr is None


def test_twins_of_a_file_with_triggered_calibration_are_calibrated_on_as_many_clean_images() -> None:
    poisoned, spotless = network("badnets", 0), network(None, 0)
    records = [
        behaviour(poisoned, "int8-static", calibration=EIGHTH),
        defense(poisoned, "int8-static", scan_metrics(3.0), verdict=FOUND, calibration=EIGHTH),
        behaviour(spotless, "int8-static", calibration=CLEAN256),
        defense(spotless, "int8-static", scan_metrics(1.0), calibration=CLEAN256),
    ]
    _, row = scan_rows(cohort(records))
    assert row.setting.calibration == "eighth (256 images, 0.125 triggered)"
    assert row.auroc == 1.0


# --- dataset scans, filters, repairs ----------------------------------------------------------------------------------


def test_dataset_row_averages_auroc_over_networks_and_pools_rows() -> None:
    records: list[Record] = []
    for seed, (area, hits) in enumerate([(0.8, 10), (0.6, 20)]):
        made = network("badnets", seed)
        metrics = DatasetMetrics(auroc=area, tpr=Rate(hits=hits, n=50), fpr=Rate(hits=1, n=100))
        records += [behaviour(made), defense(made, metrics=metrics, name="ac", kind="dataset", verdict=FOUND)]
    made = network(None, 0)
    metrics = DatasetMetrics(fpr=Rate(hits=5, n=100))
    records += [behaviour(made), defense(made, metrics=metrics, name="ac", kind="dataset")]
    _, row = dataset_rows(cohort(records))
    assert row.auroc is not None
    assert (row.auroc.mean, row.auroc.low, row.auroc.high) == (pytest.approx(0.7), 0.6, 0.8)
    assert row.tpr is not None
    assert (row.tpr.hits, row.tpr.n) == (30, 100)
    assert row.fpr is not None
    assert (row.fpr.hits, row.fpr.n) == (2, 200)
    assert row.clean_fpr is not None
    assert (row.clean_fpr.hits, row.clean_fpr.n) == (5, 100)
    assert row.alarms is not None
    assert row.clean_alarms is not None
    assert (row.alarms.hits, row.clean_alarms.hits, row.within_auroc) == (2, 0, None)


def test_a_method_that_only_ranks_rows_has_figures_and_raises_no_alarm() -> None:
    """Spectral Signatures draws no line: its verdict is NOT_MEASURED, the order of its rows is not."""
    made = network("badnets", 0)
    metrics = DatasetMetrics(auroc=0.6, within_auroc=0.9, tpr=Rate(hits=1, n=2), fpr=Rate(hits=0, n=2))
    trial = dataset_trial(made, metrics, None)
    (row,) = dataset_rows(cohort([behaviour(made), trial]))
    assert row.answers == Answers(measured=1)
    assert row.within_auroc is not None
    assert row.within_auroc.mean == 0.9
    assert row.alarms is None
    (published,) = published_rows(cohort([behaviour(made), trial]))
    assert (published.judges, published.alarms, published.calm) == (False, 0, 0)


@pytest.mark.parametrize(
    ("line", "unmeasured", "status", "reason"),
    [
        (None, 0, "measured", "class 3: 20 images"),
        (None, 20, "not measured", "class 3: 20 images; 20 rows of the training set have no score"),
        (0.15, 0, "not measured", "class 3: 20 images"),
        (0.15, 20, "not measured", "class 3: 20 images; 20 rows of the training set have no score"),
    ],
)
def test_scores_of_rows_are_an_answer_without_a_verdict_only_where_no_line_is_drawn_and_no_row_is_left_out(
    line: float | None, unmeasured: int, status: str, reason: str
) -> None:
    metrics = DatasetMetrics(auroc=0.6, fpr=Rate(hits=0, n=200), unmeasured=unmeasured)
    trial = dataset_trial(network("badnets", 0), metrics, line)
    assert status_of(trial) == status
    assert reason_of(trial) == reason
    judged = trial.model_copy(update={"verdict": FOUND})
    assert (status_of(judged), reason_of(judged)) == ("measured", trial.reason)


def test_scores_of_rows_are_no_answer_where_the_finding_is_not_told() -> None:
    metrics = DatasetMetrics(auroc=0.6, fpr=Rate(hits=0, n=200))
    assert status_of(defense(network(), metrics=metrics, name="ac", kind="dataset", verdict=LOST)) == "not measured"


def test_filter_row_pools_inputs_and_counts_those_without_a_score() -> None:
    made = network("badnets", 0)
    metrics = FilterMetrics(
        auroc=0.9, tpr=Rate(hits=9, n=10), fpr=Rate(hits=1, n=20), asr_after=Rate(hits=1, n=10), unmeasured=3
    )
    trial = defense(made, metrics=metrics, name="strip", kind="filter", verdict=None)
    (row,) = filter_rows(cohort([behaviour(made), trial]))
    assert row.answers == Answers(measured=1)
    assert row.asr_after is not None
    assert row.asr_after.value == 0.1
    assert row.unmeasured_inputs == 3


def lined(value: float, note: str | None = None) -> FilterMetrics:
    rate = Rate(hits=0, n=10)
    line = {"value": value, "lowest_score": 0.0, "note": note}
    return FilterMetrics(auroc=0.9, tpr=rate, fpr=rate, asr_after=rate, boundary=line)


def test_filter_row_counts_files_whose_line_no_score_is_below() -> None:
    """A TPR and an FPR of 0 that no input could have changed are no measurement of either."""
    records: list[Record] = []
    for seed, (value, note) in enumerate([(0.1, None), (0.0, "it cuts"), (-0.3, None)]):
        for attack in (None, "badnets"):
            made = network(attack, seed)
            metrics = lined(value, note if attack else None)
            records += [behaviour(made), defense(made, metrics=metrics, name="strip", kind="filter", verdict=None)]
    clean, attacked = filter_rows(cohort(records))
    assert (clean.without_line, attacked.without_line) == (2, 4)
    assert (clean.weaknesses, attacked.weaknesses) == ({}, {"it cuts": 1})
    assert FilterMetrics(fpr=Rate(hits=0, n=1)).rejects_nothing is False, "an old line that does not say"


def test_repair_row_shows_change_and_never_detection() -> None:
    records: list[Record] = []
    for seed, (accuracy, asr) in enumerate([(0.93, 0.1), (0.91, 0.3), (0.89, 0.02)]):
        made = network("badnets", seed)
        metrics = RepairMetrics(
            accuracy_before=0.95, accuracy_after=accuracy, asr_before=1.0, asr_after=asr,
            activity_before=Activity.ACTIVE, activity_after=Activity.DORMANT if asr < 0.06 else Activity.ATTENUATED,
        )  # fmt: skip
        records += [behaviour(made), defense(made, metrics=metrics, name="fp", kind="repair", verdict=None)]
    (row,) = repair_rows(cohort(records))
    assert row.accuracy_change is not None
    assert row.accuracy_change.mean == pytest.approx(-0.04)
    # sd 0.02: 4.303 * 0.02 / sqrt(3) = 0.0497
    assert row.accuracy_change.high == pytest.approx(-0.04 + 0.0497, abs=1e-4)
    assert row.asr_change is not None
    assert row.asr_change.mean == pytest.approx(-0.86)
    assert row.transitions == {"active to attenuated": 2, "active to dormant": 1}
    assert "tpr" not in row.model_dump()


def test_repair_without_a_new_file_is_not_measured() -> None:
    metrics = RepairMetrics(accuracy_before=0.95, activity_before=Activity.ACTIVE)
    trial = defense(network(), metrics=metrics, name="fp", kind="repair", verdict=None)
    assert status_of(trial) == "not measured"
    (row,) = repair_rows(cohort([behaviour(network()), trial]))
    assert row.answers == Answers(not_measured=1)
    assert row.accuracy_before is None


def test_repair_that_cost_too_much_is_measured_and_its_loss_is_in_the_row() -> None:
    metrics = RepairMetrics(
        accuracy_before=0.97, accuracy_after=0.07, asr_before=0.93, asr_after=0.0,
        activity_before=Activity.ACTIVE, activity_after=Activity.DORMANT,
    )  # fmt: skip
    trial = defense(network("badnets"), metrics=metrics, name="fp", kind="repair", verdict=Verdict.NOT_REPAIRED)
    assert status_of(trial) == "measured"
    (row,) = repair_rows(cohort([behaviour(network("badnets")), trial]))
    assert row.answers == Answers(measured=1)
    assert row.refused == 1
    assert row.accuracy_change is not None
    assert row.accuracy_change.mean == pytest.approx(-0.9)


# --- behaviour, and which records count -------------------------------------------------------------------------------


def test_behaviour_row_has_activity_counts_size_and_what_is_not_there() -> None:
    first, second, third = (network("badnets", seed) for seed in range(3))
    records = [
        training(first),
        behaviour(first, "int4", accuracy=0.9, asr=0.95),
        quantization(first, "int4"),
        behaviour(second, "int4", accuracy=0.8, asr=0.5, activity=Activity.ATTENUATED),
        quantization(second, "int4"),
        training(third, artifact_sha256=None, failed=True),
    ]
    (row,) = behaviour_rows(cohort(records))
    assert row.clean_accuracy is not None
    assert row.clean_accuracy.mean == pytest.approx(0.85)
    assert row.activity == {Activity.ACTIVE: 1, Activity.ATTENUATED: 1}
    assert row.size_bytes is not None
    assert (row.size_bytes.mean, row.measured, row.failed, row.unrecorded) == (70_000, 2, 0, 1)


def test_behaviour_has_an_fpr_where_an_attack_is_source_specific() -> None:
    records = [
        *(behaviour(network("cassock", seed), fpr=fpr, bystanders=1800) for seed, fpr in enumerate((0.1, 0.3))),
        behaviour(network("badnets")),
    ]
    every = {row.setting.attack: row.fpr for row in behaviour_rows(cohort(records))}
    assert every["badnets"] is None
    assert every["cassock"] is not None
    assert (every["cassock"].mean, every["cassock"].n) == (pytest.approx(0.2), 2)


def test_a_sweep_of_poison_counts_has_a_row_for_each() -> None:
    made = [network("badnets", **changes) for changes in ({"poison_rate": 0.1}, {"poison_count": 50})]
    rows = behaviour_rows(cohort([behaviour(one) for one in made]))
    assert [row.setting.attack for row in rows] == ["badnets (poison_count=50)", "badnets (poison_rate=0.1)"]


def test_behaviour_that_failed_is_no_measurement() -> None:
    (row,) = behaviour_rows(cohort([behaviour(network(), accuracy=None, asr=None, failed=True)]))
    assert (row.measured, row.failed, row.clean_accuracy) == (0, 1, None)


@pytest.mark.parametrize("last", [0, 1])
def test_cohort_takes_the_network_that_was_measured_last(last: int) -> None:
    """Whatever its number: of two machines in turn either may be the last one."""
    made = network("badnets", 0)
    groups = [measured_of(made, replica, score) for replica, score in enumerate((9.0, 2.0))]
    found = cohort(*(groups if last else reversed(groups)))
    (row,) = behaviour_rows(found)
    assert row.clean_accuracy is not None
    assert (row.clean_accuracy.mean, row.measured) == ((0.9, 0.5)[last], 1)
    assert found.superseded == 2
    (scan,) = scan_rows(found)
    assert scan.answers == Answers(measured=1)


@pytest.mark.parametrize("turn", [1, -1])
def test_networks_of_another_revision_of_the_attack_stand_in_rows_of_their_own(turn: int) -> None:
    """A row with the newer network of one seed and the older of another would be of neither."""
    olds = [network("badnets", seed) for seed in range(2)]
    new = olds[0].model_copy(update={"attack_revisions": {"badnets": 2}})
    groups = [measured_of(olds[0], 0, 9.0), measured_of(new, 1, 2.0)]
    found = cohort(*groups[::turn], measured_of(olds[1], 0, 9.0))
    rows = {row.setting.attack: row for row in behaviour_rows(found)}
    means = {name: (row.clean_accuracy and row.clean_accuracy.mean, row.measured) for name, row in rows.items()}
    assert means == {"badnets": (0.9, 2), "badnets (revision=2)": (0.5, 1)}
    assert [row.unknown_activity for row in scan_rows(found)] == [0, 0]
    assert found.superseded == 0


def test_a_failure_of_the_newer_revision_hides_behind_no_older_answer() -> None:
    old = network("lsp", 0, host="badnets")
    new = old.model_copy(update={"attack_revisions": {"badnets": 2}})
    failed = behaviour(new, accuracy=None, asr=None, failed=True)
    rows = behaviour_rows(cohort([behaviour(old, accuracy=0.9), failed]))
    told = {row.setting.attack: (row.measured, row.failed) for row in rows}
    assert told == {"lsp": (1, 0), "lsp (host.revision=2)": (0, 1)}


def test_a_file_of_equal_bytes_does_what_its_own_networks_trigger_makes_it_do() -> None:
    """Attacks that differ at inference alone train the same network."""
    weak, strong = (network("sig", 0, inference_delta=delta) for delta in (20, 40))
    shared = {"artifact_sha256": sha("equal bytes")}
    seen = [
        behaviour(made, asr=asr, activity=activity).model_copy(update=shared)
        for made, asr, activity in ((weak, 0.5, Activity.ATTENUATED), (strong, 0.99, Activity.ACTIVE))
    ]
    found = defense(strong, metrics=scan_metrics(9.0, target=12, found=True), verdict=FOUND)
    scan = found.model_copy(update=shared)
    (row,) = scan_rows(cohort([*seen, scan]))
    assert (row.answers, row.unknown_activity) == (Answers(measured=1), 0)


def test_a_dataset_scan_has_no_hit_or_miss_where_no_row_is_poisoned() -> None:
    """An attack in the training loop: CLEAN is right of the set, and no miss."""
    made = network("wanet", 0)
    metrics = DatasetMetrics(fpr=Rate(hits=0, n=9000))
    scan = defense(made, metrics=metrics, name="ac", kind="dataset")
    (row,) = dataset_rows(cohort([behaviour(made), scan]))
    assert (row.answers, row.alarms) == (Answers(measured=1), None)


def measured_of(made: Network, replica: int, score: float, **changes: object) -> list[Record]:
    trial = defense(made, metrics=scan_metrics(score), verdict=FOUND, replica=replica, **changes)  # type: ignore[arg-type]
    return [behaviour(made, accuracy=(0.9, 0.5)[replica], replica=replica), trial]


def test_a_defense_tried_on_an_older_network_has_that_networks_rates_and_the_others_too() -> None:
    """The newer one is on another machine, so that a new defense meets the one that is at hand."""
    made = network("badnets", 0)
    trials = [record for replica in range(2) for record in measured_of(made, replica, 3.0)]
    new = measured_of(made, 0, 3.0, name="strip-scan")[1]
    found = cohort([*trials, new])
    old, added = scan_rows(found)
    assert (added.answers, added.unknown_activity, old.answers) == (Answers(measured=1), 0, Answers(measured=1))
    assert {one.replica for group in found.defenses.values() for one in group} == {0}
    assert [row.clean_accuracy.mean for row in behaviour_rows(found) if row.clean_accuracy] == [0.9]


def test_rows_that_only_another_network_of_the_recipe_has_keep_it_and_what_it_does() -> None:
    made = network("badnets", 0)
    only_there = measured_of(made, 1, 3.0, name="strip-scan")
    found = cohort(only_there, measured_of(made, 0, 3.0))
    assert [row.answers for row in scan_rows(found)] == [Answers(measured=1)] * 2
    assert [row.unknown_activity for row in scan_rows(found)] == [0, 0]


def test_a_trial_that_failed_takes_no_answers_place() -> None:
    made = network("badnets", 0)
    failed = measured_of(made, 1, 3.0, failed=True)[1]
    found = cohort(measured_of(made, 0, 3.0), [failed])
    (row,) = scan_rows(found)
    assert (row.answers, found.superseded) == (Answers(measured=1), 1)
    assert scan_rows(cohort([failed]))[0].setting == row.setting


def test_cohort_names_the_settings_in_which_attacks_and_defenses_differ() -> None:
    weak, strong = network("blended", 0, alpha=0.1), network("blended", 0, alpha=0.2)
    records = [
        defense(weak, metrics=scan_metrics(1.0), settings={"budget": "quick", "steps": 5}),
        defense(strong, metrics=scan_metrics(1.0), settings={"budget": "gate", "steps": 5}),
    ]
    found = cohort(list(records))
    assert {subject.setting.attack for subject in found.defenses} == {"blended (alpha=0.1)", "blended (alpha=0.2)"}
    assert {subject.defense for subject in found.defenses} == {
        "neural-cleanse (budget=gate)",
        "neural-cleanse (budget=quick)",
    }


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"recipe": {"epochs": 10, "flip": True}}, "resnet8, width 16 (flip=True)"),
        ({"recipe": {"epochs": 2, "flip": False}}, "resnet8, width 16 (epochs=2)"),
        ({"recipe": {"epochs": 2, "flip": True}}, "resnet8, width 16 (epochs=2, flip=True)"),
        ({"train_sha256": "ab" * 32}, "resnet8, width 16 (train_sha256=abababababab)"),
        ({"width": 8}, "resnet8, width 8"),
    ],
)
def test_networks_made_by_another_recipe_are_no_replicates(change: dict[str, object], label: str) -> None:
    """They differ in more than the seed: a mean over both is of neither, and their clean twins are others."""
    recipe = {"recipe": {"epochs": 10, "flip": False}}
    made, spotless = (network(attack, 0).model_copy(update=recipe) for attack in ("badnets", None))
    other = network("badnets", 1).model_copy(update={**recipe, **change})
    found = cohort(
        [record for one, score in ((made, 3.0), (other, 2.0), (spotless, 1.0)) for record in scanned(one, score)]
    )
    assert [row.measured for row in behaviour_rows(found)] == [1, 1, 1]
    assert label in {setting.architecture for setting in found.behaviours}
    aurocs = {row.setting.architecture: row.auroc for row in scan_rows(found) if row.setting.attack == "badnets"}
    assert len(aurocs) == 2
    assert aurocs[label] is None
    assert all(row.unrecorded == 0 for row in scan_rows(found))


def scanned(made: Network, score: float) -> list[Record]:
    return [behaviour(made), defense(made, metrics=scan_metrics(score))]


def asked(seed: int, score: float, clean_images: int, attack: str | None = "badnets", **changes: object) -> Record:
    rules = EvaluationRules(seed=0, clean_images=clean_images, held_out_images=None)
    facts = {"evaluation": rules, "data_sha256": sha(clean_images), "test_sha256": sha("test", "gtsrb"), **changes}
    return defense(network(attack, seed), metrics=scan_metrics(score), verdict=FOUND, key=sha(facts, seed), **facts)  # type: ignore[arg-type]


def test_answers_under_other_rules_stand_in_rows_of_their_own() -> None:
    records = [asked(0, 3.0, 40), asked(0, 2.0, 20), asked(1, 2.5, 20), asked(0, 1.0, 20, None)]
    files = [behaviour(network("badnets", seed)) for seed in range(2)]
    found = cohort([*records, *files])
    assert found.superseded == 0
    rows = {row.setting.evaluation: row for row in scan_rows(found) if row.setting.attack == "badnets"}
    few, many = rows["evaluation (clean_images=20)"], rows["evaluation (clean_images=40)"]
    assert (few.answers, few.auroc) == (Answers(measured=2), 1.0)
    assert (many.answers, many.auroc) == (Answers(measured=1), None)
    assert many.setting.place == "gtsrb, resnet8, width 16, evaluation (clean_images=40)"
    assert {row.setting.evaluation for row in behaviour_rows(found)} == {""}


def test_answers_under_other_seeds_do_not_take_each_others_place() -> None:
    found = cohort([asked(0, 3.0, 40), asked(0, 2.0, 40).model_copy(update={"seed": 1, "key": "other"})])
    assert found.superseded == 0
    assert {subject.setting.evaluation for subject in found.defenses} == {"evaluation (seed=0)", "evaluation (seed=1)"}


def test_rules_that_old_records_do_not_say_are_told_apart_by_their_digests() -> None:
    unsaid = {"evaluation": None, "test_sha256": None}
    old = [asked(0, 3.0, 40, **unsaid), asked(1, 3.0, 30, **unsaid), asked(2, 3.0, 40)]
    rows = scan_rows(cohort(list(old)))
    assert [row.setting.evaluation for row in rows] == [
        f"evaluation (clean_images=40, test_sha256={sha('test', 'gtsrb')[:12]})",
        f"evaluation (data_sha256={sha(30)[:12]}, rules=not recorded)",
    ]
    assert [len(row.keys) for row in rows] == [2, 1]  # the digest of 40 images is the same in an old record
    alone = scan_rows(cohort(list(old[:1])))
    assert [row.setting.evaluation for row in alone] == [""]


def test_activity_is_of_the_same_test_images() -> None:
    made, other = network("badnets", 0), {"data_sha256": sha("other"), "key": "other"}
    files = [behaviour(made), behaviour(made, asr=0.5, activity=Activity.ATTENUATED).model_copy(update=other)]
    trial = asked(0, 3.0, 40)
    found = cohort([*files, trial])
    assert [row.measured for row in behaviour_rows(found)] == [1, 1]
    assert isinstance(trial, DefenseRecord)
    assert found.activity(trial) is Activity.ACTIVE
    assert found.activity(trial.model_copy(update={"data_sha256": sha("?")})) is None


@pytest.mark.parametrize(("told", "rows"), [({}, 0), ({"evaluation_revision": 1}, 0), ({"evaluation_revision": 2}, 2)])
def test_a_time_by_older_code_than_measured_its_file_since_is_left_out(told: dict[str, int], rows: int) -> None:
    old = behaviour(network("badnets", 0), evaluation_revision=1)
    timed = FileLatency.model_validate({**latency(old, 0.5), **told})
    again = old.model_copy(update={"evaluation_revision": 2})
    assert len(latency_rows([timed], cohort([old, again]))) == rows
    assert len(latency_rows([timed], cohort([old]))) == 2


OLD, NEW = ({"evaluation_revision": 1, "revision": revision} for revision in (1, 2))


def test_an_answer_of_newer_code_takes_the_place_of_the_older_one_of_its_cell_alone() -> None:
    found = cohort([asked(0, 9.0, 40, **OLD), asked(0, 3.0, 40, **NEW), asked(1, 2.0, 40, **OLD), asked(2, 2.0, 40)])
    assert found.superseded == 1
    rows = {row.setting.evaluation: row for row in scan_rows(found)}
    assert {label: (len(row.keys), row.unrecorded) for label, row in rows.items()} == {
        "evaluation (evaluation_revision=1, revision=2)": (1, 2),
        "evaluation (evaluation_revision=1, revision=1)": (1, 2),
        "evaluation (evaluation_revision=not recorded, revision=not recorded)": (1, 2),
    }


@pytest.mark.parametrize("others", [{"settings": {"budget": "gate"}}, {"access": "shadow"}, {"seed": 1}])
def test_an_answer_of_newer_code_to_another_question_takes_no_place(others: dict[str, object]) -> None:
    newer = asked(0, 3.0, 40, **NEW).model_copy(update=others)
    assert cohort([asked(0, 9.0, 40, **OLD), newer]).superseded == 0


def test_a_failure_of_newer_code_takes_no_answers_place() -> None:
    failed = asked(0, 3.0, 40, failed=True, **NEW)
    found = cohort([asked(0, 9.0, 40, **OLD), failed])
    (row,) = scan_rows(found)
    assert (row.answers, row.setting.evaluation, found.superseded) == (Answers(), "", 1)
    assert row.keys == (asked(0, 9.0, 40, **OLD).key,)


def test_clean_twins_are_of_the_same_code() -> None:
    """A file keeps its place under every revision; figures of two are of two methods."""
    twin = asked(0, 1.0, 40, None, **OLD)
    files = [behaviour(network("badnets", 0)), behaviour(network(None, 0))]
    (_, old), (_, new) = (scan_rows(cohort([*files, asked(0, 3.0, 40, **code), twin])) for code in (OLD, NEW))
    assert (old.auroc, new.auroc, old.unknown_activity, new.unknown_activity) == (1.0, None, 0, 0)


def test_what_a_file_does_is_superseded_file_by_file() -> None:
    first, second = (behaviour(network("badnets", seed), evaluation_revision=1) for seed in range(2))
    again = behaviour(network("badnets", 0), accuracy=0.5, evaluation_revision=2)
    found = cohort([first, second, again])
    assert found.superseded == 1
    assert {row.setting.evaluation: row.measured for row in behaviour_rows(found)} == {
        "evaluation (evaluation_revision=1)": 1,
        "evaluation (evaluation_revision=2)": 1,
    }


VNNI, AVX2 = RUNTIME, RUNTIME.model_copy(update={"isa": ("avx2", "fma")})


def ran_on(runtime: Runtime | None, made: Network, score: float, **changes: object) -> list[Record]:
    trial = defense(made, metrics=scan_metrics(score), verdict=FOUND, runtime=runtime)
    return [behaviour(made, **changes).model_copy(update={"runtime": runtime}), trial]


def test_records_of_other_instruction_sets_stand_in_rows_of_their_own() -> None:
    """Law 5: the same file gives other logits there, so that neither figures nor clean twins are shared."""
    found = cohort(
        ran_on(VNNI, network("badnets", 0), 3.0),
        ran_on(AVX2, network("badnets", 1), 2.0),
        ran_on(AVX2, network(None, 0), 1.0),
    )
    rows = {row.setting.file: row for row in scan_rows(found) if row.setting.attack == "badnets"}
    assert {file: row.auroc for file, row in rows.items()} == {
        "fp32, runtime (isa=avx2 fma avx512_vnni)": None,
        "fp32, runtime (isa=avx2 fma)": 1.0,
    }
    assert [row.measured for row in behaviour_rows(found)] == [1, 1, 1]
    newer = VNNI.model_copy(update={"onnxruntime": "1.25.0"})
    assert {*map(cohort(ran_on(VNNI, network(), 1.0), ran_on(newer, network(), 1.0)).runtime, (VNNI, newer))} == {
        "runtime (onnxruntime=1.24.1)",
        "runtime (onnxruntime=1.25.0)",
    }


def test_runtime_is_told_only_where_there_is_more_than_one() -> None:
    other_system = VNNI.model_copy(update={"system": "Windows"})
    found = cohort(*(ran_on(one, network("badnets", 0), 1.0) for one in (VNNI, other_system, None)))
    assert [row.setting.file for row in scan_rows(found)] == ["fp32"]


def test_runtime_is_told_only_of_data_and_architectures_that_were_measured_on_several() -> None:
    groups = [ran_on(one, network("badnets", seed), 1.0) for seed, one in enumerate((VNNI, AVX2))]
    elsewhere = network("badnets", 0).model_copy(update={"architecture": "preactresnet18"})
    found = cohort(*groups, ran_on(VNNI, elsewhere, 1.0))
    assert [(row.setting.architecture.partition(",")[0], row.setting.file) for row in scan_rows(found)] == [
        ("preactresnet18", "fp32"),
        ("resnet8", "fp32, runtime (isa=avx2 fma avx512_vnni)"),
        ("resnet8", "fp32, runtime (isa=avx2 fma)"),
    ]
    assert found.runtime_at(elsewhere, VNNI) == ""
    assert found.runtime_at(elsewhere, AVX2) == "runtime (isa=avx2 fma)"


def test_trial_that_names_no_runtime_is_in_no_row_of_one() -> None:
    groups = [ran_on(one, network("badnets", seed), 1.0) for seed, one in enumerate((VNNI, AVX2, None))]
    assert {row.setting.runtime: len(row.keys) for row in scan_rows(cohort(*groups))} == {
        "runtime (isa=avx2 fma avx512_vnni)": 1,
        "runtime (isa=avx2 fma)": 1,
        "runtime not recorded": 1,
    }


def test_activity_is_of_the_same_runtime() -> None:
    """A file that saturates on one instruction set may be dormant there, and a defense that is silent on it right."""
    made = network("badnets", 0)
    found = cohort(ran_on(VNNI, made, 3.0), ran_on(AVX2, made, 3.0, activity=Activity.DORMANT))
    rows = {row.setting.runtime: row for row in scan_rows(found)}
    assert [(row.answers.measured, row.inactive.measured) for row in rows.values()] == [(1, 0), (0, 1)]
    (row,) = (one for one in scan_rows(cohort(ran_on(VNNI, made, 3.0)[:1], ran_on(AVX2, made, 3.0)[1:])))
    assert row.unknown_activity == 1


def test_cohort_says_the_scheme_alone_where_only_one_quantization_has_it() -> None:
    made = network(None, 0)
    one = behaviour(made, "int4")
    other = one.model_copy(update={"key": "other", "precision": "int4-block16-symmetric"})
    assert [setting.precision for setting in cohort([one]).behaviours] == ["int4"]
    assert {setting.precision for setting in cohort([one, other]).behaviours} == {one.precision, other.precision}


def test_setting_says_how_the_file_is_made_and_run() -> None:
    plain = Setting(data="gtsrb", architecture="resnet8, width 16", attack="none", precision="fp32")
    assert (plain.place, plain.file) == ("gtsrb, resnet8, width 16", "fp32")
    full = plain.model_copy(update={"precision": "int8-static", "calibration": "c (16 images)", "arithmetic": "exact"})
    assert full.file == "int8-static, c (16 images), exact arithmetic"
