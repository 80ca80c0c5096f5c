"""The command line. stdout carries results, stderr carries progress; exit codes are those of `qdefense.audit.gate`."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import traceback
from types import FrameType

import click
from click.shell_completion import CompletionItem

from qdefense.report.escaping import harmless, harmless_lines

# Those of `qdefense.audit.gate`, which imports ONNX Runtime.
PASSED, USAGE, INCOMPLETE, INTERRUPTED = 0, 2, 3, 130
_COMPLETION = "_QDEFENSE_COMPLETE"
_COMMANDS = {
    "attacks": "The attacks of `train`, with their settings.",
    "audit": "Judge one ONNX file; the exit code is the answer.",
    "bench": "Measure a matrix of attacks, precisions and defenses; resumes where it stopped.",
    "calibrate": "Thresholds with a known false-alarm rate, from clean models.",
    "completion": "Print the completion script of a shell.",
    "data": "Fetch public data sets; say what a path is read as.",
    "defenses": "The defenses of `audit`, with their settings.",
    "demo": "A clean and a backdoored network, each as three files, audited before your eyes.",
    "doctor": "What this installation and machine can do.",
    "inspect": "What is in an ONNX file, and what ONNX Runtime makes of it.",
    "quantize": "FP32 ONNX to an INT8 or INT4 file.",
    "repair": "A new file that may have lost its backdoor, from clean images.",
    "report": "One page, or tables, of what `bench` measured.",
    "schema": "Print the JSON schema of the report.",
    "shadow": "The fidelity certificate of a file's differentiable twin.",
    "train": "Train a zoo model, clean or poisoned.",
}
_EPILOG = (
    "Exit codes: 0 every required check ran and passed; 1 a finding, or a refused quantization or repair; 2 usage, or "
    "data that do not fit the model; 3 incomplete: something required was not measured; 4 the file was refused; 130 "
    "interrupted (Ctrl-C, SIGTERM, SIGHUP)."
)


class _LazyGroup(click.Group):
    """Imports a command when it is called, so that --help needs neither torch nor ONNX Runtime."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"qdefense.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # The parent's imports every command for its help, torch among them: two seconds on each TAB.
        found = [CompletionItem(name, help=text) for name, text in _COMMANDS.items() if name.startswith(incomplete)]
        return found or click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(
    cls=_LazyGroup, no_args_is_help=False, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="qdefense")
def group() -> None:
    """Tell whether the exact ONNX file that ships carries a backdoor."""


def main() -> None:
    """Entry point of the `qdefense` script."""
    # Spinning OpenMP threads made a gradient step 6 times slower on a busy 2-core machine; torch reads this on import.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    for ending in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # Windows has no SIGHUP
        if signal.getsignal(ending) is signal.SIG_DFL:  # nohup's choice stands
            signal.signal(ending, _interrupt)
    sys.exit(run(sys.argv[1:]))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """What a job runner or a closed terminal sends ends the work as Ctrl-C does, its worker processes too."""
    raise KeyboardInterrupt


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; the only place that catches every exception."""
    try:
        return _dispatch(arguments)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(harmless_lines(shown.getvalue().expandtabs(4)), err=True, nl=False)  # click indents by tabs
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout left; point stdout elsewhere so that the interpreter's last flush does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INCOMPLETE
    except Exception as error:  # noqa: BLE001 (the boundary: a bug must not leave as 0 or 1)
        return _explain(error, arguments)


def _dispatch(arguments: list[str]) -> int:
    for argument in arguments:
        if any("\ud800" <= char <= "\udfff" for char in argument):
            raise click.UsageError(f"{argument!r} is not UTF-8; rename the file")
    if os.environ.get(_COMPLETION) and not arguments:  # as shells ask; one that lies about answers for no command
        return _answer_shell()
    # Not `group.main`, which turns a reader that left into 1 and an EOFError into an interruption.
    with group.make_context("qdefense", list(arguments)) as context:
        result = group.invoke(context)
    return result if isinstance(result, int) else PASSED


def _answer_shell() -> int:
    """Click ends the process with 1 at a question that it does not know, which here would be a verdict."""
    importlib.import_module("qdefense.cli.completion").answer_shells()
    try:
        group.main(args=[], prog_name="qdefense", standalone_mode=False)
    except SystemExit as stop:
        return USAGE if stop.code else PASSED
    return PASSED


def _explain(error: Exception, arguments: list[str]) -> int:
    if "-v" in arguments or "--verbose" in arguments:
        click.echo(harmless_lines("".join(traceback.format_exception(error))), err=True, nl=False)
    try:
        from qdefense.cli.failures import exit_code_of, message_of  # noqa: PLC0415 (imports ONNX Runtime)
    except ImportError as broken:
        click.echo(f"error: the installation is broken: {harmless(str(broken))}; install qdefense again", err=True)
        return INCOMPLETE
    click.echo(f"error: {message_of(error)}", err=True)
    return exit_code_of(error)
