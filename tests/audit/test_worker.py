from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from PIL import Image

from qdefense.audit import worker
from qdefense.audit.events import Advanced, Answered, Certified, Described, Event, Finished, Found, Job, Opened
from qdefense.audit.worker import NoNumbersError
from qdefense.converters.contract import ContractError, StatedContract
from qdefense.converters.reading import FileRefusedError
from qdefense.data.images import DataError, ImageSet
from qdefense.data.npz import load_npz, save_npz
from qdefense.findings import Verdict
from qdefense.registry import SpecError
from qdefense.session import SessionError

from .worker_events import done, of_kind

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

EXRE = ("activation-clustering:rule=exclusionary-reclassification",)
WORKER = [sys.executable, "-P", "-m", "qdefense.audit.worker"]


def toy_images(toy: Toy) -> ImageSet:
    return load_npz(toy.data, split=None, limit=None, seed=0)


def changed_model(toy: Toy, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(toy.clean)
    change(model)
    onnx.save(model, target)
    return target


# --- what a job sends -------------------------------------------------------------------------------------------------


def test_run_sends_every_answer_in_order_when_all_goes_well(toy: Toy) -> None:
    events = done(Job(model=str(toy.clean), data=str(toy.data), defenses=(toy.scan,), memory_bytes=10**15))
    kinds = [event.event for event in events if not isinstance(event, Advanced)]
    assert kinds == ["opened", "described", "answered", "certified", "found", "finished"]
    described, found = of_kind(events, Described), of_kind(events, Found)
    assert described.subject.sha256 == hashlib.sha256(toy.clean.read_bytes()).hexdigest()
    assert (described.subject.file, described.subject.size_bytes) == ("clean.onnx", toy.clean.stat().st_size)
    assert (described.subject.data.images, described.subject.data.classes) == (320, 8)
    assert described.environment.memory_limited is (sys.platform == "linux")
    assert of_kind(events, Answered).clean_accuracy.value > 0.8
    assert of_kind(events, Answered).clean_accuracy.source == "measured"
    assert (found.finding.verdict, found.finding.defense) == (Verdict.CLEAN, "neural-cleanse")
    stages = [event.stage for event in events if isinstance(event, Advanced)]
    assert set(stages) == {"neural-cleanse"}
    finished = of_kind(events, Finished)
    assert list(finished.seconds_per_stage) == ["load", "certificate", "neural-cleanse"]
    assert (finished.peak_memory_bytes is None) is (sys.platform != "linux")
    assert finished.peak_memory_bytes is None or finished.peak_memory_bytes > 10**7


def test_run_only_describes_when_the_job_has_no_data(toy: Toy) -> None:
    events = done(Job(model=str(toy.clean), memory_bytes=10**15))
    # once more when all that the file says is known: loading it may end the process
    assert [event.event for event in events] == ["opened", "opened", "described", "finished"]
    described = of_kind(events, Described)
    assert (described.subject.data, described.environment.profile) == (None, None)
    assert described.subject.contract.class_names[0] == "zone 0"
    assert described.subject.inspection.scheme == "fp32"
    assert described.environment.memory_limited is (sys.platform == "linux")


def test_run_stops_at_the_certificate_when_the_job_has_no_defenses(toy: Toy) -> None:
    kinds = [event.event for event in done(Job(model=str(toy.clean), data=str(toy.data)))]
    assert kinds == ["opened", "described", "answered", "certified", "finished"]


def test_run_says_not_measured_when_there_are_only_50_images(toy: Toy) -> None:
    events = done(Job(model=str(toy.clean), data=str(toy.few), defenses=(toy.scan,)))
    finding, certificate = of_kind(events, Found).finding, of_kind(events, Certified).certificate
    assert (finding.verdict, finding.reason) == (Verdict.NOT_MEASURED, "50 clean images; at least 200 are needed")
    assert not certificate.certified


def test_run_says_not_measured_when_the_limit_leaves_50_images(toy: Toy) -> None:
    events = done(Job(model=str(toy.clean), data=str(toy.data), limit=50, defenses=(toy.scan,)))
    assert of_kind(events, Found).finding.reason.startswith("50 clean images")


def test_run_gives_no_accuracy_and_no_verdict_when_weights_are_nan(toy: Toy, tmp_path: Path) -> None:
    def poison(model: onnx.ModelProto) -> None:
        array = onnx.numpy_helper.to_array(model.graph.initializer[2]).copy()
        array[0, 0] = np.nan
        model.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(array, "weight"))

    model = changed_model(toy, tmp_path / "nan.onnx", poison)
    events = done(Job(model=str(model), data=str(toy.data), defenses=(toy.scan,)))
    assert of_kind(events, Described).subject.inspection.nonfinite_initializers == ("weight",)
    assert of_kind(events, Answered).clean_accuracy is None, "argmax would take a NaN for an answer"
    finding = of_kind(events, Found).finding
    assert finding.verdict is Verdict.NOT_MEASURED
    assert "not finite" in finding.reason


def test_run_stops_when_some_clean_images_have_no_answer(toy: Toy, tmp_path: Path) -> None:
    """One NaN among 320 images is in none of the rows that certificate and scan look at, and no accuracy is known."""

    def break_where_dark(model: onnx.ModelProto) -> None:
        brightness = load_npz(toy.data, split=None, limit=None, seed=0).pixels.mean(axis=(1, 2, 3))
        darkest = np.partition(brightness, 1)[:2].mean()
        make, graph = onnx.helper.make_node, model.graph
        graph.node[-1].output[0] = "sound"
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([[darkest]], np.float32), "darkest"))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes"))
        graph.node.extend(
            [
                make("ReduceMean", ["image", "axes"], ["brightness"], keepdims=0),
                make("Reshape", ["brightness", "column"], ["rows"]),
                make("Sub", ["rows", "darkest"], ["above"]),
                make("Sqrt", ["above"], ["root"]),  # NaN of the darkest image alone
                make("Sub", ["root", "root"], ["nothing"]),
                make("Add", ["sound", "nothing"], ["logits"]),
            ]
        )
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 1], np.int64), "column"))

    model = changed_model(toy, tmp_path / "dark.onnx", break_where_dark)
    with pytest.raises(
        NoNumbersError, match=r"^1 of 320 clean images are answered with NaN or infinity, image \d+ of "
    ):
        done(Job(model=str(model), data=str(toy.data), defenses=(toy.scan,)))


def test_run_opens_the_file_before_anything_can_be_wrong_with_it(tmp_path: Path, toy: Toy) -> None:
    file = tmp_path / "cut.onnx"
    file.write_bytes(toy.clean.read_bytes()[:1000])
    events: list[Event] = []
    with pytest.raises(FileRefusedError, match="cut short"):
        worker.run(Job(model=str(file), data="nowhere"), events.append)
    (opened,) = events
    assert isinstance(opened, Opened)
    assert opened.subject.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


# --- what does not fit ------------------------------------------------------------------------------------------------


def misfit(toy: Toy, tmp_path: Path, images: ImageSet) -> str:
    """The message when the toy model meets these images."""
    save_npz(tmp_path / "other.npz", images)
    with pytest.raises(DataError) as caught:
        done(Job(model=str(toy.clean), data=str(tmp_path / "other.npz")))
    return str(caught.value)


def test_run_names_both_sizes_when_images_are_of_another_size(toy: Toy, tmp_path: Path) -> None:
    images = toy_images(toy)
    message = misfit(toy, tmp_path, replace(images, images=np.ascontiguousarray(images.images[:, :12])))
    assert message == (
        "npz other.npz: images are 12x16, the model takes 16x16; give data of that size, or say how they were resized "
        "for the model: --resize bilinear"
    )


def test_run_names_both_counts_when_there_are_other_classes(toy: Toy, tmp_path: Path) -> None:
    images = toy_images(toy)
    message = misfit(toy, tmp_path, replace(images, class_names=(*images.class_names, "zone 8")))
    assert message == (
        "npz other.npz has 9 classes, the model answers with 8; give the data set that the model was made for"
    )


def test_run_resizes_the_images_when_the_contract_says_how(toy: Toy, tmp_path: Path) -> None:
    images = toy_images(toy)
    larger = np.ascontiguousarray(images.images.repeat(2, axis=1).repeat(2, axis=2))
    save_npz(tmp_path / "other.npz", replace(images, images=larger))
    job = Job(model=str(toy.clean), data=str(tmp_path / "other.npz"), contract=StatedContract(resize="nearest"))
    events, plain = done(job), done(Job(model=str(toy.clean), data=str(toy.data)))
    assert of_kind(events, Answered) == of_kind(plain, Answered)
    assert of_kind(events, Described).subject.contract.resize == "nearest"


def test_run_renumbers_the_labels_by_name_when_the_classes_are_in_another_order(toy: Toy, tmp_path: Path) -> None:
    images = toy_images(toy)
    turned = replace(images, labels=7 - images.labels, class_names=images.class_names[::-1])
    save_npz(tmp_path / "other.npz", turned)
    events = done(Job(model=str(toy.clean), data=str(tmp_path / "other.npz")))
    plain = done(Job(model=str(toy.clean), data=str(toy.data)))
    assert of_kind(events, Answered) == of_kind(plain, Answered)
    data = of_kind(events, Described).subject.data
    assert data.notes == ("labels were renumbered by class name, to the order of the contract (metadata)",)
    assert data.sha256 == turned.digest


def test_run_shows_the_order_when_the_datas_class_names_are_not_those_of_its_labels(toy: Toy, tmp_path: Path) -> None:
    images = toy_images(toy)
    save_npz(tmp_path / "other.npz", replace(images, class_names=images.class_names[::-1]))
    events: list[Event] = []
    with pytest.raises(worker.MisreadFileError) as caught:
        worker.run(Job(model=str(toy.clean), data=str(tmp_path / "other.npz")), events.append)
    message = str(caught.value)
    assert message.startswith("clean accuracy on 160 images is 0.0% as the file is driven now, but ")
    order = "classes in the order that half of the images show: output 0 is 'zone 7', output 1 is 'zone 6', "
    assert f" with {order}" in message
    assert message.endswith(" and 4 more (--classes names them); say how the model was trained")
    assert [event.event for event in events] == ["opened", "described", "answered"]


def test_run_takes_the_numbers_when_the_data_names_its_classes_otherwise(toy: Toy, tmp_path: Path) -> None:
    save_npz(tmp_path / "other.npz", replace(toy_images(toy), class_names=tuple("abcdefgh")))
    events = done(Job(model=str(toy.clean), data=str(tmp_path / "other.npz")))
    assert of_kind(events, Answered).clean_accuracy.value > 0.8
    assert of_kind(events, Described).subject.data.notes == (
        "class names differ: class 0 is 'a' in the data and 'zone 0' in the model; the numbers are taken to agree",
    )


def test_run_suggests_a_name_when_the_defense_is_misspelt(toy: Toy) -> None:
    with pytest.raises(SpecError, match="did you mean 'neural-cleanse'"):
        done(Job(model=str(toy.clean), data=str(toy.data), defenses=("neural-clense",)))


# --- from exception to exit code --------------------------------------------------------------------------------------


def _missing_file() -> Exception:
    try:
        Path("/no/such/model.onnx").read_bytes()
    except OSError as error:
        return error
    raise AssertionError


STOPS = {
    "data": (DataError("no labels"), 2, "no labels"),
    "a spec": (SpecError("no such defense"), 2, "no such defense"),
    "a misread file": (worker.MisreadFileError("BGR"), 3, "BGR"),
    "the contract": (ContractError("two inputs"), 2, "two inputs"),
    "a missing file": (
        *(_missing_file(), 2),
        "/no/such/model.onnx: No such file or directory; check the path and its permissions",
    ),
    "a refused file": (FileRefusedError("no ONNX"), 4, "no ONNX"),
    "a file the runtime refuses": (SessionError("no kernel"), 4, "no kernel"),
    "memory": (MemoryError("40 TB"), 3, "not enough memory: 40 TB; raise --memory-limit, or read"),
    "memory, of which nothing is said": (MemoryError(), 3, "not enough memory; raise --memory-limit, or read"),
    "memory of the runtime": (SessionError("std::bad_alloc"), 3, "not enough memory: std::bad_alloc; raise --memory"),
    "memory of the parser": (DecodeError("Arena alloc failed"), 3, "not enough memory: Arena alloc failed; raise --m"),
    "mapped memory": (OSError(12, "Cannot allocate memory"), 3, "not enough memory: [Errno 12] Cannot allocate"),
    "a name that is no UTF-8": (DataError("gr\udcfcn: no labels"), 2, "gr\\udcfcn: no labels"),
    "a bug": (KeyError("x"), 3, "internal error: KeyError: 'x'"),
    "a long text": (RuntimeError("one\ntwo\n" * 1000), 3, "internal error: RuntimeError: one two one two"),
}


@pytest.mark.parametrize(("error", "code", "message"), STOPS.values(), ids=list(STOPS))
def test_stopped_gives_code_and_one_line_when_the_trouble_is(error: Exception, code: int, message: str) -> None:
    stop = worker._stopped(error)
    assert stop.exit_code == code
    assert stop.message.startswith(message)
    assert "\n" not in stop.message
    assert len(stop.message) <= 600
    assert stop.model_dump_json()


# --- progress ---------------------------------------------------------------------------------------------------------


def test_progress_is_thinned_out_but_keeps_first_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(np.arange(100) * 0.03)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    sent: list[Any] = []
    progress = worker._throttled(sent.append)
    for step in range(21):
        progress("stage", step, 20)
    assert [event.done for event in sent] == [0, 4, 8, 12, 16, 20]


# --- the process ------------------------------------------------------------------------------------------------------


def spoken(job: Job | bytes, **options: Any) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[bytes]]:
    """The events of a worker process of its own, whose supervisor listens to the end."""
    line = job if isinstance(job, bytes) else job.model_dump_json().encode() + b"\n"
    with subprocess.Popen(WORKER, stdin=-1, stdout=-1, stderr=-1, env=quiet(), **options) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(line)
        process.stdin.flush()
        output, errors = process.stdout.read(), process.stderr.read()
    ran = subprocess.CompletedProcess(WORKER, process.returncode, output, errors)
    return [json.loads(event) for event in output.splitlines()], ran


def quiet(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def test_main_stops_with_the_reason_and_tells_stderr_the_rest_when_the_split_is_missing(
    toy: Toy, tmp_path: Path
) -> None:
    name = "größe\x1b[31m\u202e.npz"
    save_npz(tmp_path / name, toy_images(toy))
    events, ran = spoken(Job(model=str(toy.clean), data=str(tmp_path / name), split="train"))
    stop = events[-1]
    assert [event["event"] for event in events] == ["opened", "stopped"]
    assert stop["exit_code"] == 2
    assert stop["message"].startswith(f"npz {name}: no split 'train'"), "a report holds the text as it is"
    assert ran.stderr.startswith(b"Traceback (most recent call last):\n")
    assert r"größe\x1b[31m\u202e.npz" in ran.stderr.decode(), "what goes to a terminal is escaped"
    assert b"\x1b" not in ran.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8")
def test_main_stops_with_the_reason_when_the_folder_has_a_name_that_is_no_utf8(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"gr\xfcn")
    (folder / "a").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "a" / "0.png")
    (tmp_path / "link").symlink_to(folder)
    events, _ = spoken(Job(model=str(toy.clean), data=str(tmp_path / "link")))
    assert events[-1]["exit_code"] == 2
    assert events[-1]["message"].startswith("images gr\\udcfcn has 1 classes, the model answers with 8; give the data")


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits are Linux only")
def test_main_leaves_the_file_unmeasured_when_it_wants_more_memory_than_the_limit(toy: Toy, tmp_path: Path) -> None:
    def blow_up(model: onnx.ModelProto) -> None:
        size = np.array([2**30], np.int64)  # 4 GiB of zeros, which fit the machine but not the limit
        model.graph.initializer.append(onnx.numpy_helper.from_array(size, "size"))
        make = onnx.helper.make_node
        model.graph.node[-1].output[0] = "plain"
        model.graph.node.extend(
            [
                make("ConstantOfShape", ["size"], ["huge"], name="huge"),
                make("ReduceSum", ["huge"], ["zero"], name="zero", keepdims=0),
                make("Add", ["plain", "zero"], ["logits"], name="add"),
            ]
        )

    model = changed_model(toy, tmp_path / "huge.onnx", blow_up)
    events, _ = spoken(Job(model=str(model), data=str(toy.data), memory_bytes=3 * 2**30))
    assert [event["event"] for event in events] == ["opened", "described", "stopped"]
    assert "allocate memory" in events[-1]["message"]


def test_limit_resources_keeps_to_a_lower_limit_when_there_is_one() -> None:
    """`ulimit -d` in a build job must not turn into an internal error."""
    code = (
        "import resource\nfrom qdefense.audit.worker import _limit_resources as limit\n"
        f"limit({2**62}); print(*resource.getrlimit(resource.RLIMIT_DATA), *resource.getrlimit(resource.RLIMIT_CORE))\n"
        f"limit({2**32}); print(*resource.getrlimit(resource.RLIMIT_DATA))"
    )

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))

    ran = subprocess.run(
        [sys.executable, "-P", "-c", code], preexec_fn=lower, capture_output=True, text=True, check=True, env=quiet()
    )
    assert ran.stdout.splitlines() == [f"{2**33} {2**33} 0 0", f"{2**32} {2**32}"]


def test_main_ends_at_once_when_the_supervisor_is_gone_though_it_could_go_on(toy: Toy, tmp_path: Path) -> None:
    """Its output goes to a file here: no broken pipe ends it, only the end of its stdin does."""
    job = Job(model=str(toy.clean), data=str(toy.data), defenses=("neural-cleanse:budget=exhaustive",))
    with (
        (tmp_path / "events").open("wb") as events,
        subprocess.Popen(WORKER, stdin=-1, stdout=events, stderr=-1, env=quiet()) as process,
    ):
        assert process.stdin is not None
        process.stdin.write(job.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while b'"advanced"' not in (tmp_path / "events").read_bytes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=20) == 3
    seen = [json.loads(line)["event"] for line in (tmp_path / "events").read_bytes().splitlines()]
    assert seen[:4] == ["opened", "described", "answered", "certified"]
    assert set(seen[4:]) == {"advanced"}


# --- training data ----------------------------------------------------------------------------------------------------


def training_job(toy: Toy, folder: Path, **changes: Any) -> Job:
    """The clean toy and a training set of 640 images."""
    images = toy_images(toy)
    images = images.take(np.tile(np.arange(len(images)), 2))
    save_npz(folder / "training.npz", images)
    given = {"training_data": str(folder / "training.npz"), "defenses": ("activation-clustering",), **changes}
    return Job(model=str(toy.clean), data=str(toy.data), **given)


def test_run_asks_dataset_scans_about_the_training_data(toy: Toy, tmp_path: Path) -> None:
    scans = ("activation-clustering", "spectral-signatures")
    events = done(training_job(toy, tmp_path, defenses=scans))
    findings = [event.finding for event in events if isinstance(event, Found)]
    assert [(finding.defense, finding.kind) for finding in findings] == [(name, "dataset") for name in scans]
    for finding in findings:
        assert len(finding.result.sample_scores) == 640
        assert [entry.n for entry in finding.result.classes] == [80] * 8
    facts = of_kind(events, Described).subject.training_data
    assert (facts.images, facts.source, facts.classes) == (640, "npz training.npz", 8)
    assert {event.stage for event in events if isinstance(event, Advanced)} == {"activation-clustering"}
    assert list(of_kind(events, Finished).seconds_per_stage) == ["load", "certificate", *scans]


def test_run_reads_the_whole_training_data_whatever_the_limit_on_images(toy: Toy, tmp_path: Path) -> None:
    events = done(training_job(toy, tmp_path, limit=300))
    described = of_kind(events, Described).subject
    assert (described.data.images, described.training_data.images) == (300, 640)


def test_run_has_no_training_data_when_none_is_given(toy: Toy) -> None:
    described = of_kind(done(Job(model=str(toy.clean), data=str(toy.data))), Described)
    assert described.subject.training_data is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"training_data": None}, "activation-clustering judges the training data; name it with --training-data"),
        ({"defenses": ("neural-cleanse",)}, "nothing reads --training-data: neural-cleanse judges the model alone"),
        ({"training_data": "nowhere"}, "'nowhere': no such file or folder"),
        ({"training_split": "odd"}, "no split 'odd'"),
    ],
)
def test_run_refuses_before_anything_is_measured_when_the_training_data(
    toy: Toy, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    events: list[Event] = []
    with pytest.raises(DataError, match=problem):
        worker.run(training_job(toy, tmp_path, **changes), events.append)
    assert [event.event for event in events] == ["opened"]


def test_run_asks_the_reference_what_the_smaller_clusters_are(toy: Toy, tmp_path: Path) -> None:
    blind = of_kind(done(training_job(toy, tmp_path, defenses=EXRE)), Found).finding
    assert blind.verdict is Verdict.NOT_APPLICABLE
    events = done(training_job(toy, tmp_path, defenses=EXRE, reference=str(toy.backdoored)))
    digest = hashlib.sha256(toy.backdoored.read_bytes()).hexdigest()
    named = of_kind(events, Described).subject.reference
    assert (named.file, named.sha256) == ("backdoored.onnx", digest)
    reason = of_kind(events, Found).finding.reason
    assert reason.startswith("the reference answers as the audited file does: "), "the toys differ by the trigger alone"


@pytest.mark.parametrize("scan", ["activation-clustering", "spectral-signatures"])
def test_run_refuses_a_reference_that_no_defense_asks(toy: Toy, tmp_path: Path, scan: str) -> None:
    problem = "nothing asks the --reference; add --defense activation-clustering:rule=exclusionary-reclassification"
    with pytest.raises(DataError, match=problem):
        done(training_job(toy, tmp_path, defenses=(scan,), reference=str(toy.backdoored)))


@pytest.mark.parametrize("says", [False, True])
def test_run_drives_a_reference_as_it_says_or_as_was_stated_of_the_audited_file(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: bool
) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.doc_string = "another"
        if not says:
            del model.metadata_props[:]

    seen: list[Any] = []

    def gathered(*_: Any, **__: Any) -> Any:
        raise SessionError("far enough")

    monkeypatch.setattr(worker, "gather_evidence", gathered)
    monkeypatch.setattr(worker, "_named", lambda _, session: seen.append(session.artifact.contract))
    reference = changed_model(toy, tmp_path / "other.onnx", change)
    said = StatedContract(range=(0.0, 255.0))
    job = training_job(toy, tmp_path, defenses=EXRE, reference=str(reference), contract=said)
    with pytest.raises((SessionError, worker.MisreadFileError)):
        done(job)
    assert seen[0].range == ((0.0, 1.0) if says else (0.0, 255.0))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("clean.onnx", "clean.onnx is the audited file; name one that was trained without the flagged rows"),
        ("toy.npz", "--reference toy.npz: "),
        ("other.onnx", "answers images of 16x16 with 7 classes, the audited file images of 16x16 with 8 classes"),
        ("turned.onnx", "turned.onnx names other classes than the audited file, or in another order"),
    ],
)
def test_run_refuses_a_reference_that_cannot_be_asked(toy: Toy, tmp_path: Path, name: str, problem: str) -> None:
    changes = {"other.onnx": one_class_less, "turned.onnx": turned_names}
    if name in changes:
        changed_model(toy, tmp_path / name, changes[name])
    folder = tmp_path if name in changes else toy.clean.parent
    with pytest.raises(DataError, match=re.escape(problem)):
        done(training_job(toy, tmp_path, defenses=EXRE, reference=str(folder / name)))


def test_run_refuses_a_reference_that_is_driven_otherwise_than_it_was_trained(toy: Toy, tmp_path: Path) -> None:
    def in_bytes(model: onnx.ModelProto) -> None:
        (entry,) = model.metadata_props
        entry.value = json.dumps({**json.loads(entry.value), "range": [0, 255]})

    reference = changed_model(toy, tmp_path / "bytes.onnx", in_bytes)
    problem = r"^--reference bytes.onnx: clean accuracy on 320 images is .* as the file is driven now, but .* with "
    with pytest.raises(DataError, match=problem):
        done(training_job(toy, tmp_path, defenses=EXRE, reference=str(reference)))


def test_run_refuses_a_reference_that_answers_with_nan(toy: Toy, tmp_path: Path) -> None:
    def without_numbers(model: onnx.ModelProto) -> None:
        weight = next(tensor for tensor in model.graph.initializer if tensor.dims)
        value = np.full(tuple(weight.dims), np.nan, np.float32)
        weight.CopyFrom(onnx.numpy_helper.from_array(value, weight.name))

    reference = changed_model(toy, tmp_path / "nan.onnx", without_numbers)
    with pytest.raises(DataError, match=r"^--reference nan.onnx answers clean images with NaN or infinity$"):
        done(training_job(toy, tmp_path, defenses=EXRE, reference=str(reference)))


def turned_names(model: onnx.ModelProto) -> None:
    (entry,) = model.metadata_props
    said = json.loads(entry.value)
    entry.value = json.dumps({**said, "class_names": said["class_names"][::-1]})


def one_class_less(model: onnx.ModelProto) -> None:
    last = model.graph.node[-1]
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name in last.input:
            values = onnx.numpy_helper.to_array(tensor)[..., :-1]
            model.graph.initializer[index].CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = 7
    del model.metadata_props[:]


def test_run_refuses_training_data_of_another_size(
    toy: Toy, tmp_path: Path, make_noise: Callable[..., ImageSet]
) -> None:
    save_npz(tmp_path / "small.npz", make_noise(100, size=8, classes=8))
    with pytest.raises(DataError, match="images are 8x8, the model takes 16x16"):
        done(training_job(toy, tmp_path, training_data=str(tmp_path / "small.npz")))


def test_run_says_not_applicable_of_a_dataset_scan_when_the_training_data_has_no_labels(
    toy: Toy, tmp_path: Path
) -> None:
    images = toy_images(toy)
    folder = tmp_path / "bare"
    folder.mkdir()
    for row in range(60):
        Image.fromarray(images.images[row]).save(folder / f"{row}.png")
    finding = of_kind(done(training_job(toy, tmp_path, training_data=str(folder))), Found).finding
    assert (finding.verdict, finding.kind) == (Verdict.NOT_APPLICABLE, "dataset")
    assert "has no labels" in finding.reason
