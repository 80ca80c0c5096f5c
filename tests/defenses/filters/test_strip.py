from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qdefense.attacks import ATTACKS
from qdefense.converters.quantize import quantize
from qdefense.data.images import ImageSet, Pixels
from qdefense.defenses import DEFENSES
from qdefense.defenses.entropies import mean_entropies, normal_boundary
from qdefense.defenses.filters.judging import judge_inputs
from qdefense.defenses.filters.strip import FittedStrip, Strip
from qdefense.evidence import Evidence
from qdefense.findings import Finding, Verdict
from qdefense.rates import auroc, wilson_interval
from qdefense.registry import SpecError
from qdefense.session import Logits, SessionProfile

from .corner_nets import CLASSES, evidence_of, images, network, stamp

if TYPE_CHECKING:
    from ...conftest import SmallSigns  # noqa: TID252 (the fixtures are there)

CLEAN = images(300)
STRANGERS = images(80, seed=9)


def fitted(evidence: Evidence, **settings: Any) -> FittedStrip:
    filter_ = Strip(**settings).fit(evidence)
    assert isinstance(filter_, FittedStrip), filter_.reason
    return filter_


def refused(evidence: Evidence, **settings: Any) -> Finding:
    finding = Strip(**settings).fit(evidence)
    assert isinstance(finding, Finding)
    assert (finding.defense, finding.kind, finding.result) == ("strip", "filter", None)
    assert finding.settings == {"overlays": 100, "superimposition": "add", "false_rejection_rate": 0.01, **settings}
    return finding


def scores(filter_: FittedStrip, x: Any) -> Any:
    return np.array(filter_.decide(x).scores, dtype=np.float64)


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("superimposition", ["add", "blend"])
def test_decide_gives_the_mean_entropy_over_all_overlays(superimposition: str) -> None:
    evidence = evidence_of(network(backdoored=False), CLEAN)
    filter_ = fitted(evidence, superimposition=superimposition, overlays=7)
    overlays, x = filter_.overlays.pixels, STRANGERS.pixels[:3]
    assert overlays.shape == (7, 3, 8, 8)
    weight = np.float32(0.5 if superimposition == "blend" else 1)
    expected = [
        mean_entropies(np.stack([evidence.session.logits(weight * (x[[i]] + o)) for o in overlays], axis=1))[0]
        for i in range(3)
    ]
    assert scores(filter_, x) == pytest.approx(expected, abs=1e-6)


def test_add_gives_the_session_sums_above_1_without_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = evidence_of(network(backdoored=False), CLEAN)
    filter_ = fitted(evidence)
    seen: list[float] = []

    def spy(x: Any) -> Logits:
        seen.append(float(x.max()))
        return np.zeros((len(x), CLASSES), np.float32)

    monkeypatch.setattr(evidence.session, "logits", spy)
    filter_.decide(stamp(STRANGERS.pixels[:1]))
    assert max(seen) == pytest.approx(1 + filter_.overlays.pixels[:, :, -2:, -2:].max())
    assert max(seen) > 1.1


def test_fit_sets_the_boundary_on_one_part_and_measures_it_on_another() -> None:
    filter_ = fitted(evidence_of(network(backdoored=False), CLEAN))
    boundary = filter_.boundary
    assert (boundary.fitted_on, len(boundary.held_out_scores), len(filter_.overlays.pixels)) == (100, 100, 100)
    everything = scores(filter_, CLEAN.pixels)
    held_out = np.array(boundary.held_out_scores)
    assert np.isin(held_out.round(6), everything.round(6)).all()
    rejected = int((held_out < boundary.value).sum())
    assert boundary.measured_frr == rejected / 100
    assert boundary.frr_interval == wilson_interval(rejected, 100)
    assert boundary.nominal_frr == 0.01
    assert boundary.value == pytest.approx(boundary.mean - 2.3263478740408408 * boundary.sd)
    assert boundary.can_reject
    assert boundary.null_rate == boundary.frr_interval[1]


def test_fit_leaves_the_held_out_part_out_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(entropies: Any, rate: float) -> tuple[float, float, float]:
        seen.append(entropies)
        return normal_boundary(entropies, rate)

    monkeypatch.setattr("qdefense.defenses.filters.strip.normal_boundary", spy)
    boundary = fitted(evidence_of(network(backdoored=False), CLEAN)).boundary
    (used,) = seen
    assert len(used) == 100
    assert set(used.tolist()).isdisjoint(boundary.held_out_scores)


def test_fit_cuts_large_sets_at_500_images_a_part() -> None:
    boundary = fitted(evidence_of(network(backdoored=False), images(1200)), overlays=2).boundary
    assert (boundary.fitted_on, len(boundary.held_out_scores)) == (500, 500)


def test_a_higher_false_rejection_rate_rejects_more() -> None:
    evidence = evidence_of(network(backdoored=False), CLEAN)
    low, high = (fitted(evidence, false_rejection_rate=rate).boundary for rate in (0.01, 0.2))
    assert low.held_out_scores == high.held_out_scores
    assert low.value < high.value
    assert low.measured_frr < high.measured_frr


# --- power, level, vacuity --------------------------------------------------------------------------------------------


def test_strip_rejects_triggered_inputs_and_accepts_clean_ones() -> None:
    filter_ = fitted(evidence_of(network(backdoored=True), CLEAN))
    triggered = filter_.decide(stamp(STRANGERS.pixels))
    clean = filter_.decide(STRANGERS.pixels)
    assert set(triggered.decisions) == {"reject"}
    assert clean.decisions.count("reject") <= 4
    assert auroc(-scores(filter_, stamp(STRANGERS.pixels)), -scores(filter_, STRANGERS.pixels)) == 1.0
    assert (clean.boundary, clean.test) == (filter_.boundary, None)


def test_strip_takes_the_same_inputs_for_clean_on_the_clean_twin() -> None:
    filter_ = fitted(evidence_of(network(backdoored=False), CLEAN))
    stamped, clean = scores(filter_, stamp(STRANGERS.pixels)), scores(filter_, STRANGERS.pixels)
    assert (stamped < filter_.boundary.value).sum() <= 4
    assert 0.3 < auroc(-stamped, -clean) < 0.7


def test_strip_sees_nothing_when_the_answers_belong_to_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vacuity: the same logits, shuffled among all rows of a block, carry no signal of any one input."""
    evidence = evidence_of(network(backdoored=True), CLEAN)
    filter_ = fitted(evidence)
    x = np.concatenate([stamp(STRANGERS.pixels[:40]), STRANGERS.pixels[40:]])
    mixed = np.random.default_rng(0).permutation(len(x))
    true, rng, logits = scores(filter_, x[mixed]), np.random.default_rng(1), evidence.session.logits
    monkeypatch.setattr(evidence.session, "logits", lambda rows: rng.permutation(logits(rows)))
    shuffled, planted = scores(filter_, x[mixed]), mixed < 40
    assert auroc(-true[planted], -true[~planted]) == 1.0
    assert auroc(-shuffled[planted], -shuffled[~planted]) < 0.75


@dataclass(frozen=True)
class Planted:
    """The attacked network of `small_files` in one form, images to fit on, and inputs without and with the trigger."""

    evidence: Evidence
    clean: Pixels
    stamped: Pixels

    def auroc(self, superimposition: str) -> float:
        filter_ = fitted(self.evidence, superimposition=superimposition)
        return auroc(-scores(filter_, self.stamped), -scores(filter_, self.clean))


@pytest.fixture(name="planted")
def _planted(small_files: dict[str, bytes], small_signs: SmallSigns) -> Callable[[str], Planted]:
    trigger = ATTACKS.create("badnets:size=2,target-class=7").trigger(16, 16)
    inputs = small_signs.test.take(np.arange(300, 400))
    clean = inputs.take(np.flatnonzero(inputs.labels != 7)).pixels

    def plant(form: str) -> Planted:
        evidence = evidence_of(small_files[form], small_signs.test.take(np.arange(300)), threads=2)
        return Planted(evidence, clean, trigger.stamp(clean))

    return plant


@pytest.mark.parametrize("form", ["second", "second.int8-dynamic"])
def test_strip_tells_badnets_inputs_from_clean_ones(planted: Callable[[str], Planted], form: str) -> None:
    attacked = planted(form)
    assert attacked.auroc("add") >= 0.9
    assert fitted(attacked.evidence).boundary.note is None


def test_strip_loses_on_static_int8_what_the_input_quantizer_cuts_and_says_so(
    planted: Callable[[str], Planted],
) -> None:
    """The cause, not only the loss: cutting every sum at 1 changes no score; averages are spared, and lose nothing."""
    attacked = planted("second.int8-static")
    filter_ = fitted(attacked.evidence)
    logits, overlays, x = attacked.evidence.session.logits, filter_.overlays.pixels, attacked.stamped[:5]
    cut = [mean_entropies(logits(np.minimum(image + overlays, 1))[np.newaxis])[0] for image in x]
    assert scores(filter_, x).tolist() == cut
    assert filter_.boundary.note == (
        "the file cuts pixels at 1, where a bright trigger drowns among bright overlays: triggered inputs may pass"
    )
    assert fitted(attacked.evidence, superimposition="blend").boundary.note is None
    assert abs(attacked.auroc("blend") - planted("second").auroc("blend")) <= 0.05


def test_strip_takes_the_trigger_for_a_clean_input_on_the_clean_network(planted: Callable[[str], Planted]) -> None:
    assert 0.4 <= planted("first").auroc("add") <= 0.65


# --- the file decides how its pixels and answers are read -------------------------------------------------------------


@pytest.mark.parametrize("head", ["softmax", "log-softmax"])
def test_strip_gives_the_same_scores_whatever_the_head(head: str) -> None:
    plain, other = (
        fitted(evidence_of(network(backdoored=True, head=one), CLEAN), overlays=5) for one in ("logits", head)
    )
    assert scores(plain, STRANGERS.pixels) == pytest.approx(scores(other, STRANGERS.pixels), abs=1e-5)
    assert plain.boundary.value == pytest.approx(other.boundary.value, abs=1e-5)


def test_strip_lets_a_uint8_file_cut_the_sum_at_255() -> None:
    filter_ = fitted(evidence_of(network(backdoored=True, dtype="uint8"), CLEAN))
    assert set(filter_.decide(stamp(STRANGERS.pixels)).decisions) == {"reject"}
    assert filter_.decide(STRANGERS.pixels).decisions.count("reject") <= 4
    white = np.ones((1, 3, 8, 8), np.float32)
    logits = filter_.overlays.session.logits
    assert np.array_equal(logits(white + filter_.overlays.pixels[:1]), logits(white))
    bright = replace(CLEAN, images=CLEAN.images + np.uint8(100))
    assert fitted(evidence_of(network(backdoored=False, dtype="uint8"), bright)).boundary.note is not None
    assert fitted(evidence_of(network(backdoored=False), bright)).boundary.note is None


def quantized_input(data: bytes, low: float, high: float) -> bytes:
    """The file as static INT8 reads its input: one scale of 8 bits from ``low`` to ``high`` for all channels."""
    model = onnx.load_from_string(data)
    scale = np.float32((high - low) / 255)
    model.graph.node[0].input[0] = "read"
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["read"]),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    zero = np.uint8(round(-low / scale))
    model.graph.initializer.extend([numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(zero, "zero")])
    written: bytes = model.SerializeToString()
    return written


def test_strip_says_that_a_static_int8_file_cuts_each_channel_at_another_place() -> None:
    """One scale for three channels: the smallest deviation sets the range, which whites of the others do not fill."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    bright = replace(CLEAN, images=CLEAN.images + np.uint8(100))
    plain = network(backdoored=False, scale=3.0, mean=mean, std=std)
    static = evidence_of(quantized_input(plain, -mean[0] / std[0], (1 - mean[2]) / std[2]), bright)
    sums = bright.pixels[:50] + bright.pixels[50:100]
    whole, at_109, at_1 = (static.session.logits(np.minimum(sums, np.float32(level))) for level in (2, 1.1, 1))
    assert np.array_equal(whole, at_109)
    assert not np.array_equal(whole, at_1)
    note = fitted(static, overlays=20).boundary.note
    assert note is not None
    assert re.fullmatch(r"the file cuts pixels at 1\.\d\d or below, where a bright trigger drowns among .*", note)
    assert fitted(static, superimposition="blend", overlays=20).boundary.note is None
    assert fitted(evidence_of(plain, bright), overlays=20).boundary.note is None
    given = replace(bright, images=bright.images - np.uint8(1)).without_labels()
    finding = judge_inputs(Strip(overlays=20), replace(static, inputs=given))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.endswith("; ask --defense strip:superimposition=blend")


@pytest.mark.parametrize("seed", range(4))
def test_fit_sees_the_cut_whatever_image_comes_first(seed: int) -> None:
    """Of an image that is black, and of overlays that are dark, no sum is above 1."""
    mixed = images(200)
    mixed.images[::2] //= 8
    mixed.images[1::2, 3, 3] = 200
    evidence = replace(evidence_of(network(backdoored=False, dtype="uint8"), mixed), seed=seed)
    assert fitted(evidence, overlays=1).boundary.note is not None


def test_strip_keeps_the_batch_of_a_file_whose_rows_share_a_scale() -> None:
    data = quantize(network(backdoored=False), "int8-dynamic")
    evidence = evidence_of(data, CLEAN)
    assert evidence.session.artifact.batch_coupled
    assert evidence.session.profile.batch == 1
    filter_ = fitted(evidence, overlays=5)
    assert np.array_equal(scores(filter_, STRANGERS.pixels)[7:9], scores(filter_, STRANGERS.pixels[7:9]))


def test_strip_lets_no_input_share_a_scale_with_another() -> None:
    """Where such a file is run in batches, a batch holds one input only: a neighbour would move its score."""
    data = quantize(network(backdoored=False), "int8-dynamic")
    filter_ = fitted(evidence_of(data, CLEAN, profile=SessionProfile(batch=64)), overlays=5)
    x = STRANGERS.pixels
    beside_white = np.concatenate([x[:1], np.ones_like(x[:1])])
    assert scores(filter_, beside_white)[0] == scores(filter_, x[:2])[0] == scores(filter_, x[:1])[0]


def test_strip_fills_the_batch_of_a_file_that_fixes_it() -> None:
    evidence = evidence_of(network(backdoored=True), CLEAN)
    counted = fitted(evidence, overlays=20)
    before = evidence.session.forwards
    counted.decide(STRANGERS.pixels)
    assert evidence.session.forwards - before == 80 * 20


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backdoored", [True, False])
def test_strip_gives_the_same_bits_for_any_number_of_threads(backdoored: bool) -> None:
    evidence = evidence_of(network(backdoored=backdoored), CLEAN)
    one, four = (fitted(replace(evidence, threads=threads)) for threads in (1, 4))
    assert one.boundary == four.boundary
    assert one.decide(STRANGERS.pixels) == four.decide(STRANGERS.pixels)


def test_strip_draws_overlays_by_the_seed() -> None:
    evidence = evidence_of(network(backdoored=False), CLEAN)
    same, again, other = (fitted(replace(evidence, seed=seed)) for seed in (3, 3, 4))
    assert same.boundary == again.boundary
    assert same.boundary.value != other.boundary.value
    assert not np.array_equal(same.overlays.pixels, other.overlays.pixels)


def test_fit_reports_its_progress_in_images() -> None:
    told: list[tuple[str, int, int]] = []
    evidence = evidence_of(network(backdoored=False), CLEAN, progress=lambda *step: told.append(step))
    fitted(evidence, overlays=5)
    assert told[0] == ("strip: clean images", 0, 294)
    assert told[-1] == ("strip: clean images", 294, 294)


# --- what cannot be fitted --------------------------------------------------------------------------------------------


def test_fit_is_not_applicable_when_the_head_is_a_sigmoid() -> None:
    finding = refused(evidence_of(network(backdoored=False, head="sigmoid"), CLEAN))
    assert finding.verdict is Verdict.NOT_APPLICABLE
    assert finding.reason == (
        "the file answers with a sigmoid per class: its answers are no distribution over classes, and have no entropy"
    )
    assert finding.cost.forwards == 0


@pytest.mark.parametrize(("count", "fits"), [(200, True), (199, False)])
def test_fit_needs_200_images_for_100_overlays(count: int, fits: bool) -> None:
    evidence = evidence_of(network(backdoored=False), images(count))
    if fits:
        fitted(evidence)
        return
    finding = refused(evidence)
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == (
        "199 clean images; at least 200 are needed: 100 overlays, 50 to fit the boundary and 50 to measure its false "
        "rejections"
    )
    assert finding.cost.forwards == 0


def test_fit_is_not_measured_when_groups_leave_a_part_too_small() -> None:
    groups = np.zeros(300, dtype=np.int64)
    groups[:20] = np.arange(1, 21)
    finding = refused(evidence_of(network(backdoored=False), replace(CLEAN, groups=groups)))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.endswith(
        "are needed: images that show the same thing stay together, so give more clean images"
    )


def test_fit_is_not_measured_when_unlabelled_images_have_no_stated_accuracy() -> None:
    guesses = replace(CLEAN, labelled=False)
    finding = refused(evidence_of(network(backdoored=False), guesses))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == (
        "the images have no labels, so the clean accuracy was not measured; give labelled images, or vouch for it with "
        "--expected-accuracy"
    )
    fitted(evidence_of(network(backdoored=False), guesses, stated_accuracy=0.9))
    low = refused(evidence_of(network(backdoored=False), guesses, stated_accuracy=0.3))
    assert low.reason.startswith("clean accuracy 30.0% is near chance (25.0%)")


def test_fit_is_not_measured_when_the_accuracy_is_near_chance() -> None:
    wrong = replace(CLEAN, labels=np.random.default_rng(0).permutation(CLEAN.labels))
    finding = refused(evidence_of(network(backdoored=False), wrong))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.endswith("is near chance (25.0%): wrong labels, order or pixels?")


def test_fit_is_not_measured_when_one_class_alone_gives_the_accuracy() -> None:
    """A model that always says class 0 is right on 60 % of images of which 60 % are of class 0, and knows nothing."""
    labels = np.where(np.arange(300) % 5 < 3, 0, CLEAN.labels)
    finding = refused(evidence_of(network(backdoored=False, scale=0.0), replace(CLEAN, labels=labels)))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert re.fullmatch(
        r"clean accuracy \d\d\.\d% is little more than answering the commonest class alone gives \(\d\d\.\d%\): give "
        "images of all classes",
        finding.reason,
    )


def test_fit_is_not_measured_when_the_model_answers_everything_alike() -> None:
    """A constant model: accuracy is checked first, so somebody vouches for it."""
    constant = replace(CLEAN, labels=np.zeros(300, dtype=np.int64), labelled=False)
    finding = refused(evidence_of(network(backdoored=False, scale=0.0), constant, stated_accuracy=0.9))
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason == (
        "the entropies of the 100 images do not differ (all 2 bits), so that no boundary can be fitted"
    )


@pytest.mark.parametrize(("bad", "reason"), [
    (0.0, "the session's logits on clean images are not finite (NaN or infinite weights?)"),
    (0.46, "the session's logits on 200 of 200 clean images with overlays are not finite"),
])  # fmt: skip
def test_fit_is_not_measured_when_logits_are_not_finite(
    monkeypatch: pytest.MonkeyPatch, bad: float, reason: str
) -> None:
    """On the images themselves, or only where pixels are brighter than any image's."""
    evidence = evidence_of(network(backdoored=False), CLEAN)
    logits = evidence.session.logits

    def broken(x: Any, **_: Any) -> Logits:
        return np.where(x.max(axis=(1, 2, 3))[:, None] > bad, np.nan, logits(x)).astype(np.float32)

    monkeypatch.setattr(evidence.session, "logits", broken)
    finding = refused(evidence)
    assert (finding.verdict, finding.reason) == (Verdict.NOT_MEASURED, reason)


def test_decide_accepts_no_input_whose_logits_are_not_finite() -> None:
    filter_ = fitted(evidence_of(network(backdoored=False), CLEAN), overlays=5)
    x = STRANGERS.pixels[:3].copy()
    x[1, 0, 0, 0] = np.nan
    result = filter_.decide(x)
    assert result.decisions == ("accept", "unmeasured", "accept")
    assert result.scores[1] is None


def test_decide_gives_nothing_for_no_input() -> None:
    result = fitted(evidence_of(network(backdoored=False), CLEAN), overlays=5).decide(STRANGERS.pixels[:0])
    assert (result.decisions, result.scores) == ((), ())


@pytest.mark.parametrize("spec", [
    "strip:overlays=0", "strip:false-rejection-rate=0", "strip:false-rejection-rate=0.5", "strip:superimposition=mix",
    "strip:alpha=1",
])  # fmt: skip
def test_strip_refuses_settings_out_of_range(spec: str) -> None:
    with pytest.raises(SpecError):
        DEFENSES.create(spec)


def test_strip_is_registered_with_the_papers_defaults() -> None:
    made = DEFENSES.create("strip")
    assert isinstance(made, Strip)
    assert (made.overlays, made.superimposition, made.false_rejection_rate) == (100, "add", 0.01)
    assert isinstance(CLEAN, ImageSet)
