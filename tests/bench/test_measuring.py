"""A defense of each kind against the truth: planted ones that see the patch, or nothing at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import BaseModel

from qdefense.artifact import Artifact
from qdefense.audit.fit import fit_images
from qdefense.bench.cohort import lost_for_gradients
from qdefense.bench.matrix import read_matrix
from qdefense.bench.records import (
    BehaviourRecord,
    DatasetMetrics,
    DefenseRecord,
    EvaluationRules,
    FilterMetrics,
    Rate,
    RepairMetrics,
    ScanMetrics,
)
from qdefense.bench.revisions import EVALUATION_REVISION, SOURCES, source_digest
from qdefense.bench.running import evaluation_of
from qdefense.bench.store import Store
from qdefense.bench.survey import survey
from qdefense.converters.contract import InputContract
from qdefense.data.images import Images, ImageSet, Pixels, to_images
from qdefense.data.signs import CLASS_NAMES
from qdefense.defenses import DEFENSES, Need
from qdefense.evidence import Evidence
from qdefense.findings import (
    DatasetResult,
    FilterResult,
    Finding,
    InvertedTrigger,
    ScanResult,
    Suspect,
    TriggerPicture,
    Verdict,
)
from qdefense.profile import runtime
from qdefense.registry import Registry
from qdefense.session import DeployedSession

from .conftest import TINY, Desk, Inline

NewDesk = Callable[..., Desk]
SEEN: list[Evidence] = []
"""What planted defenses were given, in order."""


def patched(images: Images) -> NDArray[np.bool_]:
    """Whether the default BadNets patch is there: 3x3 white, one pixel from the bottom right corner."""
    found: NDArray[np.bool_] = (images[:, 28:31, 28:31] == 255).all(axis=(1, 2, 3))
    return found


def answer(evidence: Evidence, name: str, kind: Any, result: Any, verdict: Verdict = Verdict.BACKDOORED) -> Finding:
    SEEN.append(evidence)
    return Finding(defense=name, kind=kind, verdict=verdict, reason="planted", seed=evidence.seed, result=result)


@dataclass(frozen=True, kw_only=True)
class PlantedScan:
    """Ranks class 7 second."""

    name: ClassVar[str] = "planted-scan"
    kind: ClassVar[str] = "scan"
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LOGITS, Need.GRADIENTS})
    revision: ClassVar[int] = 1

    target: int = 7

    def scan(self, evidence: Evidence) -> Finding:
        entries = tuple(
            InvertedTrigger(
                target_class=target,
                class_name="x",
                rank=rank,
                norm=None if rank == 3 else 10.0 * rank,
                index=None if rank == 3 else 3.0 - rank,
                optimised_asr=1.0,
                artifact_asr=1.0,
                restart_norms=(),
            )
            for rank, target in ((1, 3), (2, self.target), (3, 4))
        )
        suspect = Suspect(target_class=self.target, class_name="x", score=1.0, artifact_asr=1.0, trigger_id="t")
        shown = {"mask_png": "m", "trigger_png": "t", "example_png": "an image", "stamped_png": "an image"}
        pictures = (TriggerPicture(target_class=3, trigger_id="t", **shown),)
        result = ScanResult(score=2.0, suspects=(suspect,), classes=entries, pictures=pictures)
        return answer(evidence, self.name, "scan", result)


@dataclass(frozen=True, kw_only=True)
class PlantedDatasetScan:
    """Flags the rows that carry the patch."""

    name: ClassVar[str] = "planted-dataset"
    kind: ClassVar[str] = "dataset"
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ACTIVATIONS, Need.TRAINING_SET})
    revision: ClassVar[int] = 1

    blind: bool = False

    def scan(self, evidence: Evidence) -> Finding:
        assert evidence.training_set is not None
        if self.blind:
            return answer(evidence, self.name, "dataset", None, Verdict.NOT_MEASURED)
        seen = patched(evidence.training_set.images)
        scores = tuple(map(float, seen))
        result = DatasetResult(sample_scores=scores, flagged=tuple(np.flatnonzero(seen).tolist()))
        return answer(evidence, self.name, "dataset", result)


class Boundary(BaseModel):
    value: float = 0.5
    held_out_scores: tuple[float, ...] = (1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class PlantedFilter:
    """Rejects the patch, with a score of 0; or cannot be fitted."""

    name: ClassVar[str] = "planted-filter"
    kind: ClassVar[str] = "filter"
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LOGITS})
    revision: ClassVar[int] = 1

    fits: bool = True

    def fit(self, evidence: Evidence) -> Any:
        finding = answer(evidence, self.name, "filter", None, Verdict.NOT_MEASURED)
        return SimpleNamespace(decide=self._decide, boundary=Boundary()) if self.fits else finding

    def _decide(self, x: Pixels) -> FilterResult:
        seen = patched(to_images(x))
        return FilterResult(
            decisions=tuple("reject" if hit else "accept" for hit in seen),
            scores=tuple(0.0 if hit else 1.0 for hit in seen),
        )


@dataclass(frozen=True, kw_only=True)
class PlantedRepair:
    """Gives another file, whose digest it knows; or gives up."""

    name: ClassVar[str] = "planted-repair"
    kind: ClassVar[str] = "repair"
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.WEIGHTS})
    revision: ClassVar[int] = 1

    file: ClassVar[bytes] = b""
    works: bool = True

    def repair(self, evidence: Evidence) -> Any:
        verdict = Verdict.NOT_REPAIRED if self.works else Verdict.NOT_APPLICABLE
        repaired = Artifact.from_bytes(type(self).file) if self.works else None
        return SimpleNamespace(artifact=repaired, finding=answer(evidence, self.name, "repair", None, verdict))


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry: Registry[Any] = DEFENSES
    registry.names()
    for cls in (PlantedScan, PlantedDatasetScan, PlantedFilter, PlantedRepair):
        monkeypatch.setitem(registry._classes, cls.name, cls)
    SEEN.clear()
    yield
    SEEN.clear()


@pytest.fixture
def measured(new_desk: NewDesk, finished: Desk) -> Callable[..., list[DefenseRecord]]:
    """``measured(defense, accesses=..., scheme=...)``: records of the clean network, then of the poisoned one."""

    def do(
        defense: str, *, accesses: str = '["session"]', scheme: str = "fp32", text: str = TINY
    ) -> list[DefenseRecord]:
        text = text.replace("neural-cleanse:budget=quick", defense).replace('"fp32", "int8-dynamic"', f'"{scheme}"')
        made = new_desk(f"{text}accesses = {accesses}\n", name=defense.replace(":", " "))
        if not made.results.exists():
            shutil.copytree(finished.results / "models", made.results / "models")
        made.run(Inline())
        found = [record for record in made.records.values() if isinstance(record, DefenseRecord)]
        for record in found:
            assert not record.failed, record.reason
        return sorted(found, key=lambda record: record.network.attack or "")

    return do


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_a_defense_sees_clean_images_and_nothing_of_the_truth(measured: Callable[..., list[DefenseRecord]]) -> None:
    measured("planted-scan")
    for evidence in SEEN:
        assert len(evidence.clean) == 40
        assert not patched(evidence.clean.images).any()
        assert evidence.training_set is None
        assert evidence.inputs is None
        assert evidence.seed == 0
        assert not {"trigger", "target", "truth", "attack"} & {part for part in dir(evidence) if part[0] != "_"}


def test_a_shadow_is_built_only_for_who_needs_one(measured: Callable[..., list[DefenseRecord]]) -> None:
    measured("planted-scan")
    assert all(evidence.shadow is not None for evidence in SEEN)
    SEEN.clear()
    measured("planted-dataset")
    assert SEEN
    assert all(evidence.shadow is None for evidence in SEEN)
    assert "planted-dataset needs no gradients" in SEEN[0].certificate.reason


@pytest.mark.parametrize("scheme", ["fp32", "int8-dynamic"])
def test_each_access_gives_what_it_says(measured: Callable[..., list[DefenseRecord]], scheme: str) -> None:
    records = measured("planted-scan", accesses='["session", "shadow", "no-gradients"]', scheme=scheme)
    assert [record.access for record in records] == ["session", "shadow", "no-gradients"] * 2
    session, shadow, cut = SEEN[:3]
    assert type(session.session) is DeployedSession
    assert session.shadow is not None
    assert cut.shadow is None
    assert type(cut.session) is DeployedSession
    assert not cut.certificate.certified
    x = shadow.clean.pixels[:8]
    assert type(shadow.session).__name__ == "ShadowSession"
    before = shadow.session.forwards
    np.testing.assert_allclose(shadow.session.logits(x), session.session.logits(x), atol=1e-4)
    assert shadow.session.forwards == before + 8
    assert shadow.shadow is not None
    name = shadow.shadow.tensor_names[-2]
    np.testing.assert_allclose(
        shadow.session.activations(x, name), session.session.activations(x, name), atol=1e-3, rtol=1e-3
    )


def test_without_gradients_neural_cleanse_is_not_measured(new_desk: NewDesk, finished: Desk) -> None:
    """With images enough: it is the missing gradient that stops it."""
    text = TINY.replace("clean_images = 40", "clean_images = 250").replace("test_limit = 60", "test_limit = 300")
    made = new_desk(text.replace('"none", ', "") + 'accesses = ["no-gradients"]\n', name="cut")
    shutil.copytree(finished.results / "models", made.results / "models")
    plan, _ = made.run(Inline())
    assert not any(
        item.incomplete for item in survey(plan, Store(made.results), evaluation_of(read_matrix(made.matrix)))
    )
    found = [record for record in made.records.values() if isinstance(record, DefenseRecord)]
    assert len(found) == 2
    for record in found:
        assert record.verdict is Verdict.NOT_MEASURED
        assert lost_for_gradients(record)


def test_without_gradients_too_few_images_leave_the_matrix_incomplete_all_the_same(
    new_desk: NewDesk, finished: Desk
) -> None:
    made = new_desk(TINY + 'accesses = ["no-gradients"]\n', name="cut")
    shutil.copytree(finished.results / "models", made.results / "models")
    plan, _ = made.run(Inline())
    items = survey(plan, Store(made.results), evaluation_of(read_matrix(made.matrix)))
    assert [item.incomplete for item in items if item.stage == "defense"] == [True] * 4


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_scan(measured: Callable[..., list[DefenseRecord]]) -> None:
    clean, poisoned = measured("planted-scan")
    assert poisoned.metrics == ScanMetrics(
        score=2.0,
        suspects=(7,),
        targets=(7,),
        target_rank=2,
        target_index=1.0,
        target_norm=20.0,
        target_found=True,
        classes=3,
        censored=1,
    )
    assert isinstance(clean.metrics, ScanMetrics)
    assert (clean.metrics.targets, clean.metrics.target_rank, clean.metrics.target_found) == ((), None, None)
    missed = measured("planted-scan:target=5")[1].metrics
    assert isinstance(missed, ScanMetrics)
    assert (missed.target_found, missed.target_rank) == (False, None)


def test_an_attack_on_every_class_has_no_target_to_be_found_or_missed(
    new_desk: NewDesk, measured: Callable[..., list[DefenseRecord]]
) -> None:
    text = TINY.replace('"none", "badnets"', '"badnets:mode=all-to-all"').replace(', "int8-dynamic"', "")
    made = new_desk(text.replace("neural-cleanse:budget=quick", "planted-scan"), name="to-all")
    made.run(Inline())
    (behaviour,) = (record for record in made.records.values() if isinstance(record, BehaviourRecord))
    assert behaviour.eligible == behaviour.images
    (found,) = (record.metrics for record in made.records.values() if isinstance(record, DefenseRecord))
    assert isinstance(found, ScanMetrics)
    assert (found.target_rank, found.target_index, found.target_norm, found.target_found) == (None, None, None, None)
    assert found.targets == tuple(range(len(CLASS_NAMES)))
    assert (found.score, found.suspects) == (2.0, (7,))


def test_no_record_shows_an_image_of_the_data(measured: Callable[..., list[DefenseRecord]]) -> None:
    _, poisoned = measured("planted-scan")
    assert "an image" not in poisoned.model_dump_json()
    assert poisoned.finding is not None
    assert isinstance(poisoned.finding.result, ScanResult)
    assert poisoned.finding.result.pictures[0].mask_png == "m"


def test_dataset_scan(measured: Callable[..., list[DefenseRecord]]) -> None:
    """The training set is the one that the network saw: 13 of 128 images carry the patch."""
    clean, poisoned = measured("planted-dataset")
    found = poisoned.metrics
    assert isinstance(found, DatasetMetrics)
    assert (found.auroc, found.within_auroc) == (1.0, 1.0)
    assert (found.tpr, found.fpr) == (Rate(hits=13, n=13), Rate(hits=0, n=115))
    assert found.top_recall == Rate(hits=13, n=13)
    assert found.top_precision is not None
    assert found.top_precision.hits == 13
    assert poisoned.scores_sha256 is not None
    assert poisoned.finding is not None
    assert poisoned.finding.result == DatasetResult(sample_scores=(), flagged=())
    assert clean.metrics == DatasetMetrics(fpr=Rate(hits=0, n=128))
    seen = SEEN[-1].training_set
    assert seen is not None
    assert (len(seen), seen.labels[patched(seen.images)].tolist()) == (128, [7] * 13)


@pytest.mark.parametrize("defense", ["planted-dataset", "spectral-signatures", "activation-clustering"])
def test_dataset_scan_gets_no_groups_which_poisoned_sets_never_have(
    measured: Callable[..., list[DefenseRecord]], monkeypatch: pytest.MonkeyPatch, defense: str
) -> None:
    """GTSRB's tracks of the clean control alone would tell it from the others."""

    def grouped(contract: InputContract, images: ImageSet) -> ImageSet:
        return replace(fit_images(contract, images), groups=np.arange(len(images), dtype=np.int64) // 3)

    monkeypatch.setattr("qdefense.bench.measuring.fit_images", grouped)
    found = []
    scan = DEFENSES._classes[defense].scan

    def watched(self: Any, evidence: Evidence) -> Finding:
        assert evidence.training_set is not None
        assert evidence.training_set.groups is None
        with_tracks = replace(evidence.training_set, groups=np.arange(len(evidence.training_set), dtype=np.int64))
        answers: list[Finding] = [
            scan(self, replace(evidence, training_set=seen)) for seen in (evidence.training_set, with_tracks)
        ]
        found.append(tuple(one.model_copy(update={"cost": None}) for one in answers))
        return answers[0]

    monkeypatch.setattr(DEFENSES._classes[defense], "scan", watched)
    assert len(measured(defense)) == 2
    assert len(found) == 2
    assert all(first == second for first, second in found), "no scan that ships reads them"


def test_dataset_scan_without_scores(measured: Callable[..., list[DefenseRecord]]) -> None:
    _, poisoned = measured("planted-dataset:blind=true")
    assert (poisoned.verdict, poisoned.metrics, poisoned.scores_sha256) == (Verdict.NOT_MEASURED, None, None)


def test_filter(measured: Callable[..., list[DefenseRecord]]) -> None:
    """Ten held-out images, and of these with the patch the ones of other classes than the target."""
    clean, poisoned = measured("planted-filter")
    found = poisoned.metrics
    assert isinstance(found, FilterMetrics)
    assert (found.auroc, found.fpr, found.unmeasured) == (1.0, Rate(hits=0, n=10), 0)
    assert found.tpr is not None
    assert 0 < found.tpr.hits == found.tpr.n <= 10
    assert found.asr_after == Rate(hits=0, n=found.tpr.n)
    assert found.boundary == {"value": 0.5}
    assert poisoned.verdict is None
    assert clean.metrics == FilterMetrics(fpr=Rate(hits=0, n=10), boundary={"value": 0.5})


def test_filter_on_the_shadow_is_judged_by_what_the_shadow_answers(
    measured: Callable[..., list[DefenseRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its decisions held against the deployed file's answers are a rate of neither."""
    monkeypatch.setattr("qdefense.fidelity.MIN_ROWS", 40)
    _, poisoned = measured("planted-filter", accesses='["shadow"]')
    assert isinstance(poisoned.metrics, FilterMetrics)
    assert poisoned.metrics.asr_after is not None
    assert [evidence.session.forwards for evidence in SEEN] == [0, poisoned.metrics.asr_after.n]


def test_filter_on_a_shadow_that_is_not_certified_has_no_answer(new_desk: NewDesk, finished: Desk) -> None:
    """It never looks at the certificate, so what such a shadow answers would pass for what the file does."""
    text = TINY.replace("neural-cleanse:budget=quick", "planted-filter") + 'accesses = ["shadow"]\n'
    made = new_desk(text, name="uncertified")
    shutil.copytree(finished.results / "models", made.results / "models")
    made.run(Inline())
    found = [record for record in made.records.values() if isinstance(record, DefenseRecord)]
    assert len(found) == 4
    for record in found:
        assert (record.failed, record.verdict, record.metrics) == (True, Verdict.NOT_MEASURED, None)
        assert "no certified shadow to answer for the file: 40 clean images" in record.reason
        assert record.runtime == runtime(), "or it stands in a row of its own where a folder holds two CPUs' answers"


def test_a_shadow_that_answers_for_itself_is_compared_without_saturation(
    measured: Callable[..., list[DefenseRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own session adds none: emulated in the replay alone, shadow and shadow would disagree on such a CPU."""
    monkeypatch.setattr("qdefense.converters.shadow.runtime_saturation", lambda: ("QLinearConv",))
    measured("planted-scan", accesses='["session", "shadow"]')
    session, shadow = SEEN[:2]
    assert (type(session.session), type(shadow.session).__name__) == (DeployedSession, "ShadowSession")
    assert (session.certificate.saturation_emulated, shadow.certificate.saturation_emulated) == (True, False)


def test_a_missing_truth_costs_the_scans_of_the_training_set_alone(new_desk: NewDesk, finished: Desk) -> None:
    text = TINY.replace('"neural-cleanse:budget=quick"', '"planted-dataset", "planted-filter"')
    made = new_desk(text, name="untold")
    shutil.copytree(finished.results, made.results)
    for truth in (made.results / "models").glob("*.truth.json"):
        truth.unlink()
    _, told = made.run(Inline())
    found = [record.defense for record in made.records.values() if isinstance(record, DefenseRecord)]
    assert [name for name in found if name != "neural-cleanse"] == ["planted-filter"] * 4
    assert told
    assert all("no readable truth beside its network" in line for line in told)


def test_filter_that_cannot_be_fitted(measured: Callable[..., list[DefenseRecord]]) -> None:
    _, poisoned = measured("planted-filter:fits=false")
    assert (poisoned.verdict, poisoned.metrics) == (Verdict.NOT_MEASURED, None)


def test_records_say_under_which_rules_they_were_made(
    measured: Callable[..., list[DefenseRecord]], finished: Desk
) -> None:
    """Without them a reader takes answers on 40 clean images and on 20 for answers to the same question."""
    (scan, *_), (fitted, *_) = measured("planted-scan"), measured("planted-filter")
    assert scan.evaluation == EvaluationRules(seed=0, clean_images=40, held_out_images=None)
    assert fitted.evaluation == EvaluationRules(seed=0, clean_images=40, held_out_images=10)
    assert (scan.revision, scan.evaluation_revision) == (1, EVALUATION_REVISION)
    assert {record.versions[SOURCES] for record in finished.records.values()} == {source_digest()}
    behaviours = [record for record in finished.records.values() if isinstance(record, BehaviourRecord)]
    assert {record.evaluation for record in behaviours} == {None}  # on the whole test split, whatever the rules
    assert {record.data_sha256 for record in behaviours} == {scan.test_sha256} == {fitted.test_sha256}


def test_filter_without_held_out_images(new_desk: NewDesk, finished: Desk) -> None:
    text = TINY.replace("neural-cleanse:budget=quick", "planted-filter").replace(
        "clean_images = 40", "clean_images = 60"
    )
    made = new_desk(text, name="greedy")
    shutil.copytree(finished.results / "models", made.results / "models")
    made.run(Inline())
    reasons = {record.reason for record in made.records.values() if record.failed}
    assert len(reasons) == 1
    assert "clean_images takes all test images, and a filter must decide on others; lower it" in reasons.pop()


def test_a_repair_without_images_to_be_measured_on(new_desk: NewDesk, finished: Desk) -> None:
    text = TINY.replace("neural-cleanse:budget=quick", "fine-pruning").replace("clean_images = 40", "clean_images = 60")
    made = new_desk(text, name="greedy repair")
    shutil.copytree(finished.results / "models", made.results / "models")
    made.run(Inline())
    reasons = {record.reason or "" for record in made.records.values() if record.failed}
    assert len(reasons) == 1
    assert "clean_images takes all test images, and a repair must be measured on others; lower it" in reasons.pop()


def test_repair(measured: Callable[..., list[DefenseRecord]], finished: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The poisoned network becomes the clean one: judged on the 20 test images that no defense saw."""
    behaviours = [r for r in finished.records.values() if isinstance(r, BehaviourRecord) and r.scheme == "fp32"]
    other = next(record.artifact_sha256 for record in behaviours if record.network.attack is None)
    file = (finished.results / "models" / f"{other[:16]}.onnx").read_bytes()
    monkeypatch.setattr(PlantedRepair, "file", file)
    clean, poisoned = measured("planted-repair")
    before, after = clean.metrics, poisoned.metrics
    assert isinstance(before, RepairMetrics)
    assert isinstance(after, RepairMetrics)
    assert after.new_sha256 == other
    assert after.accuracy_after == before.accuracy_before
    assert after.asr_before is not None
    assert after.asr_after is not None
    assert before.asr_before is None
    assert poisoned.verdict is Verdict.NOT_REPAIRED  # its own word; what became of the file stands there all the same
    assert after.accuracy_before * 20 == pytest.approx(round(after.accuracy_before * 20))


def test_repair_that_gives_up(measured: Callable[..., list[DefenseRecord]]) -> None:
    _, poisoned = measured("planted-repair:works=false")
    assert poisoned.verdict is Verdict.NOT_APPLICABLE
    assert isinstance(poisoned.metrics, RepairMetrics)
    assert poisoned.metrics.new_sha256 is None


@pytest.mark.parametrize(
    ("found", "changed", "message"),
    [
        (r'"poison_indices": \[\n  ', '"poison_indices": [\n  0,\n  ', "has other poisons than the truth file names"),
        (
            r'"training_set_sha256": "\w+"',
            f'"training_set_sha256": "{"0" * 64}"',
            "has other images or labels than the truth file's digest tells of",
        ),
    ],
)
def test_a_training_set_that_comes_out_otherwise_is_refused(
    new_desk: NewDesk, finished: Desk, found: str, changed: str, message: str
) -> None:
    made = new_desk(
        TINY.replace("neural-cleanse:budget=quick", "planted-dataset").replace('"none", ', ""), name="moved"
    )
    shutil.copytree(finished.results / "models", made.results / "models")
    for path in (made.results / "models").glob("*.truth.json"):
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(found, text)) <= 1
        path.write_text(re.sub(found, changed, text), encoding="utf-8")
    made.run(Inline())
    reasons = {record.reason for record in made.records.values() if record.failed}
    assert len(reasons) == 1
    assert message in reasons.pop()


def test_a_truth_older_than_the_digest_is_judged_by_its_rows(new_desk: NewDesk, finished: Desk) -> None:
    made = new_desk(TINY.replace("neural-cleanse:budget=quick", "planted-dataset"), name="old truths")
    shutil.copytree(finished.results / "models", made.results / "models")
    for path in (made.results / "models").glob("*.truth.json"):
        told = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "training_set_sha256"}
        path.write_text(json.dumps(told), encoding="utf-8")
    made.run(Inline())
    assert not [record.reason for record in made.records.values() if record.failed]
    assert [record for record in made.records.values() if isinstance(record, DefenseRecord)]
