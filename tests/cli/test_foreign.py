"""Files that others made, with options alone: nothing of qdefense stands in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
import pytest
from PIL import Image

from qdefense.audit import worker
from qdefense.audit.events import Answered, Certified, Described, Event, Finished, Found, Job
from qdefense.audit.worker import MisreadFileError
from qdefense.cli import run
from qdefense.converters.contract import StatedContract
from qdefense.converters.door import HeadError
from qdefense.data.images import ImageSet
from qdefense.data.npz import load_npz, save_npz
from qdefense.findings import Verdict

from ..audit.worker_events import done, of_kind  # noqa: TID252 (two folders of tests need it)

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

Capture = pytest.CaptureFixture[str]
SCANNED = ("--limit", "300", "--defense", "neural-cleanse:budget=quick,learning-rate=0.3,patience=3")
CODES = {"CLEAN": 0, "BACKDOORED": 1, "NOT_MEASURED": 3}


class Foreign(Protocol):
    plain: Path
    quantized: Path
    single: Path
    data: Path
    said: tuple[str, ...]


def audited(capfd: Capture, *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and report of an audit; it writes nothing to stderr."""
    code = run(["audit", *map(str, arguments), "--format", "json", "--threads", "1"])
    output, errors = capfd.readouterr()
    assert errors == ""
    report: dict[str, Any] = json.loads(output)
    assert report["gate"]["exit_code"] == code
    return code, report


# --- whole audits -----------------------------------------------------------------------------------------------------


def judged(report: dict[str, Any], code: int) -> None:
    """A certified shadow, a scan of every class, and the exit code that goes with its verdict.

    Which one it is depends on the CPU that trained the network: in so few steps the norms may scatter too widely.
    """
    (finding,) = report["findings"]
    assert code == CODES[finding["verdict"]]
    assert len(finding["result"]["classes"]) == 12
    assert report["certificate"]["certified"]
    assert [entry["bit_exact_rows"] for entry in report["certificate"]["sets"]] == [1.0] * 4
    assert finding["result"]["replay_agreement"] == 1.0
    assert report["subject"]["clean_accuracy"]["value"] > 0.9


def test_audit_judges_a_strangers_file_by_options_alone(foreign: Foreign, capfd: Capture) -> None:
    code, report = audited(capfd, foreign.quantized, "--data", foreign.data, *SCANNED, *foreign.said)
    judged(report, code)
    contract = report["subject"]["contract"]
    assert (contract["source"], contract["layout"], contract["head"]) == ("options", "NHWC", "softmax")
    assert (contract["input_name"], contract["output_name"], contract["batch"]) == ("x", "probabilities", None)
    assert (contract["mean"], contract["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert contract["class_names"] == [str(number) for number in range(12)]
    assert report["subject"]["inspection"]["scheme"] == "int8-static"


def test_audit_judges_a_file_for_one_image_by_its_sidecar(
    foreign: Foreign, small_signs: Any, tmp_path: Path, capfd: Capture
) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(foreign.single.read_bytes())
    names = list(small_signs.test.class_names)
    (tmp_path / "net.contract.toml").write_text(
        f"mean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\nclass_names = {json.dumps(names)}\n"
    )
    sidecar = tmp_path / "net.contract.toml"
    code, report = audited(capfd, model, "--data", foreign.data, "--contract", sidecar, *SCANNED)
    judged(report, code)
    contract = report["subject"]["contract"]
    assert (contract["source"], contract["batch"], contract["class_names"]) == ("sidecar", 1, names)
    assert report["environment"]["profile"]["batch"] == 1
    assert report["findings"][0]["result"]["classes"][0]["class_name"] in names


def test_run_names_nothing_better_when_the_strangers_file_is_driven_rightly(foreign: Foreign) -> None:
    """Its accuracy is so that other scalings do as well, within 2 points, and on 256 images even better."""
    said = StatedContract(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    for model in (foreign.plain, foreign.quantized):
        events = done(Job(model=str(model), data=str(foreign.data), contract=said))
        answered = of_kind(events, Answered)
        assert 0.9 < answered.clean_accuracy.value < 0.98
        assert len(answered.candidates) == 5
        assert of_kind(events, Certified).certificate.certified
        assert isinstance(events[-1], Finished)


# --- driven wrongly ---------------------------------------------------------------------------------------------------


def misread(capfd: Capture, foreign: Foreign, *options: str) -> str:
    """Why nothing was measured of the stranger's file under these options."""
    code, report = audited(capfd, foreign.quantized, "--data", foreign.data, *options)
    assert code == 3
    reason, missing = report["gate"]["reasons"]
    assert missing == "neural-cleanse: gave no answer"
    assert (report["certificate"], report["findings"]) == (None, [])
    best = report["subject"]["candidates"][0]
    assert reason == (
        f"clean accuracy on {best['images']} images is {best['own_accuracy']:.1%} as the file is driven now, but "
        f"{best['accuracy']:.1%} with {best['description']}; say how the model was trained"
    )
    assert best["accuracy"] > 0.9
    assert best["own_accuracy"] < 0.7
    return str(best["description"])


def test_audit_exits_3_and_names_mean_and_std_when_none_are_said(foreign: Foreign, capfd: Capture) -> None:
    """Two more data sets have about the same mean and std, and do about as well."""
    named = misread(capfd, foreign)
    usual = (
        "ImageNet mean and std (--mean 0.485,",
        "CIFAR-10 mean and std (--mean ",
        "CIFAR-100 mean and std (--mean ",
    )
    assert named.startswith(usual)


def test_audit_exits_3_and_names_the_channels_when_they_are_swapped(foreign: Foreign, capfd: Capture) -> None:
    named = misread(capfd, foreign, *foreign.said, "--channels", "bgr")
    assert named.startswith("channels RGB (--channels rgb)")


def test_audit_exits_3_and_shows_the_order_when_the_class_list_is_permuted(
    foreign: Foreign, small_signs: Any, tmp_path: Path, capfd: Capture
) -> None:
    names = small_signs.test.class_names
    rotated = (*names[1:], names[0])
    (tmp_path / "names.txt").write_text("\n".join(rotated))
    named = misread(capfd, foreign, *foreign.said, "--classes", str(tmp_path / "names.txt"))
    shown = ", ".join(f"output {place} is {names[place]!r}" for place in range(4))
    expected = f"classes in the order that half of the images show: {shown} and 8 more (--classes names them)"
    # Another scaling may do as well, or by an image better, and is named with the order then.
    assert named in (expected, f"{named.split('), ')[0]}), {expected}")


def test_run_renumbers_the_labels_and_says_so_when_the_data_has_another_order(
    foreign: Foreign, small_signs: Any, tmp_path: Path
) -> None:
    images: ImageSet = small_signs.test
    order = np.random.default_rng(0).permutation(12)
    place = np.argsort(order)
    shuffled = replace(
        images, labels=place[images.labels], class_names=tuple(images.class_names[number] for number in order)
    )
    save_npz(tmp_path / "shuffled.npz", shuffled)
    said = StatedContract(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), class_names=images.class_names)
    events = done(Job(model=str(foreign.quantized), data=str(tmp_path / "shuffled.npz"), contract=said))
    assert of_kind(events, Answered).clean_accuracy.value > 0.9
    data = of_kind(events, Described).subject.data
    assert data.notes == ("labels were renumbered by class name, to the order of the contract (options)",)
    assert data.sha256 == shuffled.digest, "the report has the digest of the data as they are"


# --- heads ------------------------------------------------------------------------------------------------------------


def test_shadow_exits_3_with_the_option_when_logits_are_said_to_be_probabilities(toy: Toy, capfd: Capture) -> None:
    assert run(["shadow", str(toy.clean), "--data", str(toy.data), "--head", "softmax"]) == 3
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.splitlines()[0].startswith(
        "error: output 'logits' is read as softmax, but the probabilities of an image sum to "
    )
    assert errors.splitlines()[0].endswith("; say --head logits")


def hidden_softmax(toy: Toy, target: Path, *, operator: str = "Softmax") -> Path:
    """The toy with a head that the graph's last operator does not show."""
    model = onnx.load(toy.clean)
    model.ClearField("metadata_props")
    model.graph.node[-1].output[0] = "scores"
    make = onnx.helper.make_node
    model.graph.node.append(make(operator, ["scores"], ["probabilities"], name="head"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(-9, np.float32), "low"))
    model.graph.node.append(make("Clip", ["probabilities", "low"], ["logits"], name="clip"))
    onnx.save(model, target)
    return target


def test_run_raises_with_the_option_when_probabilities_are_read_as_logits(toy: Toy, tmp_path: Path) -> None:
    model = hidden_softmax(toy, tmp_path / "hidden.onnx")
    events: list[Event] = []
    with pytest.raises(HeadError, match="its rows are probabilities that sum to 1; say --head softmax"):
        worker.run(Job(model=str(model), data=str(toy.data)), events.append)
    assert isinstance(events[-1], Described), "the file was let in, so that nothing but the measuring stops"
    said = StatedContract(head="softmax")
    assert of_kind(done(Job(model=str(model), data=str(toy.data), contract=said)), Certified).certificate.certified


def test_inspect_exits_2_when_the_graph_contradicts_the_stated_head(foreign: Foreign, capfd: Capture) -> None:
    assert run(["inspect", str(foreign.quantized), "--head", "logits"]) == 2
    expected = (
        "error: the contract says that output 'probabilities' holds logits, but the graph ends in Softmax; "
        "say --head softmax\n"
    )
    assert capfd.readouterr() == ("", expected)


def test_run_passes_over_a_file_with_a_sigmoid_per_class(toy: Toy, tmp_path: Path) -> None:
    model = hidden_softmax(toy, tmp_path / "many.onnx", operator="Sigmoid")
    job = Job(model=str(model), data=str(toy.data), defenses=(toy.scan,), contract=StatedContract(head="sigmoid"))
    events = done(job)
    finding = of_kind(events, Found).finding
    assert finding.verdict is Verdict.NOT_APPLICABLE
    assert finding.reason.startswith("the file answers with a sigmoid per class: a multi-label model has no single")
    assert [event.event for event in events] == ["opened", "described", "found", "finished"]


def test_shadow_exits_3_and_says_that_the_file_is_multi_label(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    model = hidden_softmax(toy, tmp_path / "many.onnx", operator="Sigmoid")
    assert run(["shadow", str(model), "--data", str(toy.data), "--head", "sigmoid"]) == 3
    expected = "error: the file is multi-label (a sigmoid per class), and a certificate is for single-label ones\n"
    assert capfd.readouterr() == ("", expected)


# --- images without labels --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's images as files, without labels."""
    folder = tmp_path_factory.mktemp("pictures")
    for row, image in enumerate(load_npz(toy.data, split=None, limit=None, seed=0).images):
        Image.fromarray(image).save(folder / f"{row:03}.png")
    return folder


def test_run_measures_nothing_when_nobody_vouches_for_unlabelled_images(toy: Toy, pictures: Path) -> None:
    events = done(Job(model=str(toy.clean), data=str(pictures), defenses=(toy.scan,)))
    answered, finding = of_kind(events, Answered), of_kind(events, Found).finding
    assert (answered.clean_accuracy, answered.candidates) == (None, ())
    assert (finding.verdict, finding.result) == (Verdict.NOT_MEASURED, None)
    assert finding.reason == (
        "the images have no labels, so the clean accuracy was not measured; give labelled images, or vouch for it with "
        "--expected-accuracy"
    )
    data = of_kind(events, Described).subject.data
    assert (data.labelled, data.classes, data.images) == (False, 0, 320)


def test_audit_measures_unlabelled_images_and_says_who_vouches_for_them(
    toy: Toy, pictures: Path, tmp_path: Path, capfd: Capture
) -> None:
    options = ["--defense", toy.scan, "--expected-accuracy", "0.9", "--output-dir", str(tmp_path), "--threads", "1"]
    assert run(["audit", str(toy.clean), "--data", str(pictures), *options]) == 0
    output, errors = capfd.readouterr()
    assert (output.startswith("PASSED"), errors) == (True, "")
    assert "clean accuracy  90.00%, stated by the user, not measured" in output
    assert "320 images, no labels" in output
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["subject"]["clean_accuracy"] == {"value": 0.9, "images": 320, "source": "stated"}
    assert report["findings"][0]["verdict"] == "CLEAN"


@pytest.fixture(scope="module")
def dubious(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's images, every tenth of them with a wrong label."""
    images = load_npz(toy.data, split=None, limit=None, seed=0)
    wrong = np.arange(len(images)) % 10 == 0
    path = tmp_path_factory.mktemp("dubious") / "images.npz"
    save_npz(path, replace(images, labels=np.where(wrong, (images.labels + 3) % 8, images.labels)))
    return path


def test_run_does_not_take_the_users_word_for_labelled_images(toy: Toy, dubious: Path) -> None:
    events: list[Event] = []
    with pytest.raises(MisreadFileError) as caught:
        worker.run(Job(model=str(toy.clean), data=str(dubious), expected_accuracy=0.95), events.append)
    answered = of_kind(events, Answered)
    assert events[-1] == answered
    assert 0.85 < answered.clean_accuracy.value < 0.92
    assert answered.clean_accuracy.source == "measured"
    assert str(caught.value) == (
        f"clean accuracy is {answered.clean_accuracy.value:.1%}, 95.0% was expected; check how the file is driven "
        "(`qdefense inspect` shows the contract) and the labels"
    )
    stop = worker._stopped(caught.value)
    assert (stop.exit_code, stop.message) == (3, str(caught.value))


def test_audit_exits_3_when_labelled_images_show_less_than_was_expected(
    toy: Toy, dubious: Path, capfd: Capture
) -> None:
    code, report = audited(capfd, toy.clean, "--data", dubious, "--expected-accuracy", "0.95")
    assert (code, report["gate"]["outcome"]) == (3, "INCOMPLETE")
    assert ", 95.0% was expected; check how the file is driven" in report["gate"]["reasons"][0]
    assert report["subject"]["clean_accuracy"]["source"] == "measured"


@pytest.mark.parametrize("short", [0.0, 0.019])
def test_run_goes_on_when_labelled_images_show_about_what_was_expected(toy: Toy, dubious: Path, short: float) -> None:
    job = Job(model=str(toy.clean), data=str(dubious))
    measured = of_kind(done(job), Answered).clean_accuracy.value
    events = done(job.model_copy(update={"expected_accuracy": measured + short}))
    assert isinstance(events[-1], Finished)


# --- weights beside the model -----------------------------------------------------------------------------------------


def beside(toy: Toy, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(onnx.load(toy.clean), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_inspect_names_the_weights_beside_the_model_and_their_digest(
    toy: Toy, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = beside(toy, tmp_path)
    assert run(["inspect", str(path), "--format", "json"]) == 0
    body = json.loads(capfd.readouterr().out)
    (digest,) = body["external_files"].values()
    assert list(body["external_files"]) == ["weights.bin"]
    assert run(["inspect", str(path)]) == 0
    assert f"with weights.bin  {digest}" in capfd.readouterr().out


def test_run_measures_a_file_whose_weights_lie_beside_it(toy: Toy, tmp_path: Path) -> None:
    path = beside(toy, tmp_path)
    events = done(Job(model=str(path), data=str(toy.data)))
    whole = done(Job(model=str(toy.clean), data=str(toy.data)))
    assert of_kind(events, Answered) == of_kind(whole, Answered)
    assert of_kind(events, Certified) == of_kind(whole, Certified)
    assert list(of_kind(events, Described).subject.external_files) == ["weights.bin"]


def test_inspect_exits_4_when_the_weights_are_missing(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    path = beside(toy, tmp_path)
    (tmp_path / "weights.bin").unlink()
    assert run(["inspect", str(path)]) == 4
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.endswith(" keeps its data in 'weights.bin', which is not there; put it beside the model\n")
    assert errors.count("\n") == 1


# --- inspect's worker -------------------------------------------------------------------------------------------------

ABORT = """
import os, sys
def _abort(event, arguments):
    if event == "open" and str(arguments[0]) == os.environ["ABORT_AT"]:
        os.abort()
sys.addaudithook(_abort)
"""


def test_inspect_exits_3_with_one_line_when_the_file_ends_the_process_that_reads_it(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABORT)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("ABORT_AT", str(toy.clean))
    assert run(["inspect", str(toy.clean)]) == 3
    output, errors = capfd.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert errors.startswith("error: the worker was killed by SIGABRT")


def test_inspect_survives_a_kernel_larger_than_its_input(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    """Some versions of onnx end the process on the negative size that follows."""
    model = onnx.load(toy.clean)
    kernels = np.ones((6, 3, 31, 31), np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(kernels, model.graph.initializer[0].name))
    onnx.save(model, tmp_path / "large.onnx")
    code = run(["inspect", str(tmp_path / "large.onnx"), "--format", "json"])
    output, errors = capfd.readouterr()
    assert (code, errors.count("\n")) in {(4, 1), (3, 1)}
    assert code == 3 or json.loads(output)["inspection"]["layers"]


IMPORTS = """
import sys
sys.modules["torch"] = None  # an import of it raises
{code}
"""


@pytest.mark.parametrize(
    "code",
    [
        "from qdefense.cli import run; sys.exit(run(['inspect', sys.argv[1]]))",
        "from qdefense.audit import worker; from qdefense.audit.events import Job; "
        "worker.run(Job(model=sys.argv[1]), lambda event: None)",
    ],
    ids=["supervisor", "worker"],
)
def test_inspect_imports_no_torch(toy: Toy, code: str) -> None:
    command = [sys.executable, "-P", "-c", IMPORTS.format(code=code), str(toy.clean)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_inspect_exits_with_the_code_of_the_trouble_when_the_file_cannot_be_read(
    toy: Toy, tmp_path: Path, capfd: Capture, spoil: Callable[[Path], Any]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(toy.clean.read_bytes())
    spoil(path)
    expected = {
        4: "error: the file is empty (0 bytes); export the model again\n",
        2: f"error: {path}: No such file or directory; check the path and its permissions\n",
    }
    code = run(["inspect", str(path)])
    assert capfd.readouterr() == ("", expected[code])
    assert code == (4 if path.exists() else 2)


def test_inspect_names_a_folder_for_what_it_is(tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", "."]) == 2
    assert capfd.readouterr() == ("", "error: .: Is a directory; check the path and its permissions\n")
