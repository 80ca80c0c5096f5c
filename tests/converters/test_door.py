from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdefense.converters.contract import ContractError, InputContract
from qdefense.converters.door import FLOOR, HeadError, check_head, fed, read_answers

CONTRACT = InputContract(
    input_name="image", output_name="scores", height=2, width=2, class_names=tuple("abcdefghijkl"), source="graph"
)
GREYS = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16).repeat(3, 1) / np.float32(255)


def changed(**values: Any) -> InputContract:
    return CONTRACT.model_copy(update=values)


@pytest.fixture
def images() -> NDArray[np.float32]:
    return np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)


# --- in ---------------------------------------------------------------------------------------------------------------


def test_fed_gives_the_images_themselves_when_the_contract_changes_nothing(images: NDArray[np.float32]) -> None:
    assert fed(images, CONTRACT) is images


def test_fed_scales_by_the_formula(images: NDArray[np.float32]) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    found = fed(images, changed(range=(-1, 3), mean=mean, std=std))
    wanted = (-1 + images.astype(np.float64) * 4 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_fed_scales_in_the_files_channel_order_when_it_is_bgr(images: NDArray[np.float32]) -> None:
    found = fed(images, changed(channels="BGR", mean=(1, 2, 3), std=(1, 1, 2)))
    np.testing.assert_array_equal(found[:, 0], images[:, 2] - 1)
    np.testing.assert_array_equal(found[:, 1], images[:, 1] - 2)
    np.testing.assert_array_equal(found[:, 2], (images[:, 0] - 3) / 2)


def test_fed_moves_the_channels_to_the_end_when_the_layout_is_nhwc(images: NDArray[np.float32]) -> None:
    found = fed(images, changed(layout="NHWC", channels="BGR"))
    assert found.shape == (2, 4, 5, 3)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found[..., 2], images[:, 0])


def test_fed_gives_every_code_back_when_the_file_takes_codes() -> None:
    found = fed(GREYS, changed(dtype="uint8", range=(0, 255)))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0, 1].ravel(), np.arange(256))


def test_fed_gives_exact_codes_as_floats_when_the_range_is_0_to_255() -> None:
    np.testing.assert_array_equal(fed(GREYS, changed(range=(0, 255)))[0, 1].ravel(), np.arange(256))


def test_fed_rounds_half_to_even_and_clips_when_the_file_takes_codes() -> None:
    x = np.array([0.5, 1.5, 254.5, 300, -3], dtype=np.float32).reshape(1, 1, 1, 5).repeat(3, 1) / np.float32(255)
    assert fed(x, changed(dtype="uint8"))[0, 0, 0].tolist() == [0, 2, 254, 255, 0]


def test_fed_rounds_last_when_the_file_takes_float16(images: NDArray[np.float32]) -> None:
    scaling: dict[str, Any] = {"mean": (0.3, 0.3, 0.3), "std": (0.2, 0.2, 0.2)}
    found = fed(images, changed(dtype="float16", **scaling))
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, fed(images, changed(**scaling)).astype(np.float16))


# --- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["logits", "log-softmax", "sigmoid"])
def test_read_answers_leaves_what_are_no_probabilities(head: str) -> None:
    answers = np.array([[-3.0, 0.5]], dtype=np.float32)
    assert read_answers(answers, changed(head=head)) is answers
    halves = read_answers(answers.astype(np.float16), changed(head=head))
    assert (halves.dtype, halves.tolist()) == (np.float32, [[-3.0, 0.5]])


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_read_answers_takes_the_logarithm_of_probabilities(kind: Any) -> None:
    answers = np.array([[1.0, 0.25, 0.0, -0.01]], dtype=kind)
    found = read_answers(answers, changed(head="softmax"))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0, :2], np.log(np.array([1, 0.25])).astype(np.float32))
    np.testing.assert_array_equal(found[0, 2:], np.float32(np.log(FLOOR)))


def test_read_answers_keeps_a_nan_when_there_is_one() -> None:
    found = read_answers(np.array([[np.nan, 1.0]], dtype=np.float32), changed(head="softmax"))
    assert np.isnan(found[0, 0])


# --- what the answers really are --------------------------------------------------------------------------------------

RNG = np.random.default_rng(1)


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    parts = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = parts / parts.sum(axis=1, keepdims=True)
    return shares


def on_uint8_grid(probabilities: NDArray[np.float64]) -> NDArray[np.float32]:
    """As a quantized softmax gives them: steps of 1/256, at most 255 of them."""
    return (np.clip(np.rint(probabilities * 256), 0, 255) / 256).astype(np.float32)


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("classes", [2, 10, 43])
def test_check_head_is_silent_when_quantized_probabilities_sum_to_about_1(sharpness: float, classes: int) -> None:
    contract = changed(head="softmax", class_names=tuple(map(str, range(classes))))
    answers = on_uint8_grid(softmax(sharpness * RNG.standard_normal((300, classes))))
    check_head(read_answers(answers, contract), contract)


@pytest.mark.parametrize("head", ["softmax", "log-softmax"])
def test_check_head_is_silent_when_probabilities_are_exact(head: str) -> None:
    probabilities = softmax(9 * RNG.standard_normal((50, 12)))
    contract = changed(head=head)
    check_head(read_answers((probabilities if head == "softmax" else np.log(probabilities)), contract), contract)


LOGITS = {
    "of a trained model": 5 * RNG.standard_normal((50, 12)),
    "that a rectifier made positive": np.maximum(5 * RNG.standard_normal((50, 12)), 0),
    "whose rows sum to 1 with negative ones among them": np.array([[2.0, -1.0], [-1.0, 2.0]]),
    "that are log-probabilities": np.log(softmax(RNG.standard_normal((50, 12)))),
    "that are zero": np.zeros((50, 12)),
    "of which only a few rows sum to 1": np.vstack([softmax(RNG.standard_normal((20, 12))), np.ones((30, 12))]),
}


@pytest.mark.parametrize("logits", LOGITS.values(), ids=list(LOGITS))
def test_check_head_is_silent_on_logits(logits: NDArray[np.float64]) -> None:
    check_head(logits.astype(np.float32), CONTRACT)


@pytest.mark.parametrize("quantized", [False, True])
def test_check_head_names_the_option_when_logits_are_probabilities(quantized: bool) -> None:
    probabilities = softmax(4 * RNG.standard_normal((50, 12)))
    answers = on_uint8_grid(probabilities) if quantized else probabilities.astype(np.float32)
    with pytest.raises(HeadError) as caught:
        check_head(read_answers(answers, CONTRACT), CONTRACT)
    assert isinstance(caught.value, ContractError)
    assert str(caught.value) == (
        "output 'scores' is read as logits, but its rows are probabilities that sum to 1; say --head softmax"
    )


@pytest.mark.parametrize(("head", "total"), [("softmax", "6"), ("log-softmax", "4.42e+05")])
def test_check_head_names_the_option_when_probabilities_do_not_sum_to_1(head: str, total: str) -> None:
    answers = np.full((9, 12), 0.5, dtype=np.float32)
    answers = answers if head == "softmax" else np.full((9, 12), np.log(4.42e5 / 12), dtype=np.float32)
    contract = changed(head=head)
    with pytest.raises(HeadError) as caught:
        check_head(read_answers(answers, contract), contract)
    assert str(caught.value) == (
        f"output 'scores' is read as {head}, but the probabilities of an image sum to {total}; say --head logits"
    )


@pytest.mark.parametrize("head", ["softmax", "log-softmax"])
def test_check_head_finds_logits_of_a_trained_model_when_they_are_read_as_probabilities(head: str) -> None:
    contract = changed(head=head)
    with pytest.raises(HeadError, match="say --head logits"):
        check_head(read_answers(LOGITS["of a trained model"].astype(np.float32), contract), contract)


@pytest.mark.parametrize(
    ("logs", "head"),
    [
        (np.zeros((0, 12)), "softmax"),
        (np.full((3, 12), np.nan), "softmax"),
        (np.array([[np.inf, 0.0]]), "logits"),
        (np.full((3, 12), 0.5), "sigmoid"),
    ],
)
def test_check_head_is_silent_when_nothing_can_be_said(logs: NDArray[np.float64], head: str) -> None:
    check_head(logs.astype(np.float32), changed(head=head))
