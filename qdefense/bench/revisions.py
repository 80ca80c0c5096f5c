"""Which code measured: the revision of the evaluator, which keys hold, and a digest of all code, which they do not."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from qdefense.audit import versions as installed

EVALUATION_REVISION = 1
"""Raised in each change after which the evaluator may make something else of the same file or answer.

Its side are the draws, what a file does, the session and its shadow, the metrics and the latencies; a defense has a
revision of its own. What was measured under a lower one is measured again.
"""

SOURCES = "qdefense-sources"
_DIGITS = 16
_PACKAGES = ("qdefense", "qdefense.converters", "qdefense.models")
"""The last two stand beside the first in the repository."""


def versions() -> dict[str, str]:
    """Of what decides an answer, as an audit names them, and the digest of this package's own code."""
    return {**installed.versions(), SOURCES: source_digest()}


@functools.cache
def source_digest() -> str:
    """Start of the sha256 over names and text of the package's ``.py`` files; of the same code the same anywhere."""
    files = dict(file for package in _PACKAGES for file in _files(package))
    hasher = hashlib.sha256()
    for name in sorted(files):
        text = files[name].read_bytes()
        hasher.update(f"{name} {len(text)}\n".encode() + text)
    return hasher.hexdigest()[:_DIGITS]


def _files(package: str) -> Iterator[tuple[str, Path]]:
    spec = find_spec(package)
    for root in (spec and spec.submodule_search_locations) or ():
        for folder, _, names in os.walk(root, followlinks=True):
            place = Path(folder)
            inside = (*package.split("."), *place.relative_to(root).parts)
            yield from (("/".join((*inside, name)), place / name) for name in names if name.endswith(".py"))
