from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from qdefense.audit.events import EVENTS, Described, Found, Job, Stopped
from qdefense.audit.provenance import environment
from qdefense.audit.supervisor import UsageProblemError, default_memory_limit, run_audit
from qdefense.cli import run
from qdefense.findings import Finding, Verdict
from qdefense.memory import REUSED
from qdefense.report.model import Report, Subject

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

SCRIPT = Path(sysconfig.get_path("scripts"), "qdefense")
REQUIRED = ("neural-cleanse",)


def silent(_stage: str, _done: int, _total: int) -> None:
    """No progress."""


# --- workers that are no workers: a shell script in the place of the interpreter --------------------------------------

FOUND = Finding(defense="neural-cleanse", kind="scan", verdict=Verdict.BACKDOORED, reason="an alarm", seed=0)
DESCRIBED = Described(subject=Subject(file="model.onnx", sha256="d" * 64), environment=environment())
FINISHED = '{"event":"finished","seconds_per_stage":{}}'


@pytest.fixture
def fake_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Report]:
    """``fake_audit(shell)``: an audit whose worker is a shell script; ``$EVENTS`` is a file for its longer lines."""

    def audit(shell: str) -> Report:
        script = tmp_path / "worker.sh"
        script.write_text(f"#!/bin/bash\n{shell}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(script))
        return run_audit(Job(model="folder/model.onnx", data="signs"), required=REQUIRED, on_progress=silent)

    return audit


def said(*events: str | Described | Found | Stopped) -> str:
    lines = [event if isinstance(event, str) else event.model_dump_json() for event in events]
    return "read job\ncat <<'END'\n" + "\n".join(lines) + "\nEND"


def test_run_audit_tells_what_the_file_is_before_the_work_and_is_ended_by_what_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.sh"
    script.write_text(f"#!/bin/bash\n{said(DESCRIBED)}\nsleep 60\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))

    def refuse(subject: Subject) -> None:
        raise OSError(subject.file)

    with pytest.raises(OSError, match="model"):
        run_audit(Job(model="m", data="signs"), required=REQUIRED, on_progress=silent, on_described=refuse)


KILLED = "; was there too little memory (--memory-limit), or does the file end its reader? -v shows its last words"
DEATHS = {
    "it sends no JSON": ("echo hello", "the worker sent something that is no event"),
    "it sends another JSON": ("echo '[]'", "the worker sent something that is no event"),
    "it sends an unknown event": ("""echo '{"event":"passed"}'""", "the worker sent something that is no event"),
    "it sends a field too many": (
        """echo '{"event":"finished","seconds_per_stage":{},"verdict":"CLEAN"}'""",
        "the worker sent something that is no event",
    ),
    "it sends no UTF-8": (r"printf '\xff\xfe\n'", "the worker sent something that is no event"),
    "it sends half a line": (f"printf '%s' '{FINISHED[:-3]}'", "the worker sent something that is no event"),
    "it exits with 0": ("exit 0", "the worker ended before its work was done"),
    "it exits with 7": ("exit 7", "the worker ended with status 7"),
    "it crashes": ("ulimit -c 0; kill -SEGV $$", f"the worker was killed by SIGSEGV{KILLED}"),
    "it is killed": ("kill -KILL $$", f"the worker was killed by SIGKILL{KILLED}"),
    "it is killed by a nameless signal": ("kill -40 $$", f"the worker was killed by signal 40{KILLED}"),
    "it closes stdout and lives": ("exec >&-; sleep 60", "the worker ended before its work was done"),
    "it cannot be started": ("exec /no/such/python", "the worker ended with status 127"),
}


@pytest.mark.parametrize(("shell", "reason"), DEATHS.values(), ids=list(DEATHS))
def test_run_audit_is_incomplete_and_says_why_when(
    fake_audit: Callable[[str], Report], monkeypatch: pytest.MonkeyPatch, shell: str, reason: str
) -> None:
    monkeypatch.setattr("qdefense.audit.supervisor.ENDING_SECONDS", 1 if "sleep" in shell else 20)
    report = fake_audit(shell)
    assert (report.gate.outcome, report.gate.exit_code) == ("INCOMPLETE", 3)
    assert report.gate.reasons == (reason, "neural-cleanse: gave no answer")
    assert (report.subject, report.findings, report.certificate) == (Subject(file="model.onnx"), (), None)
    assert report.environment.runtime.onnxruntime


def test_run_audit_is_incomplete_when_the_worker_finishes_without_an_answer(
    fake_audit: Callable[[str], Report],
) -> None:
    report = fake_audit(said(DESCRIBED, FINISHED))
    assert (report.gate.exit_code, report.gate.reasons) == (3, ("neural-cleanse: gave no answer",))


def test_run_audit_is_incomplete_when_all_is_clean_but_the_worker_does_not_finish(
    fake_audit: Callable[[str], Report],
) -> None:
    clean = Found(finding=FOUND.model_copy(update={"verdict": Verdict.CLEAN}))
    assert fake_audit(said(DESCRIBED, clean, FINISHED)).gate.exit_code == 0
    report = fake_audit(said(DESCRIBED, clean) + "\nkill -ABRT $$")
    assert (report.gate.exit_code, report.gate.reasons) == (3, (f"the worker was killed by SIGABRT{KILLED}",))


@pytest.mark.parametrize(
    "ending",
    [
        *("kill -KILL $$", "echo garbage"),
        *(said(Stopped(exit_code=code, message="halt")) for code in (2, 3, 4)),
    ],
)
def test_run_audit_fails_when_an_alarm_was_sent_before_the_end(
    fake_audit: Callable[[str], Report], ending: str
) -> None:
    report = fake_audit(said(DESCRIBED, Found(finding=FOUND)) + "\n" + ending.removeprefix("read job\n"))
    assert (report.gate.outcome, report.gate.exit_code) == ("FAILED", 1)
    assert report.gate.reasons[0] == "neural-cleanse: an alarm"
    assert len(report.gate.reasons) == 2, "the report must say that it was cut short"


@pytest.mark.parametrize("code", [2, 3, 4])
def test_run_audit_is_incomplete_when_the_worker_stops_after_the_file_was_let_in(
    fake_audit: Callable[[str], Report], code: Any
) -> None:
    report = fake_audit(said(DESCRIBED, Stopped(exit_code=code, message="no room left")))
    assert (report.gate.exit_code, report.gate.reasons[0]) == (3, "no room left")
    assert report.subject == DESCRIBED.subject


def test_run_audit_refuses_when_the_worker_refuses_the_file(fake_audit: Callable[[str], Report]) -> None:
    opened = '{"event":"opened","subject":{"file":"model.onnx","sha256":"abc","size_bytes":3}}'
    report = fake_audit(said(opened, Stopped(exit_code=4, message="no ONNX model")))
    assert (report.gate.outcome, report.gate.exit_code, report.gate.reasons) == ("REFUSED", 4, ("no ONNX model",))
    assert report.subject == Subject(file="model.onnx", sha256="abc", size_bytes=3)


def test_run_audit_raises_when_file_and_data_do_not_fit(fake_audit: Callable[[str], Report]) -> None:
    with pytest.raises(UsageProblemError, match=r"^8 classes, not 12$"):
        fake_audit(said(Stopped(exit_code=2, message="8 classes, not 12")))


def test_run_audit_takes_nothing_after_the_end_when_more_is_sent(fake_audit: Callable[[str], Report]) -> None:
    clean = Found(finding=FOUND.model_copy(update={"verdict": Verdict.CLEAN}))
    report = fake_audit(said(DESCRIBED, Stopped(exit_code=3, message="halt"), clean, FINISHED))
    assert (report.gate.exit_code, report.findings) == (3, ())


def test_run_audit_survives_a_worker_that_never_reads_when_the_job_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.sh"
    script.write_text("#!/bin/bash\nexec <&-\nexit 9\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    job = Job(model="model.onnx", data="x" * 1_000_000)
    report = run_audit(job, required=REQUIRED, on_progress=silent)
    assert (report.gate.exit_code, report.gate.reasons[0]) == (3, "the worker ended with status 9")


def test_run_audit_ends_the_worker_when_the_progress_bar_fails(fake_audit: Callable[[str], Report]) -> None:
    """Whatever happens in the supervisor, no worker stays behind."""
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(UsageProblemError):
        fake_audit(said(Stopped(exit_code=2, message="no")) + "\nsleep 60")
    assert {child.pid for child in psutil.Process().children()} <= before


def test_worker_starts_without_the_current_folder_on_its_path(fake_audit: Callable[[str], Report]) -> None:
    """A file `torch.py` beside the model must not be imported."""
    report = fake_audit('[ "$1" = -P ] && exit 41')
    assert report.gate.reasons[0] == "the worker ended with status 41"


def test_default_memory_limit_is_what_is_free_now(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(total=8 * 2**30, available=3 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert default_memory_limit() == 3 * 2**30


def test_events_survive_the_wire_when_values_are_not_finite() -> None:
    body = FOUND.model_copy(update={"settings": {"value": float("nan")}})
    event = EVENTS.validate_json(Found(finding=body).model_dump_json())
    assert isinstance(event, Found)
    assert event.finding.settings == {"value": None}


# --- real workers -----------------------------------------------------------------------------------------------------

WATCHER = """
import os, sys
_log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def _watch(event, arguments):
    if event == "open":
        os.write(_log, f"{os.getpid()}\\t{arguments[0]!s}\\n".encode(errors="replace"))
        if str(arguments[0]) == os.environ["WATCH_MODEL"]:
            os.write(1, b'{"event":"finished","seconds_per_stage":{}}\\n')
            print('{"event":"stopped","exit_code":4,"message":"a stray print"}', flush=True)
sys.addaudithook(_watch)
"""


class Watched:
    """Command lines whose processes, supervisor and worker alike, log every file they open.

    As it opens the model the worker also prints what looks like events.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.log = folder / "opened.log"
        (folder / "sitecustomize.py").write_text(WATCHER)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        watching = {"PYTHONPATH": path, "WATCH_LOG": str(self.log), "WATCH_MODEL": str(model)}
        self.environment = os.environ | watching | {"OMP_NUM_THREADS": "1"}

    def opened(self) -> dict[str, set[str]]:
        """What each process opened."""
        seen: dict[str, set[str]] = {}
        for line in self.log.read_text(errors="replace").splitlines() if self.log.exists() else ():
            pid, _, path = line.partition("\t")
            seen.setdefault(pid, set()).add(path)
        return seen

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [SCRIPT, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_as_in_a_shell,  # noqa: PLW1509
        )


def _as_in_a_shell() -> None:
    """A shell's background jobs ignore SIGINT, those of nohup SIGHUP, and so would the tests run in one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def outside_volatile(text: bytes) -> bytes:
    """The bytes of a report without its part ``volatile``, which stands last."""
    head, mark, _ = text.partition(b'\n  "volatile": ')
    assert mark, "a report says what is volatile"
    return head


@pytest.fixture(scope="module")
def twice(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bytes], dict[str, set[str]], Path]:
    """Two audits of one file with one seed, the truth deleted in between, the threads another number."""
    folder = tmp_path_factory.mktemp("twice")
    model, truth = folder / "model.onnx", folder / "model.truth.json"
    model.write_bytes(toy.clean.read_bytes())
    truth.write_text('{"attack": null}')
    model.with_suffix(".truth.npz").write_bytes(b"the state of a trigger")
    watched = Watched(folder, model)
    reports = []
    for threads in ("1", "2"):
        arguments = ("--data", str(toy.data), "--format", "json", "--defense", toy.scan, "--threads", threads)
        process = watched.start("audit", str(model), *arguments)
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, b"")
        reports.append(output)
        for file in (truth, model.with_suffix(".truth.npz")):
            file.unlink(missing_ok=True)
    return reports, watched.opened(), model


def test_audit_gives_identical_bytes_when_run_twice_and_the_truth_is_deleted(
    twice: tuple[list[bytes], dict[str, set[str]], Path],
) -> None:
    first, second = twice[0]
    assert outside_volatile(first) == outside_volatile(second)
    assert first != second, "a report says when it was made"
    assert json.loads(first)["gate"]["exit_code"] == 0


def test_audit_keeps_time_and_host_out_of_all_but_volatile(
    twice: tuple[list[bytes], dict[str, set[str]], Path],
) -> None:
    report = json.loads(twice[0][0])
    volatile = report.pop("volatile")
    expected = ["command", "host", "load", "peak_memory_bytes", "seconds", "seconds_per_stage", "started"]
    assert sorted(volatile) == expected
    assert (volatile["peak_memory_bytes"] is None) is (sys.platform != "linux")
    assert sorted(volatile["seconds_per_stage"]) == ["certificate", "load", "neural-cleanse"]
    assert volatile["command"][:2] == ["qdefense", "audit"]
    body = json.dumps(report)
    assert volatile["host"] not in body
    assert str(twice[2].parent) not in body


def test_audit_never_opens_the_truth_file(twice: tuple[list[bytes], dict[str, set[str]], Path]) -> None:
    _, opened, model = twice
    readers = [pid for pid, paths in opened.items() if str(model) in paths]
    assert len(opened) >= 4, "two supervisors and two workers are watched"
    assert len(readers) == 2, "the workers open the model, the supervisors do not"
    assert not [path for paths in opened.values() for path in paths if "truth" in path]


def test_audit_never_opens_the_truth_beside_the_training_data(toy: Toy, tmp_path: Path) -> None:
    model, data = tmp_path / "model.onnx", tmp_path / "training.npz"
    model.write_bytes(toy.clean.read_bytes())
    data.write_bytes(toy.data.read_bytes())
    for path in (model, data):
        path.with_suffix(".truth.json").write_text('{"attack": null, "poison_indices": []}')
        path.with_suffix(".truth.npz").write_bytes(b"the state of a trigger")
    watched = Watched(tmp_path, model)
    arguments = ("--data", str(toy.data), "--training-data", str(data), "--defense", "activation-clustering")
    process = watched.start("audit", str(model), *arguments, "--format", "json")
    output, _ = process.communicate(timeout=120)
    report = json.loads(output)
    assert report["findings"][0]["defense"] == "activation-clustering"
    opened = watched.opened()
    assert str(data) in {path for paths in opened.values() for path in paths}
    assert not [path for paths in opened.values() for path in paths if "truth" in path]


def test_audit_takes_no_stray_print_for_an_event_when_a_library_prints_in_the_worker(
    twice: tuple[list[bytes], dict[str, set[str]], Path],
) -> None:
    """The watcher prints a forged "finished" and a forged "stopped" as the worker opens the model."""
    report = json.loads(twice[0][0])
    assert [finding["verdict"] for finding in report["findings"]] == ["CLEAN"]
    assert report["certificate"]["certified"]


def test_audit_is_incomplete_and_writes_its_report_when_the_worker_is_killed_in_the_middle(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from contextlib import contextmanager  # noqa: PLC0415

    stages = []

    def kill_at_the_scan(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        (worker,) = [child for child in psutil.Process().children() if "qdefense.audit.worker" in child.cmdline()]
        worker.kill()

    @contextmanager
    def killing() -> Iterator[Callable[[str, int, int], None]]:
        yield kill_at_the_scan

    monkeypatch.setattr("qdefense.cli.audit.progress_bar", killing)
    arguments = ["--data", str(toy.data), "--defense", toy.scan, "--threads", "1", "--output-dir", str(tmp_path)]
    assert run(["audit", str(toy.clean), *arguments]) == 3
    report = Report.model_validate_json((tmp_path / "report.json").read_bytes())
    assert stages[0] == "neural-cleanse"
    assert report.gate.reasons == (f"the worker was killed by SIGKILL{KILLED}", "neural-cleanse: gave no answer")
    assert report.certificate is not None
    assert report.subject.clean_accuracy is not None
    assert "killed by SIGKILL" in capfd.readouterr().out


ENDLESS = "neural-cleanse:budget=exhaustive"


@pytest.fixture
def started(toy: Toy, tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[bytes], psutil.Process]]]:
    """Start a long audit and wait until its worker has opened the model."""
    processes = []

    def start() -> tuple[subprocess.Popen[bytes], psutil.Process]:
        watched = Watched(tmp_path, toy.clean)
        process = watched.start("audit", str(toy.clean), "--data", str(toy.data), "--defense", ENDLESS)
        processes.append(process)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            readers = [pid for pid, paths in watched.opened().items() if str(toy.clean) in paths]
            if readers:
                worker = psutil.Process(int(readers[0]))
                processes.append(worker)
                return process, worker
            time.sleep(0.05)
        pytest.fail("no worker opened the model")

    yield start
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def gone(process: psutil.Process) -> bool:
    """Whether a process ends within seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("send", "number"),
    [
        pytest.param(os.kill, signal.SIGINT, id="Ctrl-C"),
        pytest.param(os.killpg, signal.SIGINT, id="Ctrl-C to the group"),
        pytest.param(os.kill, signal.SIGTERM, id="a job runner"),
        pytest.param(os.kill, signal.SIGHUP, id="a closed terminal"),
    ],
)
def test_audit_exits_130_and_leaves_no_worker_when_interrupted(
    started: Callable[[], tuple[subprocess.Popen[bytes], psutil.Process]],
    send: Callable[[int, int], None],
    number: signal.Signals,
) -> None:
    process, worker = started()
    send(process.pid, number)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (130, b"", b"interrupted\n")
    assert not worker.is_running()


def test_audit_leaves_no_worker_when_the_supervisor_is_killed(
    started: Callable[[], tuple[subprocess.Popen[bytes], psutil.Process]],
) -> None:
    process, worker = started()
    assert worker.is_running()
    process.kill()
    process.communicate(timeout=30)
    assert gone(worker)


def test_the_worker_reuses_its_memory_where_the_user_has_no_other_wish(
    started: Callable[[], tuple[subprocess.Popen[bytes], psutil.Process]], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = REUSED
    monkeypatch.setenv(theirs, "4096")
    monkeypatch.delenv(ours, raising=False)
    process, worker = started()
    told = worker.environ()
    process.kill()
    process.communicate(timeout=30)
    assert (told[theirs], told[ours]) == ("4096", REUSED[ours])
