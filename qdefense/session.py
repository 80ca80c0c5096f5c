"""DeployedSession: the file as ONNX Runtime really runs it, and everything its answers depend on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from qdefense.artifact import Artifact
from qdefense.converters.contract import InputContract
from qdefense.converters.door import fed, read_answers
from qdefense.converters.reading import safe_text
from qdefense.converters.runtime_graph import (
    RUNTIME_ERRORS,
    Optimization,
    RuntimeGraphError,
    is_settled,
    open_session,
    optimized_model,
    runtime_reason,
)
from qdefense.data.images import ImageSet, Pixels, to_pixels
from qdefense.profile import Runtime, SessionProfile, profile_for, rows_at_once, runtime
from qdefense.taps import TapError, Tapped, Taps, joined

__all__ = [
    "DeployedSession",
    "Logits",
    "Optimization",
    "Runtime",
    "SessionError",
    "SessionProfile",
    "profile_for",
    "rows_at_once",
    "runtime",
]

Logits = NDArray[np.float32]

_IMAGES_AT_ONCE = 256
_TAP_TOLERANCE = 1e-4
"""Of float products, over the largest logit: the tap may lack the memory layouts that the deployed session uses."""


class SessionError(RuntimeError):
    """ONNX Runtime would not load or run the file, or a tensor cannot be tapped without changing the logits."""


class DeployedSession:
    """The deployed file on the CPU execution provider.

    ``logits(x)`` takes ``x: (N, 3, H, W) float32 in [0, 1]``, RGB, and returns ``(N, K) float32``, computed in groups
    of ``profile.batch`` rows. The contract says how the file is fed and how its answer is read: of a softmax the
    log-probabilities. ``forwards`` counts the rows run so far, those that fill up a fixed batch included.

    Raises:
        SessionError: the runtime cannot load the file, or its batch is fixed at another size than the profile's.
    """

    def __init__(self, artifact: Artifact, profile: SessionProfile) -> None:
        fixed = artifact.contract.batch
        if fixed is not None and fixed != profile.batch:
            raise SessionError(
                f"the file's batch is fixed at {fixed}, the profile's is {profile.batch}; use profile_for"
            )
        self.artifact = artifact
        self.profile = profile
        self.forwards = 0
        self._counting = threading.Lock()
        try:
            self._session = self._open()
        except RuntimeGraphError as error:
            raise SessionError(f"{error}; export it again, or use another onnxruntime") from error

    @cached_property
    def graph(self) -> bytes:
        """What the runtime makes of the file under this profile, without memory layouts, as a model of its own."""
        return optimized_model(self.artifact.data, self.profile, optimization=self.profile.optimization)

    @cached_property
    def runtime_layers(self) -> tuple[str, ...]:
        """Names of the nodes that ONNX Runtime really runs."""
        return tuple(node.name for node in onnx.load_from_string(self.graph).graph.node)

    def _open(self) -> onnxruntime.InferenceSession:
        profile = self.profile
        if profile.arithmetic == "as-run":
            return open_session(self.artifact.data, profile, profile.optimization, threads=profile.threads)
        return open_session(self.graph, profile, self._graph_level, threads=profile.threads)

    @cached_property
    def _graph_level(self) -> Optimization:
        """Where `graph` gives what the file does: it only lacks layouts, and must not be optimized into another one."""
        laid_out = self.profile.optimization == "all" and is_settled(self.graph, self.profile)
        return "all" if laid_out else "disable"

    @cached_property
    def _taps(self) -> Taps:
        return Taps(self.graph, self.artifact.data, self.profile, threads=self.profile.threads)

    def logits(self, x: Pixels, *, contract: InputContract | None = None) -> Logits:
        """Logits of a batch of any length, under the file's own contract or another that fits its graph.

        Raises:
            SessionError: the runtime refused the input, or did not answer with one row of K logits per image.
        """
        read = contract or self.artifact.contract
        parts = [self._run(self._session, [read.output_name], rows, read)[0] for rows in self._groups(x)]
        none = np.empty((0, read.classes), dtype=np.float32)
        return read_answers(np.concatenate([none, *parts]), read)

    def logits_of(self, images: ImageSet, *, contract: InputContract | None = None) -> Logits:
        """Logits of stored images, turned into pixels a part at a time: large sets do not fit in memory as floats."""
        # Whole groups of rows: where a batch shares a scale, its composition is part of the answer.
        step = self.profile.batch * max(1, _IMAGES_AT_ONCE // self.profile.batch)
        parts = [
            self.logits(to_pixels(images.images[start : start + step]), contract=contract)
            for start in range(0, max(len(images), 1), step)
        ]
        return np.concatenate(parts)

    def activations(self, x: Pixels, tensor: str) -> NDArray[np.generic]:
        """One intermediate tensor, see `tap`."""
        return self.tap(x, [tensor])[tensor]

    def tap(self, x: Pixels, tensors: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        """Intermediate tensors of the graph that the runtime really runs, by name, in their own types.

        ``x: (N, 3, H, W)``. A tensor whose first axis is the images' has N rows; one without an axis of theirs, such
        as a dynamic scale, has one entry per group of ``profile.batch`` rows. Codes are those of the runtime's graph,
        which may make u8 of s8 activations.

        The taps are extra outputs of the runtime's own optimized graph, so that they break no fusion; each call
        compares its logits with the deployed ones.

        Raises:
            SessionError: there is no such tensor, the images are not on its first axis, or the tapped graph gives other
                logits than the deployed one.
        """
        if not len(x):
            raise SessionError("no image is given to tap; pass at least one")
        contract, logits = self.artifact.contract, self.logits(x)
        found = {contract.input_name: fed(x, contract), contract.output_name: logits}
        names = [name for name in dict.fromkeys(tensors) if name not in found]
        try:
            for name in names:
                self._taps.check(name)
            found |= self._tapped(x, names, logits) if names else {}
        except (TapError, RuntimeGraphError) as error:
            raise SessionError(str(error)) from error
        return {name: found[name] for name in tensors}

    def _tapped(self, x: Pixels, names: list[str], logits: Logits) -> dict[str, NDArray[np.generic]]:
        contract, groups = self.artifact.contract, self._groups(x)
        levels: tuple[Optimization, ...] = (self._graph_level, "disable")
        for level in dict.fromkeys(levels):
            tapped = self._taps.open(names, level)
            runs = [self._run(tapped.session, [contract.output_name, *names], rows, contract) for rows in groups]
            if self._same(read_answers(np.concatenate([run[0] for run in runs]), contract), logits):
                return self._joined(names, tapped, [run[1:] for run in runs], [len(rows) for rows in groups])
        shown = ", ".join(f"'{safe_text(name)}'" for name in names[:3])
        raise TapError(f"tapping {shown} changes the logits; it cannot be read without breaking a fusion")

    def _joined(
        self, names: list[str], tapped: Tapped, runs: list[list[NDArray[np.generic]]], rows: list[int]
    ) -> dict[str, NDArray[np.generic]]:
        frozen = self.artifact.contract.batch is not None
        return {
            name: joined(name, [run[index] for run in runs], rows, tapped.shapes[name], frozen=frozen)
            for index, name in enumerate(names)
        }

    def _same(self, tapped: NDArray[np.generic], deployed: Logits) -> bool:
        # None where the share is not known; 0 of INT4 weights in float products, which layouts move by a last bit.
        if self.artifact.integer and self.artifact.inspection.integer_mac_share != 0:
            return np.array_equal(tapped, deployed, equal_nan=True)
        scale = float(np.abs(deployed).max(initial=0, where=np.isfinite(deployed)))
        return np.allclose(tapped, deployed, rtol=0, atol=_TAP_TOLERANCE * scale, equal_nan=True)

    def _groups(self, x: Pixels) -> list[Pixels]:
        step = self.profile.batch
        return [np.ascontiguousarray(x[start : start + step]) for start in range(0, len(x), step)]

    def _run(
        self, session: onnxruntime.InferenceSession, outputs: list[str], rows: Pixels, contract: InputContract
    ) -> list[NDArray[np.generic]]:
        whole = self._filled(rows)
        images = fed(whole, contract)
        try:
            answers = session.run(outputs, {contract.input_name: images, **self.artifact.fixed_inputs})
        except RUNTIME_ERRORS as error:
            reason = runtime_reason(error)
            raise SessionError(f"ONNX Runtime refused an input of shape {images.shape}: {reason}") from error
        values = [np.asarray(value) for value in answers]
        with self._counting:
            self.forwards += len(whole)
        expected = (len(whole), contract.classes)
        if values[0].shape != expected:
            raise SessionError(
                f"the file answers {len(whole)} images with an output of shape {values[0].shape}, not {expected}; "
                "export it with one row of logits per image"
            )
        return [value[: len(rows)] if value.ndim and len(value) == len(whole) else value for value in values]

    def _filled(self, rows: Pixels) -> Pixels:
        """A last, short group of a fixed batch is filled with copies of its last row, which widen no range."""
        missing = 0 if self.artifact.contract.batch is None else self.profile.batch - len(rows)
        return rows if missing == 0 else np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
