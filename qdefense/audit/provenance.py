"""Where an answer came from: versions, runtime, CPU and the arithmetic measured on it."""

from __future__ import annotations

import platform
from importlib.metadata import version

from qdefense.report.model import Environment
from qdefense.session import SessionProfile, runtime

_PACKAGES = ("qdefense", "onnxruntime", "onnx", "torch", "numpy")


def environment(profile: SessionProfile | None = None, memory_limited: bool | None = None) -> Environment:
    """The environment of this process; with a profile also the operators measured to saturate on this CPU."""
    operators: tuple[str, ...] = ()
    if profile is not None:
        from qdefense.converters.shadow import runtime_saturation  # noqa: PLC0415 (imports torch)

        operators = tuple(sorted(runtime_saturation()))
    versions = {name: version(name) for name in _PACKAGES}
    return Environment(
        versions={"python": platform.python_version(), **versions},
        runtime=runtime(),
        profile=profile,
        saturating_operators=operators,
        memory_limited=memory_limited,
    )
