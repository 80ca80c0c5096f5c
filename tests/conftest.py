from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real sets, for tests marked ``real``; missing is a failure where data is required."""
    folder = Path(os.environ.get("QDEFENSE_DATA", REPOSITORY.parent / "shared" / "data"))
    missing = [name for name in ("cifar10", "gtsrb") if not (folder / name).is_dir()]
    if missing:
        reason = f"{folder} has no {' and no '.join(missing)}; set QDEFENSE_DATA"
        if os.environ.get("QDEFENSE_REQUIRE_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
