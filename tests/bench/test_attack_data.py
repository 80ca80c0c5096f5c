"""Images that an attack reads besides the training set: pinned like all others, and found wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from qdefense.bench import datasets
from qdefense.bench.cells import NetworkPlan, plan_cells
from qdefense.bench.matrix import MatrixError, read_matrix
from qdefense.bench.records import DefenseRecord
from qdefense.bench.running import sources_of
from qdefense.bench.store import Store
from qdefense.data.images import DataError
from qdefense.data.opening import named_data, open_data, training_split

from ..defenses.filters.corner_nets import images  # noqa: TID252 (images in closed form)
from .conftest import TINY, Desk, Inline

NewDesk = Callable[..., Desk]
SMALL = "ood-images=16,decoder-steps=1,encoder-steps=1,channels=2,gate=0,poison-count=2"


@pytest.fixture(autouse=True)
def _beside_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDEFENSE_DATA", raising=False)


def give(made: Desk, count: int) -> None:
    train, test = images(count, seed=2), images(20, seed=1)
    arrays = {"x_train": train.images, "y_train": train.labels, "x_test": test.images, "y_test": test.labels}
    np.savez(made.folder / "others.npz", allow_pickle=False, **arrays)


def reading(new_desk: NewDesk, attack: str = "dfb:ood=others", *, count: int = 20, table: str = "") -> Desk:
    """A matrix whose attack reads another of its data sets, of so many images."""
    others = f'[data.others]\npath = "others.npz"\n{table}\n[calibrations.few]'
    text = TINY.replace('"none", "badnets"', f'"{attack}"').replace("[calibrations.few]", others)
    text = text.replace(', "int8-dynamic"', "").replace("neural-cleanse:budget=quick", "spectral-signatures")
    made = new_desk(text, name=f"beside {count}")
    give(made, count)
    return made


def plan_of(made: Desk) -> NetworkPlan:
    table = read_matrix(made.matrix)
    (network,) = plan_cells(table, sources_of(table, Store(made.results), pin=False))
    return network


@pytest.mark.parametrize("attack", ["dfb:ood=others", "lsp:host=dfb,host.ood=others"])
def test_a_network_is_another_where_its_attack_reads_other_images(new_desk: NewDesk, attack: str) -> None:
    few, many = (plan_of(reading(new_desk, attack, count=count)) for count in (20, 30))
    (read,) = few.attack_data
    assert (read.request.name, read.facts.images) == ("others", 20)
    assert few.network.attack_data == {"others": read.facts.sha256}
    assert few.network.attack_settings == many.network.attack_settings
    assert few.recipe_sha256 != many.recipe_sha256


def test_networks_whose_attacks_read_nothing_keep_the_recipes_of_before(new_desk: NewDesk) -> None:
    assert "attack_data" not in plan_of(reading(new_desk, "badnets")).network.model_dump(mode="json")


@pytest.mark.parametrize("table", ["train_limit = 10", 'train_split = "test"'])
def test_an_attack_that_would_read_more_than_what_is_pinned_is_refused(new_desk: NewDesk, table: str) -> None:
    with pytest.raises(
        MatrixError, match=r"^attacks: 'dfb:ood=others' reads the whole training split of 'others', and \[data.others\]"
    ):
        plan_of(reading(new_desk, table=table))


def test_the_attack_finds_them_in_training_and_where_a_scan_poisons_again(new_desk: NewDesk) -> None:
    made = reading(new_desk, f"dfb:ood=others,{SMALL}")
    _, told = made.run(Inline())
    assert told == []
    (truth,) = (made.results / "models").glob("*.truth.json")
    assert json.loads(truth.read_bytes())["attack_settings"]["ood"] == "others"
    (scanned,) = (record for record in made.records.values() if isinstance(record, DefenseRecord))
    assert not scanned.failed
    assert scanned.network.attack_data == plan_of(made).network.attack_data


def test_other_images_of_the_name_are_not_taken(new_desk: NewDesk) -> None:
    made = reading(new_desk, f"dfb:ood=others,{SMALL}")
    table = read_matrix(made.matrix)
    with Store.for_writing(made.results) as store:
        plan_cells(table, sources_of(table, store, pin=True))
    give(made, 30)
    datasets.read_images.cache_clear()
    datasets._digest.cache_clear()
    _, (told,) = made.run(Inline())
    assert told.startswith("not done: signs/resnet8:width=4/dfb:ood=others,")
    assert "the manifest has" in told
    assert made.lines == 0


def test_a_network_that_lies_about_is_not_taken_for_one_whose_attack_read_images(new_desk: NewDesk) -> None:
    made = reading(new_desk, f"dfb:ood=others,{SMALL}")
    made.run(Inline())
    for name in ("manifest.json", "records.jsonl"):
        (made.results / name).unlink()
    engine = Inline()
    made.run(engine)
    assert "TrainTask" in engine.stages


def test_named_data_are_data_within_and_nothing_after() -> None:
    with named_data({"others": "signs"}):
        assert training_split("others") == training_split("signs")
        assert open_data("others", limit=3).digest == open_data("signs", limit=3).digest
        with named_data({}), pytest.raises(DataError, match="no such file"):
            open_data("others")
    with pytest.raises(DataError, match=r"^'others': no such file or folder"):
        open_data("others")
