"""The options of `qdefense quantize` that say how: the scheme and its settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_args

import click

from qdefense.cli.options import NumberRange
from qdefense.converters.quantize import Format, Method, Scheme, Types, settings_of

F = TypeVar("F", bound=Callable[..., Any])


def scheme_options(function: F) -> F:
    """The options of the scheme; the command gets them together, as ``settings``."""

    @functools.wraps(function)
    def gathered(**values: Any) -> Any:
        asked = {name: values.pop(name) for name in _NAMES}
        asked["block_size"] = int(asked["block_size"]) if asked["block_size"] else None
        return function(**values, settings=settings_of(**asked))

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return cast("F", gathered)


_OPTIONS = (
    click.option(
        "--scheme",
        type=click.Choice(get_args(Scheme)),
        required=True,
        help="int8-static: integer arithmetic, ranges from calibration images; int8-dynamic: activation scales at each "
        "run; int4: packed 4-bit weights, float activations; int4-a8: those weights, static INT8 activations.",
    ),
    click.option(
        "--types",
        type=click.Choice(get_args(Types)),
        help="Activations, then weights, of the INT8 schemes.  [default: u8s8; u8u8 for int8-dynamic]",
    ),
    click.option(
        "--format",
        type=click.Choice(get_args(Format)),
        help="Of int8-static: float operators between Q and DQ, or integer operators.  [default: qdq]",
    ),
    click.option(
        "--per-channel/--per-tensor",
        default=None,
        help="One weight scale per output channel or per tensor; int8-dynamic knows channels in MatMul and Gemm only.  "
        "[default: per channel; per tensor for int8-dynamic]",
    ),
    click.option(
        "--block-size",
        type=click.Choice(["16", "32"]),
        help="Of the INT4 schemes: one weight scale for so many input channels or features, in layers that have them.",
    ),
    click.option(
        "--symmetric/--asymmetric",
        default=None,
        help="Of the INT4 schemes: weights as INT4, or as UINT4 with zero points.  [default: symmetric]",
    ),
    click.option(
        "--reduce-range/--full-range",
        default=None,
        help="7-bit signed weights cannot saturate in int16 on CPUs without VNNI.  [default: reduced where signed]",
    ),
    click.option(
        "--method",
        type=click.Choice(get_args(Method)),
        help="How activation ranges are read off the calibration images.  [default: minmax]",
    ),
    click.option(
        "--percentile",
        type=NumberRange(min=50, max=100, min_open=True),
        help="Share of the values inside the range; implies --method percentile.  [default with it: 99.999]",
    ),
)
_NAMES = (
    "scheme",
    "types",
    "format",
    "per_channel",
    "block_size",
    "symmetric",
    "reduce_range",
    "method",
    "percentile",
)
