from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.inspection import inspect_model
from qdefense.converters.reading import FileRefusedError, parse_model, safe_text, tensor_array

from .inspected_graphs import FP32, backdoored, edited, residual_net


def test_safe_text_gives_one_short_printable_line() -> None:
    assert safe_text(" plain\tname ") == r"plain\tname"
    assert len(safe_text("x" * 121)) == len(safe_text("x" * 120)) == 120
    assert safe_text("x" * 121).endswith("x...")
    assert len(safe_text("\U000e0001" * 121)) == 120


def refuses(match: str, data: bytes) -> None:
    for read in (parse_model, inspect_model):
        with pytest.raises(FileRefusedError, match=match) as caught:
            read(data)
        assert str(caught.value).isprintable()


def test_parse_model_gives_the_model_when_it_is_sound() -> None:
    assert parse_model(FP32) == onnx.load_from_string(FP32)


def test_parse_model_refuses_when_empty() -> None:
    refuses(r"the file is empty \(0 bytes\); export the model again", b"")


@pytest.mark.parametrize("data", [FP32[: len(FP32) // 2], FP32[:-3], np.random.default_rng(0).bytes(500)])
def test_parse_model_refuses_when_cut_short_or_random(data: bytes) -> None:
    refuses(r"no ONNX model or is cut short; check the path and export it again", data)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS, no ONNX model; fetch"),
        (b"<html>", "a web page or XML, no ONNX model; it may be the error page of a download"),
        (b'{"a": 1}', "JSON, no ONNX model; check"),
        (b"PK\x03\x04\0\0", "a zip archive, such as torch.save writes, no ONNX model; unpack"),
        (b"\x80\x02}q\0.", "a pickle, such as torch.save wrote, no ONNX model; export"),
        (b"\x1f\x8b\x08\0", "compressed with gzip, no ONNX model; unpack"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture, no ONNX model; check"),
        (b"\xff\xd8\xff\xe0", "a JPEG picture, no ONNX model; check"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file, such as Keras writes, no ONNX model; export"),
        (b"\x1c\0\0\0TFL3\x14\0", "a TensorFlow Lite model, no ONNX model; export"),
        (b"\x28\0\0\0ORTM\0\0", "in the format of ONNX Runtime Mobile, no ONNX model; give"),
    ],
)
def test_parse_model_says_what_it_is_instead_when_it_begins_like(data: bytes, kind: str) -> None:
    refuses(rf"^the file \({len(data)} bytes\) is {kind}", data)


@pytest.mark.parametrize("data", [b"\x08\x07", b"\x0a\x03abc", onnx.ModelProto(ir_version=8).SerializeToString()])
def test_parse_model_refuses_when_bytes_parse_as_an_empty_model(data: bytes) -> None:
    refuses("(no ONNX graph with nodes and opsets|no ONNX model)", data)


def test_parse_model_refuses_when_opsets_are_missing() -> None:
    refuses("no ONNX graph with nodes and opsets", edited(lambda model: model.ClearField("opset_import")))


def test_parse_model_refuses_when_a_name_is_not_text() -> None:
    data = FP32.replace(b"relu1", b"rel\xffu")
    refuses("a name in the file is not UTF-8 text; export", data)


def test_parse_model_refuses_when_it_has_local_functions() -> None:
    body = [helper.make_node("Relu", ["x"], ["y"])]
    function = helper.make_function("", "Relu", ["x"], ["y"], body, [helper.make_opsetid("", 21)])
    refuses("defines 1 local functions; inline them first", edited(lambda model: model.functions.append(function)))


def test_parse_model_refuses_when_domain_is_unknown() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import.add(domain="evil\n", version=1)
        model.graph.node[0].domain = "evil\nx"

    refuses(
        r"node 'centred_node' uses operator '\w+' of domain 'evil\\nx', opset not stated, whose code is not part of",
        edited(change),
    )


def test_parse_model_refuses_when_domain_is_unknown_inside_a_branch() -> None:
    model = onnx.load_from_string(backdoored("if"))
    conditional = next(node for node in model.graph.node if node.op_type == "If")
    conditional.attribute[0].g.node[0].domain = "evil"
    model.opset_import.add(domain="evil", version=1)
    refuses("of domain 'evil', opset", model.SerializeToString())


def external(tensor: TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights.bin")


def test_parse_model_refuses_when_data_is_external() -> None:
    match = "tensor 'mean' keeps its data in another file; read the model from its folder, or save it in one file"
    refuses(match, edited(lambda model: external(model.graph.initializer[0])))
    refuses(match, edited(lambda model: model.graph.initializer[0].external_data.add(key="location", value="x")))


def test_parse_model_refuses_when_a_constant_node_is_external() -> None:
    net = residual_net()
    constant = numpy_helper.from_array(np.ones(1, np.float32), "far away")
    external(constant)
    net.node("Constant", [], "unused", value=constant)
    refuses("tensor 'far away' keeps its data", net.model())


def test_parse_model_refuses_when_a_sparse_tensor_is_external() -> None:
    def change(model: onnx.ModelProto) -> None:
        sparse = model.graph.sparse_initializer.add(dims=[4])
        sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "sparse"))
        sparse.indices.CopyFrom(numpy_helper.from_array(np.ones(1, np.int64), "where"))
        external(sparse.indices)

    refuses("tensor 'where' keeps its data", edited(change))


def test_parse_model_refuses_when_a_dimension_is_negative() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = -1

    refuses("tensor 'image' declares a negative dimension; name it instead", edited(change))


def test_parse_model_refuses_when_a_declared_type_is_unknown() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.elem_type = 50

    refuses("tensor 'image' has the unknown data type 50; export the model again", edited(change))


@pytest.mark.parametrize("kind", [0, 77])
def test_parse_model_refuses_when_data_type_is_unknown(kind: int) -> None:
    refuses(
        f"tensor 'mean' has the unknown data type {kind}; export",
        edited(lambda model: setattr(model.graph.initializer[0], "data_type", kind)),
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model: setattr(model.graph.node[0], "op_type", "Nope"), "ONNX has no such operator"),
        (lambda model: model.graph.node[1].output.__setitem__(0, "centred"), "static single assignment|SSA"),
        (lambda model: model.graph.node[0].input.__setitem__(0, "nowhere"), "nowhere"),
        (lambda model: setattr(model, "ir_version", 99), "ir_version 99"),
        (lambda model: setattr(model.graph.initializer[0], "raw_data", b"abc"), "too small"),
    ],
)
def test_parse_model_refuses_when_checker_does(change: Any, match: str) -> None:
    refuses(f"onnx.checker refuses the file: .*({match}).*; export it again", edited(change))


def test_tensor_array_refuses_when_data_and_shape_differ() -> None:
    tensor = TensorProto(name="short\n", data_type=TensorProto.FLOAT, dims=[3], raw_data=b"abcd")
    with pytest.raises(FileRefusedError, match=r"^tensor 'short' has not the data its shape needs; export"):
        tensor_array(tensor)
