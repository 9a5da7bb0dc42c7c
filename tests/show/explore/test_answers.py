"""The page's answers beside what the models say when asked directly."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from beitv2_fast.data.images import read_images
from beitv2_fast.errors import UserError
from beitv2_fast.models.features import features
from beitv2_fast.models.vit import normalize
from beitv2_fast.show.attention import attention_probabilities
from beitv2_fast.show.explore.answers import MAX_PIXELS, BadRequest
from beitv2_fast.show.index import TypicalPatches, sprite
from beitv2_fast.weights.build import load_run_model

from ...support.small_runs import CODES
from ...support.training import write_images
from .conftest import answers_of

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # fp32 in batches of another size


def file_of(images, index: int) -> bytes:
    return images.read(index)


@pytest.fixture
def image(answers):
    """(the page's description, the views [1, 3, 32, 32]) of a sample that was dropped on the page."""
    data = answers.runs.samples.read(1)
    return answers.add(data), read_images([io.BytesIO(data)], 32)


def test_an_image_has_the_tokens_that_the_tokenizer_gives_it(answers, image):
    found, views = image
    assert found["codes"] == answers.runs.tokenizer.encode(views)[0].tolist()
    assert answers.sample(1)["codes"] == found["codes"]


def test_the_patches_of_a_code_have_that_code_in_the_data_set(answers, root):
    tokenizer, images = load_run_model(root / "tokenizer")[0], answers.runs.images
    codes = tokenizer.encode(read_images([images.root / p for p in images.paths], 32))
    counts = torch.bincount(codes.flatten(), minlength=CODES)
    for code in range(CODES):
        found = answers.code(code)
        assert found["count"] == counts[code]
        assert len(found["patches"]) == min(12, counts[code])
        assert all(codes[image, patch] == code for image, patch in found["patches"])


@pytest.mark.parametrize("model", ["student", "tokenizer"])
def test_the_nearest_patches_are_those_of_the_largest_cosine_one_per_image(answers, image, model):
    found, views = image
    network, images = getattr(answers.runs, model), answers.runs.images
    everything = features(network, read_images([images.root / p for p in images.paths], 32)).patches
    query = features(network, views).patches[0, 5]
    cosines = torch.cosine_similarity(everything, query, dim=-1)  # [images, N]
    rows = answers.nearest(found["key"], 5, model)["patches"]
    order = cosines.amax(1).argsort(descending=True).tolist()
    assert [row["image"] for row in rows] == order
    assert [row["patch"] for row in rows] == [int(cosines[i].argmax()) for i in order]
    torch.testing.assert_close(torch.tensor([row["cosine"] for row in rows]), cosines.amax(1)[order], rtol=0, atol=2e-3)


@pytest.mark.parametrize("model", ["student", "tokenizer"])
def test_the_attention_is_that_of_the_chosen_patch_in_the_chosen_layer(answers, image, model):
    found, views = image
    rows = answers.attention(found["key"], 6, model, 1)["heads"]
    expected = attention_probabilities(getattr(answers.runs, model), views, 1)[0, :, 7, 1:]
    torch.testing.assert_close(torch.tensor(rows), expected, **CLOSE)


def test_a_prediction_is_the_students_for_the_hidden_patches_alone(answers, image):
    found, views = image
    hidden = [9, 2, 14]
    said = answers.predict(found["key"], hidden)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, hidden] = True
    chances = answers.runs.student.predict(normalize(views), mask)[0][0].softmax(-1).detach()
    assert said["hidden"] == [2, 9, 14]
    assert said["true"] == [found["codes"][i] for i in said["hidden"]]
    for i, patch in enumerate(said["hidden"]):
        best, codes = chances[patch].topk(5)
        assert said["codes"][i] == codes.tolist()
        torch.testing.assert_close(torch.tensor(said["chances"][i]), best, **CLOSE)
        assert said["true_chance"][i] == pytest.approx(float(chances[patch, said["true"][i]]), rel=1e-3)
    assert said["right"] == sum(codes[0] == true for codes, true in zip(said["codes"], said["true"], strict=True))


def test_hiding_other_patches_changes_a_prediction(answers, image):
    """The student sees the mask: its answer for a patch is not the same whatever else is hidden."""
    key = image[0]["key"]
    alone, among = answers.predict(key, [5]), answers.predict(key, list(range(16)))
    assert alone["chances"][0] != among["chances"][5]


def test_a_random_mask_is_one_of_the_training(answers):
    found = {seed: answers.mask(seed)["hidden"] for seed in range(5)}
    assert all(len(hidden) == answers.runs.settings.num_masked for hidden in found.values())
    assert len({tuple(hidden) for hidden in found.values()}) > 1


def test_a_typical_patch_is_a_real_patch_nearest_to_the_median():
    patches = np.zeros((5, 32, 32, 3), np.uint8)
    patches += np.array([10, 12, 14, 90, 250], np.uint8)[:, None, None, None]
    typical = TypicalPatches(3, seed=0)
    typical.add(torch.tensor([1, 1, 1, 1, 1]), patches)
    chosen = typical.choose()
    assert (chosen[1] == 14).all()
    assert (chosen[0] == 127).all(), "a code without patches is gray"


def test_typical_patches_are_sampled_from_all_patches_of_a_code():
    kept = []
    for seed in range(40):
        typical = TypicalPatches(1, seed)
        typical.size = 4
        for value in range(100):
            typical.add(torch.zeros(1, dtype=torch.int64), np.full((1, 2, 2, 3), value, np.uint8))
        kept += [int(patch[0, 0, 0]) for patch in typical.kept[0]]
    assert len(kept) == 160
    assert 40 < np.mean(kept) < 60  # the mean of 160 uniform values of 0 to 99 has a deviation of 2.3


def test_the_sprite_has_each_code_at_its_place():
    typical = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    picture = sprite(typical)
    assert picture.shape == (4, 6, 3)
    assert [int(picture[code // 3 * 2, code % 3 * 2, 0]) for code in range(5)] == list(range(5))


def test_a_tokenizer_alone_can_be_explored_and_the_page_says_what_is_missing(root):
    answers = answers_of(root / "tokenizer")
    info = answers.info()
    assert not info["game"] and "no mask game" in info["problem"] and info["models"] == ["tokenizer"]
    key = answers.sample(0)["key"]
    for question in (lambda: answers.predict(key, [1]), lambda: answers.mask(0)):
        with pytest.raises(BadRequest, match="no mask game"):
            question()


def test_a_pre_training_brings_its_tokenizer(root):
    assert answers_of(root / "pretrain").info()["game"]


def test_the_images_can_be_others_than_the_runs(root):
    answers = answers_of(root, data=root / "data" / "test", max_images=3)
    assert answers.info()["images"] == 3 and not answers.info()["held_out"]


def test_what_is_left_out_is_told_once_where_the_images_are_also_the_samples(root, tmp_path, caplog):
    write_images(tmp_path, 3)
    (tmp_path / "broken.png").write_bytes(b"")
    runs = answers_of(root, data=tmp_path).runs
    assert sorted(runs.samples.paths) == sorted(runs.images.paths) == ["00.png", "01.png", "02.png"]
    assert [record.getMessage() for record in caplog.records if "broken.png" in record.getMessage()] == [
        f"1 of 4 files in {tmp_path} are left out:\n  broken.png: an empty file"
    ]


def test_a_folder_without_runs_says_what_would_be_one(tmp_path):
    with pytest.raises(UserError, match=r"is no run.*make demo"):
        answers_of(tmp_path)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_image_is_refused(answers, data):
    with pytest.raises(BadRequest, match="no image that can be read"):
        answers.add(data)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(answers, monkeypatch):
    monkeypatch.setattr("beitv2_fast.show.explore.answers.open_image", lambda data: pytest.fail("it was decoded"))
    buffer = io.BytesIO()
    Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)).save(buffer, "png")
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(BadRequest, match="64 million pixels"):
        answers.add(buffer.getvalue())


def test_images_beyond_the_last_few_are_forgotten(answers, monkeypatch):
    monkeypatch.setattr("beitv2_fast.show.explore.answers.REMEMBERED", 2)
    keys = [answers.sample(i)["key"] for i in range(3)]
    assert answers.picture(keys[2])[:4] == b"\x89PNG"
    with pytest.raises(BadRequest, match="choose it again"):
        answers.picture(keys[0])


@pytest.mark.parametrize("patch", [-1, 16])
def test_a_patch_outside_the_grid_is_refused(answers, patch):
    key = answers.sample(0)["key"]
    for question in (
        lambda: answers.nearest(key, patch, "student"),
        lambda: answers.attention(key, patch, "student", 1),
        lambda: answers.predict(key, [patch]),
        lambda: answers.patch(0, patch),
    ):
        with pytest.raises(BadRequest, match="no such patch"):
            question()
