"""Where an answer came from: versions, runtime, CPU and the arithmetic measured on it."""

from __future__ import annotations

import platform

from qdefense.audit.versions import versions
from qdefense.calibration import Conditions
from qdefense.converters.saturation_probe import runtime_saturation
from qdefense.report.model import Environment
from qdefense.session import SessionProfile, runtime


def environment(profile: SessionProfile | None = None, memory_limited: bool | None = None) -> Environment:
    """The environment of this process; with a profile also the operators measured to saturate on this CPU."""
    operators: tuple[str, ...] = ()
    if profile is not None:
        operators = tuple(sorted(runtime_saturation()))
    return Environment(
        versions={"python": platform.python_version(), **versions()},
        runtime=runtime(),
        profile=profile,
        saturating_operators=operators,
        memory_limited=memory_limited,
    )


def conditions_of(surroundings: Environment, seed: int) -> Conditions:
    """What of it a score rests on."""
    exact = surroundings.profile is not None and surroundings.profile.arithmetic == "exact"
    return Conditions(
        seed=seed,
        versions=surroundings.versions,
        runtime=surroundings.runtime,
        profile=surroundings.profile,
        saturating_operators=() if exact else surroundings.saturating_operators,
    )
