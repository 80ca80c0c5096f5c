from __future__ import annotations

import copy
import hashlib

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from qdefense.converters.contract import InputContract, read_contract, write_contract
from qdefense.converters.fingerprint import graph_fingerprint
from qdefense.converters.shadow import Shadow, ShadowError, build_shadow, runtime_saturates
from qdefense.converters.shadow.graph import file_weights
from qdefense.converters.writeback import ChangedTensor, Scales, WriteBackError, write_back
from qdefense.fidelity import compare_logits

from .shadow.quantized_files import CLASSES, SIZE, Array, every_file, model_of, pictures
from .shadow.shadow_graphs import graph_model, run_shadow, session_output

KINDS = (
    "fp32",
    "fp32 unfolded",
    "fp16",
    "qdq u8s8 channel reduced",
    "qdq u8s8 tensor",
    "qdq s8s8 channel",
    "qdq u8u8 tensor",
    "qoperator u8s8 channel reduced",
    "qoperator u8u8 tensor",
    "dynamic u8",
    "dynamic s8 channel",
    "int4 channel",
    "uint4 blocks",
    "int4-a8 blocks",
)
INTEGER = tuple(kind for kind in KINDS if not kind.startswith("fp"))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    found = every_file()
    assert tuple(found) == KINDS
    return found


def trainable(model: bytes) -> Shadow:
    return build_shadow(model, source="shipped", trainable=True)


def tensors(model: bytes) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load_from_string(model).graph.initializer}


def arrays(model: bytes) -> dict[str, Array]:
    return {name: numpy_helper.to_array(tensor) for name, tensor in tensors(model).items()}


def without_tensors(model: bytes) -> bytes:
    proto = onnx.load_from_string(model)
    for tensor in proto.graph.initializer:
        for field in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(field)
    return bytes(proto.SerializeToString(deterministic=True))


def codes_of_first_layer(shadow: Shadow) -> str:
    return next(name for name in shadow.parameters_by_initializer if name.startswith("one.w"))


def train_a_little(shadow: Shadow, rate: float = 0.05) -> None:
    """Enough to move codes of 4 bits, and some to the end of their range."""
    x, optimizer = torch.from_numpy(pictures(16, seed=3)), torch.optim.SGD(shadow.parameters(), lr=rate, momentum=0.9)
    labels = torch.arange(16) % CLASSES
    for _ in range(8):
        optimizer.zero_grad()
        functional.cross_entropy(5 * shadow(x), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("scales", ["keep", "recalibrate"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_file_comes_back_byte_for_byte(
    files: dict[str, bytes], kind: str, trained: bool, scales: Scales
) -> None:
    shadow = build_shadow(files[kind], source="shipped", trainable=trained)
    written = write_back(files[kind], shadow, scales=scales)
    assert written.data == files[kind]
    assert written.changed == ()


@pytest.mark.parametrize("kind", INTEGER)
def test_weight_moved_by_more_than_half_a_step_changes_exactly_its_code(files: dict[str, bytes], kind: str) -> None:
    shadow = trainable(files[kind])
    name = codes_of_first_layer(shadow)
    before = tensors(files[kind])
    codes = numpy_helper.to_array(before[name]).astype(int)
    at = np.unravel_index(np.argmin(np.abs(codes - np.median(codes))), codes.shape)
    step, _ = file_weights(files[kind]).trainable[name].grids[0].laid(torch.Size(codes.shape))
    with torch.no_grad():
        shadow.parameters_by_initializer[name][tuple(map(int, at))] += (
            0.6 * step.expand(codes.shape)[tuple(map(int, at))]
        )
    written = write_back(files[kind], shadow)
    after = tensors(written.data)
    moved = numpy_helper.to_array(after[name]).astype(int) - codes
    assert moved[at] == 1
    assert np.count_nonzero(moved) == 1
    assert written.changed == (ChangedTensor(initializer=name, size=codes.size, changed=1),)
    assert [key for key in after if after[key].SerializeToString() != before[key].SerializeToString()] == [name]


@pytest.mark.parametrize("kind", INTEGER)
def test_weight_moved_by_less_than_half_a_step_changes_nothing(files: dict[str, bytes], kind: str) -> None:
    shadow = trainable(files[kind])
    with torch.no_grad():
        for name, parameter in shadow.parameters_by_initializer.items():
            if name.startswith("one.w"):
                parameter.mul_(1 + 1e-4)
    assert write_back(files[kind], shadow).data == files[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_new_file_computes_what_the_changed_shadow_computes(files: dict[str, bytes], kind: str) -> None:
    shadow, x = trainable(files[kind]), pictures(256, seed=7)
    before = run_shadow(shadow, x)
    train_a_little(shadow)
    after = run_shadow(shadow, x)
    assert np.abs(after - before).max() > 0.1 * before.std()
    data = write_back(files[kind], shadow).data
    np.testing.assert_array_equal(run_shadow(build_shadow(data, source="shipped"), x), after)
    session = session_output(data, x, level="ORT_DISABLE_ALL", batch=1)
    here = run_shadow(shadow, x, saturate=runtime_saturates())
    if kind.startswith("qoperator"):
        np.testing.assert_array_equal(here, session)
    assert compare_logits(session, here).passes
    assert compare_logits(session, here).max_abs <= (1e-3 if kind == "fp16" else 1e-5) * np.abs(session).max()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("qdq", "qoperator"))])
def test_new_file_is_certified_as_any_file(files: dict[str, bytes], kind: str) -> None:
    shadow, x = trainable(files[kind]), pictures(256, seed=8)
    train_a_little(shadow)
    data = write_back(files[kind], shadow).data
    optimized = build_shadow(data, source="optimized")
    np.testing.assert_array_equal(run_shadow(optimized, x, saturate=runtime_saturates()), session_output(data, x))


@pytest.mark.parametrize("kind", KINDS)
def test_graph_contract_and_types_stay(files: dict[str, bytes], kind: str) -> None:
    proto = onnx.load_from_string(files[kind])
    names = tuple(f"class {index}" for index in range(CLASSES))
    contract = InputContract(
        input_name="x", output_name="y", height=SIZE, width=SIZE, class_names=names, pixels_from="metadata"
    )
    write_contract(proto, contract)
    model = bytes(proto.SerializeToString())
    shadow = build_shadow(model, source="shipped", contract=contract, trainable=True)
    train_a_little(shadow)
    written = write_back(model, shadow)
    assert written.changed
    assert without_tensors(written.data) == without_tensors(model)
    assert graph_fingerprint(written.data) == graph_fingerprint(model)
    assert read_contract(onnx.load_from_string(written.data)) == contract
    touched = {entry.initializer for entry in written.changed if entry.changed}
    before, after = tensors(model), tensors(written.data)
    for name, tensor in before.items():
        assert (tensor.SerializeToString() == after[name].SerializeToString()) == (name not in touched)
        assert tensor.HasField("raw_data") == after[name].HasField("raw_data")


def test_shadow_that_is_not_trainable_is_rounded_to_the_grid(files: dict[str, bytes]) -> None:
    model, x = files["qdq u8s8 channel reduced"], pictures(32)
    shadow = build_shadow(model, source="shipped")
    with torch.no_grad():
        shadow.parameters_by_initializer["fc.w_quantized"].neg_()
        shadow.parameters_by_initializer["fc.b_quantized"].mul_(2)
    data = write_back(model, shadow).data
    np.testing.assert_array_equal(arrays(data)["fc.w_quantized"], -arrays(model)["fc.w_quantized"])
    np.testing.assert_array_equal(arrays(data)["fc.b_quantized"], 2 * arrays(model)["fc.b_quantized"])
    np.testing.assert_array_equal(run_shadow(build_shadow(data, source="shipped"), x), run_shadow(shadow, x))


def test_codes_stay_in_the_range_that_avoids_saturation(files: dict[str, bytes]) -> None:
    shadow = trainable(files["qdq u8s8 channel reduced"])
    with torch.no_grad():
        shadow.parameters_by_initializer["one.w_quantized"][0] *= 4
    written = write_back(files["qdq u8s8 channel reduced"], shadow)
    codes = arrays(written.data)["one.w_quantized"]
    assert np.abs(codes.astype(int)).max() == 64
    (entry,) = written.changed
    before = arrays(files["qdq u8s8 channel reduced"])["one.w_quantized"][0].astype(int)
    assert entry.clipped == np.count_nonzero(np.abs(before) > 16)
    assert entry.clipped > 0


def test_clipped_weights_are_told_even_if_no_code_changes(files: dict[str, bytes]) -> None:
    model = files["qdq u8s8 channel reduced"]
    at = tuple(int(index[0]) for index in np.nonzero(arrays(model)["one.w_quantized"] == 64))
    shadow = trainable(model)
    with torch.no_grad():
        shadow.parameters_by_initializer["one.w_quantized"][at] *= 1.5
    written = write_back(model, shadow)
    assert written.data == model
    assert written.changed == (ChangedTensor(initializer="one.w_quantized", size=216, changed=0, clipped=1),)


def test_initializer_that_two_nodes_use_is_one_parameter(files: dict[str, bytes]) -> None:
    model, x = files["fp32 unfolded"], pictures(8)
    shadow = trainable(model)
    with torch.no_grad():
        shadow.parameters_by_initializer["shared"].mul_(2)
    data = write_back(model, shadow).data
    np.testing.assert_allclose(session_output(data, x), 4 * session_output(model, x), rtol=1e-4, atol=1e-6)


def branching_file() -> bytes:
    """x W in the branch that a constant chooses, plus a bias of the outer graph."""
    values = {name: numpy_helper.from_array(np.full((3, CLASSES), number, np.float32), name) for name, number in
              (("inner", 1), ("other", 2))}  # fmt: skip
    bodies = {}
    for branch, name in (("then_branch", "inner"), ("else_branch", "other")):
        answer = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, ["batch", CLASSES])
        node = helper.make_node("MatMul", ["flat", name], [f"{name}.y"], name=f"{name}.product")
        bodies[branch] = helper.make_graph([node], name, [], [answer], [values[name]])
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("If", ["yes"], ["chosen"], name="if", **bodies),
        helper.make_node("Add", ["chosen", "bias"], ["y"], name="add"),
    ]
    tensors = [numpy_helper.from_array(np.array(True), "yes")]
    tensors.append(numpy_helper.from_array(np.zeros(CLASSES, np.float32), "bias"))
    return bytes(model_of(nodes, tensors).SerializeToString())


def test_weight_in_a_branch_is_written_into_the_branch() -> None:
    model, x = branching_file(), pictures(4)
    shadow = trainable(model)
    assert set(shadow.parameters_by_initializer) == {"inner", "bias"}
    with torch.no_grad():
        shadow.parameters_by_initializer["inner"].mul_(3)
    written = write_back(model, shadow)
    assert [entry.initializer for entry in written.changed] == ["inner"]
    np.testing.assert_allclose(session_output(written.data, x), 3 * session_output(model, x), rtol=1e-6)
    np.testing.assert_allclose(run_shadow(shadow, x), session_output(written.data, x), rtol=1e-6)


def test_float16_tensor_stays_float16(files: dict[str, bytes]) -> None:
    shadow = trainable(files["fp16"])
    with torch.no_grad():
        shadow.parameters_by_initializer["fc.b"][0] = 0.1
    written = arrays(write_back(files["fp16"], shadow).data)["fc.b"]
    assert written.dtype == np.float16
    assert written[0] == np.float16(0.1)


def test_large_bias_codes_survive(files: dict[str, bytes]) -> None:
    model = onnx.load_from_string(files["qdq u8s8 channel reduced"])
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "fc.b_quantized")
    codes = np.array([2**31 - 1, 2**24 + 1, -(2**30) - 1, 5, 0], dtype=np.int32)
    tensor.CopyFrom(numpy_helper.from_array(codes, "fc.b_quantized"))
    data = bytes(model.SerializeToString())
    for trained in (False, True):
        shadow = build_shadow(data, source="shipped", trainable=trained)
        with torch.no_grad():
            shadow.parameters_by_initializer["fc.b_quantized"][3] *= 7 / 5
        found = arrays(write_back(data, shadow).data)["fc.b_quantized"]
        np.testing.assert_array_equal(found, [2**31 - 1, 2**24 + 1, -(2**30) - 1, 7, 0])


def test_unknown_scales_are_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"scales is 'new', expected one of \('keep', 'recalibrate'\)"):
        write_back(files["fp32"], trainable(files["fp32"]), scales="new")  # type: ignore[arg-type]


def test_shadow_of_the_optimized_graph_is_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(WriteBackError, match=r'are not those of the file; build it with source="shipped"'):
        write_back(files["fp32"], build_shadow(files["fp32"], source="optimized"))


def test_shadow_of_another_file_is_refused(files: dict[str, bytes]) -> None:
    shadow = trainable(files["fp32"])
    expected = f"built from another file .sha256 {shadow.file_sha256[:12]}.; pass the bytes that it was built from"
    with pytest.raises(WriteBackError, match=expected):
        write_back(files["fp16"], shadow)


@pytest.mark.parametrize("kind", ["fp32", "qdq u8s8 channel reduced", "dynamic u8", "uint4 blocks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameter_that_is_not_finite_is_named(files: dict[str, bytes], kind: str, value: float) -> None:
    shadow = trainable(files[kind])
    name = codes_of_first_layer(shadow)
    with torch.no_grad():
        shadow.parameters_by_initializer[name][0, 0] = value
    expected = rf"the parameter of initializer '{name}' has 9 values of 216 that are NaN or infinite; train with"
    with pytest.raises(WriteBackError, match=expected):
        write_back(files[kind], shadow)


def test_infinite_constant_of_the_file_is_no_error(files: dict[str, bytes]) -> None:
    model = onnx.load_from_string(files["fp32"])
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "fc.b")
    tensor.CopyFrom(numpy_helper.from_array(np.array([1, np.nan, -np.inf, 0, 0], np.float32), "fc.b"))
    data = bytes(model.SerializeToString())
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["fc.b"], name="constant", value=tensor))
    unnamed = bytes(model.SerializeToString())
    assert write_back(unnamed, trainable(unnamed)).data == unnamed
    shadow = trainable(data)
    assert write_back(data, shadow).data == data
    with torch.no_grad():
        shadow.parameters_by_initializer["fc.b"][0] = 2
    written = write_back(data, shadow)
    np.testing.assert_array_equal(arrays(written.data)["fc.b"], [2, np.nan, -np.inf, 0, 0])
    assert written.changed[0].changed == 1


def test_number_too_large_for_float16_is_refused(files: dict[str, bytes]) -> None:
    shadow = trainable(files["fp16"])
    with torch.no_grad():
        shadow.parameters_by_initializer["fc.b"][0] = 1e5
    with pytest.raises(
        WriteBackError, match=r"'fc\.b' holds numbers too large for its float16; keep them within 65504"
    ):
        write_back(files["fp16"], shadow)


def test_parameter_of_another_shape_is_refused(files: dict[str, bytes]) -> None:
    shadow = trainable(files["fp32"])
    shadow.parameters_by_initializer["fc.b"].data = torch.zeros(3)
    with pytest.raises(
        WriteBackError, match=r"'fc.b' has the shape \(5,\) and its parameter \(3,\); .* keep the shape"
    ):
        write_back(files["fp32"], shadow)


def test_change_that_would_be_lost_is_refused(files: dict[str, bytes]) -> None:
    shadow = build_shadow(files["dynamic u8"], source="shipped")
    with torch.no_grad():
        shadow.parameters_by_initializer["one.w_scale"].mul_(2)
    with pytest.raises(WriteBackError, match=r"initializer 'one.w_scale' was changed, .*: it is no weight of the file"):
        write_back(files["dynamic u8"], shadow)


def test_changed_constant_is_refused(files: dict[str, bytes]) -> None:
    shadow = build_shadow(files["fp16"], source="shipped")
    shadow.get_buffer("constant0").add_(1)
    with pytest.raises(
        WriteBackError, match="buffer 'constant0' was changed, which holds a constant of the graph; leave"
    ):
        write_back(files["fp16"], shadow)


def test_module_with_another_parameter_is_refused(files: dict[str, bytes]) -> None:
    shadow = trainable(files["fp32"])
    shadow.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(WriteBackError, match="the module has gained or lost 'extra'; change the values of its param"):
        write_back(files["fp32"], shadow)


def test_copy_of_a_shadow_is_written_back(files: dict[str, bytes]) -> None:
    model, x = files["qoperator u8u8 tensor"], pictures(8)
    shadow = copy.deepcopy(trainable(model))
    train_a_little(shadow)
    written = write_back(model, shadow)
    assert written.changed
    np.testing.assert_array_equal(run_shadow(build_shadow(written.data, source="shipped"), x), run_shadow(shadow, x))


def test_data_in_another_file_is_refused(files: dict[str, bytes]) -> None:
    model = onnx.load_from_string(files["fp32"])
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location="weights.bin")
    data = bytes(model.SerializeToString())
    shadow = trainable(files["fp32"])
    shadow.file_sha256 = hashlib.sha256(data).hexdigest()
    with pytest.raises(ShadowError, match="lies in an external file"):
        write_back(data, shadow)


def test_input_that_the_contract_fixes_is_no_weight(files: dict[str, bytes]) -> None:
    model = onnx.load_from_string(files["fp32"])
    model.graph.node[0].input[1] = "offset"
    model.graph.input.append(helper.make_tensor_value_info("offset", TensorProto.FLOAT, [1, 3, 1, 1]))
    names = tuple(f"class {index}" for index in range(CLASSES))
    contract = InputContract(
        input_name="x", output_name="y", height=SIZE, width=SIZE, class_names=names, fixed_inputs={"offset": 0.5}
    )
    data = bytes(model.SerializeToString())
    assert (
        "offset"
        not in build_shadow(data, source="shipped", contract=contract, trainable=True).parameters_by_initializer
    )
    shadow = build_shadow(data, source="shipped", contract=contract)
    with torch.no_grad():
        shadow.parameters_by_initializer["offset"].add_(1)
    with pytest.raises(WriteBackError, match=r"'offset' was changed, .* or a constant of its contract; leave it"):
        write_back(data, shadow)


@pytest.mark.parametrize("is_trainable", [True, False])
def test_bound_of_a_clip_is_no_weight(is_trainable: bool) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Clip", ["h", "low", "high"], ["y"])]
    constants = {"w": np.ones((3, 5), np.float32), "low": np.float32(0), "high": np.float32(6)}
    shadow = build_shadow(
        graph_model(nodes, np.ones((2, 3), np.float32), constants), source="shipped", trainable=is_trainable
    )
    assert list(shadow.parameters_by_initializer) == ["w"]


@pytest.mark.parametrize("quantized", [True, False])
def test_change_that_reached_some_nodes_only_is_refused(quantized: bool) -> None:
    """Tied weights: the transposed copy is computed when the shadow is built, unless it is trained."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Transpose", ["w"], ["t"]),
        helper.make_node("MatMul", ["h", "t"], ["y"]),
    ]
    x, w = np.ones((2, 3), np.float32), np.arange(15, dtype=np.float32).reshape(3, 5)
    constants: dict[str, Array] = {"w": w}
    if quantized:
        nodes = [helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"]), *nodes]
        constants = {"codes": w.astype(np.int8), "scale": np.array(0.1, np.float32)}
    proto = onnx.load_from_string(graph_model(nodes, x, constants))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3]))
    model, name = proto.SerializeToString(), "codes" if quantized else "w"
    for is_trainable in (True, False):
        shadow = build_shadow(model, source="shipped", trainable=is_trainable)
        with torch.no_grad():
            shadow.parameters_by_initializer[name].mul_(0.5)
        if is_trainable:
            written = write_back(model, shadow).data
            np.testing.assert_allclose(run_shadow(shadow, x), session_output(written, x), rtol=1e-5)
            continue
        with pytest.raises(WriteBackError, match=f"'{name}' was changed, which another node reads in a form"):
            write_back(model, shadow)
