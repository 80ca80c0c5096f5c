from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.arithmetic import ArithmeticAgreement, OtherArithmetic
from qdefense.artifact import Artifact
from qdefense.converters.exact_products import UnsupportedArithmeticError
from qdefense.data.images import Pixels
from qdefense.session import DeployedSession, SessionError, SessionProfile, profile_for

WIDTH, CLASSES = 48, 5


def _deployed(data: bytes, **changes: object) -> DeployedSession:
    artifact = Artifact.from_bytes(data)
    return DeployedSession(artifact, profile_for(artifact).with_changes(**changes))


def _codes() -> np.ndarray:
    """Every pair of weights overflows int16 on white images."""
    weights = np.full((WIDTH, CLASSES), 127, np.int8)
    weights[:, 1::2] = -128
    return weights


def _white_is_worst(**changes: Any) -> bytes:
    """Pixels to u8 codes, times `_codes`, in QOperator form."""
    constants = {
        "scale": np.float32(1 / 255), "zero": np.uint8(0), "weights": _codes(), "unit": np.float32(0.5),
        "none": np.int8(0),
    }  # fmt: skip
    product = ["codes", "scale", "zero", "weights", "unit", "none"]
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("QuantizeLinear", ["flat", "scale", "zero"], ["codes"]),
        helper.make_node("QGemm", product, ["logits"], domain="com.microsoft", name="product"),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants | changes).items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def _expected(x: Pixels) -> np.ndarray:
    sums: np.ndarray = np.rint(x.reshape(len(x), -1) * 255).astype(np.int64) @ _codes().astype(np.int64)
    return sums / 255 * 0.5


@pytest.fixture
def bright() -> Pixels:
    levels = np.linspace(135, 255, 9, dtype=np.float32).reshape(-1, 1, 1, 1) / 255
    return levels * np.ones((1, 3, 4, 4), np.float32)


@pytest.mark.parametrize("optimization", ["disable", "basic", "extended", "all"])
def test_exact_sessions_do_not_saturate_at_any_level(bright: Pixels, optimization: str) -> None:
    session = _deployed(_white_is_worst(), arithmetic="exact", optimization=optimization)
    np.testing.assert_allclose(session.logits(bright), _expected(bright), rtol=1e-6)
    held = {tensor.data_type for tensor in onnx.load_from_string(session.graph).graph.initializer}
    assert TensorProto.INT8 not in held


@pytest.mark.parametrize("form", ["static", "dynamic", "fp32"])
def test_exact_sessions_answer_as_the_runtimes_own_precise_mode(toy_forms: Any, form: str) -> None:
    """Where the option works: it stops at graphs that use one weight twice, and at s8 x s8 products."""
    session = _deployed(toy_forms[form], arithmetic="exact")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    precise = onnxruntime.InferenceSession(toy_forms[form], options, providers=["CPUExecutionProvider"])
    x, step = toy_forms.images.pixels, session.profile.batch
    answers = [precise.run(None, {"image": x[at : at + step]})[0] for at in range(0, len(x), step)]
    np.testing.assert_array_equal(session.logits(x), np.concatenate(answers))


@pytest.mark.parametrize("optimization", ["disable", "basic", "extended", "all"])
@pytest.mark.parametrize("form", ["static", "dynamic"])
def test_exact_sessions_differ_in_nothing_but_saturation(toy_forms: Any, form: str, optimization: str) -> None:
    """On small codes no kernel saturates: halving every weight's code is reduce_range by hand."""
    model = onnx.load_from_string(toy_forms[form])
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT8 and tensor.dims:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) // 2, tensor.name))
    pair = [
        _deployed(model.SerializeToString(), arithmetic=arithmetic, optimization=optimization)
        for arithmetic in ("as-run", "exact")
    ]
    x = toy_forms.images.pixels
    np.testing.assert_array_equal(pair[0].logits(x), pair[1].logits(x))


def test_exact_sessions_refuse_a_graph_without_an_exact_form(make_lstm: Callable[[], bytes]) -> None:
    with pytest.raises(UnsupportedArithmeticError, match="DynamicQuantizeLSTM"):
        _deployed(make_lstm(), arithmetic="exact")


@pytest.fixture
def make_lstm() -> Callable[[], bytes]:
    def make() -> bytes:
        value = helper.make_tensor_value_info
        nodes = [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("Unsqueeze", ["flat", "first"], ["steps"]),
            helper.make_node(
                "DynamicQuantizeLSTM",
                ["steps", "w", "r", "", "", "", "", "", "scale", "zero", "scale", "zero"],
                ["", "last"],
                domain="com.microsoft",
                hidden_size=CLASSES,
                name="lstm",
            ),
            helper.make_node("Squeeze", ["last", "first"], ["logits"]),
        ]
        weights = np.zeros((1, WIDTH, 4 * CLASSES), np.int8)
        constants = {
            "w": weights, "r": weights[:, :CLASSES], "scale": np.ones(1, np.float32), "zero": np.zeros(1, np.int8),
            "first": np.zeros(1, np.int64),
        }  # fmt: skip
        graph = helper.make_graph(
            nodes,
            "test",
            [value("image", TensorProto.FLOAT, ["batch", 3, 4, 4])],
            [value("logits", TensorProto.FLOAT, ["batch", CLASSES])],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())

    return make


@pytest.mark.parametrize("used", ["as-run", "exact"])
def test_agreement_is_bit_for_bit_where_nothing_saturates(bright: Pixels, used: str) -> None:
    session = _deployed(_white_is_worst(weights=_codes() // 4), arithmetic=used)
    other = OtherArithmetic(session)
    other.compare(bright, session.logits(bright))
    other.compare(bright[:3], session.logits(bright[:3]))
    found = other.agreement
    assert found == ArithmeticAgreement(
        used=used, mixed_products=1, n=12, top1_agreement=1.0, max_abs_logit_diff=0.0, bit_exact_rows=1.0, forwards=12
    )
    assert found.bit_exact
    assert (
        found.summary
        == "as-run and exact arithmetic agree bit for bit on 12 images (1 operators multiply u8 by s8 codes)"
    )


def test_agreement_says_how_far_apart_the_two_are(bright: Pixels) -> None:
    """As on a CPU that saturates: there the session's logits are what they are here plus what clipping takes off."""
    session = _deployed(_white_is_worst(weights=_codes() // 4))
    other, logits = OtherArithmetic(session), session.logits(bright)
    clipped = logits.copy()
    clipped[0] = logits[0, ::-1]
    clipped[0, 1] = logits[0].max() + 1.5
    other.compare(bright, clipped)
    found = other.agreement
    assert found is not None
    assert not found.bit_exact
    assert found.top1_agreement == pytest.approx(8 / 9)
    assert found.bit_exact_rows == pytest.approx(8 / 9)
    assert found.max_abs_logit_diff == pytest.approx(float(np.abs(clipped - logits).max()))
    assert found.summary == (
        f"as-run and exact arithmetic differ: top-1 agreement 0.8889, largest logit difference "
        f"{found.max_abs_logit_diff:.3g}, 88.9% of 9 rows bit-exact (1 operators multiply u8 by s8 codes)"
    )


def test_agreement_has_no_largest_difference_when_a_logit_is_not_finite(bright: Pixels) -> None:
    session = _deployed(_white_is_worst())
    other = OtherArithmetic(session)
    other.compare(bright, session.logits(bright) * np.float32(np.inf))
    found = other.agreement
    assert found is not None
    assert found.max_abs_logit_diff is None
    assert "largest logit difference not finite" in found.summary


def test_agreement_says_why_when_the_other_arithmetic_answers_no_more(
    bright: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _deployed(_white_is_worst())
    other, logits = OtherArithmetic(session), session.logits(bright)
    other.compare(bright, logits)

    def fail(*_: object) -> None:
        raise SessionError("refused")

    monkeypatch.setattr(DeployedSession, "logits", fail)
    other.compare(bright, logits)
    other.compare(bright, logits)
    found = other.agreement
    assert found == ArithmeticAgreement(used="as-run", mixed_products=1, not_run="refused")
    assert not found.bit_exact
    assert found.summary == "only as-run arithmetic was run: refused"


def test_agreement_costs_nothing_when_no_product_is_mixed(bright: Pixels) -> None:
    data = _white_is_worst(weights=_codes().view(np.uint8), none=np.uint8(0))
    session = _deployed(data)
    other = OtherArithmetic(session)
    other.compare(bright, session.logits(bright))
    found = other.agreement
    assert found == ArithmeticAgreement(used="as-run", mixed_products=0)
    assert found.bit_exact
    assert found.summary.startswith("as-run and exact arithmetic are one: ")


def test_agreement_is_none_where_there_is_one_arithmetic(toy_forms: Any) -> None:
    session = _deployed(toy_forms.fp32)
    other, x = OtherArithmetic(session), toy_forms.images.pixels
    other.compare(x, session.logits(x))
    assert other.agreement is None


def test_agreement_says_why_the_other_arithmetic_was_not_run(bright: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    session = _deployed(_white_is_worst())

    def refuse(*_: object, **__: object) -> NoReturn:
        raise UnsupportedArithmeticError("node 'lstm' has no exact form here")

    monkeypatch.setattr("qdefense.converters.runtime_graph.exact_model", refuse)
    other = OtherArithmetic(session)
    other.compare(bright, session.logits(bright))
    found = other.agreement
    assert found == ArithmeticAgreement(used="as-run", not_run="node 'lstm' has no exact form here")
    assert not found.bit_exact
    assert found.summary == "only as-run arithmetic was run: node 'lstm' has no exact form here"


def test_profiles_of_earlier_reports_are_those_of_now_as_run() -> None:
    earlier = {"provider": "CPUExecutionProvider", "optimization": "all", "threads": 1, "batch": 64}
    assert SessionProfile.model_validate(earlier) == SessionProfile(
        batch=64, arithmetic="as-run", matmulnbits_accuracy_level=1
    )
