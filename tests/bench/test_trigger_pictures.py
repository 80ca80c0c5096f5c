"""Pictures of planted triggers: drawn where they are missing, shown where they are there, of no data set."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qdefense.attacks import ATTACKS
from qdefense.attacks.interfaces import trigger_shows_images
from qdefense.attacks.states import pack_state
from qdefense.bench.cohort import Cohort
from qdefense.bench.page import render_bench
from qdefense.bench.store import Store
from qdefense.bench.summary import read_results, summarise
from qdefense.bench.trigger_pictures import MOST_BYTES, _poisons, draw_triggers, read_trigger_pictures

from ..report import sample_reports as reports  # noqa: TID252 (what is hostile is there)
from ..report.test_html import parse  # noqa: TID252 (the reader of pages is there)
from . import sample_records as samples

DIGEST = "ab" * 32
TITLE = "gtsrb/resnet8/x/seed 0"


def _plan(attack: str | None, *, side: int = 32) -> Any:
    """All that is asked of a planned network here."""
    facts = SimpleNamespace(height=side, width=side, classes=43)
    shows = attack is not None and trigger_shows_images(ATTACKS.create(attack))
    return SimpleNamespace(
        attack=attack,
        recipe_sha256="r",
        title=TITLE,
        test=SimpleNamespace(facts=facts),
        trigger_shows_images=shows,
    )


def _draw(folder: Path, plan: Any, state: dict[str, Any] | None = None) -> list[str]:
    told: list[str] = []
    with Store.for_writing(folder) as store:
        if state is not None:
            store.trigger = lambda _sha256: pack_state(state)  # type: ignore[assignment]
        store.replicas = lambda _recipe: (SimpleNamespace(artifact_sha256=DIGEST),)  # type: ignore[assignment,return-value]
        draw_triggers([plan], store, told.append)
    return told


@pytest.mark.parametrize(
    "attack", ["badnets:target-class=12", "blended", "wanet", "cassock:source-class=40,target-class=3"]
)
def test_every_attacked_network_gets_a_small_picture_and_equal_ones_equal_bytes(tmp_path: Path, attack: str) -> None:
    found = []
    for part in ("first", "second"):
        assert _draw(tmp_path / part, _plan(attack)) == []
        found.append((tmp_path / part / "triggers" / f"{DIGEST[:16]}.png").read_bytes())
    assert found[0] == found[1]
    assert len(found[0]) <= MOST_BYTES
    with Image.open(io.BytesIO(found[0])) as picture:
        assert (picture.format, picture.info) == ("PNG", {})


@pytest.mark.parametrize(
    ("attack", "labels"),
    [
        ("badnets:target-class=12", ["class 12"] * 3),
        ("sig:target-class=7,delta=40,class-rate=0.02", ["class 7"] * 3),
        ("cassock:source-class=40,target-class=3", ["class 3"] * 3),
        ("lsp:host=adaptive-blend,host.target-class=12,host.poison-count=2", ["class 12"] * 2),
        ("badnets:mode=all-to-all", ["class 2"] * 3),
        ("wanet", []),
    ],
)
def test_a_picture_shows_signs_as_the_attack_poisons_them(attack: str, labels: list[str]) -> None:
    block = _poisons(ATTACKS.create(attack), (16, 20), 43)
    assert block is not None
    assert list(block.names) == labels
    assert block.images.shape == (len(labels), 16, 20, 3)
    assert block.heading == ("poisons as the training set has them" if labels else "The poisons are made in training.")


def test_poisons_are_stamped_as_for_training_and_not_as_at_inference() -> None:
    faint, loud = (
        _poisons(ATTACKS.create(f"sig:inference-delta=100,delta={delta}"), (16, 16), 10) for delta in (4, 40)
    )
    assert faint is not None
    assert loud is not None
    assert 0 < np.abs(faint.images.astype(int) - loud.images.astype(int)).max() <= 44


@pytest.mark.parametrize(
    "attack", ["clean-label", "htba", "lsp:host=clean-label", "badnets:poison-count=1000", "sig:target-class=50"]
)
def test_no_poisons_are_shown_that_take_a_network_or_more_signs_or_classes(attack: str) -> None:
    assert _poisons(ATTACKS.create(attack), (16, 16), 43) is None


@pytest.mark.parametrize(
    ("attack", "state"),
    [("badnets", None), ("badnets:mode=all-to-all", {"classes": np.array(43)})],
)
def test_a_picture_has_poisons_where_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str, state: dict[str, Any] | None
) -> None:
    heights = {}
    for part, most in (("with", MOST_BYTES), ("without", 0)):
        with monkeypatch.context() as patched:
            if not most:
                patched.setattr("qdefense.bench.trigger_pictures._poisons", lambda *_: None)
            assert _draw(tmp_path / part, _plan(attack, side=16), state) == []
        with Image.open(tmp_path / part / "triggers" / f"{DIGEST[:16]}.png") as picture:
            heights[part] = picture.height
    assert heights["with"] > heights["without"]


def test_a_picture_that_is_there_is_left_alone_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    _draw(tmp_path, _plan("badnets"))
    (picture,) = (tmp_path / "triggers").iterdir()
    picture.write_bytes(b"mine")
    (tmp_path / "triggers" / ".x.png.1.part").write_bytes(b"torn")
    _draw(tmp_path, _plan("badnets"))
    assert [path.name for path in (tmp_path / "triggers").iterdir()] == [picture.name]
    assert picture.read_bytes() == b"mine"


def test_a_clean_network_has_none_and_one_whose_state_is_gone_is_told(tmp_path: Path) -> None:
    assert _draw(tmp_path, _plan(None)) == []
    (told,) = _draw(tmp_path, _plan("badnets:mode=all-to-all"))
    assert told.startswith("gtsrb/resnet8/x/seed 0: no picture of its trigger: badnets: how many classes there are is ")
    assert not (tmp_path / "triggers").exists()


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        ("cassock:variant=cont", "pattern"),
        ("cassock-loop:variant=comp", "pattern"),
        ("lsp:host=cassock,host.variant=cont", "pattern"),
        ("dfb", "residual"),
    ],
)
def test_a_trigger_that_shows_a_training_image_has_no_picture(tmp_path: Path, attack: str, name: str) -> None:
    state = {name: np.full((3, 32, 32), 0.1, np.float32)}
    assert _draw(tmp_path, _plan(attack), state) == []
    assert not (tmp_path / "triggers").exists()


def test_images_too_large_for_a_small_picture_have_none(tmp_path: Path) -> None:
    assert _draw(tmp_path, _plan("blended", side=224)) == []
    assert read_trigger_pictures(tmp_path) == {}


def _page(folder: Path, network: Any, body: bytes | None) -> str:
    behaviour = samples.behaviour(network)
    results = samples.write(folder, [samples.training(network), behaviour])
    if body is not None:
        sha = samples.training(network).artifact_sha256
        (results / "triggers").mkdir()
        (results / "triggers" / f"{sha[:16]}.png").write_bytes(body)
    found = read_results(results)
    cohort = Cohort(found.records)
    return render_bench(summarise(found, cohort), cohort, read_trigger_pictures(results))


def _png(side: int = 40) -> bytes:
    body = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(body, format="PNG")
    return body.getvalue()


def test_page_embeds_the_picture_of_an_attack(tmp_path: Path) -> None:
    page = parse(_page(tmp_path, samples.network("badnets"), _png()))
    (section,) = (one for one in page.all("section") if one.attributes["id"] == "planted")
    (image,) = section.all("img")
    assert image.attributes["src"] == f"data:image/png;base64,{base64.b64encode(_png()).decode()}"
    assert image.attributes["alt"].startswith("Images without and with the trigger, and the residual: gtsrb, resnet8")
    assert "badnets, seed 0" in image.attributes["alt"]
    assert "#planted" in {link.attributes["href"] for link in page.all("a")}


@pytest.mark.parametrize("body", [None, b"no picture", _png() + bytes(MOST_BYTES)], ids=["missing", "broken", "large"])
def test_page_without_a_picture_shows_nothing(tmp_path: Path, body: bytes | None) -> None:
    text = _page(tmp_path, samples.network("badnets"), body)
    assert "planted" not in text.partition("<body>")[2]


def test_page_takes_the_names_of_an_attack_for_text(tmp_path: Path) -> None:
    network = samples.network("badnets").model_copy(update={"attack": reports.SCRIPT})
    text = _page(tmp_path, network, _png())
    assert "<script" not in text
    assert 'id="planted"' in text
