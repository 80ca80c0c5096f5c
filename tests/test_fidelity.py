from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from qdefense import fidelity
from qdefense.artifact import Artifact
from qdefense.converters.shadow import Shadow, build_shadow, runtime_saturation
from qdefense.data.images import ImageSet, Pixels, on_grid
from qdefense.fidelity import (
    FidelityCertificate,
    certify,
    check_gradients,
    compare_logits,
    finite_or_none,
    input_gradients,
    shadow_logits,
    uncertified,
)
from qdefense.session import DeployedSession, Logits, profile_for

NAMES = ("first", "first.int8-static", "first.int8-dynamic", "second", "second.int8-static", "second.int8-dynamic")
SETS = ["clean", "uniform", "gradient-steps", "stamped"]


class _Recorder(DeployedSession):
    """Keeps what was asked and answered."""

    def __init__(self, data: bytes) -> None:
        artifact = Artifact.from_bytes(data)
        super().__init__(artifact, profile_for(artifact))
        self.seen: list[tuple[Pixels, Logits]] = []

    def logits(self, x: Pixels) -> Logits:
        found = super().logits(x)
        self.seen.append((x, found))
        return found


class _Altered(nn.Module):
    """A shadow with the same values and other gradients: their factor is 0 for none at all."""

    def __init__(self, shadow: Shadow, factor: float) -> None:
        super().__init__()
        self.shadow, self.factor = shadow, factor
        self.source, self.is_quantized = shadow.source, shadow.is_quantized

    def forward(self, x: Tensor, **keywords: bool) -> Tensor:
        y: Tensor = self.shadow(x, **keywords)
        return y.detach() + self.factor * (y - y.detach()) if self.factor else y.detach()

    def to_double(self) -> _Altered:
        return _Altered(self.shadow.to_double(), self.factor)


@pytest.fixture(scope="module")
def certified(small_files: dict[str, bytes], small_signs: Any) -> dict[str, tuple[_Recorder, FidelityCertificate]]:
    """Every small file with its certificate, and what its session was asked for it."""
    found = {}
    for name in NAMES:
        session = _Recorder(small_files[name])
        shadow = build_shadow(small_files[name], source="optimized")
        found[name] = session, certify(session, shadow, small_signs.test, seed=0)
    return found


@pytest.fixture
def clean(small_signs: Any) -> ImageSet:
    images: ImageSet = small_signs.test
    return images


def _changed(data: bytes, operator: str, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """The file with the weights of the last ``operator`` replaced."""
    model = onnx.load_from_string(data)
    wanted = next(node for node in reversed(model.graph.node) if node.op_type == operator).input[1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == wanted)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), wanted))
    return bytes(model.SerializeToString())


def test_pass_marks_are_the_design_page_s() -> None:
    marks = (
        fidelity.MIN_ROWS,
        fidelity.MIN_TOP1_AGREEMENT,
        fidelity.MAX_RELATIVE_RMS,
        fidelity.MIN_GRADIENT_ROWS,
        fidelity.GRADIENT_STEPS,
    )
    assert marks == (256, 0.995, 0.05, 0.99, (4, 8, 16))


@pytest.mark.parametrize("name", NAMES)
def test_certify_passes_when_the_shadow_is_that_of_the_file(
    certified: dict[str, tuple[_Recorder, FidelityCertificate]], name: str
) -> None:
    _, certificate = certified[name]
    assert certificate.certified
    assert certificate.reason == "all four input sets and the gradient checks pass"
    assert [(entry.name, entry.n, entry.passes) for entry in certificate.sets] == [(name, 256, True) for name in SETS]
    assert (certificate.source, certificate.cause) == ("optimized", None)
    assert certificate.gradients is not None
    assert certificate.gradients.rows == 256
    assert min(certificate.gradients.finite_rows, certificate.gradients.nonzero_rows) >= 0.99


@pytest.mark.parametrize("name", ["first", "second"])
def test_certify_finds_every_row_of_static_int8_bit_exact(
    certified: dict[str, tuple[_Recorder, FidelityCertificate]], name: str
) -> None:
    _, certificate = certified[f"{name}.int8-static"]
    assert [entry.bit_exact_rows for entry in certificate.sets] == [1.0] * 4
    assert [entry.max_abs_logit_diff for entry in certificate.sets] == [0.0] * 4
    assert certificate.gradients is not None
    assert certificate.gradients.directional_rows is None


@pytest.mark.parametrize("name", ["first", "second"])
def test_certify_finds_fp32_within_a_hundred_thousandth_of_the_largest_logit(
    certified: dict[str, tuple[_Recorder, FidelityCertificate]], name: str
) -> None:
    session, certificate = certified[name]
    for entry, (_, logits) in zip(certificate.sets, session.seen, strict=True):
        assert entry.max_abs_logit_diff is not None
        assert entry.max_abs_logit_diff <= 1e-5 * np.abs(logits).max(), entry.name
    assert certificate.gradients is not None
    assert certificate.gradients.directional_rows == 1.0


@pytest.mark.parametrize("name", ["first", "second"])
def test_certify_finds_dynamic_int8_of_one_mind_at_batch_1(
    certified: dict[str, tuple[_Recorder, FidelityCertificate]], name: str
) -> None:
    session, certificate = certified[f"{name}.int8-dynamic"]
    assert session.profile.batch == 1
    assert [entry.top1_agreement for entry in certificate.sets] == [1.0] * 4


@pytest.mark.parametrize("name", NAMES[:3])
def test_certify_asks_the_session_for_the_four_sets_of_the_design_page(
    certified: dict[str, tuple[_Recorder, FidelityCertificate]], clean: ImageSet, name: str
) -> None:
    session, _ = certified[name]
    assert len(session.seen) == 4
    (still, uniform, stepped, stamped) = (x for x, _ in session.seen)
    for x in (still, uniform, stepped, stamped):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(on_grid(x), x)
    known = {image.tobytes() for image in clean.pixels}
    assert len({image.tobytes() for image in still} & known) == 256
    assert abs(float(uniform.mean()) - 0.5) < 0.01
    assert float(uniform.min()) == 0.0
    assert float(uniform.max()) == 1.0

    moved = np.rint(255 * np.abs(stepped - still))
    largest = moved.max(axis=(1, 2, 3))
    assert set(largest.tolist()) == {4.0, 8.0, 16.0}
    assert float(moved.max()) <= 16
    free = (still > 16.5 / 255) & (still < 238.5 / 255) & (moved > 0)
    assert (moved == np.broadcast_to(largest[:, None, None, None], moved.shape))[free].all()
    assert float((moved > 0).mean()) > 0.5

    changed = (stamped != still).any(axis=1)
    assert changed.any(axis=(1, 2)).all()
    assert {int(rows.sum()) <= 64 for rows in changed[:128]} == {True}
    assert float(changed[128:].mean()) > 0.9
    assert float(np.abs(stamped[128:] - still[128:]).max()) <= 0.2 + 1 / 255


def test_certify_steps_raise_the_random_class(
    small_files: dict[str, bytes], certified: dict[str, tuple[_Recorder, FidelityCertificate]]
) -> None:
    shadow = build_shadow(small_files["first"], source="optimized")
    (still, _), _, (stepped, _), _ = certified["first"][0].seen
    lost = (shadow_logits(shadow, still).argmax(1) != shadow_logits(shadow, stepped).argmax(1)).mean()
    noise = on_grid(np.clip(still + np.sign(np.random.default_rng(0).standard_normal(still.shape)) * 8 / 255, 0, 1))
    assert lost > 2 * (shadow_logits(shadow, still).argmax(1) != shadow_logits(shadow, noise).argmax(1)).mean()


def test_certify_repeats_itself_by_seed(small_files: dict[str, bytes], clean: ImageSet) -> None:
    runs = []
    for seed in (5, 5, 6):
        session = _Recorder(small_files["first.int8-static"])
        shadow = build_shadow(small_files["first.int8-static"], source="optimized")
        runs.append((certify(session, shadow, clean, seed=seed), [x.tobytes() for x, _ in session.seen]))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


def test_certify_refuses_when_there_are_255_images(small_files: dict[str, bytes], clean: ImageSet) -> None:
    session = _Recorder(small_files["first"])
    shadow = build_shadow(small_files["first"], source="shipped")
    certificate = certify(session, shadow, clean.take(np.arange(255)), seed=0)
    assert not certificate.certified
    assert certificate.reason == "255 clean images; the certificate needs 256"
    assert (certificate.source, certificate.sets, session.forwards) == ("shipped", (), 0)
    assert certify(session, shadow, clean.take(np.arange(256)), seed=0).certified


def _refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


def test_certify_refuses_and_stays_valid_json_when_a_weight_is_nan(
    small_files: dict[str, bytes], clean: ImageSet
) -> None:
    def poke(weights: np.ndarray) -> np.ndarray:
        weights.flat[0] = np.nan
        return weights

    data = _changed(small_files["first"], "Gemm", poke)
    certificate = certify(_Recorder(data), build_shadow(data, source="optimized"), clean, seed=0)
    assert not certificate.certified
    assert certificate.reason == (
        "clean images: top-1 agreement 0.0000, RMS difference not finite; cause: numerics, "
        "the session's own logits are not finite, as are the weights 'classifier.weight'"
    )
    assert certificate.cause is not None
    assert certificate.cause.layers == ("classifier.weight",)
    read = json.loads(certificate.model_dump_json(), parse_constant=_refuse_constant)
    assert [entry["rms_logit_diff"] for entry in read["sets"]] == [None] * 4
    assert [entry["relative_rms"] for entry in read["sets"]] == [None] * 4
    assert FidelityCertificate.model_validate(read) == certificate


@pytest.mark.parametrize("name", NAMES[:3])
def test_certify_refuses_for_the_gradients_alone_when_they_are_cut(
    small_files: dict[str, bytes], clean: ImageSet, name: str
) -> None:
    shadow = _Altered(build_shadow(small_files[name], source="optimized"), 0.0)
    certificate = certify(_Recorder(small_files[name]), shadow, clean, seed=0)  # type: ignore[arg-type]
    assert all(entry.passes for entry in certificate.sets)
    assert not certificate.certified
    assert certificate.gradients is not None
    assert (certificate.gradients.nonzero_rows, certificate.gradients.finite_rows) == (0.0, 1.0)
    assert certificate.reason.startswith("gradients: 0.0% of rows non-zero, 100.0% finite")
    assert certificate.cause is None


@pytest.mark.parametrize("factor", [1.01, -1.0])
def test_certify_refuses_a_float_graph_when_its_gradient_is_wrong(
    small_files: dict[str, bytes], clean: ImageSet, factor: float
) -> None:
    shadow = _Altered(build_shadow(small_files["first"], source="optimized"), factor)
    certificate = certify(_Recorder(small_files["first"]), shadow, clean, seed=0)  # type: ignore[arg-type]
    assert all(entry.passes for entry in certificate.sets)
    assert not certificate.certified
    assert certificate.gradients is not None
    assert (certificate.gradients.nonzero_rows, certificate.gradients.finite_rows) == (1.0, 1.0)
    assert certificate.gradients.directional_rows is not None
    assert certificate.gradients.directional_rows < 0.5  # a direction across the gradient sees no factor
    assert "right in float64" in certificate.reason


def test_check_gradients_counts_rows_when_a_gradient_is_not_finite(
    small_files: dict[str, bytes], clean: ImageSet
) -> None:
    shadow = _Altered(build_shadow(small_files["first.int8-static"], source="optimized"), float("inf"))
    found = check_gradients(shadow, clean.pixels[:64], np.random.default_rng(0))  # type: ignore[arg-type]
    assert not found.passes
    assert found.finite_rows < 0.5


def test_certify_passes_when_the_network_is_too_sure_for_float32(
    small_files: dict[str, bytes], clean: ImageSet
) -> None:
    data = _changed(small_files["first"], "Gemm", lambda weights: weights * np.float32(30))
    session, shadow = _Recorder(data), build_shadow(data, source="optimized")
    certificate = certify(session, shadow, clean, seed=0)
    own = session.seen[0][1].argmax(axis=1)
    gradient = input_gradients(shadow, session.seen[0][0], own)
    dead = (gradient == 0).all(axis=(1, 2, 3)).mean()
    assert dead > 0.1, "the network is not sure enough for this test"
    assert certificate.certified, certificate.reason


def test_certify_works_on_images_smaller_than_a_patch(make_noise: Callable[..., ImageSet]) -> None:
    pixels = make_noise(256, size=4).pixels
    stamped = fidelity._stamp_at_random(pixels, np.random.default_rng(0))
    assert (stamped != pixels).any(axis=(1, 2, 3)).all()


def test_input_gradients_are_zero_when_the_output_ignores_the_input(clean: ImageSet) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), 4, requires_grad=True) * 1.0

    found = input_gradients(Constant(), clean.pixels[:3], np.zeros(3, dtype=np.int64))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, np.zeros((3, 3, 16, 16)))


def test_input_gradients_are_those_of_the_log_probability(small_files: dict[str, bytes], clean: ImageSet) -> None:
    shadow = build_shadow(small_files["first"], source="optimized")
    x = torch.from_numpy(clean.pixels[:70]).requires_grad_()
    targets = np.arange(70) % 12
    chosen = torch.log_softmax(shadow(x), 1)[torch.arange(70), torch.from_numpy(targets)]
    (expected,) = torch.autograd.grad(chosen.sum(), x)
    np.testing.assert_allclose(input_gradients(shadow, clean.pixels[:70], targets), expected, atol=1e-4)


def test_compare_logits_by_hand() -> None:
    session = np.array([[0, 2], [4, 2]], dtype=np.float32)
    shadow = np.array([[0, 2], [1, 2]], dtype=np.float32)
    found = compare_logits(session, shadow)
    assert (found.n, found.top1_agreement, found.max_abs, found.mean_abs) == (2, 0.5, 3.0, 0.75)
    assert found.rms == 1.5
    assert found.relative_rms == pytest.approx(1.5 / np.sqrt(2))  # 0, 2, 4, 2 have the variance 2
    assert found.bit_exact_rows == 0.5
    assert not found.passes
    assert found.summary == "top-1 agreement 0.5000, RMS difference 106.07% of the logits' spread"


def test_compare_logits_counts_rows_without_numbers_for_no_more_than_they_are() -> None:
    session = np.array([[0, 2], [4, 2], [np.nan, 2], [1, 0]], dtype=np.float32)
    shadow = np.array([[0, 2], [4, 2], [0, 2], [1, np.inf]], dtype=np.float32)
    found = compare_logits(session, shadow)
    assert (found.top1_agreement, found.bit_exact_rows, found.not_finite_rows) == (0.5, 0.5, 2)
    assert found.relative_rms == np.inf
    assert not found.passes
    assert found.summary == "2 of 4 rows have values that are not finite"


@pytest.mark.parametrize(
    ("agreeing", "offset", "passes"), [(995, 0.0, True), (994, 0.0, False), (1000, 0.049, True), (1000, 0.051, False)]
)
def test_compare_logits_passes_up_to_the_marks(agreeing: int, offset: float, *, passes: bool) -> None:
    session = np.tile(np.array([[-1, 1]], dtype=np.float64), (1000, 1))
    session[0::2] *= -1  # standard deviation 1
    shadow = session + offset
    shadow[agreeing:] = 0.99 * shadow[agreeing:, ::-1] if offset else shadow[agreeing:]
    if agreeing < 1000:
        session[agreeing:] = [0.0, 0.01]
        shadow[agreeing:] = [0.01, 0.0]
    found = compare_logits(session.astype(np.float32), shadow.astype(np.float32))
    assert found.top1_agreement == pytest.approx(agreeing / 1000)
    assert found.passes is passes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_compare_logits_never_passes_when_a_value_is_not_finite(bad: float, side: int) -> None:
    pair = [np.ones((4, 3), dtype=np.float32), np.ones((4, 3), dtype=np.float32)]
    pair[side][2, 1] = bad
    found = compare_logits(*pair)
    assert (found.top1_agreement, found.bit_exact_rows, found.rms) == (0.75, 0.75, np.inf)
    assert not found.passes


def test_compare_logits_of_a_constant_session() -> None:
    session = np.ones((4, 3), dtype=np.float32)
    assert compare_logits(session, session).passes
    found = compare_logits(session, session + np.float32(1e-3))
    assert found.relative_rms == np.inf
    assert not found.passes


def test_finite_or_none() -> None:
    assert [finite_or_none(value) for value in (1.5, float("nan"), float("inf"))] == [1.5, None, None]


def test_shadow_logits_are_the_same_in_one_piece_and_in_chunks(small_files: dict[str, bytes], clean: ImageSet) -> None:
    shadow = build_shadow(small_files["first.int8-dynamic"], source="optimized")
    whole = shadow_logits(shadow, clean.pixels[:130])
    assert whole.shape == (130, 12)
    np.testing.assert_array_equal(whole[65:70], shadow_logits(shadow, clean.pixels[65:70]))


def test_uncertified_says_why() -> None:
    certificate = uncertified("no shadow")
    assert (certificate.certified, certificate.reason, certificate.cause) == (False, "no shadow", None)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arithmetic", "emulated"), [("as-run", True), ("exact", False)])
def test_certify_emulates_saturation_only_where_the_session_saturates(
    toy_forms: Any, monkeypatch: pytest.MonkeyPatch, arithmetic: str, emulated: bool
) -> None:
    monkeypatch.setattr("qdefense.converters.shadow.runtime_saturation", lambda: frozenset({"QGemm"}))
    artifact = Artifact.from_bytes(toy_forms.static)
    session = DeployedSession(artifact, profile_for(artifact).with_changes(arithmetic=arithmetic))
    shadow = build_shadow(artifact.data, source="optimized", contract=artifact.contract, options=session.profile)
    certificate = certify(session, shadow, toy_forms.images, seed=0)
    assert certificate.saturation_emulated is emulated


@pytest.mark.parametrize("arithmetic", ["as-run", "exact"])
def test_certificate_compares_both_arithmetics_on_its_own_images(
    toy_forms: Any, make_noise: Any, arithmetic: str
) -> None:
    artifact = Artifact.from_bytes(toy_forms.static)
    session = DeployedSession(artifact, profile_for(artifact).with_changes(arithmetic=arithmetic))
    shadow = build_shadow(artifact.data, source="optimized", contract=artifact.contract, options=session.profile)
    certificate = certify(session, shadow, make_noise(256, size=16, classes=8), seed=0)
    found = certificate.arithmetic
    assert found is not None
    assert (found.used, found.n, found.forwards) == (arithmetic, 1024, 1024)
    assert found.mixed_products >= 2
    assert session.forwards == 1024
    if not runtime_saturation():
        assert found.bit_exact
    if arithmetic == "exact":
        assert all(entry.bit_exact_rows == 1.0 for entry in certificate.sets)
