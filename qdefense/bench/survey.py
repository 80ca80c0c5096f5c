"""What of a plan is there and what is not, told from the store alone: nothing is read, trained or run for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qdefense.bench.cells import Cell, FilePlan, NetworkPlan
from qdefense.bench.cohort import lost_for_gradients, status_of
from qdefense.bench.costs import CostModel, Source, defense_keys, file_keys
from qdefense.bench.records import BehaviourRecord, ControlRecord, DefenseRecord, Record, Replica, digest_of
from qdefense.bench.store import Store
from qdefense.bench.tasks import Evaluation, TrialKey, quantization_key, training_key
from qdefense.profile import Runtime

State = Literal["measured", "not measured", "failed", "missing"]
Stage = Literal["train", "quantize", "behaviour", "control", "defense"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One work item of the plan. ``blocked`` is why a missing one cannot be made: what it needs has failed."""

    stage: Stage
    title: str
    state: State
    network: NetworkPlan
    file: FilePlan | None = None
    cell: Cell | None = None
    record: Record | None = None
    blocked: str | None = None

    @property
    def pending(self) -> bool:
        """Whether a run would do it, unless only failed ones stand before it."""
        return self.state == "missing" and self.blocked is None

    @property
    def incomplete(self) -> bool:
        """Whether it keeps the matrix from being complete; what is lost for want of gradients is the point."""
        expected = isinstance(self.record, DefenseRecord) and lost_for_gradients(self.record)
        return self.state != "measured" and not expected


def current_file(store: Store, file: FilePlan, network: Replica) -> Replica | None:
    """The file of a network at a precision: the one of its recipe's that is measured."""
    if file.quantization is None:
        return network
    return store.measured(digest_of(**file.recipe(network.artifact_sha256)))


def attacker_of(cell: Cell, store: Store) -> Replica | None:
    """The network whose trigger a control is of; ``None`` of other cells, and where it is not trained yet."""
    return None if cell.attacker is None else store.measured(cell.attacker.recipe_sha256)


def trial_key(
    network: NetworkPlan,
    file: FilePlan,
    cell: Cell,
    artifact: Replica,
    rules: Evaluation,
    store: Store,
) -> TrialKey:
    """What a cell's record is called once its file, and of a control its `attacker_of`, is known.

    It names the runtime where only answers of it count, and the record without that name is from another.
    """
    attacker = attacker_of(cell, store)
    key = TrialKey(
        plan=file,
        cell=cell,
        artifact_sha256=artifact.artifact_sha256,
        batch=artifact.batch,
        train_sha256=network.train.facts.sha256,
        test_sha256=network.test.facts.sha256,
        evaluation=rules,
        attacker_sha256=None if attacker is None else attacker.artifact_sha256,
    )
    if rules.here is not None and is_elsewhere(store.records.get(key.key), rules.here):
        return replace(key, runtime=rules.here)
    return key


def is_elsewhere(record: Record | None, here: Runtime) -> bool:
    """Whether a record is of a trial on another CPU or ONNX Runtime."""
    known = record.runtime if isinstance(record, BehaviourRecord | ControlRecord | DefenseRecord) else None
    return known is not None and known.facts != here.facts


def measured_apart(items: Sequence[Item], here: Runtime) -> int:
    """Trials of defenses to be done here, of files whose behaviour was measured elsewhere: no rate would hold them."""
    files = {_file_of(item) for item in items if item.stage == "behaviour" and is_elsewhere(item.record, here)}
    return sum(item.pending and item.stage == "defense" and _file_of(item) in files for item in items)


def _file_of(item: Item) -> tuple[int, str]:
    return id(item.file), "" if item.cell is None else item.cell.arithmetic


def never(_key: str) -> bool:
    """What failed stays as it is."""
    return False


def survey(
    plan: Sequence[NetworkPlan], store: Store, rules: Evaluation, *, again: Callable[[str], bool] = never
) -> list[Item]:
    """Every work item of the plan, in its order; a failed one counts as missing where its key is tried ``again``."""
    return [item for network in plan for item in survey_network(network, store, rules, again=again)]


def survey_network(
    network: NetworkPlan, store: Store, rules: Evaluation, *, again: Callable[[str], bool] = never
) -> Iterator[Item]:
    """The same for one network."""

    def find(key: str) -> Record | None:
        record = store.records.get(key)
        return None if record is not None and record.failed and again(key) else record

    made = store.measured(network.recipe_sha256)
    failure = find(training_key(network.recipe_sha256, None)) if made is None else None
    yield Item(
        stage="train",
        title=network.title,
        network=network,
        state="measured" if made is not None else "missing" if failure is None else "failed",
        record=failure,
    )
    blocked = None if failure is None else f"its network could not be trained: {failure.reason}"
    for file in network.files.values():
        artifact = None if made is None else current_file(store, file, made)
        yield from _survey_file(network, file, rules, store, find, made, artifact, blocked)


def _survey_file(
    network: NetworkPlan,
    file: FilePlan,
    rules: Evaluation,
    store: Store,
    find: Callable[[str], Record | None],
    made: Replica | None,
    artifact: Replica | None,
    blocked: str | None,
) -> Iterator[Item]:
    if file.quantization is not None:
        failure = None
        if made is not None and artifact is None:
            failure = find(quantization_key(digest_of(**file.recipe(made.artifact_sha256)), None))
        yield Item(
            stage="quantize",
            title=f"{network.title}/{file.precision}{_on(file)}",
            network=network,
            file=file,
            state="measured" if artifact is not None else "missing" if failure is None else "failed",
            record=failure,
            blocked=blocked,
        )
        if failure is not None:
            blocked = f"its file could not be made: {failure.reason}"
    for cell in file.cells.values():
        attacker, record = attacker_of(cell, store), None
        if artifact is not None and (attacker is not None or cell.attacker is None):
            record = find(trial_key(network, file, cell, artifact, rules, store).key)
        yield Item(
            stage=cell.stage,
            title=cell.title,
            network=network,
            file=file,
            cell=cell,
            state=_state(record),
            record=record,
            blocked=None if record is not None else blocked or _without_trigger(cell, attacker, find),
        )


def _without_trigger(cell: Cell, trained: Replica | None, find: Callable[[str], Record | None]) -> str | None:
    """Why a control cannot be made."""
    if cell.attacker is None or trained is not None:
        return None
    failure = find(training_key(cell.attacker.recipe_sha256, None))
    return None if failure is None else f"the network with the trigger could not be trained: {failure.reason}"


def _on(file: FilePlan) -> str:
    return "" if file.calibration is None else f"/{file.calibration.name}"


def _state(record: Record | None) -> State:
    if record is None:
        return "missing"
    if isinstance(record, DefenseRecord):
        status = status_of(record)
        return "measured" if status == "not applicable" else status
    return "failed" if record.failed else "measured"


def estimate(item: Item, costs: CostModel) -> tuple[float, Source]:
    """Seconds of one worker."""
    made = item.network.network
    if item.stage == "train":
        images = item.network.train.facts.images
        return costs.training(made, epochs=made.recipe["epochs"], images=images)
    assert item.file is not None  # noqa: S101 (every later stage has one)
    if item.cell is None or item.cell.defense is None:
        return costs.other(item.stage, file_keys(item.stage, made, item.file.scheme), made)
    asked = item.cell.defense
    keys = defense_keys(asked.name, asked.settings, item.cell.access, made, item.file.scheme)
    blind = item.cell.access == "no-gradients"  # asked of defenses alone that need them, and end at once
    return costs.other("defense without gradients" if blind else item.stage, keys, made)
