from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense import calibration
from qdefense.artifact import Artifact
from qdefense.calibration import (
    CalibrationBody,
    CalibrationEntry,
    CalibrationError,
    CalibrationFile,
    Calibrations,
    Conditions,
    Population,
    draw_line,
    driven,
    file_identity,
    parse_calibration,
    population_of,
    read_calibration,
    shipped_calibrations,
)
from qdefense.converters.contract import InputContract, StatedContract
from qdefense.converters.fingerprint import graph_fingerprint
from qdefense.converters.quantize import quantize
from qdefense.data.opening import open_data
from qdefense.defenses.scans.neural_cleanse import NeuralCleanse
from qdefense.session import Runtime, SessionProfile

SETTINGS = {"budget": "gate", "patience": 5, "learning_rate": 0.1}
SCAN = "neural-cleanse"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def population(**changes: Any) -> Population:
    values: dict[str, Any] = {
        "fingerprint": digest("graph"),
        "scheme": "int8-static",
        "granularity": "per-channel",
        "classes": 12,
        "contract": {"height": 32, "width": 32},
        "data_sha256": digest("data"),
    }
    return Population(**(values | changes))


def conditions(**changes: Any) -> Conditions:
    values: dict[str, Any] = {
        "seed": 0,
        "versions": {"onnxruntime": "1.32.0", "torch": "2.13.0"},
        "runtime": Runtime(onnxruntime="1.32.0", machine="x86_64", isa=("avx2",), system="Linux"),
        "profile": SessionProfile(batch=64),
        "saturating_operators": (),
    }
    return Conditions(**(values | changes))


def entry(scores: tuple[float, ...] = tuple(map(float, range(1, 20))), **changes: Any) -> CalibrationEntry:
    values: dict[str, Any] = {
        "defense": SCAN,
        "settings": SETTINGS,
        "population": population(),
        "conditions": conditions(),
        "scores": scores,
        "artifacts": tuple(sorted(digest(f"model {index}") for index in range(len(scores)))),
        "not_measured": 0,
    }
    return CalibrationEntry(**(values | changes))


def file(*entries: CalibrationEntry, name: str = "mine.json", shipped: bool = False) -> CalibrationFile:
    body = CalibrationBody(command=("qdefense", "calibrate"), entries=entries)
    return CalibrationFile(name=name, sha256=hashlib.sha256(body.to_bytes()).hexdigest(), body=body, shipped=shipped)


def audit(*files: CalibrationFile, **changes: Any) -> Calibrations:
    values: dict[str, Any] = {
        "artifact": digest("another"),
        "population": population(),
        "conditions": conditions(),
        "files": files,
    }
    return Calibrations(**(values | changes))


# --- the threshold ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "rate", "value", "promised"),
    [(19, 0.05, 19.0, 1 / 20), (19, 0.1, 18.0, 2 / 20), (20, 0.05, 20.0, 1 / 21), (20, 0.1, 19.0, 2 / 21)],
)
def test_line_is_the_ranked_clean_score_when_an_entry_fits(n: int, rate: float, value: float, promised: float) -> None:
    calibrated = file(entry(tuple(map(float, range(1, n + 1)))))
    threshold = audit(calibrated, rate=rate).line(SCAN, SETTINGS, paper=2.0).threshold
    assert (threshold.value, threshold.source, threshold.n) == (value, "calibrated", n)
    assert threshold.false_alarm_rate == promised
    assert (threshold.calibration_sha256, threshold.note, threshold.p_value) == (calibrated.sha256, None, None)


def test_line_takes_the_default_rate_when_none_was_asked_for() -> None:
    assert audit(file(entry())).line(SCAN, SETTINGS, paper=2.0).threshold.false_alarm_rate == 0.05


def test_line_counts_ties_against_the_alarm() -> None:
    line = audit(file(entry((1.0, *[5.0] * 18))), rate=0.1).line(SCAN, SETTINGS, paper=2.0)
    assert line.threshold.value == 5.0
    assert line.judged(5.0).p_value == 19 / 20
    assert line.judged(5.0000001).p_value == 1 / 20


def test_judged_adds_the_p_value_to_a_calibrated_threshold_only() -> None:
    line = audit(file(entry())).line(SCAN, SETTINGS, paper=2.0)
    assert line.judged(17.5) == line.threshold.model_copy(update={"p_value": 3 / 20})
    assert line.judged(1e9).p_value == 1 / 20, "no p-value below 1/(n + 1)"
    assert line.judged(None) == line.threshold
    paper = audit().line(SCAN, SETTINGS, paper=2.0)
    assert paper.judged(17.5) == paper.threshold


@pytest.mark.parametrize(
    ("n", "rate", "message"),
    [
        (18, 0.05, "mine.json: a false-alarm rate of 0.05 needs 19 clean models, there are 18; calibrate on more, or "
                   "ask for --false-alarm-rate 0.053"),
        (20, 0.01, "mine.json: a false-alarm rate of 0.01 needs 99 clean models, there are 20; calibrate on more, or "
                   "ask for --false-alarm-rate 0.048"),
    ],
)  # fmt: skip
def test_line_raises_when_n_is_too_small_for_the_rate(n: int, rate: float, message: str) -> None:
    calibrations = audit(file(entry(tuple(map(float, range(n))))), rate=rate)
    with pytest.raises(CalibrationError) as raised:
        calibrations.line(SCAN, SETTINGS, paper=2.0)
    assert str(raised.value) == message


@pytest.mark.parametrize("n", range(1, 60))
def test_smallest_rate_can_be_promised(n: int) -> None:
    few = entry(tuple(map(float, range(n))))
    assert few.threshold(float(few.smallest_rate)) == (few.scores[-1], 1 / (n + 1))


# --- what fits --------------------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "fingerprint": ({"population": population(fingerprint=digest("x"))}, "graph fingerprint"),
    "scheme": ({"population": population(scheme="int8-dynamic")}, "scheme"),
    "granularity": ({"population": population(granularity="per-tensor")}, "granularity"),
    "classes": ({"population": population(classes=43)}, "class count"),
    "contract": ({"population": population(contract={"height": 32, "width": 32, "channels": "BGR"})}, "input contract"),
    "data": ({"population": population(data_sha256=digest("x"))}, "data digest"),
    "setting": ({"settings": SETTINGS | {"budget": "quick", "patience": 4}}, "settings (budget, patience)"),
    "further setting": ({"settings": SETTINGS | {"restarts": 3}}, "settings (restarts)"),
    "missing setting": ({"settings": {"budget": "gate", "patience": 5}}, "settings (learning_rate)"),
    "defense": ({"defense": "pixel"}, "defense"),
    "two": (
        {"settings": {}, "population": population(classes=43, data_sha256=digest("x"))},
        "settings (budget, learning_rate, patience), another class count, another data digest",
    ),
}


@pytest.mark.parametrize("key", OTHERS)
def test_line_is_the_papers_with_a_reason_when_a_named_file_differs(key: str) -> None:
    changes, words = OTHERS[key]
    threshold = audit(file(entry(**changes))).line(SCAN, SETTINGS, paper=2.0).threshold
    assert (threshold.value, threshold.source) == (2.0, "paper")
    assert (threshold.n, threshold.false_alarm_rate, threshold.calibration_sha256) == (None, None, None)
    assert threshold.note == f"no entry of mine.json fits; the nearest has another {words}"


@pytest.mark.parametrize("key", OTHERS)
def test_line_is_the_papers_without_a_word_when_a_shipped_file_differs(key: str) -> None:
    threshold = audit(file(entry(**OTHERS[key][0]), shipped=True)).line(SCAN, SETTINGS, paper=2.0).threshold
    assert (threshold.value, threshold.source, threshold.note) == (2.0, "paper", None)


def test_line_names_the_nearest_entry_and_every_file_when_none_fits() -> None:
    far = entry(defense="pixel", population=population(classes=43, data_sha256=digest("x")))
    near = entry(population=population(data_sha256=digest("x")))
    threshold = audit(file(far, near), file(name="empty.json")).line(SCAN, SETTINGS, paper=2.0).threshold
    assert threshold.note == (
        "no entry of mine.json fits; the nearest has another data digest; empty.json has no entries"
    )


def test_line_says_that_no_rate_is_promised_when_one_was_asked_for_and_nothing_fits() -> None:
    shipped = file(entry(defense="pixel"), shipped=True)
    threshold = audit(shipped, rate=0.1).line(SCAN, SETTINGS, paper=2.0).threshold
    assert threshold.note == "no calibration fits, so nothing promises a false-alarm rate of 0.1"


def test_line_takes_named_files_before_shipped_ones() -> None:
    first, second = file(entry()), file(entry(tuple(map(float, range(100, 119)))), shipped=True)
    other = file(entry(defense="pixel"))
    assert audit(other, first, second).line(SCAN, SETTINGS, paper=2.0).threshold.value == 19.0
    found = audit(second, first).line(SCAN, SETTINGS, paper=2.0).threshold
    assert (found.value, found.note) == (19.0, None)
    low = file(entry(tuple(float(score) / 100 for score in range(19))), shipped=True)
    assert audit(first, low).line(SCAN, SETTINGS, paper=2.0).threshold.value == 19.0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_line_takes_the_lowest_threshold_and_says_how_many_fit_when_several_do(order: tuple[int, ...]) -> None:
    files = [file(entry(tuple(float(top + i) for i in range(19))), name=f"{top}.json") for top in (30, 10, 20)]
    line = audit(*(files[index] for index in order)).line(SCAN, SETTINGS, paper=2.0)
    assert (line.threshold.value, line.threshold.calibration_sha256) == (28.0, files[1].sha256)
    assert line.clean_scores == files[1].body.entries[0].scores
    assert (
        line.threshold.note == "the lowest threshold of the 3 files that fit, 10.json: their false-alarm rates add up"
    )
    assert line.threshold.false_alarm_rate == pytest.approx(0.15), "a clean model need only pass one of three lines"
    twice = audit(files[1], files[1]).line(SCAN, SETTINGS, paper=2.0).threshold
    assert (twice.false_alarm_rate, twice.note) == (0.05, None), "the same file twice is one"


FEW = (0.5, 1.0, 1.5)


@pytest.mark.parametrize("few_first", [True, False])
@pytest.mark.parametrize("shipped", [True, False])
def test_line_passes_over_a_file_with_too_few_models_when_another_has_enough(few_first: bool, shipped: bool) -> None:
    few, enough = file(entry(FEW), name="few.json"), file(entry(), name="enough.json", shipped=shipped)
    found = audit(*((few, enough) if few_first else (enough, few))).line(SCAN, SETTINGS, paper=2.0).threshold
    assert (found.value, found.n) == (19.0, 19)
    assert found.note == "few.json fits, too, but has too few clean models (3) for a false-alarm rate of 0.05"


def test_line_raises_with_the_most_models_when_every_file_that_fits_has_too_few() -> None:
    files = [file(entry(FEW[:count]), name=f"{count}.json") for count in (1, 3, 2)]
    with pytest.raises(CalibrationError) as raised:
        audit(*files).line(SCAN, SETTINGS, paper=2.0)
    assert str(raised.value) == (
        "3.json: a false-alarm rate of 0.05 needs 19 clean models, there are 3; calibrate on more, or ask for "
        "--false-alarm-rate 0.25"
    )


@pytest.mark.parametrize("shipped", [True, False])
def test_line_never_judges_a_file_by_its_own_score(shipped: bool) -> None:
    """Law 3: thresholds are never fitted on the data they score."""
    own = audit(file(entry(), shipped=shipped), artifact=digest("model 7"))
    threshold = own.line(SCAN, SETTINGS, paper=2.0).threshold
    assert (threshold.value, threshold.source) == (2.0, "paper")
    assert threshold.note == ("this very file is one of the clean models of mine.json, which can thus not judge it")


def test_line_goes_on_to_another_file_when_the_audited_one_is_part_of_the_first() -> None:
    mine, shipped = (
        file(entry()),
        file(entry(artifacts=tuple(sorted(map(digest, "abcdefghijklmnopqrs")))), shipped=True),
    )
    threshold = audit(mine, shipped, artifact=digest("model 7")).line(SCAN, SETTINGS, paper=2.0).threshold
    assert (threshold.source, threshold.calibration_sha256) == ("calibrated", shipped.sha256)


def test_line_compares_settings_as_json_has_them() -> None:
    listed = file(entry(settings={"sizes": [1, 2]}))
    assert audit(listed).line(SCAN, {"sizes": (1, 2)}, paper=2.0).threshold.source == "calibrated"


CONDITIONS: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"versions": {"onnxruntime": "1.31.0", "torch": "2.13.0"}}, "onnxruntime 1.31.0 (here 1.32.0)"),
    "missing": ({"versions": {"onnxruntime": "1.32.0"}}, "torch none (here 2.13.0)"),
    "machine": (
        {"runtime": Runtime(onnxruntime="1.32.0", machine="x86_64", isa=("avx2", "avx512_vnni"), system="Linux")},
        "machine Linux x86_64 avx2 avx512_vnni (here Linux x86_64 avx2)",
    ),
    "saturation": (
        {"saturating_operators": ("QLinearConv",)},
        "session CPUExecutionProvider, all, batch 64, threads 1, saturating: QLinearConv "
        "(here CPUExecutionProvider, all, batch 64, threads 1, no saturation)",
    ),
    "seed": ({"seed": 3}, "seed 3 (here 0)"),
    "profile": ({"profile": None, "seed": 1}, "session no saturation (here CPUExecutionProvider, all, batch 64, "
                "threads 1, no saturation), seed 1 (here 0)"),
}  # fmt: skip


@pytest.mark.parametrize("key", CONDITIONS)
def test_line_tells_what_the_calibration_was_made_with_when_that_differs(key: str) -> None:
    changes, words = CONDITIONS[key]
    threshold = audit(file(entry(conditions=conditions(**changes)))).line(SCAN, SETTINGS, paper=2.0).threshold
    assert (threshold.source, threshold.note) == ("calibrated", f"calibrated with {words}")


# --- whose line -------------------------------------------------------------------------------------------------------


def test_draw_line_lets_the_user_decide_and_says_what_is_not_used() -> None:
    calibrations = audit(file(entry()), file(entry(), name="shipped.json", shipped=True))
    threshold = draw_line(calibrations, SCAN, SETTINGS, user=3.5, paper=2.0).threshold
    assert (threshold.value, threshold.source, threshold.n) == (3.5, "user", None)
    assert threshold.note == "set by hand, so nothing of mine.json is used"
    for silent in (None, audit(file(entry(), shipped=True))):
        assert draw_line(silent, SCAN, SETTINGS, user=3.5, paper=2.0).threshold.note is None


def test_draw_line_is_the_papers_when_there_are_no_calibrations() -> None:
    threshold = draw_line(None, SCAN, SETTINGS, user=None, paper=2.0).threshold
    assert (threshold.value, threshold.source, threshold.note) == (2.0, "paper", None)


def test_draw_line_is_calibrated_when_an_entry_fits() -> None:
    threshold = draw_line(audit(file(entry())), SCAN, SETTINGS, user=None, paper=2.0).threshold
    assert (threshold.value, threshold.source) == (19.0, "calibrated")


# --- the population ---------------------------------------------------------------------------------------------------


def _artifact(stated: StatedContract | None = None, *, seed: int = 0) -> Artifact:
    weight = np.random.default_rng(seed).normal(size=(48, 5)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Artifact.from_bytes(model.SerializeToString(), stated)


def test_population_of_is_the_same_for_two_files_that_differ_in_weights() -> None:
    one, two = (_artifact(seed=seed) for seed in (0, 1))
    assert one.sha256 != two.sha256
    found = population_of(one, digest("data"))
    assert found == population_of(two, digest("data"))
    assert found.fingerprint == graph_fingerprint(one.data)
    assert (found.scheme, found.granularity, found.classes, found.data_sha256) == ("fp32", None, 5, digest("data"))


def test_population_of_tells_files_apart_that_are_driven_otherwise() -> None:
    plain = population_of(_artifact(), digest("data"))
    assert plain.contract == {"height": 4, "width": 4}
    names = StatedContract(class_names=("a", "b", "c", "d", "e"))
    assert population_of(_artifact(names), digest("data")) == plain
    swapped = population_of(_artifact(StatedContract(channels="BGR", range=(0, 255))), digest("data"))
    assert swapped.contract == {"height": 4, "width": 4, "channels": "BGR", "range": [0.0, 255.0]}


def test_driven_leaves_it_out_whether_somebody_said_the_numbers() -> None:
    contract = InputContract(input_name="a", output_name="b", height=4, width=5, class_names=("0", "1"))
    assert driven(contract.model_copy(update={"numbers_stated": True})) == driven(contract)


def test_driven_leaves_names_out() -> None:
    contract = InputContract(input_name="a", output_name="b", height=4, width=5, class_names=("x",), source="graph")
    assert driven(contract) == {"height": 4, "width": 5}


def test_file_identity_covers_weights_in_other_files() -> None:
    assert file_identity("a", {}) == "a"
    one, two = file_identity("a", {"w": "1", "v": "2"}), file_identity("a", {"v": "2", "w": "1"})
    assert one == two
    assert len({one, file_identity("a", {"w": "1", "v": "3"}), file_identity("b", {"w": "1", "v": "2"}), "a"}) == 4


# --- the file ---------------------------------------------------------------------------------------------------------


def test_calibration_reads_back_what_was_written(tmp_path: Path) -> None:
    body = CalibrationBody(command=("qdefense", "calibrate"), entries=(entry(), entry(defense="pixel", not_measured=2)))
    path = tmp_path / "c.json"
    path.write_bytes(body.to_bytes())
    found = read_calibration(path)
    assert (found.name, found.body, found.shipped) == ("c.json", body, False)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.body.to_bytes() == body.to_bytes()
    assert found.body.entries[0].n == 19


def test_calibration_has_the_same_bytes_whatever_order_its_parts_were_given_in() -> None:
    turned = dict(reversed(SETTINGS.items()))
    versions = {"torch": "2.13.0", "onnxruntime": "1.32.0"}
    one = CalibrationBody(command=(), entries=(entry(),)).to_bytes()
    two = CalibrationBody(command=(), entries=(entry(settings=turned, conditions=conditions(versions=versions)),))
    assert two.to_bytes() == one
    assert one.endswith(b"}\n")


def _changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    body = json.loads(CalibrationBody(command=(), entries=(entry(),)).to_bytes())
    change(body)
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "x: no JSON ("),
        (b"[" * 100_000, "x: no JSON ("),
        (b"{", "x: no JSON ("),
        (b"[]", "x: schema version None, this one reads 1.x; make it again with qdefense calibrate"),
        (b'{"schema_version": 1}', "x: schema version 1, this one reads 1.x"),
        (b'{"schema_version": "2.0"}', "x: schema version '2.0', this one reads 1.x; make it again with"),
        (b'{"schema_version": "1.0"}', "x: command: Field required; make it again with qdefense calibrate"),
        (_changed(lambda b: b["entries"][0]["scores"].reverse()), "x: entries.0.scores: scores must be finite and in "
         "rising order; make it again with qdefense calibrate"),
        (_changed(lambda b: b["entries"][0]["scores"].__setitem__(18, float("inf"))), "x: entries.0.scores"),
        (_changed(lambda b: b["entries"][0]["scores"].pop()), "x: entries.0: 18 scores of 19 files; expected one"),
        (_changed(lambda b: b["entries"][0].update(scores=[], artifacts=[])), "x: entries.0.scores: Tuple should have"),
        (_changed(lambda b: b["entries"][0]["artifacts"].reverse()), "x: entries.0.artifacts: digests must be"),
        (_changed(lambda b: b["entries"][0]["artifacts"].__setitem__(1, b["entries"][0]["artifacts"][0])),
         "x: entries.0.artifacts: digests must be in rising order, each once"),
        (_changed(lambda b: b["entries"][0]["artifacts"].__setitem__(0, "short")), "x: entries.0.artifacts.0: String"),
        (_changed(lambda b: b["entries"][0].update(not_measured=-1)), "x: entries.0.not_measured: Input should be"),
        (_changed(lambda b: b["entries"][0]["population"].update(recipe="new")), "x: entries.0.population.recipe:"),
        (_changed(lambda b: b["entries"][0]["population"].pop("classes")), "x: entries.0.population.classes: Field"),
    ],
)  # fmt: skip
def test_parse_calibration_names_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(CalibrationError) as raised:
        parse_calibration(data, "x")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("changes", [{}, {"not_measured": 3}, {"conditions": conditions(seed=1)}])
def test_parse_calibration_refuses_two_entries_for_one_population_and_defense(changes: dict[str, Any]) -> None:
    def add(body: dict[str, Any]) -> None:
        other = entry(tuple(map(float, range(19))), **changes)
        body["entries"] += [entry(defense="pixel").model_dump(mode="json"), other.model_dump(mode="json")]

    with pytest.raises(CalibrationError) as raised:
        parse_calibration(_changed(add), "x")
    graph = digest("graph")[:12]
    assert str(raised.value) == (
        "x: entries: two entries are about neural-cleanse with the same settings on the same population (int8-static, "
        f"graph {graph}), and only one can hold; make it again with qdefense calibrate"
    )


def test_parse_calibration_ignores_what_a_newer_minor_version_adds() -> None:
    def add(body: dict[str, Any]) -> None:
        body["schema_version"], body["author"] = "1.7", "someone"
        body["entries"][0]["mean"] = 1.0

    assert parse_calibration(_changed(add), "x").body.entries == (entry(),)


def test_read_calibration_raises_when_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_calibration(tmp_path / "none.json")


class ZooFile(Protocol):
    path: Path


def test_shipped_calibration_fits_the_demos_files(zoo_file: ZooFile) -> None:
    """Its network, images and settings: what anybody's clean or backdoored resnet8 on `signs` is judged by."""
    images, data = open_data("signs", limit=1000), zoo_file.path.read_bytes()
    training = open_data("signs", split="train", limit=256).pixels
    settings = NeuralCleanse().calibrated_settings
    for scheme in (None, "int8-static", "int8-dynamic"):
        file = data if scheme is None else quantize(data, scheme, calibration=training if "static" in scheme else None)
        subject = audit(*shipped_calibrations(), population=population_of(Artifact.from_bytes(file), images.digest))
        threshold = subject.line(SCAN, settings, paper=2.0).threshold
        assert (threshold.source, threshold.n) == ("calibrated", 20), scheme
    (shipped,) = shipped_calibrations()
    assert " ".join(shipped.body.command) == "qdefense calibrate --data signs --limit 1000"
    assert [entry.not_measured for entry in shipped.body.entries] == [0, 0, 0]


def test_shipped_calibrations_are_none_when_there_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_SHIPPED", "no such folder")
    assert shipped_calibrations() == ()


def test_shipped_calibrations_read_every_json_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration.resources, "files", lambda _package: tmp_path)
    folder = tmp_path / "calibrations"
    folder.mkdir()
    for name in ("b.json", "a.json", "README.md"):
        (folder / name).write_bytes(CalibrationBody(command=(name,), entries=()).to_bytes())
    assert [(f.name, f.body.command, f.shipped) for f in shipped_calibrations()] == [
        ("a.json", ("a.json",), True),
        ("b.json", ("b.json",), True),
    ]
