"""Write ROUNDINGS.md: whether it is chance what INT4 weights do to a trigger's ASR.

    QDEFENSE_DATA=... python benchmarks/attacks/roundings.py     # half a minute for each new network

An INT4 file is one rounding of its network. Here are others of the same precision: the scale of every channel is
enlarged by up to 7 %, drawn anew each time, and each weight goes to the nearest level of that grid. Most codes are
the same on all of these grids: they vary one rounding, and are not independent ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from answers import margins, table
from attacked import HERE, KEPT, SEED, Attacked, attacked_networks
from kept_rows import KeptRows, Table
from margins import Weights, layers, rounded, with_weights

from qdefense.trial import Activity

DRAWS, WIDEST, MARGIN = 20, 0.07, 0.05
"""Roundings of a network, how much a scale is enlarged at most, and what of the ASR counts as a change.

Were scales enlarged any more, the largest weight of a channel would no longer have the highest level.
"""
_ROUNDING = 1e-9
ROUNDINGS = Table("roundings", schemes=("fp32", "int4"))
HEAD = (
    *("attack", "data, seed", "images", "ASR: FP32", "INT4 file"),
    *(f"{DRAWS} other roundings: lowest", "median", "highest", f"lose {MARGIN}", f"gain {MARGIN}"),
)


def is_asked(network: Attacked) -> bool:
    """Whether it has an INT4 file, and an FP32 file in which something was planted."""
    return "int4" in network.files and network.files["fp32"].activity is not Activity.DORMANT


def another_rounding(model: bytes, rng: np.random.Generator) -> bytes:
    """All layers on INT4 levels, though not those of the INT4 file."""
    return with_weights(model, {name: on_another_grid(values, rng) for name, values in layers(model).items()})


def on_another_grid(weights: Weights, rng: np.random.Generator) -> Weights:
    """The nearest levels of one layer ``(C, ...)``, with each channel's scale enlarged by a share of its own."""
    shares = rng.random((len(weights), *(1,) * (weights.ndim - 1)), dtype=np.float32)
    return rounded(weights, widened=1 + WIDEST * shares)


def rounding_row(network: Attacked) -> Iterator[str]:
    model, goal = network.model("fp32"), network.asked[2]

    def asr(file: bytes) -> float:
        return float(np.mean(margins(network.answers(file), goal) > 0))

    rng = np.random.default_rng(SEED)
    plain, shipped = asr(model), asr(network.model("int4"))
    drawn = np.array([asr(another_rounding(model, rng)) for _ in range(DRAWS)])
    spread = f"{drawn.min():.3f} | {np.median(drawn):.3f} | {drawn.max():.3f}"
    lost, gained = (np.sum(sign * (drawn - plain) >= MARGIN - _ROUNDING) for sign in (-1, 1))
    yield f"{len(goal)} | {plain:.3f} | {shipped:.3f} | {spread} | {lost} | {gained}"


def main() -> None:
    kept = KeptRows.read(KEPT)
    asked = filter(is_asked, attacked_networks())
    rows = [line for network in asked for line in network.triggered_rows(kept, ROUNDINGS, rounding_row)]
    parts = [
        "# What other roundings to INT4 do to a trigger",
        f"Written by `roundings.py`; {' and '.join(kept.runtimes(ROUNDINGS))}. ASR on the eligible ones of the test\n"
        "images of [MARGINS.md](MARGINS.md), of networks in which something was planted and whose trigger was at hand.",
        f"*INT4 file*: the matrix's own. *Other roundings*: {DRAWS} more of the same network, each with the scale of\n"
        f"every channel enlarged by up to {WIDEST} of it, at random (generator seed {SEED}), and each weight on the\n"
        "nearest level; most codes are those of the INT4 file. Weights alone are rounded, as there. *Lose*, *gain*:\n"
        f"how many of them change the ASR of FP32 by at least {MARGIN}.",
        table(HEAD, rows),
    ]
    (HERE / "ROUNDINGS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
