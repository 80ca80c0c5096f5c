"""The registry of attacks."""

from __future__ import annotations

from typing import Any

from qdefense.registry import Registry

ATTACKS: Registry[Any] = Registry("attack", "qdefense.attacks")
