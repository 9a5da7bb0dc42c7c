"""Features of every kind of model, from images in [0, 1]."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast import classify, features, read_images
from beitv2_fast.downstream.probes.features import global_features
from beitv2_fast.models.vit import normalize

from ..support.small_runs import TinyTeacher
from ..support.training import write_images
from ..support.weights import classifier, images, student, tokenizer

X = images().sigmoid()


def test_a_students_features_are_normed_tokens_of_both_branches():
    model = student()
    last, aggregated = model.encode(normalize(X))
    found = features(model, X)
    assert torch.equal(found.cls, model.norm(aggregated[:, 0]))
    assert torch.equal(found.patches, model.norm(last[:, 1:]))


def test_without_aggregation_the_cls_token_is_the_last_layers():
    model = student(aggregation_depth=0)
    assert torch.equal(features(model, X).cls, model.norm(model.encode(normalize(X))[0][:, 0]))


def test_a_classifiers_patches_are_what_its_head_reads():
    model = classifier()
    logits = model.head(model.fc_norm(features(model, X).patches.mean(1)))
    torch.testing.assert_close(logits.softmax(-1), classify(model, X), rtol=1e-5, atol=1e-6)


def test_a_tokenizers_patches_give_its_codes():
    model = tokenizer()
    vectors = model.encode_task_layer(features(model, X).patches)
    assert torch.equal(model.quantize.encode(vectors), model.encode(X))


def test_images_are_read_as_a_batch(tmp_path):
    folder = write_images(tmp_path / "images", 2, size=60)
    found = read_images(sorted(folder.iterdir()), 48)
    assert found.shape == (2, 3, 48, 48) and found.min() >= 0 and found.max() <= 1


TAKES_IMAGES = {
    "features of a student": lambda x: features(student(), x),
    "features of a classifier": lambda x: features(classifier(), x),
    "features of a tokenizer": lambda x: features(tokenizer(), x),
    "classify": lambda x: classify(classifier(), x),
    "a classifier": lambda x: classifier()(x),
    "a student": lambda x: student().encode(x),
    "codes": lambda x: tokenizer().encode(x),
    "the features that probes read": lambda x: global_features(student(), [1])(x),
    "normalize": normalize,
    "a teacher": lambda x: TinyTeacher()(x, (6, 6)),
}


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int64, torch.bool))
@pytest.mark.parametrize("name", TAKES_IMAGES)
def test_integer_images_are_refused_with_what_is_expected(name, dtype):
    pixels = (X * 255).to(dtype)
    with pytest.raises(TypeError, match=r"floating-point numbers are needed.*images.float\(\) / 255"):
        TAKES_IMAGES[name](pixels)
    TAKES_IMAGES[name](X)
