"""Records put in order: one of each cell and network, named in few words, joined to what the file does."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from qdefense.bench.records import (
    FP32,
    GRADIENTS_WITHHELD,
    Access,
    BehaviourRecord,
    Calibration,
    ControlRecord,
    DatasetMetrics,
    DefenseRecord,
    Network,
    QuantizationRecord,
    Record,
    RepairMetrics,
    TrainingRecord,
    digest_of,
)
from qdefense.findings import Verdict
from qdefense.profile import Runtime
from qdefense.trial import Activity, activity_of, held_against

NO_ATTACK = "none"
_EVALUATION, _RUNTIME = "evaluation", "runtime"
Kind = Literal["scan", "dataset", "filter", "repair"]
Status = Literal["measured", "not measured", "not applicable", "failed"]
_SCHEMES = (FP32, "int8-static", "int8-dynamic", "int4", "int4-a8")
_ACCESSES: tuple[Access, ...] = ("session", "shadow", "no-gradients")
_UNANSWERED: dict[Verdict, Status] = {
    Verdict.NOT_MEASURED: "not measured",
    Verdict.NOT_APPLICABLE: "not applicable",
}
_DIGITS = 12
"""Of a digest that tells one set of images from another in a label."""
_Trial = TypeVar("_Trial", BehaviourRecord, DefenseRecord)


class Setting(BaseModel):
    """Where figures were taken; networks that differ in nothing but the seed share it."""

    model_config = ConfigDict(frozen=True)

    data: str
    architecture: str
    attack: str
    precision: str
    calibration: str = ""
    arithmetic: str = "as-run"
    runtime: str = ""
    """Version and instruction set, where there are trials on others: they give other logits (law 5)."""
    evaluation: str = ""
    """Rules and test images, where there are trials under others."""

    @property
    def place(self) -> str:
        """Data, architecture and rules: the heading that rows stand under."""
        return ", ".join(filter(None, (self.data, self.architecture, self.evaluation)))

    @property
    def file(self) -> str:
        """How the file was made and is run."""
        arithmetic = "" if self.arithmetic == "as-run" else f"{self.arithmetic} arithmetic"
        return ", ".join(filter(None, (self.precision, self.calibration, arithmetic, self.runtime)))


class Subject(NamedTuple):
    """A defense in a setting."""

    setting: Setting
    defense: str
    access: Access


def status_of(record: DefenseRecord) -> Status:
    """Whether there is an answer; one that is missing is never a negative one.

    Of a scan of training data that draws no line the answer is the order of the rows, if all of them are in it.
    """
    if record.failed:
        return "failed"
    if record.verdict in _UNANSWERED:
        return "measured" if _orders_all_rows(record) else _UNANSWERED[record.verdict]
    judged = record.verdict is not None or record.kind in ("filter", "repair")
    unrepaired = isinstance(record.metrics, RepairMetrics) and record.metrics.accuracy_after is None
    return "not measured" if record.metrics is None or not judged or unrepaired else "measured"


def _orders_all_rows(record: DefenseRecord) -> bool:
    """A method that draws a line says where in its finding, whatever its verdict (`DatasetScan`)."""
    draws_no_line = record.finding is not None and record.finding.threshold is None
    return draws_no_line and isinstance(record.metrics, DatasetMetrics) and not record.metrics.unmeasured


def reason_of(record: DefenseRecord) -> str:
    """Its own, and where it has no answer how many rows are without a score."""
    rows = record.metrics.unmeasured if isinstance(record.metrics, DatasetMetrics) else 0
    if not rows or status_of(record) == "measured":
        return record.reason
    return f"{record.reason}; {rows} rows of the training set have no score"


def lost_for_gradients(record: DefenseRecord) -> bool:
    """Whether what keeps it from an answer is that the gradients were withheld: what that access is tried for."""
    withheld = record.access == "no-gradients" and GRADIENTS_WITHHELD in record.reason
    return withheld and status_of(record) in ("not measured", "not applicable")


class _Rules:
    """Under which rules trials were made, by which code, and on which test images; told only where they differ.

    Digests tell them apart even in records that are older than the fields which say them.
    """

    def __init__(self, records: Sequence[BehaviourRecord | DefenseRecord]) -> None:
        self._told = {
            one.data_sha256: one for one in records if isinstance(one, DefenseRecord) and one.evaluation is not None
        }
        self._labels = _labels((self._group(one), _EVALUATION, self._facts(one)) for one in records)

    def label(self, record: BehaviourRecord | DefenseRecord) -> str:
        """``evaluation (clean_images=500)``; empty where there are no others."""
        label: str = self._labels[self._group(record), _EVALUATION, _text(self._facts(record))]
        return "" if label == _EVALUATION else label

    def test_images(self, record: DefenseRecord) -> str | None:
        """Their digest; ``None`` where no record says it."""
        told = self._told.get(record.data_sha256)
        return None if told is None else told.test_sha256

    def _group(self, record: BehaviourRecord | DefenseRecord) -> str:
        """What is asked of the same images in the same way: the digest of a dataset scan covers the training set."""
        made = record.network
        asked = record.defense if isinstance(record, DefenseRecord) else ""
        return _text({"data": made.data, "train": made.train_sha256, "defense": asked})

    def _facts(self, record: BehaviourRecord | DefenseRecord) -> dict[str, Any]:
        code = {"evaluation_revision": _told(record.evaluation_revision)}
        if isinstance(record, BehaviourRecord):
            return {"test_sha256": record.data_sha256[:_DIGITS], **code}
        code["revision"] = _told(record.revision)
        told = self._told.get(record.data_sha256)
        if told is None or told.evaluation is None:
            unsaid = {"rules": "not recorded", "data_sha256": record.data_sha256[:_DIGITS]}
            return {"seed": record.seed, **unsaid, **code}
        images = {} if told.test_sha256 is None else {"test_sha256": told.test_sha256[:_DIGITS]}
        return {**told.evaluation.model_dump(), **images, "seed": record.seed, **code}


def _told(revision: int | None) -> str:
    return "not recorded" if revision is None else f"{revision}"


class Cohort:
    """The records of a bench in the order of their lines, by setting; of a recipe's networks the one measured last.

    The unit of replication is the network. ``behaviours`` and ``defenses`` hold one record per network, by seed: of the
    replica that the last answer is of, or where that one has none here, of another;
    ``superseded`` counts the trials that another network, file or revision of the code replaced; ``precisions`` are the
    labels by full name; ``makings`` are the records of networks trained and files quantized; ``controls`` by the key of
    the behaviour that each is the control of, whose activity here is judged by it.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._attacks = _labels((one.network.data, one.network.attack, _asked(one.network)) for one in records)
        self._architectures = _labels(_making_of(one.network) for one in records)
        makings = [one for one in records if isinstance(one, TrainingRecord | QuantizationRecord)]
        self.makings = tuple(sorted(makings, key=_making_rank))
        self._sources: defaultdict[str, set[str]] = defaultdict(set)
        for made in makings:
            if isinstance(made, QuantizationRecord) and made.artifact_sha256 is not None:
                self._sources[made.artifact_sha256].add(made.network_sha256)
        every = [one for one in records if isinstance(one, BehaviourRecord | DefenseRecord)]
        self._recorded = {one.key: one for one in every if isinstance(one, BehaviourRecord)}
        self._controls: defaultdict[str, list[ControlRecord]] = defaultdict(list)
        for control in (one for one in records if isinstance(one, ControlRecord)):
            self._controls[_controlled(control, control.attacked, control.data_sha256)].append(control)
        found = ((one, self._control_of(one, one.data_sha256)) for one in self._recorded.values())
        self.controls = {record.key: control for record, control in found if control is not None}
        self.failed_controls = self._failed_controls()
        newest = [self.judged(one) if isinstance(one, BehaviourRecord) else one for one in _newest(every)]
        trials = [one for one in newest if isinstance(one, DefenseRecord)]
        self._defenses = _labels(("", one.defense, one.settings) for one in trials)
        seen = [one for one in newest if isinstance(one, BehaviourRecord)]
        self._rules = _Rules(newest)
        named = [(one.network, one.runtime) for one in newest if one.runtime is not None]
        self._runtimes = _labels(("", _RUNTIME, runtime.facts) for _network, runtime in named)
        self._runtimes_at: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for network, runtime in named:
            self._runtimes_at[network.data, self.architecture(network)].add(self.runtime(runtime))
        self._kinds = {one.defense: one.kind for one in trials if one.kind is not None}
        self.precisions = _precision_labels(records)
        self._calibrations: dict[str, Calibration] = {}
        current = {network_id(one.network): one.replica for one in newest if not one.failed}
        self.behaviours: dict[Setting, tuple[BehaviourRecord, ...]] = _latest(
            ((self.setting(one), one) for one in seen), current
        )
        self.defenses: dict[Subject, tuple[DefenseRecord, ...]] = _latest(
            ((self.subject(one), one) for one in trials), current
        )
        kept = sum(map(len, self.behaviours.values())) + sum(map(len, self.defenses.values()))
        self.superseded = len(every) - kept
        self._files: defaultdict[tuple[str, str], list[BehaviourRecord]] = defaultdict(list)
        for one in seen:  # of every replica: a defense may have been tried on any
            self._files[one.artifact_sha256, one.arithmetic].append(one)
        self.networks = _networks(self, records)

    def _control_of(self, record: BehaviourRecord | DefenseRecord, images: str | None) -> ControlRecord | None:
        """On any CPU: the margin to a control is points wide, that between two CPUs an image or two."""
        if record.network.attack is None or images is None:
            return None
        mine = self._controls.get(_controlled(record, record.network, images), ())
        known = [one for one in mine if one.asr is not None and one.attacked_sha256 in self.sources(record)]
        return max(reversed(known), key=lambda one: _nearness(one, record), default=None)  # of equals the last line

    def _failed_controls(self) -> list[ControlRecord]:
        """Of each file and trigger the last, where no answer says as much: whichever came last, that counts first."""
        sourced = {network_id(one.network) for one in self._recorded.values() if one.fpr is not None}

        def answers(one: ControlRecord) -> bool:
            return not one.failed and (one.fpr is not None or network_id(one.attacked) not in sourced)

        groups = ({one.attacked_sha256: one for one in sorted(mine, key=answers)} for mine in self._controls.values())
        return [one for last in groups for one in last.values() if one.failed]

    def judged(self, record: BehaviourRecord) -> BehaviourRecord:
        """The record with the activity that its rates and its control, where there is one, make of what the file does.

        Anew, for older lines were judged by an older rule.
        """
        if record.activity is None or record.asr is None or record.base_confusion is None:
            return record
        ceiling = record.clean_accuracy if record.network.all_to_all else None
        alone = activity_of(record.asr, record.base_confusion, 1.0 if ceiling is None else ceiling)
        control = self.controls.get(record.key)
        activity = held_against(None if control is None else control.asr, alone, record.asr)
        return record.model_copy(update={"activity": activity})

    def recorded(self, judged: BehaviourRecord) -> BehaviourRecord:
        """The line that a judged record was made of."""
        return self._recorded[judged.key]

    def setting(self, record: BehaviourRecord | DefenseRecord) -> Setting:
        """Where a record belongs."""
        label = _calibration_label(record.calibration)
        if record.calibration is not None:
            self._calibrations[label] = record.calibration
        return Setting(
            data=record.network.data,
            architecture=self.architecture(record.network),
            attack=self.attack(record.network),
            precision=self.precisions[record.precision],
            calibration=label,
            arithmetic=record.arithmetic,
            runtime=self.runtime_at(record.network, record.runtime),
            evaluation=self._rules.label(record),
        )

    def architecture(self, network: Network) -> str:
        """``resnet8, width 16``, with what of recipe and training images differs among those on the same data."""
        data, name, making = _making_of(network)
        label: str = self._architectures[data, name, _text(making)]
        return label

    def runtime(self, runtime: Runtime | None) -> str:
        """``runtime (isa=avx2 fma)``; empty where all records that name one are of the same."""
        if len(self._runtimes) < 2:
            return ""
        if runtime is None:
            return "runtime not recorded"
        facts = runtime.facts
        return self._runtimes.get(("", _RUNTIME, _text(facts))) or _label(_RUNTIME, facts, (facts, {}))

    def runtime_at(self, network: Network, runtime: Runtime | None) -> str:
        """`runtime`; empty also where it is the only one of this data and architecture, whose rows stand together."""
        label = self.runtime(runtime)
        return "" if self._runtimes_at[network.data, self.architecture(network)] <= {label} else label

    def attack(self, network: Network) -> str:
        """The attack, with the settings and revision in which it differs from others of the name on the same data."""
        label: str = self._attacks[network.data, network.attack, _text(_asked(network))]
        return label

    def family(self, network: Network, *, without: Callable[[str], bool]) -> str:
        """The attack as `attack` names it, without the settings that do not count."""
        mine = (network.data, network.attack)
        variants = [json.loads(text) for *place, text in self._attacks if tuple(place) == mine]
        kept, *others = (
            {key: value for key, value in settings.items() if not without(key)}
            for settings in (_asked(network), *variants)
        )
        return _label(network.attack or NO_ATTACK, kept, others)

    def subject(self, record: DefenseRecord) -> Subject:
        """Which row a record belongs to."""
        return Subject(self.setting(record), self.defense(record.defense, record.settings), record.access)

    def defense(self, name: str, settings: Mapping[str, Any]) -> str:
        """The defense, with the settings in which it differs from others of the name; with all if it has no trial."""
        return self._defenses.get(("", name, _text(settings))) or _label(name, settings, (settings, {}))

    def kind(self, record: DefenseRecord) -> Kind | None:
        """The kind of a defense, which a failed trial may not name."""
        return record.kind or self._kinds.get(record.defense)

    def activity(self, record: DefenseRecord) -> Activity | None:
        """What the backdoor does in the file, on the same runtime and test images; ``None`` where that is unknown."""
        if record.network.attack is None:
            return Activity.CLEAN
        files = self._files.get((record.artifact_sha256, record.arithmetic), ())
        images, runtime = self._rules.test_images(record), self.runtime(record.runtime)
        found = {
            one.activity
            for one in files
            if one.activity is not None
            and one.network == record.network
            and images in (None, one.data_sha256)
            and (record.runtime is None or self.runtime(one.runtime) == runtime)
        }
        return found.pop() if len(found) == 1 else None

    def control(self, record: DefenseRecord) -> ControlRecord | None:
        """What the trigger does to the clean twin of the file that a defense was asked about."""
        files = self._files.get((record.artifact_sha256, record.arithmetic), ())
        images = {one.data_sha256 for one in files if one.network == record.network}
        told = self._rules.test_images(record) or (images.pop() if len(images) == 1 else None)
        return self._control_of(record, told)

    def twins(self, subject: Subject) -> tuple[DefenseRecord, ...]:
        """The same defense on clean networks, at the same precision.

        They have no trigger to calibrate with: those of a file with triggered calibration images were calibrated on
        as many clean ones.
        """
        setting = subject.setting
        calibration = self._clean_calibration(setting.calibration)
        clean = setting.model_copy(update={"attack": NO_ATTACK, "calibration": calibration})
        return self.defenses.get(subject._replace(setting=clean), ())

    def baseline(self, setting: Setting) -> Setting:
        """The FP32 files of the same networks."""
        return setting.model_copy(update={"precision": FP32, "calibration": "", "arithmetic": "as-run"})

    def sources(self, record: BehaviourRecord | DefenseRecord) -> frozenset[str]:
        """Digests of the FP32 files that the file of a record was made of, or is; none where no record says it."""
        own = record.artifact_sha256
        return frozenset({own} if record.precision == FP32 else self._sources.get(own, ()))

    def unrecorded(self, setting: Setting, records: Sequence[BehaviourRecord | DefenseRecord]) -> int:
        """How many networks of this data, architecture and attack have no record here, whether asked for or not."""
        known = self.networks[setting.data, setting.architecture, setting.attack]
        return len(known) - len(records)

    def _clean_calibration(self, label: str) -> str:
        asked = self._calibrations.get(label)
        if asked is None or not asked.triggered:
            return label
        clean = asked.model_copy(update={"triggered": 0.0, "name": ""})
        others = (name for name, one in self._calibrations.items() if one.model_copy(update={"name": ""}) == clean)
        return min(others, default=label)


def network_id(network: Network) -> str:
    """The digest of how a network is made."""
    return digest_of(network=network.model_dump(mode="json"))


def _asked(network: Network) -> dict[str, Any]:
    """The settings, and as further ones the revisions of attack and host."""
    told = {
        "revision" if name == network.attack else "host.revision": n for name, n in network.attack_revisions.items()
    }
    return {**network.attack_settings, **told}


def _making_of(network: Network) -> tuple[str, str, dict[str, Any]]:
    """Data, architecture, and what else but attack and seed decides the weights: networks of one row share all."""
    making = {**network.recipe, "train_sha256": network.train_sha256[:_DIGITS]}
    return network.data, f"{network.architecture}, width {network.width}", making


def rank_of(setting: Setting) -> tuple[Any, ...]:
    """The order of rows: no attack first, FP32 first, then as the tables of the field."""
    named = [place for place, name in enumerate(_SCHEMES) if f"{setting.precision}-".startswith(f"{name}-")]
    scheme = max(named, default=len(_SCHEMES))
    attack = (setting.attack != NO_ATTACK, setting.attack)
    file = (scheme, setting.precision, setting.calibration, setting.arithmetic, setting.runtime)
    return setting.data, (setting.architecture, setting.evaluation), attack, file


def row_rank(subject: Subject) -> tuple[Any, ...]:
    """The order of rows of defenses: the precisions of one defense stand together."""
    data, architecture, attack, file = rank_of(subject.setting)
    return data, architecture, subject.defense, attack, file, access_rank(subject.access)


def access_rank(access: Access) -> int:
    """The deployed file before its shadow, and that before no gradients."""
    return _ACCESSES.index(access)


def _making_rank(record: TrainingRecord | QuantizationRecord) -> tuple[str, ...]:
    return record.network.title, record.stage, record.key


def _networks(cohort: Cohort, records: Sequence[Record]) -> dict[tuple[str, str, str], frozenset[str]]:
    known: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    for record in records:
        network = record.network
        known[network.data, cohort.architecture(network), cohort.attack(network)].add(network_id(network))
    return {place: frozenset(found) for place, found in known.items()}


def _precision_labels(records: Sequence[Record]) -> dict[str, str]:
    """The scheme alone says it where only one quantization of the scheme was used."""
    schemes: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        if not isinstance(record, TrainingRecord):
            schemes[record.scheme].add(record.precision)
    return {name: name if len(names) > 1 else scheme for scheme, names in schemes.items() for name in sorted(names)}


def _newest(trials: Sequence[BehaviourRecord | DefenseRecord]) -> list[BehaviourRecord | DefenseRecord]:
    """Of each cell those that the newest code answered, or where none has an answer, those of the newest code."""
    newest: dict[str, tuple[bool, int, int]] = {}
    places = [(_cell_of(one), _code_of(one)) for one in trials]
    for cell, code in places:
        newest[cell] = max(code, newest.get(cell, code))
    return [one for one, (cell, code) in zip(trials, places, strict=True) if newest[cell] == code]


def _cell_of(record: BehaviourRecord | DefenseRecord) -> str:
    """What is asked, of which file, on which images: all that a key holds but the code."""
    asked = record.model_dump(mode="json", include={"defense", "settings", "access", "seed"})
    file = {"sha256": record.artifact_sha256, "precision": record.precision, "arithmetic": record.arithmetic}
    calibration = _calibration_label(record.calibration)
    made, images = network_id(record.network), record.data_sha256
    return digest_of(asked=asked, file=file, calibration=calibration, network=made, images=images)


def _controlled(record: BehaviourRecord | ControlRecord | DefenseRecord, attacked: Network, images: str) -> str:
    """What a file and its control share: the trigger, how the file is made but for it, and the images."""
    clean = {"triggered": 0.0, "name": ""}
    calibration = None if record.calibration is None else record.calibration.model_copy(update=clean).model_dump()
    file = {"precision": record.precision, "arithmetic": record.arithmetic, "calibration": calibration}
    return digest_of(network=network_id(attacked), file=file, images=images)


def _nearness(control: ControlRecord, seen: BehaviourRecord | DefenseRecord) -> tuple[int, int, bool, bool]:
    """The newest code first, then the clean network that was trained last, then one with an FPR, then the same CPU."""
    here, there = (None if one.runtime is None else one.runtime.facts for one in (control, seen))
    return control.evaluation_revision or 0, control.replica, control.fpr is not None, here == there


def _code_of(record: BehaviourRecord | DefenseRecord) -> tuple[bool, int, int]:
    """Lines that are older than revisions are of none."""
    own = record.revision if isinstance(record, DefenseRecord) else None
    return not record.failed, record.evaluation_revision or 0, own or 0


_Place = TypeVar("_Place", Setting, Subject)


def _latest(trials: Iterable[tuple[_Place, _Trial]], current: Mapping[str, int]) -> dict[_Place, tuple[_Trial, ...]]:
    """One record per place and network: an answer before a failure, then the ``current`` replica, then the last."""
    kept: defaultdict[_Place, dict[str, _Trial]] = defaultdict(dict)
    ranks: dict[tuple[_Place, str], tuple[bool, bool]] = {}
    for place, trial in trials:
        name = network_id(trial.network)
        rank = (not trial.failed, trial.replica == current.get(name))
        if rank >= ranks.get((place, name), rank):
            kept[place][name], ranks[place, name] = trial, rank
    return {place: tuple(found[name] for name in sorted(found, key=_by_seed(found))) for place, found in kept.items()}


def _by_seed(found: Mapping[str, BehaviourRecord | DefenseRecord]) -> Any:
    return lambda name: (found[name].network.seed, name)


def _calibration_label(calibration: Calibration | None) -> str:
    if calibration is None:
        return ""
    split = "" if calibration.split is None else f" of {calibration.split}"
    triggered = f", {calibration.triggered:.4g} triggered" if calibration.triggered else ""
    seed = f", seed {calibration.seed}" if calibration.seed else ""
    return f"{calibration.name} ({calibration.images} images{split}{triggered}{seed})"


def _labels(
    named: Iterable[tuple[str, str | None, Mapping[str, Any]]],
) -> dict[tuple[str, str | None, str], str]:
    """Names, each with those settings in which it differs from others of the name in the same group."""
    groups: defaultdict[tuple[str, str | None], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for group, name, settings in named:
        groups[group, name][_text(settings)] = settings
    return {
        (group, name, text): _label(name or NO_ATTACK, settings, tuple(variants.values()))
        for (group, name), variants in groups.items()
        for text, settings in variants.items()
    }


def _label(name: str, settings: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> str:
    keys = sorted({key for one in variants for key in one})
    varying = [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in variants}) > 1]
    told = [f"{key}={settings[key]}" for key in varying if key in settings]
    return f"{name} ({', '.join(told)})" if told else name


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
