"""Write README.md and PRECISIONS.md: which of the papers' orderings hold here, and what each precision leaves.

    qdefense bench benchmarks/attacks/matrix.toml
    python benchmarks/attacks/orderings.py

A sentence is judged once for every data set and seed of which all its files were measured. It is *reproduced* where it
holds for all of them that decide, *not reproduced* where it fails for one; before anything was measured it says so.
Where a sentence compares one rate or two, an interval that holds the threshold, or 0 of the difference, decides
nothing; nor does a trigger that plants nothing, in sentences about who is first and about FPR. Those intervals are over
images or poisons; indices, and orders of more than two attacks, have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from qdefense.attacks.compensation import confidence_drop, feasible_smoothings, highest_confidence, minimum_rise
from qdefense.bench.cohort import Cohort
from qdefense.bench.records import (
    BehaviourRecord,
    DatasetMetrics,
    DefenseRecord,
    Rate,
    Record,
    RepairMetrics,
    ScanMetrics,
    TrainingRecord,
)
from qdefense.bench.store import RECORDS, read_records
from qdefense.bench.tables import Proportion, proportion
from qdefense.findings import RepairResult, ScanResult, Verdict
from qdefense.trial import DORMANT_MARGIN, Activity

HERE = Path(__file__).parent
SCHEMES = ("fp32", "int8-static", "int8-dynamic", "int4")
PATCH_PIXELS = 9
"""Norm of BadNets' true mask, 3x3."""
PAPER_INDEX, KEPT_ASR = 2.0, 0.9
PAPER_SUCCESS, LOWER_SUCCESS = 0.99, 0.9
"""What Neural Cleanse asks of a trigger before it makes it smaller."""
TINY, TENFOLD = 50, 500
DFB_VARIANTS = "fixed", "encoder"
SWEPT, HELD_SHARE = 1000, 0.85
FULL, FAINT = 1.0, 0.3
"""Of the target's content, as it is; of the square, so that less of it is cut off at white."""
MANY = 0.4
"""Share of the images that are poisons, so that all-to-all has as many of each class as all-to-one has enough of."""
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
        return (record.network.attack or CLEAN.name) == self.name and all(
            given.get(key) == value for key, value in self.settings.items()
        )


CLEAN = Planted(name="none")


def cassock(variant: str, amplitude: float = 0.56) -> Planted:
    return Planted(name="cassock", settings={"variant": variant, "amplitude": amplitude})


def content(variant: str, amplitude: float = 0.2) -> Planted:
    return Planted(name="cassock", settings={"variant": variant, "content_amplitude": amplitude})


def in_the_loop(variant: str) -> Planted:
    return Planted(name="cassock-loop", settings={"variant": variant})


def few(name: str, count: int = TINY) -> Planted:
    return Planted(name=name, settings={"poison_count": count})


def dfb(count: int, variant: str) -> Planted:
    return Planted(name="dfb", settings={"variant": variant, "poison_count": count, "ood": "gtsrb"})


def clean_label(rate: float) -> Planted:
    return Planted(name="clean-label", settings={"class_rate": rate})


def to_all(name: str, rate: float = 0.1) -> Planted:
    return Planted(name=name, settings={"mode": "all-to-all", "poison_rate": rate})


BADNETS, BLENDED = (Planted(name=name, settings={"poison_rate": 0.1, "mode": None}) for name in ("badnets", "blended"))
LSP = {smoothing: Planted(name="lsp", settings={"smoothing": smoothing}) for smoothing in (0.2, 0.4, 0.5)}
SWEPT_BLENDED = Planted(name="blended", settings={"poison_count": SWEPT})
FEW_HTBA = Planted(name="htba", settings={"class_rate": 0.01})
RIVALS = {
    TINY: (few("badnets"), few("blended"), clean_label(0.01), FEW_HTBA),
    TENFOLD: (few("badnets", TENFOLD), few("blended", TENFOLD), clean_label(0.1)),
}
"""Of DFB, by the number of poisons."""
COUNTED = (*(few("badnets", count) for count in (TINY, 250, TENFOLD, SWEPT)), BADNETS, SWEPT_BLENDED)
SHOWN = (
    BADNETS,
    BLENDED,
    *LSP.values(),
    *(cassock(variant, amplitude) for amplitude in (0.56, FAINT) for variant in ("source-specific", "trans")),
    *(content(variant, amplitude) for amplitude in (0.2, FULL) for variant in ("cont", "comp")),
    *map(in_the_loop, ("source-specific", "trans")),
    Planted(name="wanet"),
    Planted(name="adaptive-blend"),
    *(dfb(TINY, variant) for variant in DFB_VARIANTS),
    *RIVALS[TINY],
    *(dfb(TENFOLD, variant) for variant in DFB_VARIANTS),
    *RIVALS[TENFOLD],
    *(few("badnets", count) for count in (250, SWEPT)),
    SWEPT_BLENDED,
    Planted(name="sig"),
    Planted(name="issba"),
    Planted(name="input-aware"),
    clean_label(0.25),
    Planted(name="htba", settings={"class_rate": 0.3}),
    *(to_all(name) for name in ("badnets", "blended")),
    to_all("badnets", MANY),
)


def share_of(rate: float | None, n: int | None) -> Proportion | None:
    """A rate of n images of one network, with Wilson's interval."""
    return None if rate is None or n is None else proportion([Rate(hits=round(rate * n), n=n)])


class Results:
    """The records, newest last, by revision of the attack first; each file's activity held against its control."""

    def __init__(self, records: Iterable[Record]) -> None:
        known = sorted(records, key=lambda record: sum(record.network.attack_revisions.values()))
        cohort = Cohort(known)
        every = [record for record in known if not record.failed]
        self.unmade = [record for record in known if isinstance(record, TrainingRecord) and record.failed]
        self.controls = cohort.controls
        self.behaviours = [cohort.judged(record) for record in every if isinstance(record, BehaviourRecord)]
        answers = [record for record in every if isinstance(record, DefenseRecord)]
        self.scans = [record for record in answers if record.defense == "neural-cleanse"]
        self.rankings = [record for record in answers if record.defense == "spectral-signatures"]
        self.repairs = [record for record in answers if record.defense == "fine-pruning"]

    @property
    def places(self) -> list[tuple[str, int]]:
        """Data sets and seeds."""
        return sorted({(record.network.data, record.network.seed) for record in self.behaviours})

    def behaviour(self, planted: Planted, place: tuple[str, int], scheme: str = "fp32") -> BehaviourRecord | None:
        """What a file of this attack does."""
        return _last_of(self.behaviours, planted, place, scheme)

    def control(self, record: BehaviourRecord) -> Proportion | None:
        """What the same trigger does to the clean network at the same precision."""
        found = self.controls.get(record.key)
        return None if found is None else share_of(found.asr, found.eligible)

    def control_fpr(self, record: BehaviourRecord) -> Proportion | None:
        """And to its bystanders, where the trigger is source-specific."""
        found = self.controls.get(record.key)
        return None if found is None else share_of(found.fpr, found.bystanders)

    def beyond(self, planted: Planted, place: tuple[str, int]) -> float | None:
        """Its ASR less its control, or its confusion where that is more; NaN without that control."""
        record = self.behaviour(planted, place)
        if record is None or record.asr is None:
            return None
        control = self.control(record)
        return math.nan if control is None else record.asr - max(control.value, record.base_confusion or 0.0)

    def scan(
        self, planted: Planted, place: tuple[str, int], scheme: str, *, fixed: bool, success: float = PAPER_SUCCESS
    ) -> DefenseRecord | None:
        """What Neural Cleanse says of a file of this attack; at a fixed cost with the steps that one takes."""
        budget = "gate" if fixed else "quick"
        costed = (
            record
            for record in self.scans
            if (record.settings["multiplier"] == 1) == fixed
            and record.settings["budget"] == budget
            and record.settings["attack_success"] == success
        )
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

    def held(self, planted: Planted, place: tuple[str, int], scheme: str) -> Bounds | None:
        """Share of the poisons among the 1.5 times as many rows that Spectral Signatures rank first in their label."""
        record = _last_of(self.rankings, planted, place, scheme)
        if record is None:
            return None
        rate = record.metrics.top_recall if isinstance(record.metrics, DatasetMetrics) else None
        return _NO_ANSWER if rate is None else _bounds(proportion([rate]))


Bounds = tuple[float, float, float]
"""A rate and its interval."""
_NO_ANSWER: Bounds = (math.nan,) * 3


def _bounds(share: Proportion | None) -> Bounds:
    return _NO_ANSWER if share is None else (share.value, share.low, share.high)


def _last_of(records: Iterable[Told], planted: Planted, place: tuple[str, int], scheme: str) -> Told | None:
    there = [r for r in records if (r.network.data, r.network.seed) == place and r.scheme == scheme and planted.made(r)]
    return there[-1] if there else None


Figures = dict[str, float | None]
"""What a sentence rests on, by what is shown before it; None: not measured, NaN: measured, without an answer."""
Reads = Callable[[Results, tuple[str, int]], Figures]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of a paper, the figures it speaks of, and whether they are so; None where they do not decide."""

    paper: str
    sentence: str
    figures: Reads
    holds: Callable[[list[float]], bool | None]


def asr_of(*attacks: Planted, scheme: str = "fp32") -> Reads:
    def figures(results: Results, place: tuple[str, int]) -> Figures:
        found = {planted.title: results.behaviour(planted, place, scheme) for planted in attacks}
        return {f"ASR {title}": None if record is None else record.asr for title, record in found.items()}

    return figures


def beyond_of(*attacks: Planted) -> Reads:
    def figures(results: Results, place: tuple[str, int]) -> Figures:
        found = {planted.title: results.beyond(planted, place) for planted in attacks}
        return {f"ASR beyond control and confusion {title}": value for title, value in found.items()}

    return figures


Read = Callable[[BehaviourRecord], tuple[Proportion | None, ...]]
"""The rates whose sum a sentence compares; the first is added, further ones are taken away."""


def asr_share(record: BehaviourRecord) -> tuple[Proportion | None, ...]:
    return (share_of(record.asr, record.eligible),)


def fpr_share(record: BehaviourRecord) -> tuple[Proportion | None, ...]:
    return (share_of(record.fpr, record.bystanders),)


def selectivity(record: BehaviourRecord) -> tuple[Proportion | None, ...]:
    return (*asr_share(record), *fpr_share(record))


def compared(what: str, read: Read, better: Planted, worse: Planted) -> Reads:
    """Both figures, and the interval of their difference: what `above` and `below` decide by."""

    def figures(results: Results, place: tuple[str, int]) -> Figures:
        both = [None if one is None else read(one) for one in (results.behaviour(it, place) for it in (better, worse))]
        names = [f"{what} {planted.title}" for planted in (better, worse)]
        if any(one is None or None in one for one in both):
            return dict.fromkeys(names)
        sides = [[count for count in one or () if count is not None] for one in both]
        totals = [side[0].value - sum(count.value for count in side[1:]) for side in sides]
        low, high = difference_interval(*sides)
        return {**dict(zip(names, totals, strict=True)), "difference from": low, "to": high}

    return figures


def difference_interval(better: list[Proportion], worse: list[Proportion]) -> tuple[float, float]:
    """95 % interval of ``(b1 - b2) - (w1 - w2)`` from Wilson's of each rate (MOVER, Zou & Donner 2008).

    Of independent images; the same ones were shown to both networks, which makes it wider than need be.
    """
    added, taken = [better[0], *worse[1:]], [*better[1:], worse[0]]
    middle = sum(one.value for one in added) - sum(one.value for one in taken)
    down = [one.value - one.low for one in added] + [one.high - one.value for one in taken]
    up = [one.high - one.value for one in added] + [one.value - one.low for one in taken]
    return middle - math.hypot(*down), middle + math.hypot(*up)


def ordered(what: str, read: Read, better: Planted, worse: Planted) -> Reads:
    """What `above_and_alive` decides by."""
    return both(beyond_of(better, worse), compared(what, read, better, worse))


def indices_of(*attacks: Planted, scheme: str = "fp32", fixed: bool) -> Reads:
    def figures(results: Results, place: tuple[str, int]) -> Figures:
        return {f"index {planted.title}": results.index(planted, place, scheme, fixed=fixed) for planted in attacks}

    return figures


def both(first: Reads, second: Reads) -> Reads:
    def figures(results: Results, place: tuple[str, int]) -> Figures:
        return {**first(results, place), **second(results, place)}

    return figures


def bounded(what: str, read: Callable[[Results, Planted, tuple[str, int]], Bounds | None], *attacks: Planted) -> Reads:
    """A rate of each and its interval: what `sides` decides by."""

    def figures(results: Results, place: tuple[str, int]) -> Figures:
        found: Figures = {}
        for planted in attacks:
            names = (f"{what} {planted.title}", f"from ({planted.title})", f"to ({planted.title})")
            found |= zip(names, read(results, planted, place) or (None,) * 3, strict=True)
        return found

    return figures


def held_of(*attacks: Planted) -> Reads:
    return bounded("share of the poisons of", lambda results, one, place: results.held(one, place, "fp32"), *attacks)


def bounded_asr_of(*attacks: Planted) -> Reads:
    def read(results: Results, planted: Planted, place: tuple[str, int]) -> Bounds | None:
        record = results.behaviour(planted, place)
        return None if record is None else _bounds(share_of(record.asr, record.eligible))

    return bounded("ASR", read, *attacks)


def first_is_highest(values: list[float]) -> bool | None:
    """None where no ASR is beyond control and confusion: who is first there is chance."""
    return None if max(values) <= DORMANT_MARGIN else all(values[0] > other for other in values[1:])


def above(values: list[float]) -> bool | None:
    """By the interval of the difference, the last two values."""
    low, high = values[-2:]
    return None if low <= 0 <= high else low > 0


def below(values: list[float]) -> bool | None:
    found = above(values)
    return None if found is None else not found


def above_and_alive(values: list[float]) -> bool | None:
    """As `above` where both ASRs are beyond control and confusion; else who has one is above who has none."""
    alive = [value > DORMANT_MARGIN for value in values[:2]]
    if not any(alive):
        return None
    return above(values[2:]) if all(alive) else alive[0]


def below_and_alive(values: list[float]) -> bool | None:
    """Of an ASR beyond control and confusion, and then as `below`; who plants nothing misleads no bystander either."""
    return below(values[1:]) if values[0] > DORMANT_MARGIN else None


def hidden(values: list[float]) -> bool | None:
    """A host that is not found decides nothing: there is nothing to be hidden."""
    return values[1] <= PAPER_INDEX if values[0] > PAPER_INDEX else None


def falling(values: list[float]) -> bool:
    return all(before >= after for before, after in pairwise(values))


def sides(values: list[float], threshold: float) -> list[bool | None]:
    """Of each rate with its interval, whether it is above the threshold; None where the interval holds it."""
    pairs = zip(values[1::3], values[2::3], strict=True)
    return [True if low > threshold else False if high < threshold else None for low, high in pairs]


def held_and_missed(values: list[float]) -> bool | None:
    held, missed = sides(values, HELD_SHARE)
    if held is False or missed is True:
        return False
    return None if held is None or missed is None else True


def kept(values: list[float]) -> bool | None:
    found = sides(values, KEPT_ASR)
    return False if False in found else None if None in found else True


def kept_and_hidden(values: list[float]) -> bool | None:
    """Of the host's index, ASRs, and as many indices in their order: whether one attack has the one and not the other.

    A host that is not found decides nothing: there is nothing to be hidden.
    """
    host, half = values[0], len(values) // 2
    rates, indices = values[1 : half + 1], values[half + 1 :]
    found = any(asr > KEPT_ASR and index <= PAPER_INDEX for asr, index in zip(rates, indices, strict=True))
    return found if host > PAPER_INDEX else None


CLAIMS = (
    *(
        Claim(
            paper="LSP",
            sentence=f"a smoothing (.2, .4, .5) keeps the ASR above {KEPT_ASR} and takes the target's index to "
            f"{PAPER_INDEX:g} or less ({cost} cost{where})",
            figures=both(
                indices_of(BADNETS, scheme=scheme, fixed=fixed),
                both(asr_of(*LSP.values(), scheme=scheme), indices_of(*LSP.values(), scheme=scheme, fixed=fixed)),
            ),
            holds=kept_and_hidden,
        )
        for cost, fixed in (("adaptive", False), ("fixed", True))
        for scheme, where in (("fp32", ""), ("int8-static", ", static INT8"))
    ),
    Claim(
        paper="LSP",
        sentence=f"smoothed labels (.4) keep the ASR above {KEPT_ASR}",
        figures=bounded_asr_of(LSP[0.4]),
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
    *(
        Claim(
            paper="DFB",
            sentence=f"at {count} poisons its ASR ({variant}), beyond control and confusion, is "
            "higher than that of " + ", ".join(dict.fromkeys(rival.name for rival in rivals)),
            figures=beyond_of(dfb(count, variant), *rivals),
            holds=first_is_highest,
        )
        for (count, rivals), variant in product(RIVALS.items(), DFB_VARIANTS)
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
            sentence=f"{better.title} is above {worse.title} in ASR - FPR",
            figures=ordered("ASR - FPR", selectivity, better, worse),
            holds=above_and_alive,
        )
        for better, worse in (
            (content("comp"), cassock("trans")),
            (content("comp", FULL), cassock("trans")),
            (content("cont"), cassock("source-specific")),
            (content("cont", FULL), cassock("source-specific")),
            (content("comp"), cassock("source-specific")),
            (content("comp", FULL), cassock("source-specific")),
            (cassock("trans"), cassock("source-specific")),
            (cassock("trans", FAINT), cassock("source-specific", FAINT)),
            (in_the_loop("trans"), in_the_loop("source-specific")),
        )
    ),
    *(
        Claim(
            paper="CASSOCK",
            sentence=f"{comp.title} has a higher ASR than the baseline",
            figures=ordered("ASR", asr_share, comp, cassock("source-specific")),
            holds=above_and_alive,
        )
        for comp in (content("comp"), content("comp", FULL))
    ),
    *(
        Claim(
            paper="CASSOCK",
            sentence=f"{comp.title} has a lower FPR than the baseline, and an ASR",
            figures=both(beyond_of(comp), compared("FPR", fpr_share, comp, cassock("source-specific"))),
            holds=below_and_alive,
        )
        for comp in (content("comp"), content("comp", FULL))
    ),
)


def verdict(claim: Claim, results: Results) -> tuple[str, list[str]]:
    """The word for a claim, and its figures place by place."""
    told: list[str] = []
    answers: list[bool | None] = []
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
        told.append(f"{place[0]} seed {place[1]}: {values}: {_WORDS[answers[-1]]}")
    if not answers:
        return "no answer" if told else "not measured yet", told
    decided = [answer for answer in answers if answer is not None]
    unanswered = f"; {len(told) - len(answers)} without an answer" if len(told) > len(answers) else ""
    if not decided:
        return f"undecided (all {len(answers)}{unanswered})", told
    rest = f"; {len(answers) - len(decided)} undecided{unanswered}" if len(decided) < len(answers) else unanswered
    return ("reproduced" if all(decided) else "not reproduced") + f" ({sum(decided)} of {len(decided)}{rest})", told


_WORDS = {True: "yes", False: "no", None: "undecided"}


def claim_table(results: Results) -> Iterator[str]:
    yield "| paper | sentence | here | figures |"
    yield "|---|---|---|---|"
    for claim in CLAIMS:
        word, told = verdict(claim, results)
        yield f"| {claim.paper} | {claim.sentence} | {word} | {'<br>'.join(told)} |"


def model_table(results: Results) -> Iterator[str]:
    """The compensatory model on measured norms and costs: how far the confidence must fall at a fixed cost."""
    yield "| data, seed | precision | weight | scan | benign norm | benign cost | q_max | least smoothing | feasible |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for place in results.places:
        for scheme in SCHEMES:
            record = results.scan(BADNETS, place, scheme, fixed=True)
            found = None if record is None or record.finding is None else record.finding.result
            if record is None or not isinstance(found, ScanResult) or not isinstance(record.metrics, ScanMetrics):
                continue
            targets, weight = record.metrics.targets, float(record.settings["initial_cost"])
            benign = [one for one in found.classes if one.norm is not None and one.target_class not in targets]
            norms = [one.norm for one in benign if one.norm is not None]
            costs = [one.cross_entropy for one in benign if one.cross_entropy is not None]
            if benign and len(costs) == len(benign):
                rise = minimum_rise(weight=weight, benign_norms=norms, benign_costs=costs, trigger_norm=PATCH_PIXELS)
                smoothings = feasible_smoothings(rise, classes=len(found.classes))
                feasible = "none" if smoothings is None else f"{smoothings.low:.2f} to {smoothings.high:.2f}"
                yield (
                    f"| {place[0]}, {place[1]} | {scheme} | {weight:g} | {record.verdict} "
                    f"| {median(norms):.1f} | {median(costs):.4f} "
                    f"| {highest_confidence(rise):.3f} | {confidence_drop(rise):.3f} | {feasible} |"
                )


def success_table(results: Results) -> Iterator[str]:
    """Neural Cleanse at its adaptive cost (`quick`), asked for 99 % and 90 %, and at a fixed one; blank: not asked."""
    asked = {
        "at 99 %": partial(results.scan, fixed=False, success=PAPER_SUCCESS),
        "at 90 %": partial(results.scan, fixed=False, success=LOWER_SUCCESS),
        "fixed cost": partial(results.scan, fixed=True, success=PAPER_SUCCESS),
    }
    head = " | ".join(f"{what}: answer | lowest norm | its index | ratio | CPU" for what in asked)
    yield f"| attack | data, seed | precision | {head} |"
    yield "|---" * (3 + 5 * len(asked)) + "|"
    for planted, place, scheme in product((CLEAN, BADNETS, *LSP.values()), results.places, SCHEMES):
        scans = [scan(planted, place, scheme) for scan in asked.values()]
        if any(scan is not None for scan in scans):
            told = " | ".join(map(_told, scans))
            yield f"| {planted.title} | {place[0]}, {place[1]} | {scheme} | {told} |"


def _told(record: DefenseRecord | None) -> str:
    """The answer, and the class with the smallest mask: in an attacked file marked where it is the true target."""
    if record is None:
        return " | | | | "
    found = None if record.finding is None else record.finding.result
    measured = [] if not isinstance(found, ScanResult) else [one for one in found.classes if one.norm is not None]
    if not measured:
        return f"{record.verdict} | | | | {_machine(record)}"
    lowest = min(measured, key=lambda one: one.norm or 0.0)
    targets = record.metrics.targets if isinstance(record.metrics, ScanMetrics) else ()
    mark = " (the target)" if lowest.target_class in targets else ""
    ratio = 1 - (lowest.norm or 0.0) / median(one.norm or 0.0 for one in measured)
    return f"{record.verdict} | {lowest.norm:.1f}{mark} | {shown(lowest.index)} | {ratio:.3f} | {_machine(record)}"


def _machine(record: DefenseRecord) -> str:
    """Of the two kinds that measured: what follows the last bits of float sums is another on the other."""
    isa = () if record.runtime is None else record.runtime.isa
    return "AVX-512" if "avx512f" in isa else "AVX2" if "avx2" in isa else ""


def count_table(results: Results) -> Iterator[str]:
    """By the number of poisons: what finds them, and what removes the backdoor."""
    yield (
        "| attack | data, seed | precision | ASR | Neural Cleanse | index | mask | AUROC | Fine-Pruning | pruned "
        "| ASR before, after | accuracy before, after | CPU |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for planted, place, scheme in product(COUNTED, results.places, SCHEMES):
        repair = _last_of(results.repairs, planted, place, scheme)
        seen = results.behaviour(planted, place, scheme)
        if repair is not None and seen is not None:
            found = " | ".join((_found(results, planted, place, scheme), _ranked(results, planted, place, scheme)))
            told = f"{planted.title} | {place[0]}, {place[1]} | {scheme} | {shown(seen.asr)}"
            yield f"| {told} | {found} | {_repaired(repair)} | {_machine(repair)} |"


def _found(results: Results, planted: Planted, place: tuple[str, int], scheme: str) -> str:
    """The answer, index and mask of the true target; censored, or above the median, its index is 0."""
    scan = results.scan(planted, place, scheme, fixed=False)
    if scan is None or not isinstance(scan.metrics, ScanMetrics):
        return " | | "
    norm = scan.metrics.target_norm
    index = results.index(planted, place, scheme, fixed=False)
    return f"{scan.verdict} | {shown(index)} | {'' if norm is None else f'{norm:.1f}'}"


def _ranked(results: Results, planted: Planted, place: tuple[str, int], scheme: str) -> str:
    record = _last_of(results.rankings, planted, place, scheme)
    return shown(record.metrics.within_auroc if record and isinstance(record.metrics, DatasetMetrics) else None)


def _repaired(record: DefenseRecord) -> str:
    """The repair's own verdict, on the images that it had, and rates on those that it did not see."""
    metrics, result = record.metrics, None if record.finding is None else record.finding.result
    if not isinstance(metrics, RepairMetrics):
        return f"{record.verdict} | | | "
    pruning = result.pruning if isinstance(result, RepairResult) else None
    pruned = "" if pruning is None else f"{len(pruning.pruned)} of {pruning.channels}"
    asr, accuracy = (
        f"{shown(before)}, {shown(after)}"
        for before, after in (
            (metrics.asr_before, metrics.asr_after),
            (metrics.accuracy_before, metrics.accuracy_after),
        )
    )
    return f"{record.verdict} | {pruned} | {asr} | {accuracy}"


def figure(value: float) -> str:
    return "without an answer" if math.isnan(value) else f"{value:.3f}"


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def rate(value: float | None, n: int | None) -> str:
    share = share_of(value, n)
    return "" if share is None else f"{value:.3f} [{share.low:.3f}, {share.high:.3f}]"


def _marked(record: BehaviourRecord | None) -> str:
    """An ASR, bold where the file is active and slanted where it is dormant."""
    if record is None or record.asr is None:
        return ""
    mark = {Activity.ACTIVE: "**", Activity.DORMANT: "*"}.get(record.activity or Activity.ATTENUATED, "")
    return f"{mark}{record.asr:.3f}{mark}"


def _highest_control(results: Results, files: list[BehaviourRecord]) -> str:
    """And of how many files, where some have none."""
    controls = [control.value for one in files if (control := results.control(one)) is not None]
    if not controls:
        return ""
    part = "" if len(controls) == len(files) else f" ({len(controls)} of {len(files)})"
    return f"{max(controls):.3f}{part}"


def network_table(results: Results) -> Iterator[str]:
    """A row for each network."""
    yield f"| attack | data, seed | clean accuracy | {' | '.join(SCHEMES)} | controls up to | FPR, fp32 | its control |"
    yield "|---|---|---|" + "---|" * (len(SCHEMES) + 3)
    for planted, place in product(SHOWN, results.places):
        files = [results.behaviour(planted, place, scheme) for scheme in SCHEMES]
        seen, whole = [one for one in files if one is not None], files[0]
        if not seen:
            continue
        misled = None if whole is None else results.control_fpr(whole)
        yield (
            f"| {planted.title} | {place[0]}, {place[1]} | {shown(None if whole is None else whole.clean_accuracy)} "
            f"| {' | '.join(map(_marked, files))} | {_highest_control(results, seen)} "
            f"| {shown(None if whole is None else whole.fpr)} | {shown(None if misled is None else misled.value)} |"
        )


def precision_table(results: Results) -> Iterator[str]:
    """A row for each file."""
    yield (
        "| attack | data, seed | precision | clean accuracy | ASR | its control | base confusion | FPR | its control "
        "| activity |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for planted in SHOWN:
        for place in results.places:
            for scheme in SCHEMES:
                seen = results.behaviour(planted, place, scheme)
                if seen is not None:
                    control, misled = results.control(seen), results.control_fpr(seen)
                    yield (
                        f"| {planted.title} | {place[0]}, {place[1]} | {scheme} | {shown(seen.clean_accuracy)} "
                        f"| {rate(seen.asr, seen.eligible)} | {'' if control is None else shown(control.value)} "
                        f"| {shown(seen.base_confusion)} "
                        f"| {rate(seen.fpr, seen.bystanders)} | {'' if misled is None else shown(misled.value)} "
                        f"| {seen.activity} |"
                    )


def unmade(results: Results) -> Iterator[str]:
    """Networks that could not be made: they are in no sentence."""
    if results.unmade:
        lines = (f"- {one.network.title}: {one.reason}" for one in results.unmade)
        yield "## Networks that could not be made\n\n" + "\n".join(lines)


def page(results: Results, preface: str) -> str:
    """README.md: the preface, what the papers say, and the tables."""
    parts = [
        preface.rstrip(),
        "## The papers' orderings\n\n" + "\n".join(claim_table(results)),
        "## What each precision leaves\n\n"
        "ASR by precision, **bold** where the file is active and *slanted* where it is dormant, and the clean\n"
        "accuracy of the FP32 file. The controls, at most: what the same trigger does to the *clean* network of that\n"
        "seed at the same precision, and of how many files there is one where not of all. Intervals, confusion\n"
        "without the trigger and the FPR of every file are in [PRECISIONS.md](PRECISIONS.md).\n\n"
        + "\n".join(network_table(results)),
        "## What a poison count costs and buys\n\n"
        "Neural Cleanse (`quick`, 99 %): its answer, and the index and the mask of the true target. Spectral\n"
        "Signatures: AUROC within the target's label. Fine-Pruning: its own verdict on 500 images that it was given,\n"
        "how many channels it pruned, and ASR and clean accuracy on the test images that it was not.\n\n"
        + "\n".join(count_table(results)),
        "## The model of label smoothing on measured norms\n\n"
        "From BadNets, Neural Cleanse at a fixed cost: the trigger is hidden where its confidence is at most q_max,\n"
        "and still fires above 1 / K. Norm and cost (cross-entropy, in nats) of the benign classes are the medians of\n"
        f"those that have a trigger; the norm of the true one is the patch's, {PATCH_PIXELS} pixels.\n\n"
        + "\n".join(model_table(results)),
        "## What Neural Cleanse asks of a trigger\n\n"
        "At its adaptive cost (`quick`) it makes a mask smaller as long as the trigger reaches 99 % of the images, as\n"
        "published, or 90 %; at a fixed cost (`gate`, weight .01) it does as the model of label smoothing has it. The\n"
        "class with the smallest mask (pixels), its index, `1 - norm / median` (docs/decisions/0023), and the CPU\n"
        "that it was scanned on: the same scan on another may have another index.\n\n"
        + "\n".join(success_table(results)),
        *unmade(results),
    ]
    return "\n\n".join(parts) + "\n"


def precisions(results: Results) -> str:
    """PRECISIONS.md: every file."""
    return (
        "# What each precision leaves, file by file\n\n"
        "ASR and FPR with Wilson's 95 % interval over the images of one network. Its control: the share of the same\n"
        "images that the *clean* network of that seed and precision gives to the attacker's class with the same\n"
        "trigger on them; of the FPR, of its bystanders. Base confusion: the attacked file's share without it.\n"
        "Written by `orderings.py`.\n\n" + "\n".join(precision_table(results)) + "\n"
    )


def main() -> None:
    path = HERE / "results" / RECORDS
    results = Results(read_records(path) if path.exists() else ())
    preface = (HERE / "preface.md").read_text(encoding="utf-8")
    (HERE / "README.md").write_text(page(results, preface), encoding="utf-8")
    (HERE / "PRECISIONS.md").write_text(precisions(results), encoding="utf-8")


if __name__ == "__main__":
    main()
