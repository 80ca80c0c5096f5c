"""What `qdefense doctor` tries out, each in an interpreter of its own: a library that crashes says so and no more.

``python -m qdefense.cli.probes NAME [ARGUMENT]`` prints one JSON object on the last line; a failure is a traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
_ENTRIES = 20
_LIMIT, _TOO_MUCH = 256 << 20, 1 << 30


def runtime() -> Facts:
    """ONNX Runtime loads and runs a graph on the CPU."""
    import onnxruntime  # noqa: PLC0415

    from qdefense import session  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    ran = onnxruntime.InferenceSession(_graph(), options, providers=["CPUExecutionProvider"])
    (answer,) = ran.run(None, {"x": _input()})
    if answer.tolist() != [[3.0]]:
        raise RuntimeError(f"ONNX Runtime computes 1 + 2 as {answer.tolist()}")
    found = session.runtime()
    return {
        "build": onnxruntime.get_build_info(),
        "providers": onnxruntime.get_available_providers(),
        "machine": found.machine,
        "isa": list(found.isa),
    }


def gradients() -> Facts:
    """A shadow is built and gives gradients; with it the operators that saturate on this CPU."""
    import torch  # noqa: PLC0415

    from qdefense.converters.shadow import build_shadow, runtime_saturation  # noqa: PLC0415

    x = torch.from_numpy(_input()).requires_grad_()
    (gradient,) = torch.autograd.grad(build_shadow(_graph(), source="shipped")(x).sum(), x)
    if gradient.tolist() != [[1.0, 1.0]]:
        raise RuntimeError(f"the gradient of a sum is {gradient.tolist()}")
    return {"torch": torch.__version__, "saturating_operators": sorted(runtime_saturation())}


def machine() -> Facts:
    """Memory, CPUs, and whether a memory limit holds."""
    import psutil  # noqa: PLC0415

    memory, process = psutil.virtual_memory(), psutil.Process()
    usable = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()
    return {
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "cpus": psutil.cpu_count(),
        "usable_cpus": usable,
        "limit_holds": _limit_holds(),
    }


def data(spec: str) -> Facts:
    """One image of a data set can be read."""
    from qdefense.data.images import DataError  # noqa: PLC0415
    from qdefense.data.opening import open_data  # noqa: PLC0415

    try:
        found = open_data(spec, limit=1)
    except DataError as error:
        return {"error": str(error)}
    return {"source": found.source, "classes": len(found.class_names), "size": found.images.shape[1:3]}


def folder(path: str) -> Facts:
    """Which entries of a folder are data sets."""
    names = sorted(entry.name for entry in Path(path).iterdir())[:_ENTRIES]
    return {"found": [name for name in names if "error" not in data(str(Path(path) / name))]}


def _limit_holds() -> bool:
    try:
        import resource  # noqa: PLC0415 (not on every platform)
    except ImportError:
        return False
    resource.setrlimit(resource.RLIMIT_DATA, (_LIMIT, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        bytearray(_TOO_MUCH)
    except MemoryError:
        return True
    return False


def _graph() -> bytes:
    """``(N, 2) -> (N, 1)``: the sum of a row."""
    import numpy as np  # noqa: PLC0415
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])
    ones = numpy_helper.from_array(np.ones((2, 1), np.float32), "ones")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "ones"], ["y"], name="sum")], "sum", [x], [y], [ones])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized


def _input() -> Any:
    import numpy as np  # noqa: PLC0415

    return np.array([[1, 2]], np.float32)


PROBES = {probe.__name__: probe for probe in (runtime, gradients, machine, data, folder)}

if __name__ == "__main__":
    sys.stdout.write(f"\n{json.dumps(PROBES[sys.argv[1]](*sys.argv[2:]))}\n")
