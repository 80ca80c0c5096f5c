"""What a person says of a file: options, over a TOML sidecar. What nobody says is read off the file itself."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from pydantic import ValidationError

from qdefense.cli.options import parse_size
from qdefense.converters.contract import ContractError, StatedContract, first_problem

F = TypeVar("F", bound=Callable[..., Any])
_LARGEST_SIDECAR = 10 * 2**20


def contract_options(function: F) -> F:
    """The options of the input contract; the command gets them together, as ``said``."""

    @functools.wraps(function)
    def gathered(**values: Any) -> Any:
        said = {name: values.pop(name) for name in _NAMES}
        return function(**values, said=said)

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return cast("F", gathered)


def stated_contract(model: Path, said: dict[str, Any]) -> StatedContract | None:
    """Options over the sidecar that ``--contract`` names.

    A sidecar is never picked up unasked: whoever sends a file could send one along, and choose what is judged.

    Raises:
        ContractError: the sidecar cannot be read, or holds what is no part of a contract.
        click.BadParameter: an option holds no such value.
    """
    written = {} if said["contract"] is None else _read_sidecar(said["contract"])
    given = _given(said)
    if not written and not given:
        return None
    try:
        return StatedContract(**{**written, **given, "source": "options" if given else "sidecar"})
    except ValidationError as error:
        raise ContractError(
            f"the contract given for {model.name!r} does not hold: {first_problem(error)}; correct the options"
        ) from error


def _read_sidecar(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_SIDECAR:
        raise ContractError(f"{path.name!r} is larger than 10 MB, which no contract is")
    try:
        body = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        stated = StatedContract.model_validate({**body, "source": "sidecar"})
    except ValidationError as error:
        known = ", ".join(name for name in StatedContract.model_fields if name != "source")
        raise ContractError(f"{path.name!r}: {first_problem(error)}; a contract may hold {known}") from error
    except (ValueError, RecursionError) as error:  # those of TOML and UTF-8 among them
        raise ContractError(f"{path.name!r} is no TOML file: {error}; correct it or remove it") from error
    return stated.values


def _given(said: dict[str, Any]) -> dict[str, Any]:
    plain = ("input_name", "output_name", "layout", "channels", "resize", "head")
    given = {name: said[name] for name in plain if said[name] is not None}
    for name, counts in (("range", (2,)), ("mean", (1, 3)), ("std", (1, 3))):
        if said[name] is not None:
            given[name] = _numbers(name, said[name], counts)
    if said["size"] is not None:
        given["height"], given["width"] = parse_size(said["size"])
    if said["classes"] is not None:
        given["class_names"] = _classes(said["classes"])
    if said["fixed_input"]:
        given["fixed_inputs"] = dict(map(_fixed, said["fixed_input"]))
    return given


def _numbers(name: str, text: str, counts: tuple[int, ...]) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts:
        wanted = " or ".join(str(count) for count in counts)
        raise click.BadParameter(f"{text!r} is not {wanted} numbers with commas between", param_hint=f"--{name}")
    return values * 3 if len(values) == 1 else values


def _classes(text: str) -> tuple[str, ...]:
    if "," in text and not _is_file(Path(text)):
        return tuple(part.strip() for part in text.split(","))
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{text!r} is no UTF-8 text: {error}", param_hint="--classes") from error
    return tuple(line.strip() for line in lines if line.strip())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a long list of classes is no file's name
        return False


def _fixed(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    words = {"true": "1", "false": "0"}
    try:
        number = float(words.get(value.lower(), value))
    except ValueError:
        name, number = "", 0.0
    if not name:
        raise click.BadParameter(f"{text!r} is not NAME=NUMBER", param_hint="--fixed-input")
    return name, number


_OPTIONS = (
    click.option(
        "--contract",
        type=click.Path(path_type=Path, dir_okay=False),
        help="A TOML sidecar with what the options below say; they win over it.",
    ),
    click.option("--layout", type=click.Choice(["NCHW", "NHWC"], case_sensitive=False), help="Axes of the input."),
    click.option("--channels", type=click.Choice(["rgb", "bgr"], case_sensitive=False), help="Order of the channels."),
    click.option("--range", metavar="LOW,HIGH", help="Values of black and white, e.g. 0,255.  [default: 0,1]"),
    click.option("--mean", metavar="M[,M,M]", help="Subtracted after --range, in the file's channel order."),
    click.option("--std", metavar="S[,S,S]", help="Divided by after --mean."),
    click.option(
        "--resize",
        type=click.Choice(["none", "nearest", "bilinear", "bicubic", "crop"]),
        help="How images of another size were brought to the file's; crop: shorter side to 8/7, then the centre.",
    ),
    click.option("--size", metavar="HxW", help="Height and width, where the graph leaves them open."),
    click.option("--input", "input_name", metavar="NAME", help="The image input, where there are several."),
    click.option("--output", "output_name", metavar="NAME", help="The class scores, where there are several outputs."),
    click.option(
        "--head",
        type=click.Choice(["logits", "softmax", "log-softmax", "sigmoid"]),
        help="What the output holds.  [default: read off the graph's last operator]",
    ),
    click.option("--classes", metavar="FILE|A,B,C", help="Class names in the order of the file's outputs."),
    click.option(
        "--fixed-input", multiple=True, metavar="NAME=VALUE", help="Value of an input that is no image; repeatable."
    ),
)
_NAMES = (
    *("contract", "layout", "channels", "range", "mean", "std", "resize", "size"),
    *("input_name", "output_name", "head", "classes", "fixed_input"),
)
