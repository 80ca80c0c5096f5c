"""Named, configurable classes: one registry for attacks, one for defenses, and the ``NAME:key=value,...`` text form."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class SpecError(ValueError):
    """A ``NAME:key=value,...`` text that names nothing known or sets something wrong."""


class Nested(NamedTuple):
    """What ``host=NAME,host.key=value`` says of the setting ``host``; no name where only dotted keys are given."""

    name: str | None
    settings: dict[str, Any]


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

        A setting that is itself a registered class takes ``key=NAME``, and its settings as ``key.setting=value``.

        Raises:
            SpecError: unknown name or key, or a value out of range.
        """
        name, _, tail = spec.partition(":")
        cls = self._class(name)
        return self._make(cls, _parse_settings(spec, tail), spec)

    def restore(self, name: str, settings: Mapping[str, Any]) -> T:
        """The instance of which `flat_settings` gave these settings.

        Raises:
            SpecError: unknown name or key, or a value out of range.
        """
        spec = f"{name}:{','.join(f'{key}={value}' for key, value in settings.items())}"
        return self._make(self._class(name), settings, spec)

    def _class(self, name: str) -> type[T]:
        if name not in self.names():
            raise SpecError(f"there is no {self.kind} {name!r}; {_hint(name, self.names(), self.names())}")
        return self._classes[name]

    def _make(self, cls: type[T], settings: Mapping[str, Any], spec: str) -> T:
        try:
            return TypeAdapter(cls).validate_python(_nest(settings))
        except ValidationError as error:
            raise SpecError(f"{self.kind} {spec!r}: {_first_problem(error, cls)}") from error

    def _discover(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.walk_packages(package.__path__, prefix=f"{self._package}."):
            importlib.import_module(module.name)


def flat_settings(entry: Any) -> dict[str, Any]:
    """Every setting with its value, defaults filled in; what is ``None`` is unset, and left out.

    So are its ``untold_settings``, where it has such. Those of a setting ``host`` that is a registered class itself
    follow its name as ``host.key``.
    """
    settings: dict[str, Any] = {}
    untold: frozenset[str] = getattr(entry, "untold_settings", frozenset())
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if field.name in untold:
            continue
        if dataclasses.is_dataclass(value):
            settings[field.name] = value.name  # type: ignore[union-attr]
            settings |= {f"{field.name}.{key}": inner for key, inner in flat_settings(value).items()}
        elif value is not None:
            settings[field.name] = value
    return settings


def _nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    outer: dict[str, Any] = {}
    inner: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in settings.items():
        owner, dot, rest = key.partition(".")
        if dot:
            inner[owner][rest] = value
        else:
            outer[key] = value
    return outer | {owner: Nested(outer.get(owner), theirs) for owner, theirs in inner.items()}


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
        fields = dataclasses.fields(cls)
        hint = _hint(_typed(where), [_typed(field.name) for field in fields], map(_shown, fields))
        return f"there is no setting {_typed(where)!r}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _hint(name: str, known: Sequence[str], listed: Iterable[str]) -> str:
    """The closest of what is known, or all of it as it is listed."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(listed)}"


def _shown(field: dataclasses.Field[Any]) -> str:
    name = _typed(field.name)
    return f"{name}, {name}.KEY" if dataclasses.is_dataclass(field.default) else name


def _typed(name: str) -> str:
    """As it is typed and listed."""
    return name.replace("_", "-")
