from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qdefense.attacks import ATTACKS
from qdefense.registry import Registry, SpecError, flat_settings

PLUGIN = """
from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from {package}.registered import REGISTRY


@REGISTRY.register
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class {cls}:
    name: ClassVar[str] = "{name}"
    patch_size: Annotated[int, Field(ge=1)] = 3
    rate: float = 0.5
"""
REGISTERED = """
from qdefense.registry import Registry

REGISTRY = Registry("gadget", "{package}")
"""


@pytest.mark.parametrize("registry", ["qdefense.defenses.DEFENSES", "qdefense.attacks.ATTACKS"])
def test_nobody_waits_for_libraries_that_one_of_all_entries_needs(registry: str) -> None:
    module, _, name = registry.rpartition(".")
    loaded = "bool({'sklearn', 'scipy'} & set(sys.modules))"
    code = f"import sys; from {module} import {name}; {name}.names(); sys.exit({loaded})"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False, timeout=120).returncode == 0


@pytest.fixture
def gadgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Registry[Any]:
    """A package on disk with the gadgets `round-knob` and, in a sub-package, `lever`."""
    package = f"gadgets_{re.sub('[^a-z]', '_', request.node.name)}"
    folder = tmp_path / package
    (folder / "deeper").mkdir(parents=True)
    for name in ("__init__.py", "deeper/__init__.py"):
        (folder / name).touch()
    (folder / "registered.py").write_text(REGISTERED.format(package=package))
    (folder / "knob.py").write_text(PLUGIN.format(package=package, cls="Knob", name="round-knob"))
    (folder / "deeper" / "lever.py").write_text(PLUGIN.format(package=package, cls="Lever", name="lever"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return __import__(f"{package}.registered").registered.REGISTRY  # type: ignore[no-any-return]


def test_names_lists_every_file_of_the_package_when_none_was_imported(gadgets: Registry[Any]) -> None:
    assert gadgets.names() == ("lever", "round-knob")


def test_names_lists_badnets_when_asked_for_attacks() -> None:
    assert "badnets" in ATTACKS.names()


def test_register_raises_when_the_name_is_taken(gadgets: Registry[Any]) -> None:
    class Other:
        name = "lever"

    gadgets.names()
    with pytest.raises(ValueError, match=r"^gadget 'lever' is registered twice: <class '.*Lever'> and <class '.*Other"):
        gadgets.register(Other)


def test_create_gives_defaults_when_only_named(gadgets: Registry[Any]) -> None:
    assert dataclasses.asdict(gadgets.create("lever")) == {"patch_size": 3, "rate": 0.5}


def test_create_reads_settings_when_given_with_dashes_and_spaces(gadgets: Registry[Any]) -> None:
    made = gadgets.create("round-knob:patch-size = 5, rate=0.25,")
    assert dataclasses.asdict(made) == {"patch_size": 5, "rate": 0.25}


def test_create_gives_frozen_settings(gadgets: Registry[Any]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'rate'"):
        gadgets.create("lever").rate = 1.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("levr", "there is no gadget 'levr'; did you mean 'lever'?"),
        ("zzz:rate=1", "there is no gadget 'zzz'; known: lever, round-knob"),
        ("", "there is no gadget ''; known: lever, round-knob"),
        ("lever:speed=1", "gadget 'lever:speed=1': there is no setting 'speed'; known: patch-size, rate"),
        (
            "lever:patch-sie=1",
            "gadget 'lever:patch-sie=1': there is no setting 'patch-sie'; did you mean 'patch-size'?",
        ),
        ("lever:name=x", "gadget 'lever:name=x': there is no setting 'name'; known: patch-size, rate"),
        ("lever:rate", "'lever:rate': 'rate' is not key=value"),
        ("lever:=1", "'lever:=1': '=1' is not key=value"),
        ("lever:rate=1,rate=2", "'lever:rate=1,rate=2': 'rate' is set twice; give it once"),
        (
            "lever:patch-size=0",
            "gadget 'lever:patch-size=0': patch_size: Input should be greater than or equal to 1",
        ),
        (
            "lever:rate=fast",
            "gadget 'lever:rate=fast': rate: Input should be a valid number, unable to parse string as a number",
        ),
    ],
)
def test_create_says_what_is_wrong_when_the_spec_is_bad(gadgets: Registry[Any], spec: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        gadgets.create(spec)
    assert str(caught.value) == message


def test_restore_gives_back_what_its_settings_were_taken_from(gadgets: Registry[Any]) -> None:
    made = gadgets.create("lever:patch-size=5")
    assert flat_settings(made) == {"patch_size": 5, "rate": 0.5}
    assert gadgets.restore("lever", flat_settings(made)) == made


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("levr", {}, "there is no gadget 'levr'; did you mean 'lever'?"),
        ("lever", {"speed": 1}, "gadget 'lever:speed=1': there is no setting 'speed'; known: patch-size, rate"),
        ("lever", {"rate.high": 1}, "gadget 'lever:rate.high=1': rate: Input should be a valid number"),
    ],
)
def test_restore_says_what_is_wrong_with_settings_of_another_version(
    gadgets: Registry[Any], name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        gadgets.restore(name, settings)
    assert str(caught.value) == message
