"""How `benchmarks/attacks/orderings.py` judges a paper's sentence: never by what was not measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from qdefense.attacks import ATTACKS
from qdefense.bench.matrix import read_matrix
from qdefense.bench.records import DatasetMetrics, Rate, RepairMetrics, ScanMetrics
from qdefense.bench.tables import Proportion, proportion
from qdefense.findings import InvertedTrigger, RepairResult, ScanResult, Verdict
from qdefense.registry import flat_settings
from qdefense.trial import Activity

Values = dict[tuple[str, int], dict[str, float | None]]


@pytest.fixture(scope="module")
def orderings(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("attacks/orderings.py")


class Measured:
    """Stands for `Results`."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.places = list(values)


def told(orderings: ModuleType, values: Values) -> tuple[str, list[str]]:
    claim = orderings.Claim(
        paper="P", sentence="a is highest", figures=lambda r, p: r.values[p], holds=orderings.first_is_highest
    )
    answer: tuple[str, list[str]] = orderings.verdict(claim, Measured(values))
    return answer


def test_a_sentence_holds_for_every_place_that_was_measured_whole(orderings: ModuleType) -> None:
    whole, part = {"a": 0.9, "b": 0.1}, {"a": None, "b": 0.1}
    assert told(orderings, {}) == ("not measured yet", [])
    assert told(orderings, {("signs", 0): part}) == ("not measured yet", [])
    word, lines = told(orderings, {("signs", 0): whole, ("signs", 1): part})
    assert (word, lines) == ("reproduced (1 of 1)", ["signs seed 0: a 0.900, b 0.100: yes"])
    word, lines = told(orderings, {("signs", 0): whole, ("signs", 1): {"a": 0.1, "b": 0.1}})
    assert (word, lines[1]) == ("not reproduced (1 of 2)", "signs seed 1: a 0.100, b 0.100: no")


def test_a_scan_without_an_answer_is_told_and_decides_nothing(orderings: ModuleType) -> None:
    lacking = {"a": math.nan, "b": 0.1}
    assert told(orderings, {("signs", 0): lacking}) == ("no answer", ["signs seed 0: a without an answer, b 0.100"])
    word, lines = told(orderings, {("signs", 0): lacking, ("signs", 1): {"a": 0.9, "b": 0.1}})
    assert (word, len(lines)) == ("reproduced (1 of 1; 1 without an answer)", 2)


def test_every_attack_of_the_matrix_is_in_the_table(orderings: ModuleType) -> None:
    """One that is not would be trained, measured and left out without a word."""
    matrix = read_matrix(orderings.HERE / "matrix.toml")
    asked = {attack for grid in matrix.grid for attack in grid.attacks if attack != "none"}
    made = {attack: ATTACKS.create(attack) for attack in asked}
    records = {
        spec: SimpleNamespace(network=SimpleNamespace(attack=attack.name, attack_settings=flat_settings(attack)))
        for spec, attack in made.items()
    }
    shown = {spec: [one.title for one in orderings.SHOWN if one.made(record)] for spec, record in records.items()}
    assert {spec for spec, titles in shown.items() if len(titles) != 1} == set()


def test_rules_of_the_sentences(orderings: ModuleType) -> None:
    assert orderings.falling([3.0, 3.0, 1.0])
    assert not orderings.falling([3.0, 1.0, 1.1])
    assert orderings.hidden([2.1, 2.0])
    assert orderings.hidden([2.1, 2.1]) is False
    assert orderings.hidden([2.0, 1.0]) is None, "a host that is not found hides nothing"
    assert orderings.kept_and_hidden([3.0, 0.8, 0.95, 3.0, 2.0])
    assert orderings.kept_and_hidden([3.0, 0.8, 0.95, 1.0, 2.1]) is False, "what hides is not what works"
    assert orderings.kept_and_hidden([2.0, 0.8, 0.95, 3.0, 2.0]) is None, "the host is not found either"
    assert orderings.kept([0.92, 0.901, 0.93])
    assert orderings.kept([0.92, 0.901, 0.93, 0.8, 0.7, 0.89]) is False
    assert orderings.kept([0.901, 0.89, 0.91]) is None, "the interval holds the threshold"
    missed = [0.8, 0.78, 0.82]
    assert orderings.held_and_missed([0.9, 0.88, 0.92, *missed])
    assert orderings.held_and_missed([0.86, 0.84, 0.88, *missed]) is None
    assert orderings.held_and_missed([*missed, *missed]) is False
    assert orderings.held_and_missed([0.86, 0.84, 0.88, 0.9, 0.88, 0.92]) is False, "the second is found"
    assert orderings.above([0.9, 0.5, 0.01, 0.2])
    assert orderings.above([0.5, 0.9, -0.2, -0.01]) is False
    assert orderings.above([0.9, 0.89, -0.01, 0.03]) is None
    assert orderings.above_and_alive([0.9, 0.4, 0.9, 0.5, 0.01, 0.2])
    assert orderings.above_and_alive([0.9, 0.8, 0.9, 0.89, -0.01, 0.03]) is None
    assert orderings.above_and_alive([0.9, 0.8, 0.5, 0.9, -0.2, -0.01]) is False
    assert orderings.above_and_alive([0.05, 0.4, 0.9, 0.5, 0.01, 0.2]) is False, "what its network confuses is none"
    assert orderings.above_and_alive([0.9, 0.05, 0.5, 0.9, -0.2, -0.01])
    assert orderings.above_and_alive([0.05, 0.01, 0.9, 0.5, 0.01, 0.2]) is None
    assert orderings.below([0.1, 0.2, -0.2, -0.01])
    assert orderings.below([0.1, 0.1, -0.1, 0.1]) is None
    assert orderings.below_and_alive([0.9, 0.1, 0.2, -0.2, -0.01])
    assert orderings.below_and_alive([0.9, 0.2, 0.1, 0.01, 0.2]) is False
    assert orderings.below_and_alive([0.05, 0.1, 0.2, -0.2, -0.01]) is None, "a dead trigger has no FPR to speak of"
    assert orderings.first_is_highest([0.06, 0.05])
    assert orderings.first_is_highest([0.06, 0.07]) is False
    assert orderings.first_is_highest([0.04, 0.01]) is None, "no attack did anything"


def test_places_that_do_not_decide_are_counted_apart(orderings: ModuleType) -> None:
    open_, whole = {"a": 0.04, "b": 0.01}, {"a": 0.9, "b": 0.1}
    word, lines = told(orderings, {("signs", 0): open_})
    assert (word, lines) == ("undecided (all 1)", ["signs seed 0: a 0.040, b 0.010: undecided"])
    assert told(orderings, {("signs", 0): open_, ("signs", 1): whole})[0] == "reproduced (1 of 1; 1 undecided)"


def of(hits: int, n: int) -> Proportion:
    found = proportion([Rate(hits=hits, n=n)])
    assert found is not None
    return found


def test_interval_of_a_difference_is_newcombe_of_two_rates_and_widens_with_more(orderings: ModuleType) -> None:
    """Newcombe 1998, example (a), method 10: 56 of 70 less 48 of 80 is .2 [.0524, .3339]."""
    first, second = of(56, 70), of(48, 80)
    low, high = orderings.difference_interval([first], [second])
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))
    none, few = of(0, 50), of(10, 50)
    wide = orderings.difference_interval([first, none], [second, few])
    assert sum(wide) / 2 > sum((low, high)) / 2, "the second network's FPR is taken from it"
    assert wide[1] - wide[0] > high - low


def behaves(
    asr: float | None, fpr: float | None, variant: str = "trans", key: str = "f", **changes: object
) -> SimpleNamespace:
    network = SimpleNamespace(
        data="signs", seed=0, attack="cassock", attack_settings={"variant": variant, "amplitude": 0.56}
    )
    rates = {"asr": asr, "base_confusion": 0.05, "eligible": 100, "fpr": fpr, "bystanders": 1000}
    return SimpleNamespace(**{"network": network, "scheme": "fp32", "key": key, **rates, **changes})


def test_two_variants_are_compared_with_the_interval_of_their_difference(orderings: ModuleType) -> None:
    results = orderings.Results(())
    better, worse = orderings.cassock("comp"), orderings.cassock("trans")
    read = orderings.compared("ASR - FPR", orderings.selectivity, better, worse)
    results.behaviours = [behaves(0.9, 0.1)]
    assert set(read(results, ("signs", 0)).values()) == {None}
    results.behaviours.append(behaves(0.95, None, "comp"))
    assert set(read(results, ("signs", 0)).values()) == {None}, "without an FPR there is nothing to compare"
    results.behaviours.append(behaves(0.95, 0.02, "comp"))
    first, second, low, high = read(results, ("signs", 0)).values()
    assert (first, second) == (pytest.approx(0.93), pytest.approx(0.8))
    assert low < 0.13 < high


def test_an_asr_counts_beyond_its_control_and_what_its_network_confuses(orderings: ModuleType) -> None:
    results = orderings.Results(())
    results.controls = {"f": SimpleNamespace(asr=0.3, eligible=1000)}
    results.behaviours = [behaves(0.9, 0.1)]
    assert results.beyond(orderings.cassock("trans"), ("signs", 0)) == pytest.approx(0.6)
    assert results.beyond(orderings.cassock("comp"), ("signs", 0)) is None
    results.behaviours = [behaves(0.9, 0.1, base_confusion=0.88)]
    assert results.beyond(orderings.cassock("trans"), ("signs", 0)) == pytest.approx(0.02)
    results.behaviours = [behaves(0.9, 0.1, key="without a control")]
    assert math.isnan(results.beyond(orderings.cassock("trans"), ("signs", 0)))


def test_what_was_not_measured_is_left_empty(orderings: ModuleType) -> None:
    assert (orderings.shown(None), orderings.shown(0.0)) == ("", "0.000")
    assert (orderings.rate(None, 10), orderings.rate(0.5, None), orderings.rate(0.5, 0)) == ("", "", "")
    assert orderings.rate(0.5, 100) == "0.500 [0.404, 0.596]"


def test_the_page_has_a_row_for_each_network_and_a_table_of_every_file(orderings: ModuleType) -> None:
    results = orderings.Results(())
    results.controls = {"f": SimpleNamespace(asr=0.3, eligible=1000, fpr=0.01, bystanders=500)}
    facts = {"clean_accuracy": 0.97, "base_confusion": 0.02}
    results.behaviours = [
        behaves(0.95, 0.1, activity=Activity.ACTIVE, **facts),
        behaves(0.4, 0.1, scheme="int4", key="g", activity=Activity.ATTENUATED, **facts),
        behaves(0.03, 0.1, scheme="int8-static", key="h", activity=Activity.DORMANT, **facts),
    ]
    *_, row = orderings.network_table(results)
    start = "| `cassock:variant=trans,amplitude=0.56` | signs, 0 |"
    assert row == f"{start} 0.970 | **0.950** | *0.030* |  | 0.400 | 0.300 (1 of 3) | 0.100 | 0.010 |"
    whole, *others = results.behaviours
    results.behaviours = others
    *_, lacking = orderings.network_table(results)
    assert lacking == f"{start}  |  | *0.030* |  | 0.400 |  |  |  |", "nothing of another file stands for FP32's"
    results.behaviours = [whole, *others]
    text = orderings.page(results, "# Title\n\n## In short\n\nA word.\n")
    assert [line for line in text.splitlines() if line.startswith("#")][:4] == [
        "# Title",
        "## In short",
        "## The papers' orderings",
        "## What each precision leaves",
    ]
    assert row in text
    assert [line.split(" | ")[2] for line in orderings.precisions(results).splitlines() if "cassock" in line] == [
        "fp32",
        "int8-static",
        "int4",
    ]


def scanned(verdict: Verdict, norm: float | None, index: float | None) -> SimpleNamespace:
    network = SimpleNamespace(data="signs", seed=0, attack="badnets", attack_settings={"poison_rate": 0.1})
    metrics = ScanMetrics(score=1.0, targets=(3,), target_norm=norm, target_index=index)
    return SimpleNamespace(
        network=network,
        scheme="fp32",
        settings={"multiplier": 2.0, "budget": "quick", "attack_success": 0.99},
        verdict=verdict,
        metrics=metrics,
        finding=None,
        runtime=None,
    )


@pytest.mark.parametrize(
    ("record", "index"),
    [
        (scanned(Verdict.BACKDOORED, 4.0, 3.5), 3.5),
        (scanned(Verdict.CLEAN, None, None), 0.0),
        (scanned(Verdict.NOT_MEASURED, 4.0, 3.5), math.nan),
    ],
    ids=["found", "censored: it ranks above all others", "the scan gave no answer"],
)
def test_index_of_the_target(orderings: ModuleType, record: SimpleNamespace, index: float | None) -> None:
    results = orderings.Results(())
    results.scans = [record]
    assert results.index(orderings.BADNETS, ("signs", 0), "fp32", fixed=False) == pytest.approx(index, nan_ok=True)
    assert results.index(orderings.BADNETS, ("signs", 0), "fp32", fixed=True) is None


def test_scans_that_ask_for_less_are_beside_the_published_and_in_no_sentence(orderings: ModuleType) -> None:
    records = []
    for success, norm in ((0.9, 5.0), (0.99, 30.0), (0.9, 4.0)):
        record = scanned(Verdict.CLEAN, norm, norm / 10)
        record.settings["attack_success"] = success
        record.runtime = SimpleNamespace(isa=("avx2",) if success == 0.99 else ("avx2", "avx512f"))
        norms = [(0, 60.0), (3, norm), (1, None)]
        classes = [InvertedTrigger.model_construct(target_class=k, norm=one, index=0.5) for k, one in norms]
        record.finding = SimpleNamespace(result=ScanResult.model_construct(classes=tuple(classes)))
        records.append(record)
    results = orderings.Results(())
    results.scans, results.behaviours = records, [SimpleNamespace(network=records[0].network)]
    assert results.index(orderings.BADNETS, ("signs", 0), "fp32", fixed=False) == 3.0
    _head, _line, *rows = orderings.success_table(results)
    (row,) = rows
    assert row.endswith(
        "| signs, 0 | fp32 | CLEAN | 30.0 (the target) | 0.500 | 0.333 | AVX2 "
        "| CLEAN | 4.0 (the target) | 0.500 | 0.875 | AVX-512 |  | | | |  |"
    )
    results.scans = records[1:2]
    *_, row = orderings.success_table(results)
    assert row.endswith("| CLEAN | 30.0 (the target) | 0.500 | 0.333 | AVX2 |  | | | |  |  | | | |  |"), "not asked"
    results.scans = []
    assert len(list(orderings.success_table(results))) == 2


def test_share_of_the_poisons_that_a_ranking_holds(orderings: ModuleType) -> None:
    network = SimpleNamespace(data="signs", seed=0, attack="badnets", attack_settings={"poison_count": 1000})
    metrics = DatasetMetrics.model_construct(top_recall=Rate(hits=870, n=1000))
    results = orderings.Results(())
    results.rankings = [SimpleNamespace(network=network, scheme="fp32", metrics=metrics)]
    planted = orderings.Planted(name="badnets", settings={"poison_count": 1000})
    interval = (pytest.approx(0.8477, abs=5e-5), pytest.approx(0.8894, abs=5e-5))
    assert results.held(planted, ("signs", 0), "fp32") == (0.87, *interval)
    assert results.held(planted, ("signs", 1), "fp32") is None
    results.rankings[0].metrics = None
    assert all(map(math.isnan, results.held(planted, ("signs", 0), "fp32")))


def test_a_poison_count_stands_beside_what_finds_and_what_removes_it(orderings: ModuleType) -> None:
    network = SimpleNamespace(data="signs", seed=0, attack="badnets", attack_settings={"poison_count": 50})
    file = {"network": network, "scheme": "fp32", "runtime": SimpleNamespace(isa=("avx2",))}
    results = orderings.Results(())
    results.behaviours = [SimpleNamespace(**file, asr=0.5)]
    head = list(orderings.count_table(results))
    assert len(head) == 2, "no repair, no row"
    metrics = RepairMetrics.model_construct(asr_before=0.5, asr_after=0.25, accuracy_before=0.9, accuracy_after=None)
    result = RepairResult.model_construct(pruning=SimpleNamespace(pruned=(1, 2), channels=64))
    answer = {"verdict": Verdict.NOT_REPAIRED, "metrics": metrics, "finding": SimpleNamespace(result=result)}
    results.repairs = [SimpleNamespace(**file, **answer)]
    begun = "| `badnets:poison-count=50` | signs, 0 | fp32 | 0.500"
    repaired = "NOT_REPAIRED | 2 of 64 | 0.500, 0.250 | 0.900,  | AVX2 |"
    assert list(orderings.count_table(results))[2:] == [f"{begun} |  | |  |  | {repaired}"]
    asked = {"budget": "quick", "multiplier": 2.0, "attack_success": 0.99}
    scanned = ScanMetrics.model_construct(target_norm=13.94, target_index=2.4, targets=(1,))
    results.scans = [SimpleNamespace(**file, settings=asked, verdict=Verdict.BACKDOORED, metrics=scanned)]
    results.rankings = [SimpleNamespace(**file, metrics=DatasetMetrics.model_construct(within_auroc=0.75))]
    results.repairs = [SimpleNamespace(**file, verdict=Verdict.NOT_MEASURED, metrics=None, finding=None)]
    found = "BACKDOORED | 2.400 | 13.9 | 0.750"
    assert list(orderings.count_table(results))[2:] == [f"{begun} | {found} | NOT_MEASURED | | |  | AVX2 |"]


def told_by_the_model(orderings: ModuleType, costs: list[float | None], weight: float = 0.01) -> list[str]:
    """Of five classes, the fourth of which is the target and the fifth without a trigger."""
    record = scanned(Verdict.BACKDOORED, 9.0, 3.5)
    norms = [100.0, 120.0, 110.0, 9.0, None]
    classes = [
        InvertedTrigger.model_construct(target_class=place, norm=norm, cross_entropy=cost)
        for place, (norm, cost) in enumerate(zip(norms, [*costs, 0.9, None], strict=True))
    ]
    record.finding = SimpleNamespace(result=ScanResult.model_construct(classes=tuple(classes)))
    record.settings |= {"multiplier": 1.0, "budget": "gate", "initial_cost": weight}
    results = orderings.Results(())
    results.scans = [record]
    results.behaviours = [SimpleNamespace(network=record.network)]
    _head, _line, *rows = orderings.model_table(results)
    return rows


def test_model_takes_the_medians_of_benign_classes_that_have_a_trigger(orderings: ModuleType) -> None:
    """Rise .01 (110 - 9) + .06 = 1.07 nats; exp(-1.07) = .343; of five classes a fifth is chance."""
    assert told_by_the_model(orderings, [0.05, 0.07, 0.06]) == [
        "| signs, 0 | fp32 | 0.01 | BACKDOORED | 110.0 | 0.0600 | 0.343 | 0.657 | 0.66 to 0.80 |"
    ]


def test_model_says_where_no_smoothing_hides_and_fires(orderings: ModuleType) -> None:
    assert told_by_the_model(orderings, [0.05, 0.07, 0.06], weight=0.1) == [
        "| signs, 0 | fp32 | 0.1 | BACKDOORED | 110.0 | 0.0600 | 0.000 | 1.000 | none |"
    ]


def test_model_is_not_fed_a_cost_that_was_not_measured(orderings: ModuleType) -> None:
    assert told_by_the_model(orderings, [0.05, None, 0.06]) == []
