"""Node test cases that the shadow need not agree with, by the reason.

A case that is listed and agrees, whose operator has no function, or that the suite no longer holds is a failure:
tests/converters/shadow/test_node_cases.py.
"""

from collections.abc import Mapping

EXCEPTIONS: Mapping[str, tuple[str, ...]] = {}
