"""What ONNX Runtime answers on an x86 CPU without VNNI, where u8 x s8 kernels saturate: a record to compare with.

    PYTHONPATH=tests .venv/bin/python -P -m converters.shadow.saturating_cases

writes `saturating_cases.npz` anew. It runs ONNX Runtime in QEMU's user mode (Debian's qemu-user) as a Haswell, whose
CPUID announces AVX2 and no AVX512 or VNNI, so that the runtime chooses the kernels that it has for such a CPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from .shadow_graphs import MICROSOFT, Array, graph_model, scalars

RECORD = Path(__file__).with_suffix(".npz")
_RUN = """
import sys, numpy, onnxruntime
given, found = numpy.load(sys.argv[1]), {}
for name in {key.split(":")[0] for key in given.files}:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = given[name + ":model"].tobytes()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found[name] = session.run(None, {"x": given[name + ":x"]})[0]
numpy.savez(sys.argv[2], **found)
"""

CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one axis": ((2, 6, 12), (4, 6, 3), {"pads": [1, 1]}),
    "one axis, grouped, dilated": ((2, 6, 12), (4, 3, 3), {"group": 2, "dilations": [2]}),
    "two axes": ((2, 5, 6, 6), (4, 5, 3, 3), {"pads": [1, 0, 1, 2], "strides": [2, 1]}),
    "grouped": ((2, 8, 5, 5), (4, 2, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    "pointwise": ((2, 16, 4, 4), (4, 16, 1, 1), {}),
    "depthwise": ((2, 8, 6, 6), (8, 1, 3, 3), {"group": 8, "pads": [1, 1, 1, 1]}),
    "depthwise, two of each": ((2, 4, 6, 6), (8, 1, 3, 3), {"group": 4}),
    "three axes": ((1, 4, 5, 5, 4), (4, 4, 2, 3, 3), {"pads": [0, 1, 1, 1, 1, 0]}),
    "three axes, grouped": ((1, 4, 5, 5, 4), (4, 2, 2, 2, 2), {"group": 2}),
    "three axes, depthwise": ((1, 4, 5, 5, 4), (4, 1, 2, 2, 2), {"group": 4}),
}


def _codes(kind: type, *shape: int, seed: int) -> Array:
    limits = np.iinfo(kind)
    return np.random.default_rng(seed).integers(limits.min, limits.max + 1, shape).astype(kind)


def _quantized(node: NodeProto, x: Array, weights: Array, depth: int, output: int = TensorProto.UINT8) -> bytes:
    constants = scalars(
        xs=(0.02, np.float32), xz=(9, np.uint8), ws=(0.01, np.float32), wz=(0, np.int8),
        ys=(0.015 * depth**0.5, np.float32), yz=(120, np.uint8),
    )  # fmt: skip
    return graph_model([node], x, constants | {"w": weights}, output_type=output)


def cases() -> Iterator[tuple[str, bytes, Array]]:
    """A name, a model and its input for every kernel."""
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    for name, (shape, kernel, attributes) in CONVOLUTIONS.items():
        x, weights = _codes(np.uint8, *shape, seed=1), _codes(np.int8, *kernel, seed=2)
        node = helper.make_node("QLinearConv", names, ["y"], **attributes)
        yield f"convolution of {name}", _quantized(node, x, weights, int(np.prod(kernel[1:]))), x
    x, weights = _codes(np.uint8, 2, 5, 6, 6, seed=1), _codes(np.int8, 4, 5, 3, 3, seed=2)
    node = helper.make_node("ConvInteger", ["x", "w", "xz", "wz"], ["y"])
    yield "integer convolution", _quantized(node, x, weights, 45, TensorProto.INT32), x
    for name, kernel in (("product", (33, 7)), ("batched product", (2, 33, 5))):
        x, weights = _codes(np.uint8, 2, 6, 33, seed=3), _codes(np.int8, *kernel, seed=4)
        yield f"requantized {name}", _quantized(helper.make_node("QLinearMatMul", names, ["y"]), x, weights, 33), x
        node = helper.make_node("MatMulInteger", ["x", "w", "xz", "wz"], ["y"])
        yield f"integer {name}", _quantized(node, x, weights, 33, TensorProto.INT32), x
    x, weights = _codes(np.uint8, 33, 6, seed=5), _codes(np.int8, 7, 33, seed=6)
    node = helper.make_node("QGemm", [*names[:6], "", *names[6:]], ["y"], domain=MICROSOFT, transA=1, transB=1)
    yield "gemm", _quantized(node, x, weights, 33), x


def main() -> None:
    """Write the record."""
    inputs: dict[str, Any] = {}
    for name, model, x in cases():
        inputs[f"{name}:model"], inputs[f"{name}:x"] = np.frombuffer(model, dtype=np.uint8), x
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npz"
        np.savez(given, **inputs)
        command = ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", _RUN, str(given), str(found)]
        subprocess.run(command, check=True)
        outputs = {f"{name}:y": value for name, value in np.load(found).items()}
    np.savez_compressed(RECORD, **inputs, **outputs)


if __name__ == "__main__":
    main()
