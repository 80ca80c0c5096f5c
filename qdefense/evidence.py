"""Evidence: all that a defender may see. There is no field for a trigger, a target class or poison indices (law 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qdefense.calibration import Calibrations
from qdefense.converters.reading import safe_text
from qdefense.data.images import ImageSet
from qdefense.fidelity import FidelityCertificate, MismatchCause, certify, uncertified
from qdefense.session import DeployedSession

if TYPE_CHECKING:
    from qdefense.converters.shadow import Shadow

Progress = Callable[[str, int, int], None]


def no_progress(_label: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a defense receives.

    ``shadow`` is ``None`` where none could be built; ``certificate`` says whether it may be used and, if not, why.
    ``threads`` is how much may run side by side; torch itself computes on one thread each, so that no sum depends
    on their number. ``gradient_blind_nodes`` lie on a path from input to output; no gradient can look through them.
    ``stated_accuracy`` is the user's word for the clean accuracy of unlabelled images, whose labels are the session's
    own answers.
    """

    session: DeployedSession
    shadow: Shadow | None
    certificate: FidelityCertificate
    clean: ImageSet
    seed: int
    threads: int = 1
    gradient_blind_nodes: tuple[str, ...] = ()
    stated_accuracy: float | None = None
    training_set: ImageSet | None = None
    inputs: ImageSet | None = None
    reference: DeployedSession | None = None
    calibrations: Calibrations | None = None
    progress: Progress = field(default=no_progress, repr=False)


def gather_evidence(
    session: DeployedSession, clean: ImageSet, *, seed: int, threads: int = 1, progress: Progress = no_progress
) -> Evidence:
    """Build and certify the shadow of a session, and put together what a defense may see."""
    from qdefense.converters.shadow import (  # noqa: PLC0415 (imports torch)
        ShadowError,
        UnsupportedOperatorError,
        build_shadow,
    )

    shadow = None
    try:
        artifact = session.artifact
        shadow = build_shadow(artifact.data, source="optimized", contract=artifact.contract, options=session.profile)
        certificate = certify(session, shadow, clean, seed=seed)
    except UnsupportedOperatorError as error:
        cause = MismatchCause(kind="unsupported-operator", layers=(safe_text(error.node),), detail=str(error))
        certificate = uncertified(str(error), cause)
    except ShadowError as error:
        certificate = uncertified(str(error))
    return Evidence(
        session=session,
        shadow=shadow,
        certificate=certificate,
        clean=clean,
        seed=seed,
        threads=threads,
        gradient_blind_nodes=tuple(node.name for node in session.artifact.inspection.gradient_blind_nodes),
        progress=progress,
    )
