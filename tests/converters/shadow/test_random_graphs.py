"""The second oracle: ONNX Runtime on random networks.

A few dozen of each kind by default, the same ones each time. ``QDEFENSE_RANDOM_GRAPHS=5000 pytest ...`` draws that many
new ones of each kind.
"""

from __future__ import annotations

import os

import numpy as np
from hypothesis import HealthCheck, given, reject, settings

from qdefense.converters.runtime_graph import RUNTIME_ERRORS
from qdefense.converters.shadow import build_shadow

from .random_graphs import FLOAT, networks
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
