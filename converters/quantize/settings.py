"""What a quantization may be asked for: the schemes, their settings, which of them go together, and the name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Scheme = Literal["int8-static", "int8-dynamic", "int4", "int4-a8"]
Method = Literal["minmax", "percentile"]
Format = Literal["qdq", "qoperator"]
Types = Literal["u8s8", "s8s8", "u8u8"]
"""The activations' type, then the weights'."""
BlockSize = Literal[16, 32]

USUAL_PERCENTILE = 99.999

_DEFAULTS: dict[str, dict[str, Any]] = {
    "int8-static": {
        "types": "u8s8",
        "per_channel": True,
        "reduce_range": True,
        "method": "minmax",
        "percentile": None,
        "format": "qdq",
    },
    "int8-dynamic": {"types": "u8u8", "per_channel": False, "reduce_range": True},
    "int4": {"per_channel": True, "block_size": None, "symmetric": True},
    "int4-a8": {
        "per_channel": True,
        "block_size": None,
        "symmetric": True,
        "method": "minmax",
        "percentile": None,
    },
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "types": get_args(Types),
    "format": get_args(Format),
    "method": get_args(Method),
    "block_size": get_args(BlockSize),
}
_CALLED = {"types": "types", "format": "format", "method": "calibration method", "block_size": "block size"}


class QuantizationError(ValueError):
    """The model or the calibration images can't be quantized as asked; the message says what and what to do."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked for, every default filled in; ``None`` where the scheme has no such setting.

    Weights of INT8 schemes have one scale per output channel or per tensor; those of INT4 ones per output channel, or
    per ``block_size`` neighbours along the reduction axis (Cin or K). ``symmetric`` INT4 is the type INT4 without a
    zero point, asymmetric is UINT4 with one. ``reduce_range`` is of signed weights: 7 bits, which cannot saturate.
    """

    scheme: Scheme
    format: Format | None = None
    types: Types | None = None
    per_channel: bool = False
    reduce_range: bool = False
    method: Method | None = None
    percentile: float | None = None
    block_size: BlockSize | None = None
    symmetric: bool | None = None

    @property
    def calibrated(self) -> bool:
        """Whether ranges of activations are read off images."""
        return self.method is not None

    @property
    def name(self) -> str:
        """The scheme and what tells it from its siblings, such as ``int8-static-u8s8-per-channel-reduced-minmax-qdq``.

        ::

            int8-static-TYPES-GRANULARITY-RANGE-METHOD-FORMAT
            int8-dynamic-TYPES-GRANULARITY-RANGE     per-channel-matmul: a Conv has one scale per tensor nevertheless
            int4-GRANULARITY-SYMMETRY
            int4-a8-GRANULARITY-SYMMETRY-METHOD

        TYPES are those of activations and weights (u8s8, s8s8, u8u8), GRANULARITY is per-channel, per-tensor, block16
        or block32, RANGE is reduced or full, METHOD is minmax or percentile99.999.
        """
        parts = [self.scheme, self.types, self._granularity]
        if self.types is not None:
            parts.append("reduced" if self.reduce_range else "full")
        if self.symmetric is not None:
            parts.append("symmetric" if self.symmetric else "asymmetric")
        if self.method is not None:
            parts.append(self.method if self.percentile is None else f"percentile{_plain(self.percentile)}")
        return "-".join(part for part in (*parts, self.format) if part is not None)

    @property
    def _granularity(self) -> str:
        if self.block_size is not None:
            return f"block{self.block_size}"
        if not self.per_channel:
            return "per-tensor"
        return "per-channel-matmul" if self.scheme == "int8-dynamic" else "per-channel"

    @property
    def _older_than_names(self) -> bool:
        """Whether such files were made before there was another format or type, and names to tell them apart."""
        first = _DEFAULTS[self.scheme]
        return self.types is not None and (self.types, self.format) == (first["types"], first.get("format"))

    def record(self) -> dict[str, object]:
        """The settings as they are written into the file.

        Those of default types and format are written as they always were, without a name: the digests of such files
        stand in calibrations and committed results.
        """
        record: dict[str, object] = {
            "scheme": self.scheme,
            "per_channel": self.per_channel,
            "reduce_range": self.reduce_range,
        }
        own = ["method", "percentile", "block_size", "symmetric"]
        if not self._older_than_names:
            record["name"] = self.name
            own += ["format", "types"]
        return record | {key: getattr(self, key) for key in own if getattr(self, key) is not None}


def _plain(number: float) -> str:
    """Every digit of it: 99.99999 is not 100."""
    return repr(float(number)).removesuffix(".0")


def settings_of(scheme: str, **asked: Any) -> Settings:
    """The settings of a quantization, from those that somebody asked for; ``None`` takes the scheme's default.

    Raises:
        QuantizationError: there is no such scheme or value, the scheme has no such setting, or two do not go together.
    """
    if scheme not in _DEFAULTS:
        raise QuantizationError(f"unknown scheme {scheme!r}; choose one of {', '.join(_DEFAULTS)}")
    given = {key: value for key, value in asked.items() if value is not None}
    for key, value in given.items():
        if key not in _DEFAULTS[scheme]:
            raise QuantizationError(
                f"{scheme} has no setting {key.replace('_', ' ')}; it has "
                f"{', '.join(own.replace('_', ' ') for own in _DEFAULTS[scheme])}"
            )
        if value not in _CHOICES.get(key, (value,)):
            choices = ", ".join(str(choice) for choice in _CHOICES[key])
            raise QuantizationError(f"unknown {_CALLED[key]} {value!r}; choose one of {choices}")
    _check_together(scheme, given)
    return Settings(**_filled(scheme, given))


def _filled(scheme: str, given: dict[str, Any]) -> dict[str, Any]:
    values = {"scheme": scheme} | _DEFAULTS[scheme] | given
    if values.get("percentile") is not None:
        values["method"] = "percentile"
    elif values.get("method") == "percentile":
        values["percentile"] = USUAL_PERCENTILE
    if values.get("block_size") is not None:
        values["per_channel"] = False
    if values.get("types") == "u8u8":
        values["reduce_range"] = False
    return values


def _check_together(scheme: str, given: dict[str, Any]) -> None:
    types = given.get("types", _DEFAULTS[scheme].get("types"))
    if scheme == "int8-dynamic" and types == "s8s8":
        raise QuantizationError("int8-dynamic computes unsigned activations only; choose the types u8u8 or u8s8")
    if given.get("reduce_range") and types == "u8u8":
        raise QuantizationError(
            "u8u8 has unsigned weights, which do not saturate, so that a reduced range would only lose a bit; "
            "leave it out, or choose signed weights (u8s8)"
        )
    if scheme.startswith("int4"):
        if given.get("per_channel") and "block_size" in given:
            raise QuantizationError("weights have a scale per channel or per block, not both; leave one of them out")
        if not given.get("per_channel", True) and "block_size" not in given:
            raise QuantizationError(
                f"{scheme} has no scale per tensor, which 16 levels are too few for; "
                "leave it out, or give a block size of 16 or 32"
            )
    _check_percentile(given)


def _check_percentile(given: dict[str, Any]) -> None:
    percentile = given.get("percentile")
    if percentile is None:
        return
    if given.get("method") == "minmax":
        raise QuantizationError("minmax takes the whole range and no percentile; leave one of them out")
    if not 50.0 < percentile <= 100.0:
        raise QuantizationError(f"percentile is {percentile}, not within (50, 100]; {USUAL_PERCENTILE} is usual")
