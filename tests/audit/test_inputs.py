"""Filters in an audit: what the worker makes of ``inputs``, and what the gate makes of the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qdefense.audit.events import Certified, Described, Found, Job
from qdefense.audit.supervisor import run_audit
from qdefense.data.images import DataError, ImageSet
from qdefense.data.npz import load_npz, save_npz
from qdefense.findings import FilterResult, Verdict

from ..defenses.filters.corner_nets import images, network, stamp  # noqa: TID252
from .worker_events import done, of_kind

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

STRIP = "strip:overlays=20"


@pytest.fixture(scope="module", name="files")
def _files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backdoored file, clean images, and inputs of which 20 of 60 carry the trigger, or none."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "bad.onnx").write_bytes(network(backdoored=True))
    (folder / "sigmoid.onnx").write_bytes(network(backdoored=True, head="sigmoid"))
    save_npz(folder / "clean.npz", images(200))
    given = images(60, seed=4)
    save_npz(folder / "fine.npz", given)
    pixels = given.pixels
    pixels[:20] = stamp(pixels[:20])
    save_npz(
        folder / "stamped.npz", replace(given, images=np.rint(pixels * 255).astype(np.uint8).transpose(0, 2, 3, 1))
    )
    return folder


def job(files: Path, **changes: Any) -> Job:
    defaults = {
        "model": str(files / "bad.onnx"), "data": str(files / "clean.npz"), "defenses": (STRIP,),
        "inputs": str(files / "stamped.npz"), "memory_bytes": 10**15,
    }  # fmt: skip
    return Job(**{**defaults, **changes})


def test_run_judges_the_inputs_by_the_filter(files: Path) -> None:
    events = done(job(files))
    finding = of_kind(events, Found).finding
    assert (finding.defense, finding.kind, finding.verdict) == ("strip", "filter", Verdict.BACKDOORED)
    assert isinstance(finding.result, FilterResult)
    assert [row for row, made in enumerate(finding.result.decisions) if made == "reject"][:20] == list(range(20))
    facts = of_kind(events, Described).subject.inputs
    assert (facts.source, facts.images, facts.labelled) == ("npz stamped.npz", 60, False)
    assert of_kind(events, Certified)


def test_run_gives_equal_findings_for_any_number_of_threads(files: Path) -> None:
    one, two = (of_kind(done(job(files, threads=threads)), Found).finding for threads in (1, 2))
    assert one == two


def test_run_reads_no_label_of_the_inputs(files: Path, tmp_path: Path) -> None:
    """Labels of another task, another number of classes: nobody looks at them."""
    given = load_npz(files / "stamped.npz", split=None, limit=None, seed=0)
    other = replace(given, labels=given.labels * 0, class_names=("anything",))
    save_npz(tmp_path / "other.npz", other)
    one, two = (
        of_kind(done(job(files, inputs=str(path))), Found).finding
        for path in (files / "stamped.npz", tmp_path / "other.npz")
    )
    assert one == two


def misfit(files: Path, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        done(job(files, **changes))
    return str(caught.value)


def test_run_refuses_a_filter_without_inputs(files: Path) -> None:
    assert misfit(files, inputs=None) == "strip judges inputs; name them with --inputs"


def test_run_refuses_inputs_that_nothing_judges(files: Path) -> None:
    assert misfit(files, defenses=("neural-cleanse",)) == (
        "nothing reads --inputs: neural-cleanse is no filter; add --defense strip"
    )


def test_run_refuses_inputs_of_another_size(files: Path, make_noise: Any, tmp_path: Path) -> None:
    save_npz(tmp_path / "large.npz", make_noise(10, size=9))
    assert misfit(files, inputs=str(tmp_path / "large.npz")).startswith(
        "npz large.npz: images are 9x9, the model takes 8x8"
    )


def test_run_refuses_a_split_of_the_inputs_that_is_not_there(files: Path) -> None:
    assert "fuzzy" in misfit(files, inputs_split="fuzzy")


def test_run_passes_a_sigmoid_over_before_any_filter_runs(files: Path) -> None:
    finding = of_kind(done(job(files, model=str(files / "sigmoid.onnx"))), Found).finding
    assert (finding.defense, finding.kind, finding.verdict) == ("strip", "filter", Verdict.NOT_APPLICABLE)
    assert finding.cost.forwards == 0


@pytest.mark.parametrize(
    ("inputs", "code", "reason"),
    [
        ("stamped", 1, " of 60 inputs rejected, where at most "),
        ("fine", 3, "the fewest that would be an alarm are 15 (25.0%), more than 5%"),
    ],
)
def test_an_audit_by_a_filter_alone_never_passes(files: Path, inputs: str, code: int, reason: str) -> None:
    """Sixty inputs that are fine do not tell that no twentieth is stamped; and exit code 0 needs a model scan."""
    report = run_audit(
        job(files, inputs=str(files / f"{inputs}.npz"), memory_bytes=None),
        required=("strip",),
        on_progress=lambda *_: None,
    )
    assert report.gate.exit_code == code
    assert reason in report.gate.reasons[0]


def test_few_inputs_or_images_are_not_measured(files: Path, toy: Toy, tmp_path: Path) -> None:
    assert isinstance(load_npz(toy.few, split=None, limit=None, seed=0), ImageSet)
    finding = of_kind(done(job(files, model=str(toy.clean), data=str(toy.few), inputs=str(toy.data))), Found).finding
    assert finding.verdict is Verdict.NOT_MEASURED
    assert "at least 120 are needed" in finding.reason
