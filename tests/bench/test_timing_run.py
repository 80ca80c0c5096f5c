"""`bench --latency`: what it times, resumes and leaves out, and the report's table and chart of its very records."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdefense.bench.cells import plan_cells
from qdefense.bench.cohort import Cohort
from qdefense.bench.making import replica_of
from qdefense.bench.matrix import read_matrix
from qdefense.bench.measuring import Bench, fit_filter
from qdefense.bench.plots import cost_charts, series_of
from qdefense.bench.running import sources_of
from qdefense.bench.sheets import sheets_of
from qdefense.bench.store import LATENCY, RECORDS, Store, StoreError, read_latencies
from qdefense.bench.summary import BenchReport, read_results, summarise
from qdefense.bench.timing_records import PLAIN, FileLatency, PeakMemory
from qdefense.cli import run
from qdefense.data.npz import SPLIT_KEYS
from qdefense.defenses import FittedFilter
from qdefense.findings import Finding, Verdict
from qdefense.session import SessionError

from ..defenses.filters.corner_nets import images, network  # noqa: TID252 (networks in closed form)
from .conftest import Desk, desk

Capture = pytest.CaptureFixture[str]
TIMED = """\
[bench]
name = "timed"
clean_images = 160
held_out_images = 100
latency_rounds = 3
latency_offline_rounds = 2

[data.quarters]
path = "quarters.npz"
target_class = 2

[[grid]]
data = ["quarters"]
attacks = ["none", "badnets:size=2,margin=0"]
seeds = [0, 1]
defenses = ["strip:overlays=20", "strip:overlays=100"]
"""
TITLE = "quarters/resnet8/none/seed 0/fp32/as-run"
TOO_FEW = "160 clean images; at least 200 are needed: 100 overlays, 50 to fit the boundary and 50 to measure its false"
BOTH = ("session", "session + strip:overlays=20")


def remembered(name: str, build: Callable[[], Callable[[], object]]) -> PeakMemory:
    """What a fresh process would be told, without the seconds that it takes to start one."""
    pickle.loads(pickle.dumps(build))()()
    return PeakMemory(name=name, peak_bytes=2, before_bytes=1)


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdefense.bench.timing_run.peak_memory", remembered)


@pytest.fixture(scope="module", autouse=True)
def _paths_are_relative_to_the_matrix() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("QDEFENSE_DATA", raising=False)
        yield


def supplied(folder: Path, text: str = TIMED) -> Desk:
    """A desk whose networks need no training: they were written down."""
    made = desk(folder, text)
    sets = {"train": images(40, seed=1), "test": images(400)}
    arrays = {}
    for name, one in sets.items():
        arrays |= dict(zip(SPLIT_KEYS[name], (one.images, one.labels), strict=True))
    np.savez(folder / "quarters.npz", class_names=sets["test"].class_names, **arrays)
    table = read_matrix(made.matrix)
    with Store.for_writing(made.results) as store:
        for plan in plan_cells(table, sources_of(table, store, pin=True)):
            data = network(backdoored=plan.attack is not None, scale=12.0 + plan.network.seed)
            store.add_model(data, hashlib.sha256(data).hexdigest())
            store.add_replica(plan.recipe_sha256, plan.network.model_dump(mode="json"), replica_of(data, {}))
    return made


@pytest.fixture(scope="module", name="measured")
def _measured(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """With a record of every cell, and no latency; do not change it."""
    made = supplied(tmp_path_factory.mktemp("timed"))
    assert run(["bench", str(made.matrix)]) == 3  # one of the filters has too few images
    return made


@pytest.fixture(name="bench")
def _bench(measured: Desk, tmp_path: Path) -> Desk:
    shutil.copytree(measured.folder, tmp_path / "copy")
    return Desk(folder=tmp_path / "copy")


def timed(made: Desk, *options: str) -> int:
    return run(["bench", str(made.matrix), "--latency", *options])


def lines(made: Desk) -> list[FileLatency]:
    return list(read_latencies(made.results / LATENCY))


def reported(made: Desk) -> tuple[BenchReport, Cohort]:
    results = read_results(made.results)
    cohort = Cohort(results.records)
    return summarise(results, cohort), cohort


def test_times_the_first_network_plain_and_behind_every_filter_that_can_be_fitted(bench: Desk, capfd: Capture) -> None:
    before = (bench.results / RECORDS).read_bytes()
    assert timed(bench) == 3
    out, errors = capfd.readouterr()
    (record,) = lines(bench)
    assert record.artifact_sha256 == hashlib.sha256(network(backdoored=False)).hexdigest()
    for scenario, rows, rounds in ((record.single_stream, 1, 3), (record.offline, 64, 2)):
        assert (scenario.rows, scenario.rounds) == (rows, rounds)
        assert tuple(one.name for one in scenario.variants) == BOTH
    assert (record.profile.threads, record.threads) == (1, 1)
    fitted, left_out = record.filters
    assert (fitted.text, fitted.variant, fitted.settings["overlays"]) == ("strip:overlays=20", BOTH[1], 20)
    assert (left_out.variant, left_out.verdict) == (None, Verdict.NOT_MEASURED)
    assert left_out.reason.startswith(TOO_FEW)
    assert tuple(one.name for one in record.memory) == BOTH
    assert f"{TITLE}: strip:overlays=100 is left out: {TOO_FEW}" in errors
    assert f"not measured: {TITLE}/strip:overlays=100: {TOO_FEW}" in out
    assert (bench.results / RECORDS).read_bytes() == before


def test_a_filter_is_fitted_on_few_images_or_on_all_where_few_do_not_do(
    bench: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[tuple[str, int]] = []

    def watched(laid: Bench) -> FittedFilter | Finding:
        asked = laid.task.trial.cell.defense
        assert asked is not None
        fits.append((asked.text, len(laid.seen)))
        return fit_filter(laid)

    monkeypatch.setattr("qdefense.bench.timing_run.fit_filter", watched)
    monkeypatch.setattr("qdefense.bench.timing_run.FITTED_IMAGES", 130)
    timed(bench)
    few, many = ("strip:overlays=20", 130), ("strip:overlays=100", 160)
    assert fits == [few, ("strip:overlays=100", 130), many, few]  # and once more for the memory of what could be fitted


def test_a_damaged_file_is_told_and_not_timed(bench: Desk, capfd: Capture) -> None:
    for path in (bench.results / "models").rglob("*.onnx"):
        path.write_bytes(b"swapped")
    assert timed(bench) == 3
    assert f"failed: {TITLE}: " in (told := capfd.readouterr().err)
    assert "damaged or another file" in told
    assert not (bench.results / LATENCY).exists()


def test_nothing_is_timed_twice(bench: Desk) -> None:
    assert [timed(bench, "--only", "overlays=20") for _ in range(2)] == [0, 0]
    assert len(lines(bench)) == 1
    assert timed(bench) == 3  # other filters: another measurement
    assert timed(bench) == 3
    assert len(lines(bench)) == 2


def test_a_torn_last_line_is_dropped_and_its_file_timed_again(bench: Desk) -> None:
    timed(bench)
    path = bench.results / LATENCY
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-20])
    assert len(lines(bench)) == 1  # a reader beside the writer
    path.write_bytes(whole[:-20])
    timed(bench)
    (record,) = lines(bench)
    assert record.key == FileLatency.model_validate_json(whole).key


def test_a_line_that_is_no_latency_record_is_told(bench: Desk) -> None:
    (bench.results / LATENCY).write_text("{}\n", encoding="utf-8")
    with pytest.raises(StoreError, match=r"latency.jsonl, line 1: no latency record \(.*\); delete the line to time"):
        lines(bench)
    assert timed(bench) == 2


def test_another_runtime_is_another_measurement_and_of_the_same_the_last_one_is_shown(bench: Desk) -> None:
    timed(bench, "--only", "none/seed 0")
    path = bench.results / LATENCY
    (mine,) = lines(bench)
    runtime = mine.machine.runtime.model_copy(update={"isa": ("sse2",)})
    other = mine.model_copy(update={"key": "other", "machine": mine.machine.model_copy(update={"runtime": runtime})})
    again = mine.model_copy(update={"key": "again", "single_stream": mine.single_stream.model_copy(update={"rows": 1})})
    path.write_bytes(b"".join(one.model_dump_json().encode() + b"\n" for one in (mine, other, again)))
    runtimes = [row.runtime.rpartition(", ")[2] for row in reported(bench)[0].latency]
    assert sorted(runtimes) == sorted([" ".join(mine.machine.runtime.isa)] * 2 + ["sse2"] * 2)


def test_the_report_joins_added_latency_to_the_rates_of_its_filter(bench: Desk) -> None:
    timed(bench)
    report, cohort = reported(bench)
    (record,) = lines(bench)
    plain, behind = report.latency
    assert (plain.variant, plain.defense, plain.added_ms) == (PLAIN, None, None)
    assert behind.defense == "strip (overlays=20)"
    assert behind.added_ms == record.single_stream.added[0].difference_ms
    (sheet,) = (one for one in sheets_of(report) if one.form.id == "latency")
    assert [row[0].lines[0] for row in sheet.blocks[0].rows] == list(BOTH)
    charts = {(chart.up, chart.across.partition(" in ")[0]): chart for chart in cost_charts(report, series_of(cohort))}
    (dot,) = charts["AUROC", "added latency at batch 1, median"].dots
    assert dot.name.startswith("strip (overlays=20) against badnets, fp32: ")
    assert len(charts["clean accuracy", "latency at batch 1, p50"].dots) == 2
    assert len(charts["ASR", "latency at batch 1, p50"].dots) == 1


def test_a_filter_that_was_timed_and_never_tried_takes_no_rates(bench: Desk) -> None:
    """Its settings are others than those of the one that was tried."""
    text = TIMED.replace('"strip:overlays=20", "strip:overlays=100"', '"strip:overlays=30"')
    bench.matrix.write_text(text, encoding="utf-8")
    assert timed(bench) == 0
    report, cohort = reported(bench)
    assert report.latency[1].defense == "strip (false_rejection_rate=0.01, overlays=30, superimposition=add)"
    assert not any("added" in chart.across for chart in cost_charts(report, series_of(cohort)))


def test_only_and_dry_run_say_what_is_timed(bench: Desk, capfd: Capture) -> None:
    assert timed(bench, "--dry-run") == 0
    told = "missing       latency    {}  plain, strip:overlays=20, strip:overlays=100"
    assert capfd.readouterr().out.splitlines() == [told.format(TITLE), "1 files, 1 to time"]
    assert timed(bench, "--dry-run", "--only", "margin=0/seed 1/fp32/as-run/behaviour") == 0
    other = TITLE.replace("none/seed 0", "badnets:size=2,margin=0/seed 1")
    assert capfd.readouterr().out.splitlines()[0] == f"missing       latency    {other}  plain"
    assert not (bench.results / LATENCY).exists()


def test_a_network_whose_file_is_not_there_is_passed_over(bench: Desk, capfd: Capture) -> None:
    first, *others = (network(backdoored=bad, scale=12.0 + seed) for seed in (0, 1) for bad in (False, True))
    name = f"{hashlib.sha256(first).hexdigest()[:16]}.onnx"
    (bench.results / "models" / name).unlink()
    timed(bench, "--only", "overlays=20")
    (record,) = lines(bench)
    assert record.artifact_sha256 == hashlib.sha256(others[0]).hexdigest()  # before another seed another attack
    assert timed(bench, "--only", "none/seed 0") == 3
    assert f"no file: {TITLE}: {name} is not in models/; copy it there" in capfd.readouterr().out
    (bench.results / "manifest.json").unlink()
    assert timed(bench, "--only", "none/seed 0") == 3
    assert f"no file: {TITLE}: `qdefense bench` without --latency makes it" in capfd.readouterr().out


def test_interrupted_it_keeps_what_is_finished(bench: Desk, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    timed(bench, "--only", "none/seed 0")

    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qdefense.bench.timing_run.measure_latency", pressed)
    assert timed(bench, "--only", "none/seed 1") == 130
    assert capfd.readouterr().err.splitlines()[-1] == "interrupted"
    assert len(lines(bench)) == 1


def test_a_file_that_cannot_be_run_costs_no_other(bench: Desk, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    def broken(*_: Any) -> None:
        raise SessionError("no\x1b kernel")

    with monkeypatch.context() as patched:
        patched.setattr("qdefense.bench.timing_run.open_trial", broken)
        assert timed(bench) == 3
    out, errors = capfd.readouterr()
    assert f"failed: {TITLE}: no\\x1b kernel" in errors
    assert f"missing: {TITLE}: no\\x1b kernel" in out
    assert timed(bench, "--only", "overlays=20") == 0


@pytest.mark.parametrize("options", [("--workers", "2"), ("--scheduler", "tcp://x:1"), ("--retry-failed",)])
def test_options_of_a_run_of_cells_are_refused(bench: Desk, options: tuple[str, ...], capfd: Capture) -> None:
    assert timed(bench, *options) == 2
    assert "--latency times one file after another; leave out --workers" in capfd.readouterr().err
