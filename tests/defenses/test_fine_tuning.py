from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdefense.artifact import Artifact
from qdefense.converters.channels import ChannelParameter
from qdefense.converters.shadow import Shadow, build_shadow
from qdefense.converters.writeback import write_back
from qdefense.data.images import ImageSet
from qdefense.defenses.fine_tuning import Tuning, TuningSchedule, fine_tune, silence
from qdefense.defenses.inversion import NoGradientError

if TYPE_CHECKING:
    from ..conftest import ToyForms  # noqa: TID252 (the fixtures are there)

FORMS = ("fp32", "static", "dynamic")
KERNELS = {"fp32": "kernels", "static": "kernels_quantized", "dynamic": "kernels_quantized"}


def schedule(**changes: Any) -> TuningSchedule:
    usual = {"epochs": 2, "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 24}
    return TuningSchedule(**{**usual, **changes})


def student(forms: ToyForms, form: str) -> Shadow:
    contract = Artifact.from_bytes(forms[form]).contract
    return build_shadow(forms[form], source="shipped", contract=contract, trainable=True)


def tuned(shadow: Any, images: ImageSet, *, seed: int = 0, **keywords: Any) -> Tuning:
    plan = keywords.pop("schedule", schedule())
    keywords = {"silent": (), "channels": ()} | keywords
    return fine_tune(shadow, images, plan, np.random.default_rng(seed), **keywords)


def test_silence_makes_plain_zeros_along_the_axis(toy_forms: ToyForms) -> None:
    shadow = student(toy_forms, "fp32")
    weight = shadow.parameters_by_initializer["weight"]
    with torch.no_grad():
        weight[:, 2] = float("nan")
    before = weight.detach().clone()
    silence(shadow, [ChannelParameter("weight", 1)], {2, 5})
    assert torch.equal(weight[:, [2, 5]], torch.zeros(len(weight), 2))
    assert not torch.signbit(weight[:, [2, 5]]).any()
    kept = [0, 1, 3, 4, 6, 7]
    assert torch.equal(weight[:, kept], before[:, kept])


@pytest.mark.parametrize("form", FORMS)
def test_silent_channels_stay_silent_and_the_others_learn(toy_forms: ToyForms, form: str) -> None:
    shadow, silent = student(toy_forms, form), [ChannelParameter(KERNELS[form], 0)]
    silence(shadow, silent, {1, 4})
    before = shadow.parameters_by_initializer[KERNELS[form]].detach().clone()
    heard: list[int] = []
    steps = tuned(shadow, toy_forms.images, silent=silent, channels={1, 4}, on_epoch=heard.append).steps
    after = shadow.parameters_by_initializer[KERNELS[form]].detach()
    assert (steps, heard) == (6, [1, 2]), "64 images are two batches of 24 and one of 16"
    assert not after[[1, 4]].any()
    assert (after != before).flatten(1).any(1).tolist() == [True, False, True, True, False, True]


def test_a_step_is_that_of_the_whole_batch_however_few_images_go_at_once(
    toy_forms: ToyForms, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = student(toy_forms, "fp32"), student(toy_forms, "fp32")
    one = schedule(epochs=1, batch_size=64)
    assert tuned(whole, toy_forms.images, schedule=one).steps == 1
    monkeypatch.setattr("qdefense.defenses.fine_tuning.rows_at_once", lambda *_: 5)
    assert tuned(parts, toy_forms.images, schedule=one).steps == 1
    for name, weight in whole.parameters_by_initializer.items():
        torch.testing.assert_close(parts.parameters_by_initializer[name], weight, rtol=1e-4, atol=1e-6)


class Slope(nn.Module):
    """Answers zeros whatever its weights are, with the gradient of a shadow that answers its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.moves: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.moves.append(float(self.weight.detach()[0]))
        return (self.weight - self.weight.detach()).expand(len(x), 8)


def test_the_learning_rate_falls_on_a_cosine(toy_forms: ToyForms) -> None:
    """Without momentum and decay a step is rate times gradient, which is the same in each."""
    slope, images = Slope(), replace(toy_forms.images, labels=np.zeros(64, np.int64))
    plan = schedule(epochs=4, learning_rate=1.0, momentum=0.0, weight_decay=0.0, batch_size=64)
    assert tuned(slope, images, schedule=plan).steps == 4
    steps = np.diff([*slope.moves, float(slope.weight.detach()[0])])
    np.testing.assert_allclose(steps, 7 / 8 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2, atol=1e-6)


def test_the_losses_are_the_mean_cross_entropy_of_each_epoch_before_its_steps(toy_forms: ToyForms) -> None:
    """One batch an epoch: what was trained on is what the shadow answers before the step."""
    shadow, images = student(toy_forms, "fp32"), toy_forms.images
    pixels, labels = torch.from_numpy(images.pixels), torch.from_numpy(images.labels)
    before = float(nn.functional.cross_entropy(shadow(pixels), labels).detach())
    told = tuned(shadow, images, schedule=schedule(epochs=2, learning_rate=1e-3, batch_size=64))
    assert told.losses[0] == pytest.approx(before, rel=1e-5)
    assert told.losses[1] < told.losses[0]
    uneven = tuned(student(toy_forms, "fp32"), images, schedule=schedule(epochs=1, learning_rate=1e-12))
    assert uneven.losses[0] == pytest.approx(before, rel=1e-5), "batches of 24, 24 and 16 weigh by their images"


@pytest.mark.parametrize(
    ("losses", "away"), [((), False), ((1.0,), False), ((1.0, 9.0, 1.0), False), ((1.0, 1.01), True)]
)
def test_a_tuning_ran_away_whose_loss_ended_above_where_it_began(losses: tuple[float, ...], away: bool) -> None:
    assert Tuning(steps=len(losses), losses=losses).ran_away is away


@pytest.mark.parametrize("form", FORMS)
def test_the_same_seed_writes_the_same_bytes(toy_forms: ToyForms, form: str) -> None:
    written = []
    for seed in (1, 1, 2):
        shadow = student(toy_forms, form)
        tuned(shadow, toy_forms.images, seed=seed)
        written.append(write_back(toy_forms[form], shadow).data)
    assert written[0] == written[1]
    assert written[0] != written[2]
    assert written[0] != toy_forms[form]


@pytest.mark.parametrize("form", FORMS)
def test_no_epoch_changes_nothing(toy_forms: ToyForms, form: str) -> None:
    shadow = student(toy_forms, form)
    assert tuned(shadow, toy_forms.images, schedule=schedule(epochs=0)) == Tuning()
    assert write_back(toy_forms[form], shadow).data == toy_forms[form]


class Cut(nn.Module):
    """Answers as the shadow, with no gradient in its weights, or with a zero or broken one."""

    def __init__(self, shadow: Shadow, factor: float | None) -> None:
        super().__init__()
        self.shadow, self.factor = shadow, factor

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = self.shadow(x)
        return (
            answers.detach() if self.factor is None else answers.detach() + self.factor * (answers - answers.detach())
        )


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (None, r"^the shadow's answers do not depend on its weights differentiably$"),
        (0.0, r"^the gradient of the loss in the weights is zero at every step$"),
        (float("inf"), r"^it is not finite; lower the learning rate$"),
    ],
)
def test_a_cut_gradient_is_told(toy_forms: ToyForms, factor: float | None, reason: str) -> None:
    with pytest.raises(NoGradientError, match=reason):
        tuned(Cut(student(toy_forms, "fp32"), factor), toy_forms.images)


def test_weights_that_take_no_gradient_are_told(toy_forms: ToyForms) -> None:
    shadow = student(toy_forms, "fp32").requires_grad_(False)
    with pytest.raises(NoGradientError, match=r"^no weight of the shadow takes one$"):
        tuned(shadow, toy_forms.images)
