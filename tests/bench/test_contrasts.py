from __future__ import annotations

from typing import Any

import pytest

from qdefense.bench.cohort import Cohort
from qdefense.bench.contrasts import contrast_rows, gap_rows, trials_apart, unpaired_trials
from qdefense.bench.records import GRADIENTS_WITHHELD, DatasetMetrics, FilterMetrics, Rate, Record
from qdefense.bench.tables import Answers
from qdefense.findings import Finding, Verdict
from qdefense.trial import Activity

from .sample_records import RUNTIME, behaviour, defense, network, quantization, scan_metrics

FOUND, MISSED, LOST = Verdict.BACKDOORED, Verdict.CLEAN, Verdict.NOT_MEASURED


ORDER = Finding(defense="spectral-signatures", kind="dataset", verdict=LOST, reason="ranks only", seed=0)
RANKS = DatasetMetrics(auroc=0.6, within_auroc=0.6, fpr=Rate(hits=0, n=9000))


def pair(seed: int, before: float, after: float, activity: Activity = Activity.ACTIVE) -> list[Record]:
    made = network("badnets", seed)
    files = [behaviour(made, accuracy=before), behaviour(made, "int4", accuracy=after, activity=activity)]
    return [*files, quantization(made, "int4")]


def scanned(
    seed: int, scheme: str, score: float, verdict: Verdict = FOUND, access: str = "session", **changes: Any
) -> Record:
    metrics = scan_metrics(score, target=12, found=True)
    return defense(network("badnets", seed), scheme, metrics, verdict=verdict, access=access, **changes)


WITHHELD = f"the shadow is not certified: {GRADIENTS_WITHHELD}"


def test_contrast_is_the_paired_difference_over_networks_that_have_both_files() -> None:
    records = [*pair(0, 0.9, 0.89), *pair(1, 0.8, 0.78), *pair(2, 0.7, 0.67), behaviour(network("badnets", 3), "int4")]
    accuracy, asr = contrast_rows(Cohort(records))
    assert (accuracy.figure, accuracy.difference.n, accuracy.setting.precision) == ("clean accuracy", 3, "int4")
    # -1, -2, -3 points: mean -2, half width 4.303 * 1 / sqrt(3) = 2.484.
    assert accuracy.difference.mean == pytest.approx(-0.02)
    assert accuracy.difference.low == pytest.approx(-0.04484, abs=1e-5)
    assert (accuracy.fp32.mean, accuracy.value.mean) == (pytest.approx(0.8), pytest.approx(0.78))
    assert (asr.figure, asr.difference.mean, asr.difference.low) == ("ASR", 0, None)


def test_contrast_of_a_scan_counts_alarms_lost_and_gained() -> None:
    records = [
        *(record for seed in range(3) for record in pair(seed, 0.9, 0.9)),
        *(scanned(seed, "fp32", 3.0, FOUND if seed < 2 else MISSED) for seed in range(3)),
        *(scanned(seed, "int4", 2.0 + seed, MISSED if seed < 1 else FOUND) for seed in range(3)),
    ]
    *_, row = contrast_rows(Cohort(records))
    assert (row.figure, row.alarms_lost, row.alarms_gained) == ("score", 1, 1)
    assert row.difference.mean == 0


def test_contrast_counts_no_alarms_of_a_method_that_gives_no_verdict() -> None:
    """What only ranks loses no alarm, and 0 lost would read as if quantization had cost it none."""
    records = [
        *(record for seed in range(2) for record in pair(seed, 0.9, 0.9)),
        *(
            defense(made, scheme, RANKS, name="spectral-signatures", kind="dataset", verdict=LOST, finding=ORDER)
            for made in (network("badnets", seed) for seed in range(2))
            for scheme in ("fp32", "int4")
        ),
    ]
    *_, row = contrast_rows(Cohort(records))
    assert (row.defense, row.alarms_lost, row.alarms_gained) == ("spectral-signatures", None, None)


def test_contrast_of_a_defense_leaves_out_files_whose_backdoor_quantization_broke() -> None:
    records = [
        *pair(0, 0.9, 0.9),
        *pair(1, 0.9, 0.9, Activity.ATTENUATED),
        *(scanned(seed, scheme, 3.0) for seed in range(2) for scheme in ("fp32", "int4")),
    ]
    *_, row = contrast_rows(Cohort(records))
    assert (row.defense, row.difference.n) == ("neural-cleanse", 1)


def test_contrast_needs_an_answer_on_both_files_and_counts_those_that_quantization_took() -> None:
    lost = [*pair(0, 0.9, 0.9), scanned(0, "fp32", 3.0), scanned(0, "int4", 3.0, LOST)]
    *_, row = contrast_rows(Cohort(lost))
    assert (row.defense, row.difference, row.fp32, row.value) == ("neural-cleanse", None, None, None)
    assert (row.answers_lost, row.alarms_lost, row.alarms_gained) == (1, None, None)
    kept = [*pair(1, 0.9, 0.9), scanned(1, "fp32", 3.0), scanned(1, "int4", 3.5)]
    *_, row = contrast_rows(Cohort([*lost, *kept]))
    assert row.difference is not None
    assert (row.difference.n, row.answers_lost, row.alarms_lost) == (1, 1, 0)
    gained = [*pair(0, 0.9, 0.9), scanned(0, "fp32", 3.0, LOST), scanned(0, "int4", 3.0)]
    assert all(row.defense is None for row in contrast_rows(Cohort(gained)))


def test_contrast_of_a_dataset_scan_compares_rows_of_one_label() -> None:
    """Its scores are made within a label: the order of all rows is nobody's claim."""
    records: list[Record] = [record for seed in range(2) for record in pair(seed, 0.9, 0.9)]
    for scheme, within, pooled in (("fp32", 0.6, 0.9), ("int4", 0.8, 0.5)):
        metrics = DatasetMetrics(auroc=pooled, within_auroc=within, fpr=Rate(hits=0, n=9000))
        records += [defense(network("badnets", seed), scheme, metrics, name="ac", kind="dataset") for seed in range(2)]
    *_, row = contrast_rows(Cohort(records))
    assert row.difference is not None
    assert (row.figure, row.difference.mean) == ("AUROC within the label", pytest.approx(0.2))


def retrained(seed: int) -> list[Record]:
    """The FP32 file of a network that came out as another one; its quantized file is still the first one's."""
    made = network("badnets", seed)
    trial = defense(made, metrics=scan_metrics(9.0, target=12, found=True), verdict=FOUND, replica=1)
    return [behaviour(made, accuracy=0.5, replica=1), trial]


def test_contrast_pairs_no_file_with_another_replica_of_its_network() -> None:
    """The difference of two trainings is none of quantization."""
    tried = [scanned(seed, scheme, 3.0) for seed in range(2) for scheme in ("fp32", "int4")]
    cohort = Cohort([*pair(0, 0.9, 0.8), *pair(1, 0.9, 0.8), *tried, *retrained(1)])
    accuracy, _, score = contrast_rows(cohort)
    assert (accuracy.difference.n, accuracy.difference.mean) == (1, pytest.approx(-0.1))
    assert (score.difference.n, score.difference.mean) == (1, 0)
    assert (accuracy.unpaired, score.unpaired, unpaired_trials(cohort)) == (1, 1, 2)


def test_contrast_needs_a_record_of_what_the_file_was_made_of() -> None:
    cohort = Cohort([record for record in pair(0, 0.9, 0.8) if record.stage != "quantize"])
    assert contrast_rows(cohort) == ()
    assert unpaired_trials(cohort) == 1


def test_contrast_pairs_within_one_instruction_set() -> None:
    elsewhere = {"runtime": RUNTIME.model_copy(update={"isa": ("avx2",)}), "key": "elsewhere"}
    fp32, int4, made = pair(0, 0.9, 0.8)
    apart = Cohort([fp32, int4.model_copy(update=elsewhere), made])
    assert (contrast_rows(apart), trials_apart(apart)) == ((), 1)
    together = Cohort([fp32, int4, made])
    assert (len(contrast_rows(together)), trials_apart(together)) == (2, 0)
    assert trials_apart(Cohort([int4, made])) == 0, "without an FP32 trial anywhere it is no matter of runtimes"


def test_gap_row_pairs_no_file_with_another_replica_of_its_network() -> None:
    tried = [scanned(0, "fp32", 4.0), scanned(0, "int4", 3.0), scanned(0, "int4", 3.5, access="shadow")]
    (row,) = gap_rows(Cohort([*pair(0, 0.9, 0.9), *tried, *retrained(0)]))
    assert (row.fp32, row.signal_loss, row.numeric_loss, row.unpaired) == (None, None, None, 1)
    assert row.runtime_loss is not None
    assert row.runtime_loss.mean == pytest.approx(0.5)


def test_gap_row_pairs_two_accesses_of_one_file_alone() -> None:
    made = network(None, 0)
    session = defense(made, "int4", scan_metrics(3.0))
    shadow, other = (defense(made, "int4", scan_metrics(3.5), access="shadow", replica=one) for one in range(2))
    lost = [row.runtime_loss for tried in (shadow, other) for row in gap_rows(Cohort([session, tried]))]
    assert lost[0] is not None
    assert lost == [lost[0], None]


def test_gap_row_tells_signal_loss_from_api_loss() -> None:
    records: list[Record] = []
    for seed in range(2):
        records += [
            *pair(seed, 0.9, 0.9),
            scanned(seed, "fp32", 4.0),
            scanned(seed, "int4", 3.5, access="shadow"),
            scanned(seed, "int4", 3.0 + seed / 10),
            scanned(seed, "int4", 0.0, LOST, access="no-gradients", reason=WITHHELD),
        ]
    (row,) = gap_rows(Cohort(records))
    assert row.figure == "score"
    assert row.numeric_loss is not None
    assert row.numeric_loss.mean == pytest.approx(0.5)
    assert row.runtime_loss is not None
    assert row.runtime_loss.mean == pytest.approx(0.45)
    assert row.signal_loss is not None
    assert row.signal_loss.mean == pytest.approx(0.95)
    assert row.api_lost is not None
    assert (row.api_lost.hits, row.api_lost.n) == (2, 2)
    assert row.api_loss is None
    assert row.no_gradients is not None
    assert row.no_gradients.answers == Answers(not_measured=2)
    assert row.session is not None
    assert row.session.alarms is not None
    assert row.session.alarms.hits == 2


def test_api_loss_is_of_missing_gradients_alone() -> None:
    """Neither a crash nor too few images says that gradients were missed."""
    blind = [
        {"verdict": LOST, "reason": WITHHELD},
        {"verdict": LOST, "reason": "40 clean images; at least 200 are needed"},
        {"verdict": LOST, "reason": "internal error: MemoryError", "failed": True},
    ]
    records: list[Record] = []
    for seed, why in enumerate(blind):
        cut = scanned(seed, "int4", 0.0, access="no-gradients").model_copy(update=why)
        records += [*pair(seed, 0.9, 0.9), scanned(seed, "int4", 3.0), cut]
    (row,) = gap_rows(Cohort(records))
    assert row.api_lost is not None
    assert (row.api_lost.hits, row.api_lost.n) == (1, 1)


def test_gap_row_has_auroc_against_clean_twins_of_the_same_access() -> None:
    spotless = network(None, 0)
    records = [
        *pair(0, 0.9, 0.9),
        scanned(0, "int4", 3.5, access="shadow"),
        scanned(0, "int4", 1.0),
        behaviour(spotless, "int4"),
        defense(spotless, "int4", scan_metrics(2.0), access="shadow"),
        defense(spotless, "int4", scan_metrics(2.0)),
    ]
    row = next(row for row in gap_rows(Cohort(records)) if row.setting.attack == "badnets")
    assert row.shadow is not None
    assert row.session is not None
    assert (row.shadow.auroc, row.session.auroc) == (1.0, 0.0)
    assert row.fp32 is None
    assert row.api_lost is None


def test_gap_row_ranks_a_file_without_an_answer_by_its_score() -> None:
    spotless = network(None, 0)
    records = [
        *(record for seed in range(2) for record in pair(seed, 0.9, 0.9)),
        *(scanned(seed, "int4", 3.0, access="no-gradients") for seed in range(2)),
        scanned(0, "int4", 3.0),
        scanned(1, "int4", 1.0, LOST),
        behaviour(spotless, "int4"),
        defense(spotless, "int4", scan_metrics(2.0)),
    ]
    row = next(row for row in gap_rows(Cohort(records)) if row.setting.attack == "badnets")
    assert row.session is not None
    assert (row.session.auroc, row.session.answers) == (0.5, Answers(measured=1, not_measured=1))


def test_trials_of_a_defense_are_apart_from_those_on_another_cpu() -> None:
    elsewhere = RUNTIME.model_copy(update={"isa": ("avx2",)})
    tried = [scanned(0, "fp32", 3.0), scanned(0, "int4", 3.0, runtime=elsewhere), scanned(0, "int8-static", 3.0)]
    assert trials_apart(Cohort([*pair(0, 0.9, 0.9), *tried])) == 1


def test_gap_rows_are_none_where_only_the_session_was_tried() -> None:
    assert gap_rows(Cohort([*pair(0, 0.9, 0.9), scanned(0, "fp32", 3.0), scanned(0, "int4", 3.0)])) == ()


def test_gap_row_of_a_filter_takes_the_auroc_of_each_network() -> None:
    made = network("badnets", 0)
    records = [*pair(0, 0.9, 0.9)]
    for scheme, access, area in (("fp32", "session", 0.9), ("int4", "shadow", 0.8), ("int4", "session", 0.7)):
        metrics = FilterMetrics(auroc=area, fpr=Rate(hits=0, n=10))
        records.append(defense(made, scheme, metrics, name="strip", kind="filter", verdict=None, access=access))
    (row,) = gap_rows(Cohort(records))
    assert row.signal_loss is not None
    assert row.signal_loss.mean == pytest.approx(0.2)
    assert row.session is not None
    assert row.session.alarms is None
