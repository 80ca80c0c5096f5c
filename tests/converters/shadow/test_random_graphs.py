"""The second oracle: ONNX Runtime on random networks.

A few dozen of each kind by default, the same ones each time. ``QDEFENSE_RANDOM_GRAPHS=5000 pytest ...`` draws that many
new ones of each kind.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from qdefense.converters.runtime_graph import RUNTIME_ERRORS
from qdefense.converters.shadow import build_shadow, runtime_saturates

from .random_graphs import FLOAT, networks, quantized_networks
from .shadow_graphs import Array, run_shadow, session_output

ASKED = int(os.environ.get("QDEFENSE_RANDOM_GRAPHS", "0"))
CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


def examples(usual: int) -> settings:
    return settings(
        max_examples=ASKED or usual,
        derandomize=not ASKED,
        deadline=None,
        database=None,
        suppress_health_check=CHECKS,
        print_blob=True,
    )


def answers(model: bytes, x: Array, level: str) -> Array:
    """The session's, unless it refuses what was drawn."""
    try:
        return session_output(model, x, level=level)
    except RUNTIME_ERRORS:
        reject()


@examples(40)
@given(networks(FLOAT))
def test_shadow_of_random_float_network_equals_session(drawn: tuple[bytes, Array]) -> None:
    model, x = drawn
    for source, level in (("shipped", "ORT_DISABLE_ALL"), ("optimized", "ORT_ENABLE_ALL")):
        expected = answers(model, x, level)
        found = run_shadow(build_shadow(model, source=source), x)  # type: ignore[arg-type]
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


FLOAT_KERNELS = {"Add", "Conv", "Gemm", "LeakyRelu", "Sigmoid"}
"""Float sums in another order may cross a rounding point behind them: only what is integer is held to every bit."""


@examples(25)
@given(st.data())
def test_shadow_of_random_quantized_network_equals_session_bit_for_bit(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, x = data.draw(quantized_networks(Path(folder)))
    shadow = build_shadow(model, source="optimized")
    found, expected = run_shadow(shadow, x, saturate=runtime_saturates()), answers(model, x, "ORT_ENABLE_ALL")
    assert found.shape == expected.shape
    if not FLOAT_KERNELS.intersection(shadow.operators):
        np.testing.assert_array_equal(found, expected)
