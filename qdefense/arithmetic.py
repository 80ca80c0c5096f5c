"""The two arithmetics of a file on the same images: as this CPU runs it, and exact, without saturation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from qdefense.converters.exact_products import UnsupportedArithmeticError, exact_model
from qdefense.converters.runtime_graph import Arithmetic
from qdefense.data.images import Pixels
from qdefense.session import DeployedSession, Logits, SessionError


class ArithmeticAgreement(BaseModel):
    """The session's logits against those of the same file in the other arithmetic; no figure where none can differ."""

    model_config = ConfigDict(frozen=True)

    used: Arithmetic
    mixed_products: int | None = Field(
        default=None, description="operators of ONNX Runtime's graph that multiply u8 by s8 codes; null where unknown"
    )
    not_run: str | None = Field(default=None, description="why the other arithmetic gave no answer")
    n: int = 0
    top1_agreement: float | None = None
    max_abs_logit_diff: float | None = Field(default=None, description="null where a logit is not finite")
    bit_exact_rows: float | None = None
    forwards: int = Field(default=0, description="rows run in the other arithmetic")

    @property
    def bit_exact(self) -> bool:
        """Whether both gave the same bits on every image, or cannot differ."""
        return self.mixed_products == 0 or self.bit_exact_rows == 1.0

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.not_run is not None:
            return f"only {self.used} arithmetic was run: {self.not_run}"
        if self.mixed_products == 0:
            return "as-run and exact arithmetic are one: ONNX Runtime multiplies no u8 by s8 codes in this file"
        products = f"{self.mixed_products} operators multiply u8 by s8 codes"
        if self.bit_exact:
            return f"as-run and exact arithmetic agree bit for bit on {self.n} images ({products})"
        largest = "not finite" if self.max_abs_logit_diff is None else f"{self.max_abs_logit_diff:.3g}"
        return (
            f"as-run and exact arithmetic differ: top-1 agreement {self.top1_agreement or 0:.4f}, largest logit "
            f"difference {largest}, {self.bit_exact_rows or 0:.1%} of {self.n} rows bit-exact ({products})"
        )


class OtherArithmetic:
    """A session's file in the arithmetic that the session does not use, compared row by row as images come in.

    A file without integer layers has one arithmetic, and so no `agreement`.
    """

    def __init__(self, session: DeployedSession) -> None:
        self._used: Arithmetic = session.profile.arithmetic
        self._session: DeployedSession | None = None
        self._integer = session.artifact.integer
        self._mixed: int | None = None
        self._not_run: str | None = None
        self._session_rows: list[Logits] = []
        self._other_rows: list[Logits] = []
        if self._integer:
            self._open(session)

    def _open(self, session: DeployedSession) -> None:
        other: Arithmetic = "exact" if self._used == "as-run" else "as-run"
        try:
            opened = DeployedSession(session.artifact, session.profile.with_changes(arithmetic=other))
            self._mixed = len(exact_model((session if other == "exact" else opened).graph).rewritten)
        except (UnsupportedArithmeticError, SessionError) as error:
            self._not_run = str(error)
            return
        self._session = opened if self._mixed else None

    def compare(self, x: Pixels, logits: Logits) -> None:
        """Run ``x: (N, 3, H, W)`` in the other arithmetic, beside the session's own ``logits`` of it."""
        if self._session is None:
            return
        try:
            self._other_rows.append(self._session.logits(x))
        except SessionError as error:
            # What is judged is the session's own arithmetic; the other one is a remark.
            self._session, self._not_run = None, str(error)
            return
        self._session_rows.append(logits)

    @property
    def agreement(self) -> ArithmeticAgreement | None:
        """What was found so far."""
        if not self._integer:
            return None
        if self._session is None or not self._session_rows:
            return ArithmeticAgreement(used=self._used, mixed_products=self._mixed, not_run=self._not_run)
        own, other = np.concatenate(self._session_rows), np.concatenate(self._other_rows)
        return ArithmeticAgreement(
            used=self._used,
            mixed_products=self._mixed,
            n=len(own),
            top1_agreement=float(np.mean(own.argmax(axis=1) == other.argmax(axis=1))),
            max_abs_logit_diff=_largest(own, other),
            bit_exact_rows=float(np.mean(_same_bits(own, other))),
            forwards=self._session.forwards,
        )


def _largest(own: Logits, other: Logits) -> float | None:
    if not (np.isfinite(own).all() and np.isfinite(other).all()):
        return None
    return float(np.abs(own.astype(np.float64) - other).max())


def _same_bits(own: Logits, other: Logits) -> NDArray[np.bool_]:
    same: NDArray[np.bool_] = ((own == other) | (np.isnan(own) & np.isnan(other))).all(axis=1)
    return same
