from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDES = Path(__file__).resolve().parents[1] / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("guide", ["converters.md"])
def test_code_of_a_guide_runs_as_it_stands(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = _BLOCK.findall((GUIDES / guide).read_text(encoding="utf-8"))
    assert len(blocks) > 1
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), guide, "exec"), {})
