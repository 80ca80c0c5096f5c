from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from qdefense.converters import door
from qdefense.converters.contract import InputContract
from qdefense.converters.shadow.door import enter, read_answers, round_half

NEUTRAL: dict[str, Any] = {"range": (0.0, 255.0), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
RANGES = [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (0.1, 0.9), (-123.4, 7.7)]
MEANS = [(0.0, 0.0, 0.0), (0.485, 0.456, 0.406), (123.675, 116.28, 103.53), (0.0, -0.3, 0.0)]
STDS = [(1.0, 1.0, 1.0), (0.229, 0.224, 0.225), (58.395, 57.12, 57.375), (0.25, 0.25, 0.25)]


def contract_of(**values: Any) -> InputContract:
    body = {"input_name": "x", "output_name": "y", "height": 2, "width": 3, "class_names": tuple("abcd"), **values}
    return InputContract(**{**body, **(NEUTRAL if body.get("dtype") == "uint8" else {})})


@st.composite
def contracts(draw: st.DrawFn) -> InputContract:
    triple = st.tuples(*[st.floats(-200, 200)] * 3)
    low = draw(st.floats(-300, 300))
    return contract_of(
        layout=draw(st.sampled_from(["NCHW", "NHWC"])),
        channels=draw(st.sampled_from(["RGB", "BGR"])),
        dtype=draw(st.sampled_from(["float32", "float16", "uint8"])),
        range=draw(st.sampled_from(RANGES) | st.tuples(st.just(low), st.floats(low + 0.01, low + 300))),
        mean=draw(st.sampled_from(MEANS) | triple),
        std=draw(st.sampled_from(STDS) | st.tuples(*[st.floats(0.05, 200)] * 3)),
    )


EVERY = [
    contract_of(layout=layout, channels=channels, dtype=dtype, range=values, mean=mean, std=std)
    for layout, channels, dtype, values, mean, std in itertools.product(
        ["NCHW", "NHWC"], ["RGB", "BGR"], ["float32", "float16", "uint8"], RANGES, MEANS, STDS
    )
]


def same_at_both_doors(x: NDArray[np.float32], contract: InputContract) -> None:
    fed = door.fed(x, contract)
    entered = enter(torch.from_numpy(x), contract)
    assert entered.dtype == torch.float32, "codes and halves are carried as floats"
    np.testing.assert_array_equal(entered.numpy(), fed.astype(np.float32))


def test_enter_equals_what_the_file_is_fed_when_combined_in_every_way() -> None:
    x = np.random.default_rng(0).random((2, 3, 5, 4), dtype=np.float32)
    x[0, :, 0, 0], x[0, :, 0, 1] = 0, 1
    for contract in EVERY:
        same_at_both_doors(x, contract)


@settings(max_examples=200, deadline=None)
@given(
    contract=contracts(),
    pixels=st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_enter_equals_what_the_file_is_fed(contract: InputContract, pixels: list[float], seed: int) -> None:
    x = np.random.default_rng(seed).random((2, 3, 2, 3), dtype=np.float32)
    x[0, 0, 0] = pixels
    same_at_both_doors(x, contract)


def test_enter_gives_exact_codes_for_all_256_values() -> None:
    codes = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    for contract in (contract_of(dtype="uint8"), contract_of(range=(0.0, 255.0))):
        assert torch.equal(enter(codes / 255, contract), codes)


def test_enter_gives_the_images_themselves_when_the_contract_changes_nothing() -> None:
    x = torch.rand(2, 3, 2, 3)
    assert enter(x, contract_of()) is x


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_enter_has_the_gradient_of_its_finite_differences(layout: str, channels: str, dtype: str) -> None:
    contract = contract_of(
        layout=layout, channels=channels, dtype=dtype, range=(-1.0, 3.0), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    x = torch.rand(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(enter(x, contract).shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda images: (enter(images, contract) * weights).sum(), x)
    entered = (enter(x.detach().float().requires_grad_(), contract) * weights.float()).sum()
    assert entered.isfinite()


def gradient_of_sum(x: Tensor, contract: InputContract) -> Tensor:
    images = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(enter(images, contract).sum(), images)
    return gradient


def test_enter_lets_the_whole_gradient_through_when_it_rounds_to_float16() -> None:
    scaling: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.123, 0.456, 0.789)}
    x = torch.rand(2, 3, 4, 4)
    halves = gradient_of_sum(x, contract_of(dtype="float16", **scaling))
    assert torch.equal(halves, gradient_of_sum(x, contract_of(**scaling)))


def test_enter_gives_codes_a_gradient_of_255_inside_the_range_and_none_outside() -> None:
    x = torch.tensor([-0.1, 0.0, 0.3, 1.0, 1.1]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert gradient_of_sum(x, contract_of(dtype="uint8"))[0, 0, 0].tolist() == [0, 255, 255, 255, 0]


def test_round_half_rounds_as_numpy_does_and_leaves_float64_alone() -> None:
    value = torch.linspace(-70000, 70000, 1001)
    with np.errstate(over="ignore"):
        expected = value.numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(round_half(value).numpy(), expected)
    exact = value.double() / 3
    assert round_half(exact) is exact


def test_round_half_passes_gradients_that_float16_could_not_hold() -> None:
    value = torch.rand(4, requires_grad=True)
    (gradient,) = torch.autograd.grad((round_half(value) * 1e-12).sum(), value)
    assert gradient.tolist() == [pytest.approx(1e-12)] * 4


# --- out --------------------------------------------------------------------------------------------------------------

SOFTMAX = contract_of(head="softmax")


def probabilities() -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    tiny = np.exp(-40 * rng.random((2000, 4))).astype(np.float32)
    grid = np.arange(256, dtype=np.float32).reshape(-1, 4) / np.float32(256)
    edges = np.array([[0.0, -1e-3, 1e-12, 1.0], [1e-45, 1e-38, 0.999999, 1.001]], dtype=np.float32)
    return np.concatenate([rng.random((2000, 4), dtype=np.float32), tiny, grid, edges])


@pytest.mark.parametrize("head", ["logits", "softmax", "log-softmax", "sigmoid"])
def test_read_answers_equals_what_is_read_of_the_session(head: str) -> None:
    contract, answers = contract_of(head=head), probabilities()
    found = read_answers(torch.from_numpy(answers), None, contract)
    np.testing.assert_array_equal(found.numpy(), door.read_answers(answers, contract))
    assert found.isfinite().all()


def test_read_answers_has_the_gradient_of_the_scores_log_softmax_when_it_has_the_scores() -> None:
    scores = torch.tensor([[900.0, 0.0, -3.0, 1.0], [0.1, 0.2, 0.3, 0.4]], requires_grad=True)
    answers = torch.softmax(scores.detach(), 1)
    weights = torch.rand(2, 4)
    found = read_answers(answers, scores, SOFTMAX)
    np.testing.assert_array_equal(found.detach().numpy(), door.read_answers(answers.numpy(), SOFTMAX))
    (gradient,) = torch.autograd.grad((found * weights).sum(), scores, retain_graph=True)
    (wanted,) = torch.autograd.grad((scores.log_softmax(1) * weights).sum(), scores)
    assert torch.equal(gradient, wanted)
    assert gradient[0].abs().max() > 0.1, "where every other probability is 0, the logarithm alone has no gradient"


def test_read_answers_has_the_gradient_of_the_logarithm_when_the_scores_are_unknown() -> None:
    answers = torch.tensor([[0.5, 0.25, 0.25, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(read_answers(answers, None, SOFTMAX).sum(), answers)
    assert gradient.tolist() == [[2.0, 4.0, 4.0, 0.0]]
