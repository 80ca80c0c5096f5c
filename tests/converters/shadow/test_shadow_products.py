from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from .shadow_graphs import Array, assert_equals_runtime, assert_gradient_is_right, graph_model, operator_model

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.normal(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((2, 3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((3, 4), (4,)),
        ((2, 3, 4), (4,)),
        ((4,), (4, 5)),
        ((4,), (4,)),
    ],
)
def test_matrix_product_of_any_rank_equals_runtime(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    x = normal(*left)
    model = operator_model("MatMul", x, {"b": normal(*right)})
    assert_equals_runtime(model, x)
    assert_gradient_is_right(model, x)


@pytest.mark.parametrize("addend", [(), (1,), (5,), (3, 1), (1, 5), (3, 5), None])
@pytest.mark.parametrize("flipped", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_general_product_equals_runtime(addend: tuple[int, ...] | None, flipped: tuple[int, int]) -> None:
    x, weight = normal(*((4, 3) if flipped[0] else (3, 4))), normal(*((5, 4) if flipped[1] else (4, 5)))
    constants = {"b": weight} | ({} if addend is None else {"c": np.asarray(normal(*addend), dtype=np.float32)})
    model = operator_model("Gemm", x, constants, transA=flipped[0], transB=flipped[1], alpha=0.7, beta=1.3)
    assert_equals_runtime(model, x)
    assert_gradient_is_right(model, x)


@pytest.mark.parametrize(
    ("equation", "right"),
    [
        ("bij,bjk->bik", (2, 4, 5)),
        ("bij , bkj -> bik", (2, 5, 4)),
        ("...ij,...jk->...ik", (2, 4, 5)),
        ("bij,bij->b", (2, 3, 4)),
        ("bij,k", (5,)),
    ],
)
def test_einsum_equals_runtime(equation: str, right: tuple[int, ...]) -> None:
    x = normal(2, 3, 4)
    model = operator_model("Einsum", x, {"b": normal(*right)}, equation=equation)
    assert_equals_runtime(model, x)
    assert_gradient_is_right(model, x)


def test_product_of_two_computed_matrices_has_its_gradient() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    x = normal(2, 3, 4)
    assert_equals_runtime(graph_model(nodes, x, {}), x)
    assert_gradient_is_right(graph_model(nodes, x, {}), x)
