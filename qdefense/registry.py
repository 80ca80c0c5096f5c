"""Named, configurable classes: one registry for attacks, one for defenses, and the ``NAME:key=value,...`` text form."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class SpecError(ValueError):
    """A ``NAME:key=value,...`` text that names nothing known or sets something wrong."""


class Registry(Generic[T]):
    """Classes by their ``name``; every module of ``package`` is imported on first use: a new file suffices."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._classes: dict[str, type[T]] = {}

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator.

        Raises:
            ValueError: the name is taken.
        """
        name: str = cls.name  # type: ignore[attr-defined]
        if name in self._classes:
            raise ValueError(f"{self.kind} {name!r} is registered twice: {self._classes[name]} and {cls}")
        self._classes[name] = cls
        return cls

    def names(self) -> tuple[str, ...]:
        """Every registered name, sorted."""
        self._discover()
        return tuple(sorted(self._classes))

    def create(self, spec: str) -> T:
        """An instance from ``NAME`` or ``NAME:key=value,key=value``; values are validated by the class's own types.

        Raises:
            SpecError: unknown name or key, or a value out of range.
        """
        name, _, tail = spec.partition(":")
        if name not in self.names():
            close = difflib.get_close_matches(name, self._classes, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(self.names())}"
            raise SpecError(f"there is no {self.kind} {name!r}; {hint}")
        settings = _parse_settings(spec, tail)
        try:
            return TypeAdapter(self._classes[name]).validate_python(settings)
        except ValidationError as error:
            raise SpecError(f"{self.kind} {spec!r}: {_first_problem(error, self._classes[name])}") from error

    def _discover(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.walk_packages(package.__path__, prefix=f"{self._package}."):
            importlib.import_module(module.name)


def _parse_settings(spec: str, tail: str) -> dict[str, str]:
    settings: dict[str, str] = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise SpecError(f"{spec!r}: {item!r} is not key=value")
        key = key.strip().replace("-", "_")
        if key in settings:
            raise SpecError(f"{spec!r}: {key!r} is set twice; give it once")
        settings[key] = value.strip()
    return settings


def _first_problem(error: ValidationError, cls: type[Any]) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        known = ", ".join(field.name for field in dataclasses.fields(cls))
        return f"there is no setting {where!r}; known: {known}"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}"
