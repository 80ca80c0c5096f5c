from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdefense.audit.provenance import conditions_of, environment
from qdefense.report.model import Environment
from qdefense.report.reading import read_report
from qdefense.session import SessionProfile

SWEEP = Path(__file__).resolve().parents[2] / "benchmarks" / "calibration" / "results" / "reports"


def _surroundings(**profile: object) -> Environment:
    here = environment(SessionProfile(batch=64).with_changes(**profile))
    return here.model_copy(update={"saturating_operators": ("QGemm",)})


def test_conditions_name_the_saturating_operators_of_a_session_that_saturates() -> None:
    assert conditions_of(_surroundings(), 0).saturating_operators == ("QGemm",)
    assert conditions_of(_surroundings(arithmetic="exact"), 0).saturating_operators == ()


def test_conditions_tell_the_arithmetics_apart() -> None:
    as_run, exact = (conditions_of(_surroundings(arithmetic=name), 0) for name in ("as-run", "exact"))
    assert as_run.differences(exact) == [
        "session CPUExecutionProvider, all, batch 64, threads 1, saturating: QGemm (here CPUExecutionProvider, all, "
        "batch 64, threads 1, exact arithmetic, no saturation)"
    ]


def test_conditions_tell_accuracy_levels_apart() -> None:
    own, other = (conditions_of(_surroundings(matmulnbits_accuracy_level=level), 0) for level in (1, 4))
    (difference,) = own.differences(other)
    assert difference.endswith("threads 1, MatMulNBits accuracy level 4, saturating: QGemm)")


@pytest.mark.parametrize("name", ["n100.json", "n100.int8-static.json", "n100.int8-dynamic.json"])
def test_conditions_of_reports_from_before_the_arithmetics_are_those_of_as_run_sessions(name: str) -> None:
    data = (SWEEP / name).read_bytes()
    assert "arithmetic" not in json.loads(data)["environment"]["profile"]
    report = read_report(data)
    profile = report.environment.profile
    assert profile is not None
    now = report.environment.model_copy(update={"profile": SessionProfile(batch=profile.batch)})
    assert conditions_of(report.environment, 0) == conditions_of(now, 0)
    assert conditions_of(report.environment, 0).differences(conditions_of(now, 0)) == []
