"""Which versions are installed, from their metadata alone: nothing is imported, so that broken ones are named, too."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version

UNKNOWN = "unknown"
_MODULES = ("qdefense", "onnxruntime", "onnx", "torch", "numpy")


def versions() -> dict[str, str]:
    """The versions of what decides an answer, by the name of the distribution that provides it."""
    return {name: version_of(name) for module in _MODULES for name in distributions_of(module)}


def distributions_of(module: str) -> tuple[str, ...]:
    """Who provides a top-level module, ``onnxruntime-gpu`` for one; its own name where nobody claims it."""
    return tuple(sorted(set(_providers().get(module, (module,)))))


def version_of(distribution: str) -> str:
    """The version installed, or "unknown"."""
    try:
        return version(distribution) or UNKNOWN
    except PackageNotFoundError:
        return UNKNOWN


@functools.cache
def _providers() -> Mapping[str, list[str]]:
    return packages_distributions()
