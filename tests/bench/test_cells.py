"""From axes to cells: duplicates merge, and no axis multiplies what it does not touch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from qdefense.attacks.badnets import BadNets
from qdefense.bench.cells import NetworkPlan, chosen, plan_cells
from qdefense.bench.matrix import MatrixError, read_matrix
from qdefense.bench.revisions import EVALUATION_REVISION
from qdefense.bench.running import evaluation_of, sources_of
from qdefense.bench.store import Store
from qdefense.bench.survey import never, survey
from qdefense.bench.tasks import Evaluation, TrialKey
from qdefense.converters.quantize import QuantizationError
from qdefense.defenses.scans.neural_cleanse import NeuralCleanse
from qdefense.registry import SpecError

from ..defenses.filters.corner_nets import images  # noqa: TID252 (images in closed form)
from .conftest import CELLS, TINY, Desk

NewDesk = Callable[..., Desk]


def plan_of(desk: Desk) -> tuple[NetworkPlan, ...]:
    table = read_matrix(desk.matrix)
    return plan_cells(table, sources_of(table, Store(desk.results), pin=False))


def titles(plan: Sequence[NetworkPlan]) -> list[str]:
    return [cell.title for network in plan for _, cell in network.cells]


def test_a_grid_is_the_product_of_its_axes(new_desk: NewDesk) -> None:
    found = titles(plan_of(new_desk()))
    assert len(found) == len(set(found)) == CELLS
    assert found[0] == "signs/resnet8:width=4/none/seed 0/fp32/as-run/behaviour"
    assert found[-1] == "signs/resnet8:width=4/badnets/seed 0/int8-dynamic/as-run/neural-cleanse:budget=quick"


def test_cells_of_two_grids_merge_however_they_are_written(new_desk: NewDesk) -> None:
    grid = TINY[TINY.index("[[grid]]") :]
    again = (
        grid.replace('"badnets"', '"badnets:target-class=7,size=3"')
        .replace('"int8-dynamic"', '"int8-dynamic:types=u8u8"')
        .replace("neural-cleanse:budget=quick", "neural-cleanse:budget=quick,patience=5")
    )
    assert again != grid
    assert len(titles(plan_of(new_desk(TINY + again)))) == CELLS


def test_every_work_item_has_a_title_of_its_own_under_that_of_its_network(new_desk: NewDesk) -> None:
    variants = "cassock:variant=trans,source-class=1", "cassock:variant=cont,source-class=1", "badnets:poison-count=5"
    attacks = ", ".join(f'"{text}"' for text in variants)
    desk = new_desk(TINY.replace('"badnets"', f'"badnets", {attacks}'))
    items = survey(plan_of(desk), Store(desk.results), evaluation_of(read_matrix(desk.matrix)))
    found = [item.title for item in items]
    assert len(found) == len(set(found)) == 5 * (2 + CELLS // 2)
    assert all(item.title.startswith(item.network.title) for item in items)
    trained = [item.title for item in items if item.stage == "train"]
    assert trained == [f"signs/resnet8:width=4/{text}/seed 0" for text in ("none", "badnets", *variants)]


def test_a_network_has_the_title_that_the_first_grid_gives_it(new_desk: NewDesk) -> None:
    grid = TINY[TINY.index("[[grid]]") :].replace('"badnets"', '"badnets:size=3"').replace('"fp32"', '"int4"')
    added = [title for title in titles(plan_of(new_desk(TINY + grid))) if "int4" in title]
    assert added[-1] == "signs/resnet8:width=4/badnets/seed 0/int4/as-run/neural-cleanse:budget=quick"


def test_a_cell_is_of_the_first_grid_that_names_it(new_desk: NewDesk) -> None:
    grid = TINY[TINY.index("[[grid]]") :]
    plan = plan_of(new_desk(TINY + grid.replace('"badnets"', '"badnets", "blended"')))
    assert [network.grid for network in plan] == [0, 0, 1]
    assert {cell.grid for _, cell in plan[0].cells} == {0}
    assert {cell.grid for _, cell in plan[2].cells} == {1}


def test_only_calibrated_precisions_have_calibrations_and_only_8_bit_ones_arithmetics(new_desk: NewDesk) -> None:
    text = TINY.replace('"int8-dynamic"]', '"int8-static", "int4", "int8-dynamic"]').replace("neural-cleanse", "")
    text = text.replace("images = 16\n", "images = 16\n[calibrations.hot]\ntriggered = 0.125\n")
    text += 'calibrations = ["few", "hot"]\narithmetics = ["as-run", "exact"]\n'
    text = text.replace('defenses = [":budget=quick"]', "")
    found = [title.split("seed 0/")[1] for title in titles(plan_of(new_desk(text))) if "badnets" in title]
    both = ("as-run", "exact")
    static = [f"int8-static/{images}/{sums}/behaviour" for images in ("few", "hot") for sums in both]
    assert found == [
        "fp32/as-run/behaviour",
        *static,
        "int4/as-run/behaviour",
        *(f"int8-dynamic/{sums}/behaviour" for sums in both),
    ]
    clean = [title for title in titles(plan_of(new_desk(text))) if "none" in title]
    assert not any("hot" in title for title in clean)  # there is no trigger to put on
    assert any("few" in title for title in clean)


def test_the_target_class_is_the_attacks_own_then_the_tables(new_desk: NewDesk) -> None:
    text = TINY.replace("target_class = 7", "target_class = {badnets = 5}")
    text = text.replace('"badnets"', '"badnets", "blended", "badnets:target-class=3"')
    settings = [network.network.attack_settings for network in plan_of(new_desk(text))]
    assert [found.get("target_class") for found in settings] == [None, 5, 0, 3]


def test_without_gradients_is_a_column_of_those_that_need_them(new_desk: NewDesk) -> None:
    text = TINY + 'accesses = ["session", "shadow", "no-gradients"]\n'
    found = [title for title in titles(plan_of(new_desk(text))) if "none/seed 0/fp32" in title]
    assert [title.rsplit("/", 1)[1] for title in found] == [
        "behaviour",
        "neural-cleanse:budget=quick",
        "shadow",
        "no-gradients",
    ]


def test_only_and_limit_drop_what_no_cell_needs(new_desk: NewDesk) -> None:
    plan = chosen(plan_of(new_desk()), only="badnets", limit=None, at_hand=never)
    assert [network.network.attack for network in plan] == ["badnets"]
    (network,) = chosen(plan_of(new_desk()), only=None, limit=1, at_hand=never)
    assert titles([network]) == ["signs/resnet8:width=4/none/seed 0/fp32/as-run/behaviour"]
    assert chosen(plan_of(new_desk()), only="no such cell", limit=None, at_hand=never) == ()


def test_only_with_the_slash_tells_a_default_from_its_variants(new_desk: NewDesk) -> None:
    plan = plan_of(new_desk(TINY.replace('"badnets"', '"badnets", "badnets:poison-count=5"')))
    assert len(chosen(plan, only="badnets", limit=None, at_hand=never)) == 2
    (default,) = chosen(plan, only="/badnets/", limit=None, at_hand=never)
    assert default.title == "signs/resnet8:width=4/badnets/seed 0"
    (variant,) = chosen(plan, only="poison-count=5/", limit=None, at_hand=never)
    assert variant.title == "signs/resnet8:width=4/badnets:poison-count=5/seed 0"


@pytest.mark.parametrize(
    ("old", "new", "error", "told"),
    [
        ("resnet8:width=4", "resnet9", MatrixError, "architectures: there is no 'resnet9'; known: convnext"),
        ("resnet8:width=4", "resnet8:depth=4", MatrixError, "an architecture takes width=CHANNELS"),
        ("resnet8:width=4", "resnet8:width=0", MatrixError, "an architecture takes width=CHANNELS"),
        ('"badnets"', '"badnet"', SpecError, "there is no attack 'badnet'; did you mean 'badnets'?"),
        ("neural-cleanse", "neural", SpecError, "there is no defense 'neural'"),
        ('"int8-dynamic"', '"int8"', QuantizationError, "unknown scheme 'int8'"),
        ('"int8-dynamic"', '"int8-dynamic:u8u8"', MatrixError, "'u8u8' is not key=value"),
        ('"int8-dynamic"', '"int4:per-channel=false"', QuantizationError, "has no scale per tensor"),
        ('"int8-dynamic"', '"int8-static"', MatrixError, "'int8-static' needs calibration images"),
        (
            "target_class = 7",
            "target_class = 12",
            MatrixError,
            "attacks: 'badnets' has the target class 12, but signs has classes 0 to 11; name one of them for ",
        ),
        ('"badnets"', '"lsp:host.target-class=70"', MatrixError, "has the host.target class 70, but signs has"),
        ('"badnets"', '"htba:source-class=12"', MatrixError, "has the source class 12, but signs has"),
    ],
)
def test_unknown_names(new_desk: NewDesk, old: str, new: str, error: type[Exception], told: str) -> None:
    assert old in TINY
    with pytest.raises(error) as caught:
        plan_of(new_desk(TINY.replace(old, new)))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        ("htba:source-class=0", {"source_class": 0, "target_class": 7}),
        ("cassock:source-class=5", {"source_class": 5, "target_class": 7}),
        ("lsp:host=htba,host.source-class=0", {"host.source_class": 0, "host.target_class": 7}),
    ],
)
def test_the_default_target_does_not_stand_in_the_way_of_a_source(
    new_desk: NewDesk, attack: str, settings: dict[str, int]
) -> None:
    plan = plan_of(new_desk(TINY.replace('"badnets"', f'"{attack}"')))
    found = next(one.network.attack_settings for one in plan if one.network.attack)
    assert found | settings == found
    own = attack.replace("source-class=0", "source-class=7").replace("source-class=5", "source-class=7")
    with pytest.raises(SpecError, match="class 7 is source and target; choose another source_class"):
        plan_of(new_desk(TINY.replace('"badnets"', f'"{own}"')))


def calibrated(new_desk: NewDesk, there: int) -> Desk:
    """A matrix that asks for 300 calibration images of data that have fewer."""
    text = TINY.replace('path = "signs"\ntrain_limit = 128\ntest_limit = 60', 'path = "given.npz"')
    text = text.replace("target_class = 7", "target_class = 2").replace("images = 16", "images = 300")
    made = new_desk(text.replace('"int8-dynamic"', '"int8-static"') + 'calibrations = ["few"]\n', name=f"of {there}")
    train, test = images(there), images(20, seed=1)
    arrays = {"x_train": train.images, "y_train": train.labels, "x_test": test.images, "y_test": test.labels}
    np.savez(made.folder / "given.npz", allow_pickle=False, **arrays)
    return made


def test_a_triggered_share_that_comes_to_no_image_is_refused(new_desk: NewDesk) -> None:
    text = TINY.replace('"fp32", "int8-dynamic"', '"int8-static"').replace(
        "images = 16\n", "images = 16\ntriggered = 0.03\n"
    )
    with pytest.raises(
        MatrixError,
        match=r"^calibrations.few: 0.03 of 16 images come to none with the trigger; raise triggered, or leave it out$",
    ):
        plan_of(new_desk(text + 'calibrations = ["few"]\n'))


def test_files_that_saw_another_strength_of_the_trigger_are_files_of_their_own(new_desk: NewDesk) -> None:
    """Though the network may be the same, byte for byte: the two differ at inference alone."""
    text = TINY.replace('"fp32", "int8-dynamic"', '"int8-static"').replace(
        '"badnets"', '"sig", "sig:inference-delta=40"'
    )
    text = text.replace("images = 16\n", "images = 16\n[calibrations.hot]\nimages = 16\ntriggered = 0.5\n")
    _, *plan = plan_of(new_desk(text + 'calibrations = ["few", "hot"]\n'))
    recipes = [[file.recipe("the same network") for file in network.files.values()] for network in plan]
    (plain, hot), (other, hotter) = recipes
    assert plain == other
    assert (hot["trigger"], hotter["trigger"]) == ({"inference_delta": 20.0}, {"inference_delta": 40.0})
    assert "trigger" not in plain
    _, dfb = plan_of(new_desk(text.replace('"sig", "sig:inference-delta=40"', '"dfb"') + 'calibrations = ["hot"]\n'))
    assert next(file.recipe("") for file in dfb.files.values())["trigger"] == {"test_multiple": 6}


def test_records_say_how_many_calibration_images_there_were(new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDEFENSE_DATA", raising=False)
    found = [file.calibration for network in plan_of(calibrated(new_desk, 17)) for file in network.files.values()]
    assert [one and one.images for one in found] == [None, 17] * 2
    with pytest.raises(
        MatrixError, match=r"^calibrations.few: 'npz given.npz/train' has 15 images, fewer than 16; name a larger"
    ):
        plan_of(calibrated(new_desk, 15))


@pytest.mark.parametrize("attack", ["dfb:ood=things", "lsp:host=dfb,host.ood=things"])
def test_an_attack_that_reads_images_which_nothing_pins_is_refused(new_desk: NewDesk, attack: str) -> None:
    with pytest.raises(
        MatrixError,
        match=rf"^attacks: '{attack}' reads the images at 'things', whose digest no record .* this file \(signs\), or",
    ):
        plan_of(new_desk(TINY.replace('"badnets"', f'"{attack}"')))
    assert plan_of(new_desk(TINY.replace('"badnets"', '"dfb:ood=signs"')))


# --- keys -------------------------------------------------------------------------------------------------------------


def keys(
    desk: Desk,
    rules: Evaluation | None = None,
    artifact: str = "a" * 64,
    batch: int = 64,
    scheme: str | None = "fp32",
) -> list[str]:
    return [
        TrialKey(
            plan=file,
            cell=cell,
            artifact_sha256=artifact,
            batch=batch,
            train_sha256=network.train.facts.sha256,
            test_sha256=network.test.facts.sha256,
            evaluation=rules or evaluation_of(read_matrix(desk.matrix)),
        ).key
        for network in plan_of(desk)
        for file, cell in network.cells
        if scheme is None or file.scheme == scheme
    ]


def test_keys_are_the_same_wherever_the_matrix_lies_and_however_it_is_written(new_desk: NewDesk) -> None:
    written = TINY.replace("epochs = 1\n", "").replace('path = "signs"\n', 'epochs = 1\npath = "signs"\n')
    written = written.replace("neural-cleanse:budget=quick", "neural-cleanse:patience=5,budget=quick")
    assert keys(new_desk(written, name="elsewhere")) == keys(new_desk())


def test_keys_differ_by_artifact_settings_data_profile_and_seed(new_desk: NewDesk) -> None:
    """Each change must give the scan of the poisoned network another key."""
    rules = evaluation_of(read_matrix(new_desk().matrix))
    changed = {
        "as it is": keys(new_desk()),
        "artifact": keys(new_desk(), artifact="b" * 64),
        "profile": keys(new_desk(), batch=1),
        "settings": keys(new_desk(TINY.replace("budget=quick", "budget=gate"), name="settings")),
        "attack": keys(new_desk(TINY.replace('"badnets"', '"blended"'), name="attack")),
        "data": keys(new_desk(TINY.replace("test_limit = 60", "test_limit = 61"), name="data")),
        "images": keys(new_desk(), Evaluation(seed=0, clean_images=41, held_out_images=10)),
        "seed": keys(new_desk(), Evaluation(seed=1, clean_images=40, held_out_images=10)),
    }
    scans = {name: found[-1] for name, found in changed.items()}
    assert len(set(scans.values())) == len(scans)
    # What only filters look at leaves a scan's key alone, and a seed of the evaluation what a file does.
    assert keys(new_desk(), Evaluation(seed=0, clean_images=40, held_out_images=11)) == changed["as it is"]
    assert changed["seed"][0] == changed["as it is"][0]
    assert rules.seed == 0


def test_mended_code_is_asked_again(new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defense's answers only, where the defense was mended; all of them where the evaluator was."""
    before = keys(new_desk())
    with monkeypatch.context() as patch:
        patch.setattr(NeuralCleanse, "revision", NeuralCleanse.revision + 1)
        mended = keys(new_desk())
    assert [new == old for new, old in zip(mended, before, strict=True)] == [True, False] * 2
    monkeypatch.setattr("qdefense.bench.tasks.EVALUATION_REVISION", EVALUATION_REVISION + 1)
    assert not set(keys(new_desk())) & set(before)


def test_networks_of_a_mended_attack_are_made_again(new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of an attack that has it for a host; a clean one is what it was."""
    text = TINY.replace('"badnets"', '"badnets", "lsp", "blended"')
    before, old = plan_of(new_desk(text)), keys(new_desk(text))
    monkeypatch.setattr(BadNets, "revision", 2)
    after, new = plan_of(new_desk(text)), keys(new_desk(text))
    assert [one.network.attack_revisions for one in after] == [{}, {"badnets": 2}, {"badnets": 2}, {}]
    same = [new.recipe_sha256 == old.recipe_sha256 for new, old in zip(after, before, strict=True)]
    assert same == [True, False, False, True]
    assert "attack_revisions" not in before[1].network.model_dump()
    assert [new == old for new, old in zip(new, old, strict=True)] == [True] * 2 + [False] * 4 + [True] * 2


def test_files_of_equal_bytes_have_a_record_each(new_desk: NewDesk) -> None:
    """Clipping nothing, 16 and 17 images may read the same ranges, and two spellings of a precision write one file."""
    text = TINY.replace("images = 16\n", "images = 16\n[calibrations.more]\nimages = 17\n")
    text = text.replace('"fp32", "int8-dynamic"', '"int8-static", "int4", "int4:block-size=16"')
    text += 'calibrations = ["few", "more"]\n'
    table = text[text.index("[data.signs]") : text.index("[calibrations.few]")]
    twin = text.replace(table, table + table.replace("data.signs", "data.twin")).replace(
        '["signs"]', '["signs", "twin"]'
    )
    found = keys(new_desk(twin), scheme=None)
    assert len(found) == 2 * 2 * 4 * 2  # tables of data, networks, files, cells
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        ("lsp", {"host": "badnets", "host.target_class": 7}),
        ("lsp:host=blended", {"host": "blended", "host.target_class": 7}),
        ("lsp:host=blended,host.target-class=3", {"host": "blended", "host.target_class": 3}),
    ],
)
def test_the_target_class_of_the_data_goes_to_the_host_of_an_attack(
    new_desk: NewDesk, attack: str, told: dict[str, object]
) -> None:
    (_, made) = plan_of(new_desk(TINY.replace('"badnets"', f'"{attack}"')))
    assert made.network.attack_settings == made.network.attack_settings | told


def test_poison_counts_are_swept_as_attacks_of_their_own(new_desk: NewDesk) -> None:
    swept = '"badnets", "badnets:poison-count=5", "badnets:poison_count=50"'
    plan = plan_of(new_desk(TINY.replace('"badnets"', swept)))
    told = [
        {key: value for key, value in made.network.attack_settings.items() if key.startswith("poison")} for made in plan
    ]
    assert told == [{}, {"poison_rate": 0.1}, {"poison_count": 5}, {"poison_count": 50}]
    assert len({made.recipe_sha256 for made in plan}) == len(plan)
