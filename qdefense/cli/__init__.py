"""The command line. stdout carries results, stderr carries progress; exit codes are those of `qdefense.audit.gate`."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import click

_COMMANDS = {
    "audit": "Judge one ONNX file; the exit code is the answer.",
    "demo": "A clean and a backdoored network, each as three files, audited before your eyes.",
    "inspect": "What is in an ONNX file, read without running it.",
    "quantize": "FP32 ONNX to an INT8 file.",
    "schema": "Print the JSON schema of the report.",
    "shadow": "The fidelity certificate of a file's differentiable twin.",
    "train": "Train a zoo model, clean or poisoned.",
}
_EPILOG = (
    "Exit codes: 0 every required check ran and passed; 1 a finding; 2 usage, or data that do not fit the model; "
    "3 incomplete: something required was not measured; 4 the file was refused; 130 interrupted."
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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(cls=_LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qdefense")
def group() -> None:
    """Tell whether the exact ONNX file that ships carries a backdoor."""


def main() -> None:
    """Entry point of the `qdefense` script."""
    # Spinning OpenMP threads made a gradient step 6 times slower on a busy 2-core machine; torch reads this on import.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; the only place that catches every exception."""
    try:
        result = group.main(args=arguments, prog_name="qdefense", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader of stdout left; point stdout elsewhere so that the interpreter's last flush does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 3
    except Exception as error:  # noqa: BLE001 (the boundary: a bug must not leave as 0 or 1)
        return _explain(error, arguments)
    return result if isinstance(result, int) else 0


def _explain(error: Exception, arguments: list[str]) -> int:
    from qdefense.cli.failures import exit_code_of, message_of  # noqa: PLC0415 (imports ONNX Runtime)

    click.echo(f"error: {message_of(error)}", err=True)
    if "-v" in arguments or "--verbose" in arguments:
        traceback.print_exception(error)
        click.echo(getattr(error, "details", ""), err=True)
    return exit_code_of(error)
