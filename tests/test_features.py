"""Features of every kind of model, from images in [0, 1]."""

from __future__ import annotations

import torch

from beitv2_fast import classify, features, read_images
from beitv2_fast.transforms import normalise

from .training import write_images
from .weights import classifier, images, student, tokenizer

X = images().sigmoid()


def test_a_students_features_are_normed_tokens_of_both_branches():
    model = student()
    last, aggregated = model.encode(normalise(X))
    found = features(model, X)
    assert torch.equal(found.cls, model.norm(aggregated[:, 0]))
    assert torch.equal(found.patches, model.norm(last[:, 1:]))


def test_without_aggregation_the_cls_token_is_the_last_layers():
    model = student(aggregation_depth=0)
    assert torch.equal(features(model, X).cls, model.norm(model.encode(normalise(X))[0][:, 0]))


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
