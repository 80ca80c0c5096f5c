"""The shadow in the place of the deployed session: one step of the way from FP32 to the file that ships."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from qdefense.converters.contract import InputContract
from qdefense.data.images import Pixels
from qdefense.fidelity import shadow_logits
from qdefense.profile import rows_at_once
from qdefense.session import DeployedSession, Logits, SessionError

if TYPE_CHECKING:
    from qdefense.converters.shadow import Shadow


class ShadowSession(DeployedSession):
    """Answers as the shadow does: the file's arithmetic without what only the runtime adds (saturation, kernels).

    Tensors are those of the runtime's own graph, by the same names; integer codes come as float32.
    """

    def __init__(self, session: DeployedSession, shadow: Shadow) -> None:
        super().__init__(session.artifact, session.profile)
        self._shadow = shadow

    def logits(self, x: Pixels, *, contract: InputContract | None = None) -> Logits:
        """The shadow's logits.

        Raises:
            SessionError: the file is to be read by another contract than the shadow was built for.
        """
        if contract is not None and contract != self.artifact.contract:
            raise SessionError("a shadow reads the file by the contract that it was built for")
        self.forwards += len(x)
        return shadow_logits(self._shadow, x)

    def tap(self, x: Pixels, tensors: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        """The shadow's tensors by their ONNX names.

        Raises:
            SessionError: it computes no such tensor.
        """
        step = rows_at_once(*x.shape[2:])
        parts = [self._tapped_rows(x[start : start + step], tensors) for start in range(0, len(x), step)]
        self.forwards += len(x)
        return {name: np.concatenate([part[name] for part in parts]) for name in tensors}

    def _tapped_rows(self, x: Pixels, tensors: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        try:
            with torch.no_grad():
                found = self._shadow.activations(torch.from_numpy(np.ascontiguousarray(x)), tensors, exact=True)
        except KeyError as error:
            raise SessionError(f"the shadow cannot be tapped: {error.args[0]}") from error
        return {name: value.numpy() for name, value in found.items()}
