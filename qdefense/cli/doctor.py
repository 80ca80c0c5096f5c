"""`qdefense doctor`: tries out what an audit needs. It imports none of it, so that a broken part is named, not met."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from qdefense.audit.versions import UNKNOWN, distributions_of, version_of
from qdefense.cli.options import default_threads, output_console, verbose_option, write_json
from qdefense.report.escaping import harmless, shortened

PASSED, INCOMPLETE = 0, 3
_SECONDS = 120
_SHELLS = ("bash", "fish", "zsh")
_GIB = 1 << 30


class State(StrEnum):
    """What a line of the doctor's means: only a problem keeps an audit from running."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


_COLOURS = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "bold red"}


@dataclass(frozen=True)
class Check:
    """One line: what was found, and what to do about it."""

    name: str
    state: State
    found: str
    advice: str = ""


class _BrokenError(Exception):
    """A probe did not come to its end; the message is its last word."""


@click.command("doctor")
@click.option("--data", help="Also try to read this data set: 'signs' (built in) or a path.")
@click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)
@verbose_option
def command(data: str | None, format_: str, verbose: bool) -> int:  # noqa: ARG001 (read at the boundary)
    """Say what this installation and machine can do, and what to mend; 0 if it can audit, 3 if not."""
    checks = list(_checks(data))
    problems = sum(check.state is State.PROBLEM for check in checks)
    if format_ == "json":
        write_json(json.dumps({"can_audit": not problems, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        output_console().print(Group(_table(checks), Text(), _summary(problems)))
    return INCOMPLETE if problems else PASSED


def _checks(data: str | None) -> Iterator[Check]:
    yield Check("python", State.OK, f"{platform.python_version()}, {sys.executable}")
    yield _system()
    yield from _distributions()
    yield from _runtime()
    yield from _machine()
    yield _data_folder(os.environ.get("QDEFENSE_DATA"))
    if data is not None:
        yield _data(data)
    yield _shell(Path(os.environ.get("SHELL", "")).name)


def _system() -> Check:
    name = f"{platform.system()} {platform.machine()}"
    if name == "Linux x86_64":
        return Check("system", State.OK, name)
    return Check("system", State.WARNING, name, "gates are tested on Linux x86_64 only; run yours there")


def _distributions() -> Iterator[Check]:
    yield _distribution("qdefense", "0")
    try:
        lines = requires("qdefense") or []
    except PackageNotFoundError:
        return
    for line in lines:
        named = re.match(r"([A-Za-z0-9._-]+)(?:>=([0-9.]+))?(.*)", line)
        if named is not None and "extra ==" not in named[3]:
            yield _distribution(named[1], named[2] or "0")


def _distribution(name: str, least: str) -> Check:
    # Other builds of ONNX Runtime bring the same module under another name.
    providers = distributions_of(name) if name == "onnxruntime" else (name,)
    installed = {provider: version_of(provider) for provider in providers}
    found = ", ".join(v if provider == name else f"{provider} {v}" for provider, v in installed.items())
    if UNKNOWN in installed.values():
        return Check(name, State.PROBLEM, "is not installed", f"pip install '{name}>={least}'")
    if min(map(_release, installed.values())) < _release(least):
        return Check(name, State.PROBLEM, f"{found} is older than {least}", f"pip install --upgrade '{name}>={least}'")
    if len(providers) > 1:
        advice = f"they overwrite each other's files: uninstall all of them, then pip install {name}"
        return Check(name, State.WARNING, found, advice)
    if providers != (name,):
        return Check(name, State.WARNING, found, f"audits run on the CPU; if your product does, pip install {name}")
    return Check(name, State.OK, found)


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    digits = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(part) for part in digits[0].split(".")) if digits else ()


def _runtime() -> Iterator[Check]:
    try:
        facts = _ask("runtime")
    except _BrokenError as error:
        advice = "pip install --force-reinstall onnxruntime onnx"
        yield Check("runtime", State.PROBLEM, f"ONNX Runtime does not run: {error}", advice)
        return
    build = facts["build"].removeprefix("ORT Build Info: ")
    yield Check("runtime", State.OK, f"runs on the CPU; {build}; {', '.join(facts['providers'])}")
    yield Check("cpu", State.OK, f"{facts['machine']} {' '.join(facts['isa']) or '(instruction sets unknown)'}")
    yield _telemetry(os.environ.get("ORT_DISABLE_TELEMETRY"))
    yield from _gradients()


def _telemetry(switch: str | None) -> Check:
    if switch == "1":
        return Check("telemetry", State.OK, "ONNX Runtime's is off")
    advice = "unset it, unless ONNX Runtime may send usage events"
    return Check("telemetry", State.WARNING, f"ORT_DISABLE_TELEMETRY={switch}", advice)


def _gradients() -> Iterator[Check]:
    try:
        facts = _ask("gradients")
    except _BrokenError as error:
        advice = "pip install --force-reinstall torch"
        yield Check("gradients", State.PROBLEM, f"no shadow could be built: {error}", advice)
        return
    yield Check("gradients", State.OK, f"torch {facts['torch']} gives them through a shadow")
    operators = ", ".join(facts["saturating_operators"])
    if not operators:
        yield Check("saturation", State.OK, "no operator saturates in int16, measured")
        return
    advice = (
        "files with full-range int8 weights answer otherwise here; quantize with --reduce-range, the default, or audit "
        "with --arithmetic exact"
    )
    yield Check("saturation", State.WARNING, f"saturate in int16, measured: {operators}", advice)


def _machine() -> Iterator[Check]:
    try:
        facts = _ask("machine")
    except _BrokenError as error:
        yield Check("memory", State.PROBLEM, f"cannot be read: {error}", "pip install --force-reinstall psutil")
        return
    yield Check("CPUs", State.OK, f"{facts['usable_cpus']} of {facts['cpus']} usable, --threads {default_threads()}")
    free, total = (facts[key] / _GIB for key in ("available_bytes", "total_bytes"))
    yield Check("memory", State.OK, f"{total:.1f} GiB, {free:.1f} GiB of it free")
    yield _memory_limit(facts["limit_holds"])


def _memory_limit(holds: bool) -> Check:
    if holds:
        return Check("memory limit", State.OK, "holds: a file that asks for too much is stopped")
    advice = "audit files you don't trust in a container with a memory limit"
    return Check("memory limit", State.WARNING, "does not hold here", advice)


def _data_folder(path: str | None) -> Check:
    if path is None:
        return Check("QDEFENSE_DATA", State.OK, "is not set; only tests and benchmarks on real images read it")
    if not Path(path).is_dir():
        return Check("QDEFENSE_DATA", State.WARNING, f"{path} is no folder", "set it to a folder with data sets")
    try:
        found = _ask("folder", path)["found"]
    except _BrokenError as error:
        return Check("QDEFENSE_DATA", State.WARNING, str(error), "set it to a folder with data sets")
    if not found:
        return Check("QDEFENSE_DATA", State.WARNING, f"{path} holds no data set", "set it to a folder with data sets")
    return Check("QDEFENSE_DATA", State.OK, f"{path}: {', '.join(found)}")


def _data(spec: str) -> Check:
    try:
        facts = _ask("data", spec)
    except _BrokenError as error:
        return Check("data", State.PROBLEM, str(error), "give data that can be read")
    if "error" in facts:
        return Check("data", State.PROBLEM, facts["error"])
    height, width = facts["size"]
    return Check("data", State.OK, f"{facts['source']}: {facts['classes']} classes, {height}x{width}")


def _shell(name: str) -> Check:
    if name in _SHELLS:
        return Check("shell", State.OK, f"{name}; `qdefense completion {name}` completes commands")
    return Check("shell", State.OK, f"{name or 'unknown'}; completion is for {', '.join(_SHELLS)}")


def _ask(probe: str, *arguments: str) -> dict[str, Any]:
    """What a probe found.

    Raises:
        _BrokenError: it crashed, took too long or raised.
    """
    command = (sys.executable, "-P", "-m", "qdefense.cli.probes", probe, *arguments)
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS, env=environment)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise _BrokenError(f"no answer in {_SECONDS} seconds") from error
    if ran.returncode:
        raise _BrokenError(_last_word(ran))
    facts: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return facts


def _last_word(ran: subprocess.CompletedProcess[bytes]) -> str:
    if ran.returncode < 0:
        return f"killed by signal {-ran.returncode} ({signal.strsignal(-ran.returncode)})"
    lines = ran.stderr.decode(errors="replace").split("\n")
    return shortened(next((line for line in reversed(lines) if line.strip()), f"ended with {ran.returncode}"))


def _table(checks: list[Check]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        lines = [harmless(check.found), *([f"-> {check.advice}"] if check.advice else [])]
        table.add_row(Text(check.state.value, _COLOURS[check.state]), Text(check.name), Text("\n".join(lines)))
    return table


def _summary(problems: int) -> Text:
    if not problems:
        return Text("This installation can audit.", "bold green")
    return Text(f"This installation cannot audit: {problems} problem{'s' * (problems > 1)} above.", "bold red")
