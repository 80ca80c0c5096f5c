"""Runs a plan: what is missing is made and measured, each outcome written as it comes, nothing twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qdefense.bench.cells import Cell, FilePlan, NetworkPlan, Sources
from qdefense.bench.costs import CostModel
from qdefense.bench.datasets import (
    DataRequest,
    PinnedData,
    calibration_request,
    facts_of,
    require_apart,
    require_unseen,
    test_request,
    train_request,
)
from qdefense.bench.engines import Engine
from qdefense.bench.matrix import Matrix
from qdefense.bench.records import DataFacts, Record, Replica, digest_of
from qdefense.bench.store import Store, StoreError, read_model
from qdefense.bench.survey import attacker_of, current_file, estimate, survey_network, trial_key
from qdefense.bench.tasks import (
    Clock,
    Evaluation,
    Outcome,
    QuantizeTask,
    Task,
    TrainTask,
    TrialTask,
    quantization_key,
    train_task,
    training_key,
)
from qdefense.data.images import DataError
from qdefense.profile import Runtime

Progress = Callable[[str, int, int], None]
Notice = Callable[[str], None]
BAR = "matrix (estimated seconds)"


def evaluation_of(matrix: Matrix, *, here: Runtime | None = None) -> Evaluation:
    """What holds for every trial; with ``here`` answers of another runtime do not count."""
    facts = matrix.bench
    return Evaluation(
        seed=facts.seed, clean_images=facts.clean_images, held_out_images=facts.held_out_images, here=here
    )


def _silent(_text: str) -> None:
    """Tell nobody."""


def sources_of(matrix: Matrix, store: Store, *, pin: bool, on_notice: Notice = _silent) -> Sources:
    """Digests from the manifest; images that it does not know are read, and with ``pin`` their digest is kept.

    What comes of it raises a MatrixError where networks would be tested on nothing but images that they were trained
    on; of fewer such images the share is told when they are read first.
    """
    read: dict[DataRequest, PinnedData] = {}
    told: set[str] = set()

    def find(request: DataRequest) -> PinnedData:
        if request not in read:
            read[request] = PinnedData(request=request, facts=_facts(request, store, pin=pin))
        return read[request]

    def find_apart(name: str) -> tuple[PinnedData, PinnedData]:
        train, test = train_request(matrix, name), test_request(matrix, name)
        # Images that are named by the manifest were apart when they were read first.
        if store.data_facts(train) is None or store.data_facts(test) is None:
            share = require_unseen(train, test)
            if share and name not in told:
                on_notice(f"data.{name}: {share:.2%} of the test images are among the training images, too")
            told.add(name)
        require_apart(find(train).facts, find(test).facts)
        return read[train], read[test]

    return Sources(
        train=lambda name: find_apart(name)[0],
        test=lambda name: find_apart(name)[1],
        calibration=lambda name, calibration: find(calibration_request(matrix, name, calibration)),
    )


def _facts(request: DataRequest, store: Store, *, pin: bool) -> DataFacts:
    known = store.data_facts(request)
    if known is not None:
        return known
    facts = facts_of(request)
    if pin:
        store.add_data(facts)
    return facts


class Run:
    """One run over a plan. What failed in an earlier run is left alone, or with ``retry_failed`` tried once more."""

    def __init__(
        self,
        plan: Sequence[NetworkPlan],
        store: Store,
        rules: Evaluation,
        *,
        retry_failed: bool,
        on_progress: Progress,
        on_notice: Notice,
    ) -> None:
        self._plan, self._store, self._rules = plan, store, rules
        self._retry_failed, self._on_progress, self._on_notice = retry_failed, on_progress, on_notice
        self._networks = {network.recipe_sha256: network for network in plan}
        self._clean: dict[str, NetworkPlan] = {}
        for network in plan:
            for attacker in (cell.attacker for _, cell in network.cells if cell.attacker is not None):
                self._clean[attacker.recipe_sha256] = network
        self._attempted: set[str] = set()
        self._costs = CostModel(store.records.values(), store.images)

    def complete(self, engine: Engine) -> None:
        """Do all that is missing; every outcome is on the disk before the next one is waited for.

        Raises:
            EngineError: the machines are gone.
            StoreError: a record holds a number that is not finite.
        """
        owner: dict[str, NetworkPlan] = {}
        left = {network.recipe_sha256: self._seconds_left(network) for network in self._plan}
        total = sum(left.values())
        self._on_progress(BAR, 0, round(total))
        for network in (*self._plan, *self._plan):  # the first time an attacked network may be found after its twin
            self._submit(network, engine, owner)
        while owner:
            outcome = engine.completed()
            network = owner.pop(outcome.task_id)
            self._keep(outcome, network)
            for one in self._waiting_for(network, outcome.record):
                self._submit(one, engine, owner)
                left[one.recipe_sha256] = self._seconds_left(one)
            self._on_progress(BAR, max(0, round(total - sum(left.values()))), round(total))

    def _waiting_for(self, network: NetworkPlan, record: Record) -> Iterator[NetworkPlan]:
        """Whose tasks an outcome may allow: its own, and of controls what waited for the other network or its file."""
        yield network
        if record.stage == "train" and network.recipe_sha256 in self._clean:
            yield self._clean[network.recipe_sha256]
        if record.stage in ("train", "quantize"):
            twins = (one for one in self._plan if self._clean.get(one.recipe_sha256) is network)
            for attacked in twins:
                made = self._store.measured(attacked.recipe_sha256)
                if made is not None and self._lacks_trigger(attacked, made):
                    yield attacked

    def _seconds_left(self, network: NetworkPlan) -> float:
        items = survey_network(network, self._store, self._rules, again=self._again)
        return sum(estimate(item, self._costs)[0] for item in items if item.pending)

    def _again(self, key: str) -> bool:
        return self._retry_failed and key not in self._attempted

    def _submit(self, network: NetworkPlan, engine: Engine, owner: dict[str, NetworkPlan]) -> None:
        for task in self._tasks(network):
            if task.id not in self._attempted:
                self._attempted.add(task.id)
                owner[task.id] = network
                engine.submit(task)

    def _keep(self, outcome: Outcome, network: NetworkPlan) -> None:
        """File before record before manifest: whatever ends the process between them, the next run finds its way.

        What the manifest does not name is made or taken again, and a record that is there is not written twice.
        """
        record = outcome.record
        if outcome.lost:
            self._on_notice(f"not done: {network.title}: {record.reason}; the next run tries it again")
            return
        if outcome.model is not None and outcome.replica is not None:
            self._store.add_model(
                outcome.model,
                outcome.replica.artifact_sha256,
                outcome.truth,
                outcome.trigger,
                trigger_shows_images=network.trigger_shows_images,
            )
        self._add(record)
        if outcome.replica is not None:
            self._store.add_replica(*self._recipe(outcome, network), outcome.replica)
        if record.failed:
            self._on_notice(f"failed: {network.title}: {record.reason}")

    def _add(self, record: Record) -> None:
        old = self._store.records.get(record.key)
        if old is None or old.failed:
            self._store.add(record)

    def _recipe(self, outcome: Outcome, network: NetworkPlan) -> tuple[str, dict[str, object]]:
        if outcome.record.stage == "train":
            self._tell_replica(network, outcome.replica)
            return network.recipe_sha256, network.network.model_dump(mode="json")
        assert outcome.record.stage == "quantize"  # noqa: S101 (no other stage makes files)
        made_of = outcome.record.network_sha256
        wanted = (outcome.record.precision, outcome.record.calibration)
        file = next(f for f in network.files.values() if (f.precision, f.calibration) == wanted)
        recipe: dict[str, object] = file.recipe(made_of)
        return digest_of(**recipe), recipe

    def _tell_replica(self, network: NetworkPlan, made: Replica | None) -> None:
        known = [old.artifact_sha256 for old in self._store.replicas(network.recipe_sha256)]
        if known and made is not None and made.artifact_sha256 not in known:
            self._on_notice(
                f"{network.title}: trained again, it came out as {made.artifact_sha256[:16]}, not as "
                f"{known[-1][:16]}; a new replica, measured beside the old one's records"
            )

    def _missing(self, key: str) -> bool:
        record = self._store.records.get(key)
        return record is None or (record.failed and self._again(key))

    def _tasks(self, network: NetworkPlan) -> Iterator[Task]:
        """What can be done next for a network."""
        train = train_task(network)
        made = self._store.measured(network.recipe_sha256) or self._adopt(network, train)
        if made is None:
            if self._missing(train.id):
                yield train
            return
        self._record_training(train, made)
        made = self._choose_replicas(network, made)
        for file in network.files.values():
            try:
                yield from self._file_tasks(network, file, made, train)
            except StoreError as error:  # costs the cells that need it, and no other
                self._tell_broken(network, str(error))

    def _tell_broken(self, network: NetworkPlan, problem: str) -> None:
        if problem not in self._attempted:
            self._attempted.add(problem)
            self._on_notice(f"not done: {network.title}: {problem}")

    def _path(self, replica: Replica) -> Path | None:
        return self._store.model_path(replica.artifact_sha256)

    def _source(self, network: NetworkPlan, made: Replica) -> Path | None:
        """Where a network lies; ``None`` also where the state of its trigger, which is not committed, does not."""
        return None if self._lacks_trigger(network, made) else self._path(made)

    def _lacks_trigger(self, network: NetworkPlan, made: Replica) -> bool:
        return network.trigger_shows_images and self._store.lacks_trigger(made.artifact_sha256)

    def _record_training(self, train: TrainTask, made: Replica) -> None:
        """A network whose record is gone, such as by a deleted line, has one again."""
        if training_key(train.recipe_sha256, made.artifact_sha256) not in self._store.records:
            volatile = Clock().read().model_copy(update={"origin": "adopted"})
            facts = {"size_bytes": made.size_bytes, "versions": made.versions}
            self._store.add(train.record(made.artifact_sha256, volatile, **facts))

    def _missing_cells(self, network: NetworkPlan, file: FilePlan, artifact: Replica) -> list[Cell]:
        """Those of a control only once the attacked network is trained, which tells the trigger."""
        return [
            cell
            for cell in file.cells.values()
            if (cell.attacker is None or attacker_of(cell, self._store) is not None)
            and self._missing(self._key(network, file, cell, artifact))
        ]

    def _choose_replicas(self, network: NetworkPlan, made: Replica) -> Replica:
        """Take what is at hand for what is not, where a cell waits for it: another file of the network, or network."""
        self._choose_files(network, made)
        held_up = any(self._held_up(network, file, made) for file in network.files.values())
        if held_up and self._source(network, made) is None:
            another = self._store.use_another(network.recipe_sha256)
            if another is not None:
                self._choose_files(network, another)
                return another
        return made

    def _choose_files(self, network: NetworkPlan, made: Replica) -> None:
        for file in network.files.values():
            if file.quantization is not None and self._waits(network, file, made):
                self._store.use_another(_recipe_of(file, made))

    def _waits(self, network: NetworkPlan, file: FilePlan, made: Replica) -> bool:
        """Whether a cell waits for a file that is not at hand; for one that could not be made at all none does."""
        artifact = current_file(self._store, file, made)
        if artifact is None:
            return self._missing(quantization_key(_recipe_of(file, made), None))
        return self._path(artifact) is None and bool(self._missing_cells(network, file, artifact))

    def _held_up(self, network: NetworkPlan, file: FilePlan, made: Replica) -> bool:
        """The same, or for the state of the network's trigger."""
        artifact = current_file(self._store, file, made)
        if artifact is None or not self._lacks_trigger(network, made):
            return self._waits(network, file, made)
        return bool(self._missing_cells(network, file, artifact))

    def _waits_for_trigger(self, cell: Cell) -> bool:
        """Whether the attacked network is trained again, for the state of its trigger is not here."""
        attacked = None if cell.attacker is None else self._networks.get(cell.attacker.recipe_sha256)
        made = None if attacked is None else self._store.measured(attacked.recipe_sha256)
        return attacked is not None and made is not None and self._lacks_trigger(attacked, made)

    def _controls_wait(self, attacked: NetworkPlan) -> bool:
        """Whether a trigger has yet to be put on a file of the clean twin."""
        network = self._clean.get(attacked.recipe_sha256)
        made = None if network is None else self._store.measured(network.recipe_sha256)
        if network is None or made is None:
            return False
        files = ((file, current_file(self._store, file, made)) for file in network.files.values())
        missing = (self._missing_cells(network, file, there) for file, there in files if there is not None)
        return any(
            cell.attacker is not None and cell.attacker.recipe_sha256 == attacked.recipe_sha256
            for cells in missing
            for cell in cells
        )

    def _file_tasks(self, network: NetworkPlan, file: FilePlan, made: Replica, train: TrainTask) -> Iterator[Task]:
        # Controls are of the network that is measured: for them it is made again, and no other taken in its place.
        if self._held_up(network, file, made) or (self._lacks_trigger(network, made) and self._controls_wait(network)):
            yield from self._making(network, file, made, train)
            return
        source, artifact = self._source(network, made), current_file(self._store, file, made)
        if artifact is None:
            return
        if source is not None and not self._recorded(file, made, artifact):
            yield from self._quantization(network, file, made, source)
        path = self._path(artifact)
        if path is not None and (cells := self._missing_cells(network, file, artifact)):
            model = read_model(path, artifact.artifact_sha256)
            for cell in cells:
                if self._waits_for_trigger(cell):
                    continue
                try:
                    yield self._trial(network, file, cell, artifact, made, model)
                except StoreError as error:  # a truth that only scans of the training set read
                    self._tell_broken(network, str(error))

    def _making(self, network: NetworkPlan, file: FilePlan, made: Replica, train: TrainTask) -> Iterator[Task]:
        """A file, or first its network: what is not here may not be committed, and this is another machine."""
        source, lacks_trigger = self._source(network, made), self._lacks_trigger(network, made)
        key = quantization_key(_recipe_of(file, made), None)
        if file.quantization is not None and not lacks_trigger and not self._missing(key):
            self._tell_unmade(key, f"{network.title}: {file.precision} is not here, and could not be made again")
        elif source is not None:
            yield from self._quantization(network, file, made, source)
        elif self._missing(train.id):
            yield train
        else:
            what = "the state of its trigger" if lacks_trigger else "its file"
            self._tell_unmade(train.id, f"{network.title}: {what} is not here, and it could not be trained again")

    def _tell_unmade(self, key: str, what: str) -> None:
        if key not in self._attempted:
            self._attempted.add(key)
            self._on_notice(f"{what}: {self._store.records[key].reason}; --retry-failed tries it once more")

    def _recorded(self, file: FilePlan, made: Replica, artifact: Replica) -> bool:
        key = quantization_key(_recipe_of(file, made), artifact.artifact_sha256)
        return file.quantization is None or key in self._store.records

    def _quantization(self, network: NetworkPlan, file: FilePlan, made: Replica, source: Path) -> Iterator[Task]:
        task = QuantizeTask(
            recipe_sha256=_recipe_of(file, made),
            network_sha256=made.artifact_sha256,
            plan=file,
            attack=network.attack,
            model=read_model(source, made.artifact_sha256),
            trigger=self._store.trigger(made.artifact_sha256),
        )
        if self._missing(task.id):
            yield task

    def _key(self, network: NetworkPlan, file: FilePlan, cell: Cell, artifact: Replica) -> str:
        return trial_key(network, file, cell, artifact, self._rules, self._store).key

    def _trial(
        self,
        network: NetworkPlan,
        file: FilePlan,
        cell: Cell,
        artifact: Replica,
        made: Replica,
        model: bytes,
    ) -> TrialTask:
        judges_rows = cell.defense is not None and cell.defense.kind == "dataset"
        truth = self._store.truth(made.artifact_sha256) if judges_rows else None
        attacker = attacker_of(cell, self._store)
        return TrialTask(
            trial=trial_key(network, file, cell, artifact, self._rules, self._store),
            attack=network.attack if cell.attacker is None else cell.attacker.attack,
            replica=self._store.replicas(network.recipe_sha256).index(made),
            train=network.train,
            test=network.test,
            attack_data=network.attack_data,
            model=model,
            poison_indices=() if truth is None else truth.poison_indices,
            training_set_sha256=None if truth is None else truth.training_set_sha256,
            trigger=self._store.trigger((attacker or made).artifact_sha256),
        )

    def _adopt(self, network: NetworkPlan, train: TrainTask) -> Replica | None:
        """Take a network that lies in the folder and was made by this recipe; libraries may have been others."""
        from qdefense.bench.making import matches, replica_of  # noqa: PLC0415 (imports torch)

        for path, truth in self._store.truths():
            model = path.read_bytes()
            if hashlib.sha256(model).hexdigest() != truth.artifact_sha256 or not matches(truth, train):
                continue
            try:
                trigger = self._store.given_trigger(path, truth)
            except DataError as error:
                self._on_notice(f"{network.title}: {path.name} is not taken: {error}")
                continue
            made_with = dict(sorted(truth.versions.items()))
            told = truth.model_dump_json(indent=1).encode() + b"\n"
            shows = network.trigger_shows_images
            self._store.add_model(model, truth.artifact_sha256, told, trigger, trigger_shows_images=shows)
            replica = replica_of(model, made_with)
            self._record_training(train, replica)
            self._store.add_replica(network.recipe_sha256, network.network.model_dump(mode="json"), replica)
            libraries = ", ".join(f"{name} {version}" for name, version in made_with.items())
            self._on_notice(f"{network.title}: {path.name} was made by this recipe ({libraries}), and is taken")
            return replica
        return None


def _recipe_of(file: FilePlan, made: Replica) -> str:
    return digest_of(**file.recipe(made.artifact_sha256))
