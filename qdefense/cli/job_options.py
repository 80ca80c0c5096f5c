"""The options of the commands that run a file in a worker of its own, gathered into the worker's job."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import click

from qdefense.audit.events import Job
from qdefense.audit.supervisor import default_memory_limit
from qdefense.cli.contract_options import contract_options, stated_contract
from qdefense.cli.options import NumberRange, data_options, run_options, worker_verbose_option
from qdefense.converters.runtime_graph import Arithmetic

F = TypeVar("F", bound=Callable[..., Any])
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def job_options(function: F) -> F:
    """``MODEL``, data, contract and run options; the command gets them as ``job``, and ``verbose``."""

    @functools.wraps(function)
    def gathered(
        *,
        model: Path,
        data: str,
        split: str | None,
        limit: int | None,
        seed: int,
        threads: int,
        said: dict[str, Any],
        expected_accuracy: float | None,
        arithmetic: Arithmetic,
        memory_limit: int | None,
        **values: Any,
    ) -> Any:
        job = Job(
            model=str(model),
            data=data,
            split=split,
            limit=limit,
            seed=seed,
            threads=threads,
            memory_bytes=memory_limit or default_memory_limit(),
            contract=stated_contract(model, said),
            expected_accuracy=expected_accuracy,
            arithmetic=arithmetic,
        )
        return function(job=job, **values)

    decorated = click.option(
        "--expected-accuracy",
        type=NumberRange(0, 1),
        help="Clean accuracy that you vouch for: stands in for the measured one on unlabelled images, and is checked "
        "against it on labelled ones.",
    )(run_options(worker_verbose_option(gathered)))
    decorated = click.option(
        "--memory-limit",
        type=_MemorySize(),
        metavar="SIZE",
        help="Most memory the file may take, e.g. 4GiB (Linux only).  [default: all that is free]",
    )(decorated)
    decorated = click.option(
        "--arithmetic",
        type=click.Choice(get_args(Arithmetic)),
        default="as-run",
        show_default=True,
        help="As this CPU runs the file, or exact: as a CPU with VNNI does, where no sum of 8-bit products saturates.",
    )(decorated)
    decorated = click.argument("model", type=click.Path(path_type=Path))(data_options(contract_options(decorated)))
    return cast("F", decorated)


class _MemorySize(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().upper()
        digits = text.rstrip("KMGIB ")
        unit = text.removeprefix(digits).strip()
        try:
            size = int(float(digits) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is no size; give a number with KiB, MiB or GiB, such as 4GiB", param, ctx)
        return size
