from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from qdefense.converters import saturation_probe
from qdefense.converters.saturation_probe import runtime_saturates, runtime_saturation


def test_runtime_saturation_is_measured_once_and_names_known_operators() -> None:
    found = runtime_saturation()
    assert found is runtime_saturation()
    assert found in (frozenset(), frozenset({"MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm"}))
    assert runtime_saturates() == bool(found)


OPERATORS = ["ConvInteger", "MatMulInteger", "QGemm", "QLinearConv", "QLinearMatMul"]


@pytest.mark.parametrize("kind", OPERATORS)
def test_probe_notices_a_kernel_that_saturates_and_one_that_does_not(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stand-ins for the kernel: one adds exactly, one clips each pair to int16 as `vpmaddubsw` does."""
    codes, weights = saturation_probe._codes_and_weights()
    exact = codes.astype(np.float64) @ weights.astype(np.float64)
    products = codes[:, :, None].astype(np.int64) * weights[None].astype(np.int64)
    clipped = products.reshape(len(codes), -1, 2, weights.shape[1]).sum(2).clip(-32768, 32767).sum(1).astype(np.float64)

    def kernel(sums: Any) -> Any:
        def run(_: Any, constants: dict[str, Any], *__: Any) -> Any:
            scale = float(constants["y_scale"])
            return sums if scale == 1 else (sums / scale).round().clip(-128, 127) + 128

        return run

    for sums, expected in ((exact, False), (clipped, True)):
        monkeypatch.setattr(saturation_probe, "_run", kernel(sums))
        assert saturation_probe._PROBES[kind]() is expected


def test_saturation_probe_imports_no_torch() -> None:
    code = "import sys, qdefense.converters.saturation_probe as probe; probe.runtime_saturation(); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
