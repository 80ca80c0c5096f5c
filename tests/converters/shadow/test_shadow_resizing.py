from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdefense.converters.shadow import UnsupportedOperatorError, build_shadow

from .code_graphs import TYPES, codes
from .shadow_graphs import (
    Array,
    assert_equals_runtime,
    assert_gradient_is_right,
    graph_model,
    helper,
    operator_model,
    session_output,
    shadow_output,
)

X = np.random.default_rng(0).normal(0, 1, (2, 3, 7, 6)).astype(np.float32)
REGION = np.array([0, 0, 0.1, -0.2, 1, 1, 0.8, 1.1], dtype=np.float32)
COORDINATES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")
CROP = "tf_crop_and_resize"


def scales(*values: float) -> dict[str, Array]:
    return {"scales": np.array(values, dtype=np.float32)}


def sizes(*values: int) -> dict[str, Array]:
    return {"sizes": np.array(values, dtype=np.int64)}


TARGETS = {
    "twice": scales(1, 1, 2, 2),
    "odd scales": scales(1, 1, 1.7, 0.45),
    "ties": scales(1, 1, 0.6, 0.7),
    "wider, lower": sizes(2, 3, 3, 13),
    "one cell": sizes(2, 3, 1, 1),
    "one axis": sizes(2, 3, 7, 9),
}
MODES: dict[str, dict[str, Any]] = {
    "prefer floor": {"mode": "nearest"},
    "prefer ceil": {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
    "floor": {"mode": "nearest", "nearest_mode": "floor"},
    "ceil": {"mode": "nearest", "nearest_mode": "ceil"},
    "linear": {"mode": "linear"},
    "cubic": {"mode": "cubic"},
    "sharp cubic": {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
    "smooth linear": {"mode": "linear", "antialias": 1},
    "smooth cubic": {"mode": "cubic", "antialias": 1},
    "smooth cubic inside": {"mode": "cubic", "antialias": 1, "exclude_outside": 1},
}


def resize(target: dict[str, Array], region: Array | None = None, *, opset: int = 19, **attributes: Any) -> bytes:
    constants = {"roi": region, "scales": target.get("scales"), "sizes": target.get("sizes")}
    return operator_model("Resize", X, constants, opset=opset, **attributes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_resize_equals_runtime(mode: str, coordinates: str) -> None:
    for target in TARGETS.values():
        assert_equals_runtime(resize(target, coordinate_transformation_mode=coordinates, **MODES[mode]), X)


@pytest.mark.parametrize("mode", [name for name in MODES if not name.startswith("smooth")])
def test_cropping_resize_equals_runtime(mode: str) -> None:
    for target in TARGETS.values():
        model = resize(target, REGION, coordinate_transformation_mode=CROP, extrapolation_value=3.0, **MODES[mode])
        assert_equals_runtime(model, X)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_resize_is_right(mode: str) -> None:
    assert_gradient_is_right(resize(TARGETS["odd scales"], **MODES[mode]), X)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_that_keeps_the_aspect_ratio_equals_runtime(policy: str, mode: str) -> None:
    for shape in ((11, 8), (3, 5), (9, 4)):
        model = resize(sizes(*shape), axes=[2, 3], keep_aspect_ratio_policy=policy, mode=mode)
        assert_equals_runtime(model, X)


def test_resize_of_chosen_axes_equals_runtime() -> None:
    assert_equals_runtime(resize(scales(0.5, 1.5), axes=[3, 2], mode="linear"), X)


@pytest.mark.parametrize("steps", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("mode", ["round_prefer_floor", "round_prefer_ceil"])
def test_positions_next_to_the_middle_are_rounded_as_the_runtime_does(steps: int, mode: str) -> None:
    factor = 2 - steps * 2.0**-23
    attributes = {"mode": "nearest", "nearest_mode": mode, "coordinate_transformation_mode": "asymmetric"}
    assert_equals_runtime(resize(scales(1, 1, factor, factor), **attributes), X)


def test_old_half_pixel_equals_runtime() -> None:
    attributes = {"mode": "nearest", "coordinate_transformation_mode": "tf_half_pixel_for_nn"}
    model = resize(scales(1, 1, 2, 1.5), np.array([], dtype=np.float32), opset=11, **attributes)
    assert_equals_runtime(model, X)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("factors", [(1, 1, 2, 3), (1, 1, 0.5, 0.6)])
def test_resize_and_upsample_before_opset_11_equal_runtime(mode: str, factors: tuple[float, ...]) -> None:
    constants = scales(*factors)
    assert_equals_runtime(operator_model("Resize", X, constants, opset=10, mode=mode), X)
    if min(factors) >= 1:
        assert_equals_runtime(operator_model("Upsample", X, constants, opset=9, mode=mode), X)
        assert_equals_runtime(
            operator_model("Upsample", X, {}, opset=8, mode=mode, scales=[float(f) for f in factors]), X
        )


def test_old_mode_out_of_reach_is_named() -> None:
    model = operator_model("Upsample", X, scales(1, 1, 2, 2), opset=9, mode="cubic")
    with pytest.raises(UnsupportedOperatorError, match="attribute 'mode' is 'cubic', expected 'nearest' or 'linear'"):
        build_shadow(model, source="shipped")


def test_sizes_that_the_graph_computes_are_followed() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Mul", ["s", "factors"], ["sizes"]),
        helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear"),
    ]
    factors = np.array([1, 1, 2, 3], dtype=np.int64)
    assert_equals_runtime(graph_model(nodes, X, {"factors": factors}), X)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_codes_between_codes_equal_runtime(coordinates: str, kind: type) -> None:
    x = codes(kind, 2, 3, 7, 6)
    for target in (*TARGETS.values(), scales(1, 1, 3, 3), scales(1, 1, 1.3, 0.9)):
        constants = {"roi": None, "scales": target.get("scales"), "sizes": target.get("sizes")}
        model = operator_model(
            "Resize", x, constants, kind=TYPES[kind], mode="linear", coordinate_transformation_mode=coordinates
        )
        np.testing.assert_array_equal(shadow_output(model, x), session_output(model, x))


@pytest.mark.parametrize("attributes", [{"mode": "cubic"}, {"mode": "linear", "antialias": 1}])
def test_other_interpolation_of_codes_is_refused(attributes: dict[str, Any]) -> None:
    x = codes(np.uint8, 2, 3, 7, 6)
    model = operator_model("Resize", x, {"roi": None, **scales(1, 1, 2, 2)}, kind=TYPES[np.uint8], **attributes)
    with pytest.raises(UnsupportedOperatorError, match="it interpolates integers, which is covered for 8 bits"):
        build_shadow(model, source="shipped")
