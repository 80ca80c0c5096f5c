from __future__ import annotations

from typing import Any

import pytest

from qdefense.converters.quantize import QuantizationError, settings_of


@pytest.mark.parametrize(
    ("scheme", "asked", "name"),
    [
        ("int8-static", {}, "int8-static-u8s8-per-channel-reduced-minmax-qdq"),
        (
            "int8-static",
            {"types": "u8u8", "per_channel": False, "format": "qoperator"},
            "int8-static-u8u8-per-tensor-full-minmax-qoperator",
        ),
        (
            "int8-static",
            {"types": "s8s8", "reduce_range": False, "percentile": 99.9},
            "int8-static-s8s8-per-channel-full-percentile99.9-qdq",
        ),
        ("int8-static", {"method": "percentile"}, "int8-static-u8s8-per-channel-reduced-percentile99.999-qdq"),
        ("int8-static", {"percentile": 99.99999}, "int8-static-u8s8-per-channel-reduced-percentile99.99999-qdq"),
        ("int8-static", {"percentile": 100}, "int8-static-u8s8-per-channel-reduced-percentile100-qdq"),
        ("int8-dynamic", {}, "int8-dynamic-u8u8-per-tensor-full"),
        ("int8-dynamic", {"types": "u8s8", "per_channel": True}, "int8-dynamic-u8s8-per-channel-matmul-reduced"),
        ("int4", {}, "int4-per-channel-symmetric"),
        ("int4", {"block_size": 32, "symmetric": False}, "int4-block32-asymmetric"),
        ("int4-a8", {}, "int4-a8-per-channel-symmetric-minmax"),
        ("int4-a8", {"block_size": 16, "percentile": 99.5}, "int4-a8-block16-symmetric-percentile99.5"),
    ],
)
def test_settings_have_the_name_that_says_what_they_are(scheme: str, asked: dict[str, Any], name: str) -> None:
    settings = settings_of(scheme, **asked)
    assert (settings.name, settings.scheme) == (name, scheme)
    assert settings.record().get("name", name) == name


def test_settings_take_the_defaults_when_none_is_asked_for() -> None:
    assert settings_of("int4", block_size=None, symmetric=None) == settings_of("int4")
    assert settings_of("int8-static", types=None, percentile=None) == settings_of("int8-static")


@pytest.mark.parametrize(("scheme", "asked"), [("int8-static", {"per_channel": False}), ("int8-dynamic", {})])
def test_record_of_default_types_and_format_is_that_of_files_made_before_there_were_others(
    scheme: str, asked: dict[str, Any]
) -> None:
    own = {"reduce_range": True, "method": "minmax"} if scheme == "int8-static" else {"reduce_range": False}
    assert settings_of(scheme, **asked).record() == {"scheme": scheme, "per_channel": False} | own
    assert "name" in settings_of(scheme, types="u8u8" if scheme == "int8-static" else "u8s8").record()


def test_record_holds_what_the_scheme_has_and_nothing_else() -> None:
    assert settings_of("int4", block_size=16).record() == {
        "scheme": "int4",
        "name": "int4-block16-symmetric",
        "per_channel": False,
        "reduce_range": False,
        "block_size": 16,
        "symmetric": True,
    }


@pytest.mark.parametrize(
    ("scheme", "asked", "message"),
    [
        ("int2", {}, "unknown scheme 'int2'; choose one of int8-static, int8-dynamic, int4, int4-a8"),
        ("int8-static", {"types": "u8s16"}, "unknown types 'u8s16'; choose one of u8s8, s8s8, u8u8"),
        ("int8-static", {"format": "tflite"}, "unknown format 'tflite'; choose one of qdq, qoperator"),
        (
            "int8-static",
            {"method": "entropy"},
            "unknown calibration method 'entropy'; choose one of minmax, percentile",
        ),
        ("int4", {"block_size": 24}, "unknown block size 24; choose one of 16, 32"),
        ("int4", {"types": "u8u8"}, "int4 has no setting types; it has per channel, block size, symmetric"),
        (
            "int8-dynamic",
            {"percentile": 99.0},
            "int8-dynamic has no setting percentile; it has types, per channel, reduce range",
        ),
        (
            "int8-dynamic",
            {"types": "s8s8"},
            "int8-dynamic computes unsigned activations only; choose the types u8u8 or u8s8",
        ),
        (
            "int8-static",
            {"types": "u8u8", "reduce_range": True},
            "u8u8 has unsigned weights, which do not saturate, so that a reduced range would only lose a bit; leave it "
            "out, or choose signed weights (u8s8)",
        ),
        (
            "int8-dynamic",
            {"reduce_range": True},
            "u8u8 has unsigned weights, which do not saturate, so that a reduced range would only lose a bit; leave it "
            "out, or choose signed weights (u8s8)",
        ),
        (
            "int4-a8",
            {"per_channel": True, "block_size": 16},
            "weights have a scale per channel or per block, not both; leave one of them out",
        ),
        (
            "int4",
            {"per_channel": False},
            "int4 has no scale per tensor, which 16 levels are too few for; leave it out, or give a block size of 16 "
            "or 32",
        ),
        (
            "int8-static",
            {"method": "minmax", "percentile": 99.0},
            "minmax takes the whole range and no percentile; leave one of them out",
        ),
        ("int8-static", {"percentile": 50.0}, "percentile is 50.0, not within (50, 100]; 99.999 is usual"),
        ("int8-static", {"percentile": 100.1}, "percentile is 100.1, not within (50, 100]; 99.999 is usual"),
        ("int8-static", {"percentile": float("nan")}, "percentile is nan, not within (50, 100]; 99.999 is usual"),
    ],
)
def test_settings_are_refused_when(scheme: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        settings_of(scheme, **asked)
    assert str(caught.value) == message
