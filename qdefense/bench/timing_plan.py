"""Which files of a plan to time, told from the store alone.

Networks that differ only in seed and attack compute the same products: one of them is timed, and stands for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from qdefense.bench.cells import Cell, FilePlan, NetworkPlan
from qdefense.bench.matrix import Matrix
from qdefense.bench.records import digest_of
from qdefense.bench.revisions import EVALUATION_REVISION
from qdefense.bench.store import Store
from qdefense.bench.survey import current_file, trial_key
from qdefense.bench.tasks import Evaluation, TrialKey
from qdefense.bench.timing_records import FileLatency, Rounds
from qdefense.profile import runtime

State = Literal["measured", "missing", "no file"]
_STATES: tuple[State, ...] = ("measured", "missing", "no file")


@dataclass(frozen=True, kw_only=True)
class TimingItem:
    """A file under one arithmetic, and the filters that the matrix names for it or for one like it."""

    title: str
    state: State
    network: NetworkPlan
    plain: TrialKey | None
    """How the file is run; ``None`` where it was never made."""
    filters: tuple[TrialKey, ...]
    key: str
    record: FileLatency | None

    @property
    def variants(self) -> tuple[str, ...]:
        """The filters as the matrix writes them."""
        return tuple(_text(trial.cell) for trial in self.filters)

    @property
    def incomplete(self) -> bool:
        """Whether something that should have been timed was not."""
        return self.record is None or bool(self.record.unmeasured)


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    network: NetworkPlan
    file: FilePlan
    cells: tuple[Cell, ...]
    """Of one arithmetic, on whatever access."""

    @property
    def kind(self) -> str:
        """What files have in common whose latency is alike."""
        made = self.network.network
        return digest_of(
            data=made.data,
            architecture=made.architecture,
            width=made.width,
            file=self.file.recipe(""),
            arithmetic=self.cells[0].arithmetic,
        )


def rounds_of(matrix: Matrix) -> Rounds:
    """How often the matrix has files timed."""
    return Rounds(single_stream=matrix.bench.latency_rounds, offline=matrix.bench.latency_offline_rounds)


def survey_timings(plan: Sequence[NetworkPlan], store: Store, rules: Evaluation, rounds: Rounds) -> list[TimingItem]:
    """One item per kind of file, in the order of the plan.

    It is of the network that was timed before, else of the first whose file is there: lowest seed, then first attack.
    """
    kinds: defaultdict[str, list[_Candidate]] = defaultdict(list)
    for candidate in _candidates(plan):
        kinds[candidate.kind].append(candidate)
    return [_item(candidates, store, rules, rounds) for candidates in kinds.values()]


def _candidates(plan: Sequence[NetworkPlan]) -> Iterator[_Candidate]:
    for network in plan:
        for file in network.files.values():
            cells = sorted((cell for cell in file.cells.values() if cell.stage != "control"), key=_arithmetic)
            for _, mine in groupby(cells, key=_arithmetic):
                yield _Candidate(network=network, file=file, cells=tuple(mine))


def _arithmetic(cell: Cell) -> str:
    return cell.arithmetic


def _item(candidates: Sequence[_Candidate], store: Store, rules: Evaluation, rounds: Rounds) -> TimingItem:
    filters = _filters(candidates)
    items = (_item_of(one, filters, store, rules, rounds) for one in candidates)
    return min(items, key=lambda item: (_STATES.index(item.state), item.network.network.seed))


def _filters(candidates: Sequence[_Candidate]) -> Mapping[str, Cell]:
    """The filters on the deployed session that are named for any of the files, by name and settings."""
    found: dict[str, Cell] = {}
    for cell in (cell for one in candidates for cell in one.cells):
        if cell.defense is not None and cell.defense.kind == "filter" and cell.access == "session":
            asked = cell.defense
            found.setdefault(digest_of(name=asked.name, settings=asked.settings, revision=asked.revision), cell)
    return found


def _item_of(
    one: _Candidate, filters: Mapping[str, Cell], store: Store, rules: Evaluation, rounds: Rounds
) -> TimingItem:
    first = one.cells[0]
    plain = Cell(title=_title(first), arithmetic=first.arithmetic)
    network = store.measured(one.network.recipe_sha256)
    artifact = None if network is None else current_file(store, one.file, network)
    trials = [
        trial_key(one.network, one.file, cell, artifact, rules, store)
        for cell in (plain, *filters.values())
        if artifact is not None
    ]
    key = _key(trials[0], filters, rounds) if trials else ""
    record = store.latencies.get(key)
    there = artifact is not None and store.model_path(artifact.artifact_sha256) is not None
    return TimingItem(
        title=plain.title,
        state="measured" if record is not None else "missing" if there else "no file",
        network=one.network,
        plain=trials[0] if trials else None,
        filters=tuple(trials[1:]),
        key=key,
        record=record,
    )


def _title(cell: Cell) -> str:
    """The cell's without what it asks."""
    return cell.title.removesuffix(f"/{cell.access}").removesuffix(f"/{_text(cell)}")


def _text(cell: Cell) -> str:
    return "behaviour" if cell.defense is None else cell.defense.text


def timed_data(trial: TrialKey) -> str:
    """Digest of the test images, and of how many of them filters are fitted on."""
    return digest_of(test=trial.test_sha256, clean_images=trial.evaluation.clean_images)


def _key(trial: TrialKey, filters: Mapping[str, Cell], rounds: Rounds) -> str:
    return digest_of(
        artifact=trial.artifact_sha256,
        profile=digest_of(**trial.profile.model_dump(mode="json")),
        filters=sorted(filters),
        data=timed_data(trial),
        seed=trial.evaluation.seed,
        rounds=rounds.model_dump(mode="json"),
        runtime=runtime().model_dump(mode="json"),
        evaluation_revision=EVALUATION_REVISION,
    )
