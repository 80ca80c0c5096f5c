from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from qdefense.artifact import Artifact
from qdefense.converters.contract import StatedContract
from qdefense.converters.shadow import Shadow, ShadowError, build_shadow
from qdefense.data.images import ImageSet
from qdefense.fidelity import FidelityCertificate, certify, shadow_logits
from qdefense.session import DeployedSession, profile_for

from .shadow_graphs import MICROSOFT, Array, graph_model, session_output, shadow_output

SIZE, CLASSES = 6, 5
FEATURES = 4 * SIZE * SIZE
RNG = np.random.default_rng(0)
CONSTANTS: dict[str, Array] = {
    "kernels": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
    "weight": RNG.standard_normal((FEATURES, CLASSES)).astype(np.float32) / 4,
}
node = helper.make_node
BODY = [
    node("Conv", ["x", "kernels"], ["convolved"], pads=[1, 1, 1, 1]),
    node("Relu", ["convolved"], ["features"]),
]
FLAT = [node("Flatten", ["features"], ["flat"])]
HEAD = [node("MatMul", ["flat", "weight"], ["y"])]


@pytest.fixture(scope="module")
def images() -> ImageSet:
    codes = np.random.default_rng(1).integers(0, 256, (256, SIZE, SIZE, 3), dtype=np.uint8)
    names = tuple(map(str, range(CLASSES)))
    return ImageSet(images=codes, labels=np.arange(256) % CLASSES, class_names=names, source="noise")


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Array] | None = None,
    *,
    batch: int | str = "N",
    kind: int = TensorProto.FLOAT,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[str] = ("y",),
) -> bytes:
    held = {**CONSTANTS, **(constants or {})}
    used = {name for entry in nodes for name in entry.input}
    graph = helper.make_graph(
        list(nodes),
        "contract",
        [helper.make_tensor_value_info("x", kind, [batch, 3, SIZE, SIZE]), *inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, None]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in held.items() if name in used],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def opened(data: bytes, **said: Any) -> DeployedSession:
    names = {"class_names": tuple(map(str, range(CLASSES)))}
    artifact = Artifact.from_bytes(data, StatedContract.model_validate({**names, **said}))
    return DeployedSession(artifact, profile_for(artifact))


def shadow_of(session: DeployedSession, source: Any = "optimized") -> Shadow:
    return build_shadow(session.artifact.data, source=source, contract=session.artifact.contract)


def certificate(session: DeployedSession, images: ImageSet) -> FidelityCertificate:
    return certify(session, shadow_of(session), images, seed=0)


def agrees(session: DeployedSession, images: ImageSet, *, rtol: float = 1e-5) -> None:
    """Row by row, and whatever other rows are in the shadow's batch."""
    shadow, x = shadow_of(session), images.pixels[:7]
    logits = session.logits(x)
    assert logits.std() > 0.1
    np.testing.assert_allclose(shadow_logits(shadow, x), logits, rtol=rtol, atol=1e-5)
    single = np.concatenate([shadow_logits(shadow, x[row : row + 1]) for row in range(len(x))])
    np.testing.assert_allclose(single, logits, rtol=rtol, atol=1e-5)


# --- a frozen batch ---------------------------------------------------------------------------------------------------


def frozen(batch: int, how: str) -> bytes:
    target = np.array([batch, FEATURES])
    reshape = node("Reshape", ["features", "shape"], ["flat"])
    flattening = {
        "initializer": [reshape],
        "Constant": [node("Constant", [], ["shape"], value=numpy_helper.from_array(target)), reshape],
        "Flatten": FLAT,
    }
    constants = {"shape": target} if how == "initializer" else {}
    return model([*BODY, *flattening[how], *HEAD], constants, batch=batch)


@pytest.mark.parametrize("source", ["optimized", "shipped"])
@pytest.mark.parametrize("how", ["initializer", "Constant", "Flatten"])
@pytest.mark.parametrize("batch", [1, 4])
def test_build_shadow_frees_a_frozen_batch_when_it_is_flattened_by(
    images: ImageSet, batch: int, how: str, source: Any
) -> None:
    session = opened(frozen(batch, how))
    assert session.artifact.contract.batch == session.profile.batch == batch
    agrees(session, images)
    shadow = shadow_of(session, source)
    assert shadow(torch.zeros(3, 3, SIZE, SIZE)).shape == (3, CLASSES)


@pytest.mark.parametrize("batch", [1, 4])
def test_certify_passes_when_the_batch_is_frozen(images: ImageSet, batch: int) -> None:
    assert certificate(opened(frozen(batch, "initializer")), images).certified


def test_build_shadow_frees_a_frozen_batch_when_a_bias_is_reshaped_too(images: ImageSet) -> None:
    nodes = [
        node("Reshape", ["bias", "four"], ["broad"]),
        node("Add", ["x", "broad"], ["moved"]),
        node("Conv", ["moved", "kernels"], ["features"], pads=[1, 1, 1, 1]),
    ]
    constants = {"bias": np.array([0.1, 0.2, 0.3], np.float32), "four": np.array([1, 3, 1, 1])}
    agrees(opened(model([*nodes, *FLAT, *HEAD], constants, batch=1)), images)


EXPANDED = [
    node("Expand", ["one", "target"], ["tokens"]),
    node("Flatten", ["features"], ["only"]),
    node("Concat", ["only", "tokens"], ["flat"], axis=1),
    node("MatMul", ["flat", "wide"], ["y"]),
]
MIXED = [
    node("Reshape", ["features", "target"], ["mixed"]),
    node("Softmax", ["mixed"], ["soft"], axis=1),
    node("Reshape", ["soft", "back"], ["flat"]),
    *HEAD,
]


@pytest.mark.parametrize(
    ("tail", "targets", "batch", "why"),
    [
        (EXPANDED, {"target": [1, 2]}, 1, "Expected size 2 but got size 1"),
        (EXPANDED, {"target": [4, 2]}, 4, "Expected size 5 but got size 4"),
        (
            MIXED,
            {"target": [4, SIZE * SIZE], "back": [1, FEATURES]},
            1,
            "shape '[4, 36]' is invalid for input of size 288",
        ),
        (MIXED, {"target": [8, 2 * SIZE * SIZE], "back": [4, FEATURES]}, 4, "shape '[8, 72]' is invalid for input"),
        (MIXED, {"target": [-1, 2 * FEATURES], "back": [4, FEATURES]}, 4, "shape '[-1, 288]' is invalid for input"),
    ],
)
def test_build_shadow_says_that_a_batch_is_frozen_when_the_graph_cannot_be_freed_of_it(
    tail: list[onnx.NodeProto], targets: dict[str, list[int]], batch: int, why: str
) -> None:
    constants: dict[str, Array] = {name: np.array(shape) for name, shape in targets.items()}
    constants |= {
        "one": np.ones((1, 1), np.float32),
        "wide": np.random.default_rng(2).standard_normal((FEATURES + 2, CLASSES)).astype(np.float32),
    }
    session = opened(model([*BODY, *tail], constants, batch=batch))
    with pytest.raises(ShadowError) as caught:
        shadow_of(session)
    message = str(caught.value)
    assert message.startswith(f"the file's batch is frozen at {batch} and the graph cannot be freed of it: ")
    assert why in message
    assert message.endswith("; export it with a dynamic batch axis")
    assert message.isprintable()


def test_build_shadow_says_that_a_batch_is_frozen_when_rows_become_one() -> None:
    """A graph that runs, but no longer answers with one row per image."""
    nodes = [
        *BODY,
        *FLAT,
        node("ReduceMean", ["flat"], ["mean"], axes=[0], keepdims=1),
        node("MatMul", ["mean", "weight"], ["y"]),
    ]
    session = opened(model(nodes, batch=1))
    with pytest.raises(
        ShadowError, match=r"^the file's batch is frozen at 1 and the graph cannot be freed of it; export"
    ):
        shadow_of(session)


def test_certify_fails_when_a_freed_batch_couples_its_rows(images: ImageSet) -> None:
    """At batch 1 a mean over the batch is nothing; freed, it mixes images, and the certificate finds it."""
    nodes = [
        *BODY,
        *FLAT,
        node("ReduceMean", ["flat"], ["mean"], axes=[0], keepdims=1),
        node("Add", ["flat", "mean"], ["sum"]),
        node("MatMul", ["sum", "weight"], ["y"]),
    ]
    session = opened(model(nodes, batch=1))
    assert shadow_of(session)(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, CLASSES)
    assert not certificate(session, images).certified


# --- fixed inputs, several outputs ------------------------------------------------------------------------------------

FLAGGED = [node("Cast", ["training"], ["number"], to=TensorProto.FLOAT), node("Add", ["scores", "number"], ["y"])]
CHOSEN = [node("OneHot", ["class", "depth", "values"], ["hot"]), node("Add", ["scores", "hot"], ["y"])]
FIXED = [
    ("factor", TensorProto.FLOAT, [1], 0.5, [node("Mul", ["scores", "factor"], ["y"])]),
    ("class", TensorProto.INT64, [1], 2.0, CHOSEN),
    ("training", TensorProto.BOOL, [], 0.0, FLAGGED),
    ("training", TensorProto.BOOL, [], 1.0, FLAGGED),
]


@pytest.mark.parametrize(("name", "kind", "shape", "value", "tail"), FIXED, ids=["float", "int64", "false", "true"])
def test_shadow_agrees_when_an_input_is_fixed(
    images: ImageSet, name: str, kind: int, shape: list[int], value: float, tail: list[onnx.NodeProto]
) -> None:
    scores = [*BODY, *FLAT, node("MatMul", ["flat", "weight"], ["scores"])]
    constants: dict[str, Array] = {"depth": np.array(CLASSES), "values": np.array([0, 3], np.float32)}
    data = model([*scores, *tail], constants, inputs=[helper.make_tensor_value_info(name, kind, shape)])
    session = opened(data, fixed_inputs={name: value})
    plain = opened(model([*scores, node("Identity", ["scores"], ["y"])]))
    difference = session.logits(images.pixels[:7]) - plain.logits(images.pixels[:7])
    assert np.abs(difference).max() > 0.5 or value == 0, "the value reaches the session"
    agrees(session, images)


@pytest.mark.parametrize("chosen", ["y", "other"])
def test_shadow_agrees_when_one_output_of_two_is_chosen(images: ImageSet, chosen: str) -> None:
    tail = [node("MatMul", ["flat", "weight"], ["y"]), node("Mul", ["y", "minus"], ["other"])]
    data = model([*BODY, *FLAT, *tail], {"minus": np.array(-1, np.float32)}, outputs=["y", "other"])
    session = opened(data, output_name=chosen)
    first = opened(model([*BODY, *FLAT, *HEAD])).logits(images.pixels[:7])
    np.testing.assert_array_equal(session.logits(images.pixels[:7]), first if chosen == "y" else -first)
    agrees(session, images)


# --- other types ------------------------------------------------------------------------------------------------------


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(torch.relu(self.norm(self.conv(x))).flatten(1))
        return y


def exported_in_half() -> bytes:
    torch.manual_seed(0)
    small = _Small()
    small.norm.running_mean = torch.randn(4)
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter of old, whose files are still about
        torch.onnx.export(
            small.eval().half(),
            (torch.zeros(1, 3, SIZE, SIZE).half(),),
            target,
            dynamo=False,
            opset_version=13,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
        )
    return target.getvalue()


@pytest.mark.parametrize("scaling", [{}, {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "channels": "BGR"}])
def test_certify_passes_when_the_file_is_in_float16(images: ImageSet, scaling: dict[str, Any]) -> None:
    session = opened(exported_in_half(), **scaling)
    assert session.artifact.contract.dtype == "float16"
    found = certificate(session, images)
    assert found.certified, found.reason
    assert all((entry.relative_rms or 0) < 1e-3 for entry in found.sets)


def test_cast_to_float16_gives_what_the_runtime_gives_and_lets_the_gradient_through() -> None:
    casts = [
        node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        node("Cast", ["half"], ["y"], to=TensorProto.FLOAT),
    ]
    x = np.random.default_rng(0).normal(0, 1000, (5, 3, 4, 4)).astype(np.float32)
    data = graph_model(casts, x, {})
    np.testing.assert_array_equal(shadow_output(data, x), session_output(data, x))
    np.testing.assert_array_equal(shadow_output(data, x), x.astype(np.float16).astype(np.float32))
    shadow = build_shadow(data, source="shipped")
    images = torch.from_numpy(x).requires_grad_()
    (gradient,) = torch.autograd.grad(shadow(images).sum() * 1e-12, images)
    assert torch.equal(gradient, torch.full_like(images, 1e-12))
    assert torch.equal(shadow.to_double()(images.double()), images.double())


CODES = [
    node("Cast", ["x"], ["floats"], to=TensorProto.FLOAT),
    node("Div", ["floats", "white"], ["scaled"]),
    node("Conv", ["scaled", "kernels"], ["features"], pads=[1, 1, 1, 1]),
]


def test_certify_passes_when_the_file_takes_codes_and_scales_them_itself(images: ImageSet) -> None:
    data = model([*CODES, *FLAT, *HEAD], {"white": np.array(255, np.float32)}, kind=TensorProto.UINT8)
    session = opened(data)
    assert session.artifact.contract.dtype == "uint8"
    agrees(session, images)
    found = certificate(session, images)
    assert found.certified, found.reason
    same = opened(model([node("Conv", ["x", "kernels"], ["features"], pads=[1, 1, 1, 1]), *FLAT, *HEAD]))
    np.testing.assert_allclose(session.logits(images.pixels), same.logits(images.pixels), atol=1e-5)


def test_to_double_rounds_no_codes_so_that_differences_can_check_the_gradient() -> None:
    data = model([*CODES, *FLAT, *HEAD], {"white": np.array(255, np.float32)}, kind=TensorProto.UINT8)
    twin = shadow_of(opened(data)).to_double()
    x = torch.rand(1, 3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(twin, x, fast_mode=True)


# --- what the output means --------------------------------------------------------------------------------------------

SCORES = [*BODY, *FLAT, node("MatMul", ["flat", "weight"], ["scores"])]
HEADS = {
    "Softmax": ([node("Softmax", ["scores"], ["y"], axis=1)], "softmax"),
    "Softmax behind carriers": (
        [
            node("Softmax", ["scores"], ["a"], axis=-1),
            node("Reshape", ["a", "kept"], ["b"]),
            node("Identity", ["b"], ["y"]),
        ],
        "softmax",
    ),
    "Softmax of a picture": (
        [
            node("Reshape", ["scores", "picture"], ["a"]),
            node("Softmax", ["a"], ["b"], axis=1),
            node("Flatten", ["b"], ["y"]),
        ],
        "softmax",
    ),
    "LogSoftmax": ([node("LogSoftmax", ["scores"], ["y"], axis=1)], "log-softmax"),
}
TARGETS: dict[str, Array] = {"kept": np.array([-1, CLASSES]), "picture": np.array([0, CLASSES, 1, 1])}


def torch_scores(x: Tensor) -> Tensor:
    """The scores of SCORES, in torch alone."""
    features = torch.relu(torch.nn.functional.conv2d(x, torch.from_numpy(CONSTANTS["kernels"]), padding=1))
    return features.flatten(1) @ torch.from_numpy(CONSTANTS["weight"])


def gradients(answers: Tensor, x: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, CLASSES)
    (gradient,) = torch.autograd.grad((answers * weights).sum(), x)
    return gradient


@pytest.mark.parametrize(("tail", "head"), HEADS.values(), ids=list(HEADS))
@pytest.mark.parametrize("sharp", [1, 30], ids=["soft", "confident"])
def test_shadow_has_the_gradient_of_the_scores_log_softmax_when_the_file_ends_in(
    images: ImageSet, tail: list[onnx.NodeProto], head: str, sharp: int
) -> None:
    constants = {**TARGETS, "weight": CONSTANTS["weight"] * np.float32(sharp)}
    session = opened(model([*SCORES, *tail], constants))
    assert session.artifact.contract.head == head
    x = torch.from_numpy(images.pixels[:16]).requires_grad_()
    found = gradients(shadow_of(session)(x), x)
    wanted = gradients((torch_scores(x) * sharp).log_softmax(1), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found.abs().amax((1, 2, 3)) > 0.1).all()


@pytest.mark.parametrize(("tail", "head"), HEADS.values(), ids=list(HEADS))
def test_certify_passes_when_a_confident_file_ends_in(images: ImageSet, tail: list[onnx.NodeProto], head: str) -> None:
    """Probabilities below the floor must not make the finite differences fail."""
    constants = {**TARGETS, "weight": CONSTANTS["weight"] * np.float32(30)}
    session = opened(model([*SCORES, *tail], constants))
    assert float((session.logits(images.pixels) < -26).mean()) > 0.1
    found = certificate(session, images)
    assert found.certified, found.reason


def test_shadow_answers_with_log_probabilities_when_the_file_ends_in_a_softmax(images: ImageSet) -> None:
    session = opened(model([*SCORES, node("Softmax", ["scores"], ["y"], axis=1)]))
    logits = session.logits(images.pixels[:9])
    np.testing.assert_allclose(np.exp(logits.astype(np.float64)).sum(axis=1), 1, rtol=1e-5)
    agrees(session, images)


def test_shadow_without_a_contract_answers_with_what_the_file_does(images: ImageSet) -> None:
    data = model([*SCORES, node("Softmax", ["scores"], ["y"], axis=1)])
    plain = build_shadow(data, source="optimized")
    with torch.no_grad():
        answers = plain(torch.from_numpy(images.pixels[:9])).numpy()
    np.testing.assert_allclose(answers.sum(axis=1), 1, rtol=1e-5)


def quantized_softmax() -> bytes:
    """Float scores, and a softmax from codes to codes: what ONNX Runtime fuses to QLinearSoftmax."""
    tail = [
        node("QuantizeLinear", ["scores", "step", "middle"], ["codes"]),
        node("DequantizeLinear", ["codes", "step", "middle"], ["rounded"]),
        node("Softmax", ["rounded"], ["shares"], axis=1),
        node("QuantizeLinear", ["shares", "share", "zero"], ["share codes"]),
        node("DequantizeLinear", ["share codes", "share", "zero"], ["y"]),
    ]
    constants: dict[str, Array] = {
        "weight": CONSTANTS["weight"] * np.float32(10),
        "step": np.array(1.5, np.float32),
        "middle": np.array(131, np.uint8),
        "share": np.array(1 / 256, np.float32),
        "zero": np.array(0, np.uint8),
    }
    return model([*SCORES, *tail], constants)


def test_shadow_of_a_quantized_softmax_is_exact_and_has_the_gradient_of_the_rounded_scores(images: ImageSet) -> None:
    session = opened(quantized_softmax())
    shadow = shadow_of(session)
    assert "QLinearSoftmax" in shadow.operators
    np.testing.assert_array_equal(shadow_logits(shadow, images.pixels), session.logits(images.pixels))
    x = torch.from_numpy(images.pixels[:16]).requires_grad_()
    scores = torch_scores(x) * 10
    codes = (scores.detach() / 1.5).round().clamp(-131, 124)
    assert codes.abs().max() < 120, "nothing is clipped, so that rounding passes every gradient"
    rounded = codes * 1.5 + (scores - scores.detach())
    found = gradients(shadow(x), x)
    torch.testing.assert_close(found, gradients(rounded.log_softmax(1), x), rtol=1e-4, atol=1e-5)
    zeros = (session.logits(images.pixels[:16]) < -27).any(axis=1)
    assert zeros.any(), "some probability is rounded to 0, where its own gradient would be lost"
    assert (found[torch.from_numpy(zeros)].abs().amax((1, 2, 3)) > 0.1).all()


def test_certify_passes_when_a_quantized_softmax_rounds_to_zero(images: ImageSet) -> None:
    found = certificate(opened(quantized_softmax()), images)
    assert found.certified, found.reason
    assert all(entry.bit_exact_rows == 1 for entry in found.sets)


def test_build_shadow_knows_no_scores_when_the_softmax_is_only_stated(images: ImageSet) -> None:
    """A head that a person stated and the graph does not show has the gradient of its logarithm."""
    tail = [node("Softmax", ["scores"], ["a"], axis=1), node("Clip", ["a", "low"], ["y"])]
    data = model([*SCORES, *tail], {"low": np.array(-1, np.float32)})
    assert opened(data).artifact.contract.head == "logits"
    session = opened(data, head="softmax")
    agrees(session, images)
    x = torch.from_numpy(images.pixels[:4]).requires_grad_()
    found = gradients(shadow_of(session)(x), x)
    torch.testing.assert_close(found, gradients(torch_scores(x).log_softmax(1), x), rtol=1e-3, atol=1e-4)
