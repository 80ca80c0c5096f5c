"""Reads reports of this and every other minor version: what is unknown here was not measured, and never a pass."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qdefense.findings import Verdict
from qdefense.report.escaping import shortened
from qdefense.report.model import SCHEMA_VERSION, Report

_UNKNOWN_FIELD = "extra_forbidden"
_UNKNOWN_VALUE = frozenset({"enum", "literal_error", "union_tag_invalid"})
_MAJOR = SCHEMA_VERSION.partition(".")[0]
_TURNS = 32
"""Each turn mends every problem or moves it one level up; a report is not that deep."""

Location = tuple[int | str, ...]


class ReportError(ValueError):
    """The text is no report that this version can read; the message says why."""


def read_report(text: str | bytes) -> Report:
    """A report of any minor version of this major one.

    Unknown fields are ignored. A finding whose verdict or kind is unknown here is NOT_MEASURED; a gate whose outcome is
    unknown is INCOMPLETE, exit code 3; an unknown scheme is "other"; where any other value is unknown, the smallest
    part around it that may be missing is null.

    Raises:
        ReportError: no JSON, another major version, or no report.
    """
    body = _parse(text)
    nulled: set[Location] = set()
    for _ in range(_TURNS):
        try:
            return Report.model_validate(body)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                _mend(body, problem, nulled)
    raise ReportError("not a report: nothing in it is known here; read it with the version that wrote it")


def _parse(text: str | bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(shortened(f"not a report: no JSON: {error}; write it again with qdefense audit")) from error
    version = body.get("schema_version") if isinstance(body, dict) else None
    if not isinstance(version, str) or version.partition(".")[0] != _MAJOR:
        raise ReportError(
            shortened(f"schema version {version!r}, this one reads {_MAJOR}.x; use the qdefense that wrote the report")
        )
    return dict(body)


def _mend(body: dict[str, Any], problem: ErrorDetails, nulled: set[Location]) -> None:
    """Take out an unknown field, or put something known in the place of an unknown value.

    Raises:
        ReportError: the problem is another one.
    """
    location = _without_tags(body, problem["loc"])
    parent = _at(body, location[:-1])
    if parent is None:
        return  # an earlier problem has taken it out
    if problem["type"] == _UNKNOWN_FIELD:
        del parent[location[-1]]
    elif location in nulled and len(location) > 1:
        _null(body, location[:-1], nulled)
    elif problem["type"] in _UNKNOWN_VALUE:
        if not _stand_in(parent, location):
            _null(body, location, nulled)
    else:
        where = ".".join(str(part) for part in location)
        raise ReportError(shortened(f"not a report: {where}: {problem['msg']}; write it again with qdefense audit"))


def _without_tags(body: dict[str, Any], location: Location) -> Location:
    """Pydantic names the member of a union in the location, where the body has no level of that name."""
    kept: list[int | str] = []
    node: Any = body
    for place, part in enumerate(location):
        inner = place + 1 < len(location)
        if inner and isinstance(node, dict) and part not in node and part == node.get("kind"):
            continue
        kept.append(part)
        node = _at(node, (part,)) if inner else None
    return tuple(kept)


def _at(body: dict[str, Any], location: Location) -> Any:
    node: Any = body
    for part in location:
        node = None if node is None else node[part]
    return node


def _null(body: dict[str, Any], location: Location, nulled: set[Location]) -> None:
    _at(body, location[:-1])[location[-1]] = None
    nulled.add(location)


def _stand_in(parent: dict[str, Any], location: Location) -> bool:
    match location:
        case ("findings", int(), "verdict" | "kind" as name):
            unknown = f"{name} {str(parent[name])[:40]!r} is not known to this version"
            if name == "kind":
                parent["kind"], parent["result"] = "scan", None
            if parent.get("verdict") != Verdict.NOT_MEASURED.value:
                parent["reason"] = f"{unknown}: {parent.get('reason')}"
            parent["verdict"] = Verdict.NOT_MEASURED.value
        case ("gate", "outcome"):
            parent["outcome"], parent["exit_code"] = "INCOMPLETE", 3
        case (*_, "scheme"):
            parent["scheme"] = "other"
        case _:
            return False
    return True
