"""The registry of defenses."""

from __future__ import annotations

from typing import Any

from qdefense.registry import Registry

DEFENSES: Registry[Any] = Registry("defense", "qdefense.defenses")
