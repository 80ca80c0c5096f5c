from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qdefense.converters.shadow import Shadow, ShadowError, build_shadow, runtime_saturates
from qdefense.converters.shadow.graph import file_weights
from qdefense.converters.writeback import write_back

from .quantized_files import every_file, half_file, pictures, quantized, unfolded_file
from .shadow_graphs import MICROSOFT, Array, graph_model, operator_model, run_shadow, scalars, session_output


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return every_file()


def trainable(model: bytes) -> Shadow:
    return build_shadow(model, source="shipped", trainable=True)


def test_trainable_shadow_computes_what_the_other_one_does(files: dict[str, bytes]) -> None:
    x = pictures(32)
    for kind, model in files.items():
        shadow = trainable(model)
        plain = build_shadow(model, source="shipped")
        expected = run_shadow(plain, x)
        np.testing.assert_array_equal(run_shadow(shadow, x), expected, err_msg=kind)
        quick = run_shadow(plain, x, exact=False)
        np.testing.assert_array_equal(run_shadow(shadow, x, exact=False), quick, err_msg=kind)
        with_gradients = shadow(torch.from_numpy(x), exact=True).detach().numpy()
        np.testing.assert_array_equal(with_gradients, expected, err_msg=kind)


def test_trainable_shadow_saturates_as_the_other_one_does() -> None:
    model, x = quantized("int8-static", format="qoperator", reduce_range=False), pictures(32)
    expected = session_output(model, x, level="ORT_DISABLE_ALL")
    np.testing.assert_array_equal(run_shadow(trainable(model), x, saturate=runtime_saturates()), expected)


@pytest.mark.parametrize("inputs", [2, 4, 7])
@pytest.mark.parametrize("strides", [(2, 2), (2, 1)])
def test_kernel_of_one_cell_on_few_channels_gets_the_right_gradient(inputs: int, strides: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(0, 1, (32, inputs, 32, 32)), rng.normal(0, 1, (8, inputs, 1, 1)).astype(np.float32)
    shadow = trainable(operator_model("Conv", x.astype(np.float32), {"w": weight}, strides=strides))
    (parameter,) = shadow.parameters()
    factor = rng.normal(0, 1, (32, 8, 32 // strides[0], 32 // strides[1]))
    (shadow(torch.from_numpy(x).float()) * torch.from_numpy(factor).float()).sum().backward()
    assert parameter.grad is not None
    expected = np.einsum("nihw,nohw->oi", x[..., :: strides[0], :: strides[1]], factor)
    np.testing.assert_allclose(parameter.grad[..., 0, 0], expected, rtol=1e-4, atol=1e-3)


def test_every_weight_is_a_parameter_and_gets_a_gradient(files: dict[str, bytes]) -> None:
    for kind, model in files.items():
        shadow = trainable(model)
        assert shadow.trainable
        assert not shadow.frozen
        assert set(shadow.parameters()) == set(shadow.parameters_by_initializer.values())
        shadow(torch.from_numpy(pictures(16))).square().sum().backward()
        trained = {name: value for name, value in shadow.parameters_by_initializer.items() if value.requires_grad}
        assert len(trained) == (4 if kind == "fp32 unfolded" else 7), kind
        for name, parameter in trained.items():
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, (kind, name)


def test_parameters_are_the_real_weights(files: dict[str, bytes]) -> None:
    shapes = {tuple(value.shape) for value in trainable(files["fp32"]).parameters()}
    for kind, model in files.items():
        for name, parameter in trainable(model).parameters_by_initializer.items():
            assert kind == "fp32 unfolded" or tuple(parameter.shape) in {*shapes, (36, 5)}, (kind, name)
            assert float(parameter.detach().abs().max()) < 3, (kind, name)


def test_biases_of_32_bits_are_kept_in_float64(files: dict[str, bytes]) -> None:
    parameters = trainable(files["qoperator u8u8 tensor"]).parameters_by_initializer
    assert {name: value.dtype for name, value in parameters.items() if "b_" in name} == dict.fromkeys(
        ("one.b_quantized", "wise.b_quantized", "fc.b_quantized"), torch.float64
    )
    assert parameters["one.w_quantized"].dtype == torch.float32


def test_statistics_and_constants_of_arithmetic_are_not_trained_unasked(files: dict[str, bytes]) -> None:
    unfolded = trainable(unfolded_file()).parameters_by_initializer
    frozen = {name for name, value in unfolded.items() if not value.requires_grad}
    assert frozen == {"running_mean", "running_var"}
    assert not trainable(files["fp32"]).parameters_by_initializer["mean"].requires_grad


@pytest.mark.parametrize(
    ("kind", "name", "limits"),
    [
        ("qdq u8s8 channel reduced", "one.w_quantized", (-64, 64)),
        ("qdq s8s8 channel", "one.w_quantized", (-127, 127)),
        ("qdq u8u8 tensor", "one.w_quantized", (0, 255)),
        ("dynamic u8", "one.w_quantized", (0, 255)),
        ("int4 channel", "fc.w_int4", (-7, 7)),
        ("uint4 blocks", "fc.w_int4", (0, 15)),
        ("qdq u8u8 tensor", "one.b_quantized", (-(2**31), 2**31 - 1)),
    ],
)
def test_range_of_codes_is_the_one_the_file_uses(
    files: dict[str, bytes], kind: str, name: str, limits: tuple[int, int]
) -> None:
    assert file_weights(files[kind]).trainable[name].grids[0].limits == limits


def layer(codes: Array, scale: Array, zero_point: Array, **more: Array) -> bytes:
    """x times codes, by QLinearMatMul."""
    values = {"w": codes, "w.s": scale, "w.z": zero_point, **scalars(s=(0.02, np.float32), z=(128, np.uint8)), **more}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="in"),
        helper.make_node("QLinearMatMul", ["q", "s", "z", "w", "w.s", "w.z", "s", "z"], ["p"], name="product"),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"], name="out"),
    ]
    return graph_model(nodes, np.zeros((1, 2), np.float32), values)


@pytest.mark.parametrize(
    ("kind", "codes", "zero", "limits"),
    [
        (np.int8, [[64, 3], [-5, 9]], 0, (-64, 64)),
        (np.int8, [[63, 3], [-5, 9]], 0, (-127, 127)),
        (np.int8, [[-128, 3], [-5, 9]], 0, (-128, 127)),
        (np.int8, [[64, 3], [-5, 9]], 4, (-128, 127)),
        (np.uint8, [[127, 3], [5, 9]], 64, (0, 127)),
        (np.uint8, [[126, 3], [5, 9]], 64, (0, 255)),
        (np.uint8, [[100, 3], [5, 9]], 255, (0, 255)),
    ],
)
def test_end_of_the_codes_tells_their_range(kind: type, codes: list[list[int]], zero: int, limits: Array) -> None:
    model = layer(np.array(codes, kind), np.array(0.1, np.float32), np.array(zero, kind))
    assert file_weights(model).trainable["w"].grids[0].limits == limits


def test_gradient_runs_through_the_rounding_inside_the_range_only() -> None:
    codes = np.array([[64, 10], [-20, 30]], np.int8)
    model = layer(codes, np.array([0.01, 0.02], np.float32), np.zeros(2, np.int8))
    shadow = trainable(model)
    weight = shadow.parameters_by_initializer["w"]
    with torch.no_grad():
        weight[0, 0] += 0.011
        weight[1, 1] += 0.003
    shadow(torch.tensor([[0.5, -0.25]])).sum().backward()
    np.testing.assert_allclose(weight.grad, [[0, 0.5], [-0.24, -0.24]], rtol=1e-5)


def test_quantized_convolution_has_the_gradients_of_its_float_form(files: dict[str, bytes]) -> None:
    forms = ("qoperator u8s8 channel reduced", "qdq u8s8 channel reduced")
    x, gradients = torch.from_numpy(pictures(16)), []
    for form in forms:
        shadow = trainable(files[form])
        shadow(x)[:, 0].sum().backward()
        parameters = shadow.parameters_by_initializer
        gradients.append({name: value.grad for name, value in parameters.items() if value.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


def test_shadow_that_is_not_trainable_has_kernels_that_are_built_once(files: dict[str, bytes]) -> None:
    for model in files.values():
        shadow = build_shadow(model, source="shipped")
        assert not shadow.trainable
        assert not any(step.live for step in shadow._plan.steps)
        assert not shadow._plan.live


def test_optimized_graph_can_t_be_trained(files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"the optimized graph is the runtime's own .* train source='shipped'"):
        build_shadow(files["fp32"], source="optimized", trainable=True)


def test_trainable_shadow_can_t_run_in_float64(files: dict[str, bytes]) -> None:
    with pytest.raises(ShadowError, match="a trainable shadow can't run in float64; build one that is not"):
        trainable(files["fp32"]).to_double()


def test_float16_weights_are_rounded_in_each_pass() -> None:
    shadow, x = trainable(half_file()), pictures(4)
    before = run_shadow(shadow, x)
    with torch.no_grad():
        shadow.parameters_by_initializer["fc.b"].mul_(1 + 1e-5)
    np.testing.assert_array_equal(run_shadow(shadow, x), before)


def reason(nodes: list[NodeProto], values: Mapping[str, Array], name: str = "w") -> str:
    model = graph_model(nodes, np.zeros((1, 2), np.float32), values)
    weights = file_weights(model)
    assert name not in weights.trainable
    return weights.frozen[name]


CODES = np.array([[1, -2], [3, 4]], np.int8)


def test_codes_on_two_scales_are_frozen() -> None:
    make = helper.make_node
    nodes = [
        make("DequantizeLinear", ["w", "a"], ["wa"]),
        make("DequantizeLinear", ["w", "b"], ["wb"]),
        make("MatMul", ["x", "wa"], ["p"]),
        make("MatMul", ["p", "wb"], ["y"]),
    ]
    values = {"w": CODES, **scalars(a=(0.1, np.float32), b=(0.2, np.float32))}
    assert reason(nodes, values) == "nodes read its codes on different scales"
    same = scalars(a=(0.1, np.float32), b=(0.1, np.float32))
    model = graph_model(nodes, np.zeros((1, 2), np.float32), {"w": CODES, **same})
    assert len(file_weights(model).trainable["w"].grids) == 2


def test_scales_whose_product_is_lost_freeze_a_bias() -> None:
    shadow = trainable(biased_product(np.float32(1e-30), np.float32(1e-30)))
    assert shadow.frozen == {"c": "node 'gemm' (QGemm): the product of its scales is 0 or not finite"}


def test_blocks_of_zero_or_negative_scale_are_trained() -> None:
    codes = np.array([[7, -8, 3, 1]], np.int8).repeat(2, 0)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["v"], axis=1, block_size=2),
        helper.make_node("MatMul", ["x", "v"], ["y"]),
    ]
    values = {"w": codes, "s": np.array([[0, -0.1], [-0.2, 0.1]], np.float32)}
    proto = onnx.load_from_string(graph_model(nodes, np.zeros((1, 2), np.float32), values))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4]))
    model = bytes(proto.SerializeToString())
    shadow, x = trainable(model), np.array([[1, 2]], np.float32)
    np.testing.assert_array_equal(run_shadow(shadow, x), run_shadow(build_shadow(model, source="shipped"), x))
    assert write_back(model, shadow).data == model
    with torch.no_grad():
        shadow.parameters_by_initializer["w"][1, 0] = 0.6
    written = write_back(model, shadow)
    (tensor,) = (tensor for tensor in onnx.load_from_string(written.data).graph.initializer if tensor.name == "w")
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), [[7, -8, 3, 1], [-3, -8, 3, 1]])


def dynamic_product(scale: Array | None) -> tuple[list[NodeProto], dict[str, Array]]:
    make = helper.make_node
    nodes = [
        make("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="d"),
        make("MatMulInteger", ["q", "w", "z"], ["sums"], name="m"),
        make("Cast", ["sums"], ["y" if scale is None else "wide"], name="c", to=TensorProto.FLOAT),
    ]
    if scale is None:
        return nodes, {"w": CODES}
    nodes += [make("Mul", ["s", "w.s"], ["scales"], name="p"), make("Mul", ["wide", "scales"], ["y"], name="t")]
    return nodes, {"w": CODES, "w.s": scale}


@pytest.mark.parametrize(
    ("scale", "why"),
    [
        (None, "the graph says no scale of the tensor or its channels"),
        (np.array([[0.1], [0.2]], np.float32), "the graph says no scale of the tensor or its channels"),
        (np.array([0.1, 0.2, 0.3], np.float32), "its scale of shape (3,) doesn't fit"),
    ],
)
def test_dynamic_product_without_its_scale_is_frozen(scale: Array | None, why: str) -> None:
    assert reason(*dynamic_product(scale)) == f"node 'm' (MatMulInteger): {why}"


@pytest.mark.parametrize("scale", [np.array(0.1, np.float32), np.array([0.1, 0.2], np.float32)])
def test_dynamic_product_has_its_scale_further_down(scale: Array) -> None:
    nodes, values = dynamic_product(scale)
    shadow = trainable(graph_model(nodes, np.zeros((1, 2), np.float32), values))
    found = shadow.parameters_by_initializer
    np.testing.assert_allclose(found["w"].detach(), CODES * scale, rtol=1e-6)
    assert set(found) == {"w"}


def test_codes_that_no_operator_explains_are_frozen() -> None:
    make = helper.make_node
    nodes = [
        make("Cast", ["x"], ["i"], to=TensorProto.INT64),
        make("Gather", ["w", "i"], ["g"], name="g"),
        make("DequantizeLinear", ["g", "s"], ["y"]),
    ]
    found = reason(nodes, {"w": CODES, **scalars(s=(0.1, np.float32))})
    assert found == "node 'g' (Gather) takes it as input 0, which is not trained"


def biased_product(x_scale: Array, w_scale: Array) -> bytes:
    """Half of x times codes, plus a bias in codes."""
    inputs = ["q", "s", "z", "w", "w.s", "w.z", "c"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QGemm", inputs, ["y"], name="gemm", domain=MICROSOFT, alpha=0.5, transB=1),
    ]
    values = {"w": CODES, "c": np.array([10, -20], np.int32), "w.z": np.zeros(w_scale.shape, np.int8)}
    values |= {"s": np.asarray(x_scale), "w.s": np.asarray(w_scale), **scalars(z=(0, np.uint8))}
    return graph_model(nodes, np.zeros((1, 2), np.float32), values)


def test_alpha_belongs_to_the_scale_of_a_bias() -> None:
    shadow = trainable(biased_product(np.float32(0.5), np.array([0.1, 0.2], np.float32)))
    np.testing.assert_allclose(shadow.parameters_by_initializer["c"].detach(), [0.25, -1.0], rtol=1e-6)
    np.testing.assert_allclose(run_shadow(shadow, np.zeros((1, 2), np.float32)), [[0.25, -1.0]], rtol=1e-6)


def test_weights_behind_a_transposition_are_trained() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["v"]),
        helper.make_node("Transpose", ["v"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    shadow = trainable(graph_model(nodes, np.zeros((1, 2), np.float32), {"w": CODES, **scalars(s=(0.1, np.float32))}))
    shadow(torch.tensor([[1.0, 2.0]])).sum().backward()
    np.testing.assert_array_equal(shadow.parameters_by_initializer["w"].grad, [[1, 2], [1, 2]])


def test_state_of_a_trainable_shadow_is_plain_torch(files: dict[str, bytes]) -> None:
    model = files["dynamic s8 channel"]
    first, second, x = trainable(model), trainable(model), pictures(8)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(1.1)
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(run_shadow(second, x), run_shadow(first, x))
