from __future__ import annotations

import torch
from torch import Tensor

from qdefense.converters.shadow.rounding import round_product, round_quotient, round_sum, round_value, value_of


def gradient(result: Tensor, of: Tensor) -> list[float]:
    found: list[float] = torch.autograd.grad(result.sum(), of)[0].tolist()
    return found


def test_round_value_rounds_half_to_even() -> None:
    value = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert round_value(value, (-9, 9)).tolist() == [0, 2, 2, 0, -2]


def test_gradient_passes_inside_the_range_only() -> None:
    value = torch.tensor([-1.0, -0.6, -0.4, 0.0, 254.0, 255.4, 255.6, 300.0], requires_grad=True)
    result = round_value(value, (0, 255))
    assert result.tolist() == [0, 0, 0, 0, 254, 255, 255, 255]
    assert gradient(result, value) == [0, 0, 1, 1, 1, 1, 0, 0]


def test_round_quotient_divides_and_shifts_codes() -> None:
    value = torch.tensor([-10.0, 1.0, 100.0], requires_grad=True)
    result = round_quotient(value, torch.tensor(0.5), torch.tensor(10.0), (0, 127))
    assert result.tolist() == [0, 12, 127]
    assert gradient(result, value) == [0, 2, 0]


def test_round_product_multiplies_by_channel() -> None:
    value = torch.tensor([[10.0, 10.0], [1000.0, 1.0]], requires_grad=True)
    result = round_product(value, torch.tensor([0.25, 2.0]), None, (-128, 127))
    assert result.tolist() == [[2, 20], [127, 2]]
    assert gradient(result, value) == [[0.25, 2.0], [0.0, 2.0]]


def test_round_sum_weighs_and_broadcasts_both_operands() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 400.0]], requires_grad=True)
    b = torch.tensor([10.0, 20.0], requires_grad=True)
    result = round_sum(a, b, (2.0, 0.25), torch.tensor(0.4), (0, 127))
    assert result.tolist() == [[5, 9], [9, 127]]
    first, second = torch.autograd.grad(result.sum(), (a, b))
    assert first.tolist() == [[2, 2], [2, 0]]
    assert second.tolist() == [0.5, 0.25]


def test_value_of_takes_value_and_gradient_from_different_tensors() -> None:
    source = torch.tensor([3.0], requires_grad=True)
    result = value_of(torch.tensor([7.0]), source * 2)
    assert result.tolist() == [7]
    assert gradient(result, source) == [2]
