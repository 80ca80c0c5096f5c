"""Write README.md: which orderings of the attacks' papers hold here, and what each precision leaves of every attack.

    qdefense bench benchmarks/attacks/matrix.toml
    python benchmarks/attacks/orderings.py

A sentence is judged once for every data set and seed of which all its files were measured. It is *reproduced* where it
holds for all of them, *not reproduced* where it fails for one; before anything was measured it says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from qdefense.attacks.compensation import confidence_drop, feasible_smoothings, highest_confidence, minimum_rise
from qdefense.bench.records import BehaviourRecord, DatasetMetrics, DefenseRecord, Record, ScanMetrics
from qdefense.bench.store import RECORDS, read_records
from qdefense.findings import ScanResult, Verdict
from qdefense.rates import wilson_interval

HERE = Path(__file__).parent
SCHEMES = ("fp32", "int8-static", "int8-dynamic", "int4")
PATCH_PIXELS = 9
"""Norm of BadNets' true mask, 3x3."""
PAPER_INDEX, KEPT_ASR, TINY = 2.0, 0.9, 50
SWEPT, HELD_SHARE = 1000, 0.85
Told = TypeVar("Told", BehaviourRecord, DefenseRecord)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """An attack of the matrix: its name, and the settings by which it is told from others of that name."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """As it is asked for; a setting that is None is left out of a key where it is the default."""
        named = {key: value for key, value in self.settings.items() if value is not None}
        told = ",".join(f"{key.replace('_', '-')}={value}" for key, value in named.items())
        return f"`{self.name}:{told}`" if told else f"`{self.name}`"

    def made(self, record: BehaviourRecord | DefenseRecord) -> bool:
        """Whether it is in the file that a record is of."""
        given = record.network.attack_settings
        return record.network.attack == self.name and all(
            given.get(key) == value for key, value in self.settings.items()
        )


def cassock(variant: str) -> Planted:
    return Planted(name="cassock", settings={"variant": variant})


def few(name: str) -> Planted:
    return Planted(name=name, settings={"poison_count": TINY})


BADNETS, BLENDED = (Planted(name=name, settings={"poison_rate": 0.1, "mode": None}) for name in ("badnets", "blended"))
LSP = {smoothing: Planted(name="lsp", settings={"smoothing": smoothing}) for smoothing in (0.2, 0.4, 0.5)}
DFB = Planted(name="dfb", settings={"poison_count": TINY, "ood": "gtsrb"})
SWEPT_BLENDED = Planted(name="blended", settings={"poison_count": SWEPT})
FEW_CLEAN_LABEL = Planted(name="clean-label", settings={"class_rate": 0.01})
SHOWN = (
    BADNETS,
    BLENDED,
    *LSP.values(),
    *map(cassock, ("source-specific", "trans", "cont", "comp")),
    Planted(name="cassock-loop", settings={"variant": "trans"}),
    Planted(name="wanet"),
    Planted(name="adaptive-blend"),
    DFB,
    *(Planted(name="badnets", settings={"poison_count": count}) for count in (SWEPT, 250, TINY)),
    SWEPT_BLENDED,
    few("blended"),
    FEW_CLEAN_LABEL,
    Planted(name="sig"),
    Planted(name="issba"),
    Planted(name="input-aware"),
    Planted(name="clean-label", settings={"class_rate": 0.25}),
    Planted(name="htba"),
    *(Planted(name=name, settings={"mode": "all-to-all"}) for name in ("badnets", "blended")),
)


class Results:
    """The records, newest last."""

    def __init__(self, records: Iterable[Record]) -> None:
        every = [record for record in records if not record.failed]
        self.behaviours = [record for record in every if isinstance(record, BehaviourRecord)]
        answers = [record for record in every if isinstance(record, DefenseRecord)]
        self.scans = [record for record in answers if record.defense == "neural-cleanse"]
        self.rankings = [record for record in answers if record.defense == "spectral-signatures"]

    @property
    def places(self) -> list[tuple[str, int]]:
        """Data sets and seeds."""
        return sorted({(record.network.data, record.network.seed) for record in self.behaviours})

    def behaviour(self, planted: Planted, place: tuple[str, int], scheme: str = "fp32") -> BehaviourRecord | None:
        """What a file of this attack does."""
        return _last_of(self.behaviours, planted, place, scheme)

    def scan(self, planted: Planted, place: tuple[str, int], scheme: str, *, fixed: bool) -> DefenseRecord | None:
        """What Neural Cleanse says of a file of this attack."""
        costed = (record for record in self.scans if (record.settings["multiplier"] == 1) == fixed)
        return _last_of(costed, planted, place, scheme)

    def index(self, planted: Planted, place: tuple[str, int], scheme: str, *, fixed: bool) -> float | None:
        """Neural Cleanse's index of the true target; 0 where its norm is above the median, or censored, as it ranks.

        NaN of a scan without an answer.
        """
        record = self.scan(planted, place, scheme, fixed=fixed)
        if record is None:
            return None
        if not isinstance(record.metrics, ScanMetrics) or record.verdict is Verdict.NOT_MEASURED:
            return math.nan
        hidden = record.metrics.target_norm is None
        return 0.0 if hidden else record.metrics.target_index

    def held(self, planted: Planted, place: tuple[str, int], scheme: str) -> float | None:
        """Share of the poisons among the 1.5 times as many rows that Spectral Signatures rank first in their label."""
        record = _last_of(self.rankings, planted, place, scheme)
        if record is None:
            return None
        rate = record.metrics.top_recall if isinstance(record.metrics, DatasetMetrics) else None
        return math.nan if rate is None else rate.value


def _last_of(records: Iterable[Told], planted: Planted, place: tuple[str, int], scheme: str) -> Told | None:
    there = [r for r in records if (r.network.data, r.network.seed) == place and r.scheme == scheme and planted.made(r)]
    return there[-1] if there else None


Figures = dict[str, float | None]
"""What a sentence rests on, by what is shown before it; None: not measured, NaN: measured, without an answer."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of a paper, the figures it speaks of, and whether they are so."""

    paper: str
    sentence: str
    figures: Callable[[Results, tuple[str, int]], Figures]
    holds: Callable[[list[float]], bool]


def asr_of(*attacks: Planted) -> Callable[[Results, tuple[str, int]], Figures]:
    def figures(results: Results, place: tuple[str, int]) -> Figures:
        found = {planted.title: results.behaviour(planted, place) for planted in attacks}
        return {f"ASR {title}": None if record is None else record.asr for title, record in found.items()}

    return figures


def selectivity_of(*variants: str) -> Callable[[Results, tuple[str, int]], Figures]:
    def figures(results: Results, place: tuple[str, int]) -> Figures:
        found = {variant: results.behaviour(cassock(variant), place) for variant in variants}
        return {f"ASR - FPR {variant}": _selectivity(record) for variant, record in found.items()}

    return figures


def _selectivity(record: BehaviourRecord | None) -> float | None:
    return None if record is None or record.asr is None or record.fpr is None else record.asr - record.fpr


def indices_of(*attacks: Planted, scheme: str = "fp32", fixed: bool) -> Callable[[Results, tuple[str, int]], Figures]:
    def figures(results: Results, place: tuple[str, int]) -> Figures:
        return {f"index {planted.title}": results.index(planted, place, scheme, fixed=fixed) for planted in attacks}

    return figures


def held_of(*attacks: Planted, scheme: str = "fp32") -> Callable[[Results, tuple[str, int]], Figures]:
    def figures(results: Results, place: tuple[str, int]) -> Figures:
        return {f"share of the poisons of {planted.title}": results.held(planted, place, scheme) for planted in attacks}

    return figures


def first_is_highest(values: list[float]) -> bool:
    return all(values[0] > other for other in values[1:])


def not_below(values: list[float]) -> bool:
    return values[0] >= values[1]


def hidden(values: list[float]) -> bool:
    return values[0] > PAPER_INDEX >= values[1]


def falling(values: list[float]) -> bool:
    return all(before >= after for before, after in pairwise(values))


def held_and_missed(values: list[float]) -> bool:
    return values[0] > HELD_SHARE >= values[1]


def kept(values: list[float]) -> bool:
    return all(value > KEPT_ASR for value in values)


CLAIMS = (
    Claim(
        paper="LSP",
        sentence=f"smoothed labels (.4) keep the ASR above {KEPT_ASR}",
        figures=asr_of(LSP[0.4]),
        holds=kept,
    ),
    *(
        Claim(
            paper="LSP",
            sentence=f"Neural Cleanse ({cost} cost) finds the host's target (index above {PAPER_INDEX:g}), not that of "
            "smoothed labels",
            figures=indices_of(BADNETS, LSP[0.4], fixed=cost == "fixed"),
            holds=hidden,
        )
        for cost in ("adaptive", "fixed")
    ),
    *(
        Claim(
            paper="LSP",
            sentence=f"the target's index ({cost} cost) does not rise with the smoothing: 0, .2, .4, .5",
            figures=indices_of(BADNETS, *LSP.values(), fixed=cost == "fixed"),
            holds=falling,
        )
        for cost in ("adaptive", "fixed")
    ),
    Claim(
        paper="DFB",
        sentence=f"at {TINY} poisons its ASR is higher than that of BadNets, Blended and clean-label",
        figures=asr_of(DFB, few("badnets"), few("blended"), FEW_CLEAN_LABEL),
        holds=first_is_highest,
    ),
    Claim(
        paper="Spectral Signatures",
        sentence=f"of {SWEPT} poisons the 1.5 times as many rows it ranks first in their label hold more than "
        f"{HELD_SHARE:.0%} with BadNets, and not with Blended",
        figures=held_of(Planted(name="badnets", settings={"poison_count": SWEPT}), SWEPT_BLENDED),
        holds=held_and_missed,
    ),
    *(
        Claim(
            paper="CASSOCK",
            sentence=f"`{better}` is not below `{worse}` in ASR - FPR",
            figures=selectivity_of(better, worse),
            holds=not_below,
        )
        for better, worse in (("comp", "trans"), ("cont", "source-specific"), ("trans", "source-specific"))
    ),
)


def verdict(claim: Claim, results: Results) -> tuple[str, list[str]]:
    """The word for a claim, and its figures place by place."""
    told, answers = [], []
    for place in results.places:
        figures = claim.figures(results, place)
        known = [value for value in figures.values() if value is not None]
        if len(known) < len(figures):
            continue
        values = ", ".join(f"{what} {figure(value)}" for what, value in zip(figures, known, strict=True))
        if any(map(math.isnan, known)):
            told.append(f"{place[0]} seed {place[1]}: {values}")
            continue
        answers.append(claim.holds(known))
        told.append(f"{place[0]} seed {place[1]}: {values}: {'yes' if answers[-1] else 'no'}")
    if not answers:
        return "no answer" if told else "not measured yet", told
    return ("reproduced" if all(answers) else "not reproduced") + f" ({sum(answers)} of {len(answers)})", told


def claim_table(results: Results) -> Iterator[str]:
    yield "| paper | sentence | here | figures |"
    yield "|---|---|---|---|"
    for claim in CLAIMS:
        word, told = verdict(claim, results)
        yield f"| {claim.paper} | {claim.sentence} | {word} | {'<br>'.join(told)} |"


def model_table(results: Results) -> Iterator[str]:
    """The compensatory model on measured norms and costs: how far the confidence must fall at a fixed cost."""
    yield "| data, seed | precision | weight | benign norm | benign cost | q_max | least smoothing | feasible |"
    yield "|---|---|---|---|---|---|---|---|"
    for place in results.places:
        for scheme in SCHEMES:
            record = results.scan(BADNETS, place, scheme, fixed=True)
            found = None if record is None or record.finding is None else record.finding.result
            if record is None or not isinstance(found, ScanResult) or not isinstance(record.metrics, ScanMetrics):
                continue
            targets, weight = record.metrics.targets, float(record.settings["initial_cost"])
            benign = [one for one in found.classes if one.norm is not None and one.target_class not in targets]
            norms, costs = [one.norm for one in benign], [one.cross_entropy for one in benign]
            if benign and None not in costs:
                rise = minimum_rise(weight=weight, benign_norms=norms, benign_costs=costs, trigger_norm=PATCH_PIXELS)
                smoothings = feasible_smoothings(rise, classes=len(found.classes))
                feasible = "none" if smoothings is None else f"{smoothings.low:.2f} to {smoothings.high:.2f}"
                yield (
                    f"| {place[0]}, {place[1]} | {scheme} | {weight:g} | {median(norms):.1f} | {median(costs):.4f} "
                    f"| {highest_confidence(rise):.3f} | {confidence_drop(rise):.3f} | {feasible} |"
                )


def figure(value: float) -> str:
    return "without an answer" if math.isnan(value) else f"{value:.3f}"


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def rate(value: float | None, n: int | None) -> str:
    if value is None or not n:
        return ""
    low, high = wilson_interval(round(value * n), n)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def precision_table(results: Results) -> Iterator[str]:
    yield "| attack | data, seed | precision | clean accuracy | ASR | base confusion | FPR | activity |"
    yield "|---|---|---|---|---|---|---|---|"
    for planted in SHOWN:
        for place in results.places:
            for scheme in SCHEMES:
                seen = results.behaviour(planted, place, scheme)
                if seen is not None:
                    yield (
                        f"| {planted.title} | {place[0]}, {place[1]} | {scheme} | {shown(seen.clean_accuracy)} "
                        f"| {rate(seen.asr, seen.eligible)} | {shown(seen.base_confusion)} "
                        f"| {rate(seen.fpr, seen.bystanders)} | {seen.activity} |"
                    )


def main() -> None:
    path = HERE / "results" / RECORDS
    results = Results(read_records(path) if path.exists() else ())
    parts = [
        (HERE / "preface.md").read_text(encoding="utf-8").rstrip(),
        "## The papers' orderings\n\n" + "\n".join(claim_table(results)),
        "## The model of label smoothing on measured norms\n\n"
        "From BadNets, Neural Cleanse at a fixed cost: the trigger is hidden where its confidence is at most q_max,\n"
        "and still fires above 1 / K. Norm and cost (cross-entropy, in nats) of the benign classes are the medians of\n"
        f"those that have a trigger; the norm of the true one is the patch's, {PATCH_PIXELS} pixels.\n\n"
        + "\n".join(model_table(results)),
        "## What each precision leaves\n\nASR and FPR with Wilson's 95 % interval over the images of one network.\n\n"
        + "\n".join(precision_table(results)),
    ]
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
