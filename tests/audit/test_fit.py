from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qdefense.audit.fit import fit_images, labelled_by, once_each, resize_for
from qdefense.converters.contract import InputContract
from qdefense.data.images import DataError, ImageSet
from qdefense.data.resizing import Resize

NAMES = ("ant", "bee", "cat", "dog")


def contract(**changes: Any) -> InputContract:
    body = {"input_name": "x", "output_name": "y", "height": 8, "width": 8, "class_names": NAMES, "source": "options"}
    return InputContract.model_validate({**body, **changes})


@pytest.fixture
def images(make_noise: Callable[..., ImageSet]) -> ImageSet:
    return replace(make_noise(8), class_names=NAMES)


def unlabelled(images: ImageSet) -> ImageSet:
    return replace(images, labels=np.full(len(images), -1, dtype=np.int64), class_names=(), labelled=False)


@pytest.mark.parametrize("rule", ["nearest", "bilinear", "bicubic", "crop"])
def test_resize_for_leads_to_the_files_size_by_the_stated_rule(rule: Any) -> None:
    assert resize_for(contract(resize=rule, width=6)) == Resize(rule=rule, height=8, width=6)


def test_resize_for_is_nothing_when_no_rule_is_stated() -> None:
    assert resize_for(contract()) is None


def test_fit_images_gives_the_same_images_when_they_fit(images: ImageSet) -> None:
    assert fit_images(contract(), images) is images


@pytest.mark.parametrize("labelled", [True, False])
def test_fit_images_names_both_sizes_and_the_remedy_when_the_size_is_another(images: ImageSet, labelled: bool) -> None:
    with pytest.raises(DataError) as caught:
        fit_images(contract(width=16), images if labelled else unlabelled(images))
    assert str(caught.value) == (
        "noise: images are 8x8, the model takes 8x16; give data of that size, or say how they were resized for the "
        "model: --resize bilinear"
    )


def test_fit_images_names_both_counts_when_the_classes_are_others(images: ImageSet) -> None:
    with pytest.raises(DataError) as caught:
        fit_images(contract(class_names=(*NAMES, "elk")), images)
    assert str(caught.value) == (
        "noise has 4 classes, the model answers with 5; give the data set that the model was made for"
    )


def test_fit_images_asks_for_no_classes_when_there_are_no_labels(images: ImageSet) -> None:
    plain = unlabelled(images)
    assert fit_images(contract(class_names=(*NAMES, "elk")), plain) is plain


def test_fit_images_takes_the_numbers_when_the_file_names_no_class(images: ImageSet) -> None:
    assert fit_images(contract(class_names=("0", "1", "2", "3")), images) is images


@pytest.mark.parametrize("source", ["options", "sidecar", "metadata"])
def test_fit_images_renumbers_by_name_when_the_order_is_another(images: ImageSet, source: Any) -> None:
    order = ("cat", "ant", "dog", "bee")
    fitted = fit_images(contract(class_names=order, source=source), replace(images, notes=("first",)))
    assert fitted.class_names == order
    assert [order[label] for label in fitted.labels] == [NAMES[label] for label in images.labels]
    assert fitted.labels.dtype == np.int64
    assert fitted.images is images.images
    note = f"labels were renumbered by class name, to the order of the contract ({source})"
    assert fitted.notes == ("first", note)


def test_fit_images_takes_the_numbers_and_says_so_when_the_names_are_others(images: ImageSet) -> None:
    other = replace(images, class_names=("ant", "Biene", "dog", "cat"))
    fitted = fit_images(contract(), other)
    assert fitted.labels is other.labels
    assert fitted.class_names == other.class_names
    assert fitted.notes == (
        "class names differ: class 1 is 'Biene' in the data and 'bee' in the model; the numbers are taken to agree",
    )


def test_fit_images_takes_the_numbers_when_a_name_of_the_data_stands_twice(images: ImageSet) -> None:
    twice = replace(images, class_names=("bee", "ant", "ant", "cat"))
    fitted = fit_images(contract(), twice)
    assert fitted.labels is twice.labels
    assert fitted.notes[0].startswith("class names differ: class 0 is 'bee' in the data and 'ant' in the model")


def test_labelled_by_takes_the_answers_for_labels_and_stays_marked(images: ImageSet) -> None:
    logits = np.eye(4, dtype=np.float32)[[3, 1, 0, 2, 2, 1, 0, 3]]
    found = labelled_by(logits, unlabelled(images), contract())
    assert found.labels.tolist() == [3, 1, 0, 2, 2, 1, 0, 3]
    assert (found.labels.dtype, found.class_names, found.labelled) == (np.int64, NAMES, False)


def test_once_each_leaves_out_images_that_repeat_another(images: ImageSet) -> None:
    assert once_each(images) is images
    found = once_each(images.take(np.array([3, 1, 3, 0, 1, 3])))
    np.testing.assert_array_equal(found.images, images.images[[3, 1, 0]])
    np.testing.assert_array_equal(found.labels, images.labels[[3, 1, 0]])
    assert found.notes == ("3 of 6 images repeat another one and are left out",)


def test_once_each_has_nothing_to_say_of_no_images(images: ImageSet) -> None:
    assert len(once_each(images.take(np.array([], dtype=np.int64)))) == 0
