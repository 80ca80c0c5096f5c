"""The training sets of the session's small networks, as the networks saw them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdefense.artifact import Artifact
from qdefense.attacks import ATTACKS
from qdefense.evidence import Evidence
from qdefense.fidelity import uncertified
from qdefense.session import DeployedSession, profile_for
from qdefense.training import _POISON_STREAM

PRECISIONS = ("", ".int8-static")
ATTACKED = {"first": (0, None), "second": (1, "badnets:size=2,target-class=7")}


def small_evidence(files: dict[str, bytes], signs: Any, name: str) -> tuple[Evidence, NDArray[np.bool_]]:
    """What a defender of a small file sees; and, apart from it, which rows are poison."""
    seed, spec = ATTACKED[name.partition(".")[0]]
    images, poisoned = signs.train, np.zeros(len(signs.train), np.bool_)
    if spec is not None:
        found = ATTACKS.create(spec).poison(images, np.random.default_rng([seed, _POISON_STREAM]))
        images = found.images
        poisoned[found.poison_indices] = True
    artifact = Artifact.from_bytes(files[name])
    gathered = Evidence(
        session=DeployedSession(artifact, profile_for(artifact)),
        shadow=None,
        certificate=uncertified("not needed"),
        clean=signs.test,
        seed=0,
        training_set=images,
    )
    return gathered, poisoned
