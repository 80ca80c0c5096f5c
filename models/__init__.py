"""Architectures of the zoo and the recipes that train them; imports torch only."""

from qdefense.models.recipes import (
    Recipe,
    architectures,
    build_model,
    default_width,
    multiply_accumulates,
    recipe_for,
)

__all__ = ["Recipe", "architectures", "build_model", "default_width", "multiply_accumulates", "recipe_for"]
