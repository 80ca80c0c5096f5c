"""Foreign text made harmless: names in model files and data sets come from whoever made them."""

from __future__ import annotations

_LONGEST_MESSAGE = 600


def harmless(text: str) -> str:
    """Escape what a terminal would act on: control characters, line ends, bidirectional overrides, lone surrogates."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def harmless_lines(text: str) -> str:
    """The same for text whose own line ends stay, such as a traceback."""
    return "".join(f"{harmless(line)}\n" for line in text.splitlines())


def internal_error(error: Exception) -> str:
    """What an error of our own is called, on one line."""
    return shortened(f"internal error: {type(error).__name__}: {error}").removesuffix(":")


def shortened(text: str) -> str:
    """One line of at most 600 characters: what a runtime says of a file can fill screens."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[: _LONGEST_MESSAGE - 4]} ..."
