"""Top-1 and top-5 of a classifier: over all images, whatever the batches and ranks, and among a folder's classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.views import EvalView
from beitv2_fast.distributed import World
from beitv2_fast.downstream.evaluation import class_columns, evaluate_classifier, listed_classes
from beitv2_fast.errors import UserError

from ..support.training import write_images

CLASSES = [f"n{i}" for i in range(8)]
SIZE = 16


class Rows(nn.Module):
    """A linear classifier of pixels that remembers how it was called."""

    def __init__(self, classes: int = len(CLASSES)):
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(3 * SIZE * SIZE, classes)
        self.modes: list[bool] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        return self.linear(images.flatten(1))


class Rank(World):
    """One of several ranks whose sums a test adds up."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x


def folder(path, classes, count: int = 3) -> ImageFolder:
    generator = torch.Generator().manual_seed(5)
    for name in classes:
        write_images(path / name, count, size=int(torch.randint(17, 40, (), generator=generator)))
    return ImageFolder(find_images(path), EvalView(SIZE, 1.0))


def world(rank: int = 0, size: int = 1) -> World:
    return Rank(rank, size, torch.device("cpu"))


def expected(model: Rows, dataset: ImageFolder, columns: torch.Tensor) -> dict[str, float]:
    from beitv2_fast.models.vit import normalize

    scores, labels = [], []
    for i in range(len(dataset)):
        sample = dataset[0, i]
        scores.append(model(normalize(sample["image"])[None])[0, columns])
        labels.append(sample["label"])
    scores, labels = torch.stack(scores), torch.tensor(labels)
    rank = (scores > scores.gather(1, labels[:, None])).sum(1)
    return {
        "top1": (rank == 0).double().mean().item(),
        "top5": (rank < 5).double().mean().item(),
        "loss": F.cross_entropy(scores, labels).item(),
        "images": len(dataset),
    }


@pytest.mark.parametrize("batch_size", [1, 5, 24, 100])
def test_every_image_counts_once_whatever_the_batch(tmp_path, batch_size):
    dataset, model = folder(tmp_path, CLASSES), Rows()
    columns = class_columns(dataset.images.classes, CLASSES, tmp_path)
    with torch.no_grad():
        wanted = expected(model, dataset, columns)
    assert 0 < wanted["top5"] < 1
    found = evaluate_classifier(model, dataset, columns, world(), batch_size=batch_size)
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in wanted.items()}


def test_ranks_run_as_many_batches_each_and_count_every_image_once(tmp_path):
    dataset, columns = folder(tmp_path, CLASSES[:5]), torch.arange(5)  # 15 images on 4 ranks
    calls, images, right = [], 0, 0.0
    for rank in range(4):
        model = Rows(5)
        found = evaluate_classifier(model, dataset, columns, world(rank, 4), batch_size=2)
        calls.append(len(model.modes))
        images, right = images + found["images"], right + found["top1"] * found["images"]
    alone = evaluate_classifier(Rows(5), dataset, columns, world(), batch_size=2)
    assert calls == [2, 2, 2, 2] and images == 15 and right == pytest.approx(alone["top1"] * 15)


def test_a_folder_with_some_classes_is_evaluated_among_these(tmp_path):
    some = ["n1", "n4", "n6"]
    dataset, model = folder(tmp_path, some), Rows()
    columns = class_columns(dataset.images.classes, CLASSES, tmp_path)
    assert columns.tolist() == [1, 4, 6]
    with torch.no_grad():
        model.linear.bias[[0, 2, 3, 5, 7]] = 1e4  # classes that the folder does not have win among all
        wanted = expected(model, dataset, columns)
    found = evaluate_classifier(model, dataset, columns, world(), batch_size=4)
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in wanted.items()} and found["top5"] == 1


def test_the_model_is_in_eval_mode_meanwhile_and_as_before_afterwards(tmp_path):
    dataset, model = folder(tmp_path, CLASSES[:2], 1), Rows()
    for training in (True, False):
        evaluate_classifier(model.train(training), dataset, torch.arange(2), world(), batch_size=4)
        assert model.training == training
    assert not any(model.modes)


@pytest.mark.parametrize(("there", "said"), [(["n1", "cat"], "has the classes cat"), ([], "has no classes")])
def test_classes_that_the_classifier_does_not_know_are_named(there, said):
    with pytest.raises(UserError, match=said):
        class_columns(there, CLASSES, "FOLDER")


LIST = "Hühner\nn1 \n\nébène\n"


@pytest.mark.parametrize(
    "content",
    [LIST.encode(), LIST.encode("utf-8-sig"), LIST.encode("utf-16"), b"\xfe\xff" + LIST.encode("utf-16-be")],
    ids=["UTF-8", "UTF-8 with a mark", "UTF-16", "UTF-16, big end first"],
)
def test_a_list_of_classes_is_read_in_the_encodings_that_tell_themselves(tmp_path, content):
    (tmp_path / "names.txt").write_bytes(content.replace(b"\n", b"\r\n") if content[1:2] == b"\xc3" else content)
    assert listed_classes(tmp_path / "names.txt") == ["Hühner", "n1", "ébène"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LIST.encode("latin-1"), r"no UTF-8 text \(line 1: invalid start byte\). Save it as UTF-8"),
        ("a\nb\ncafé\n".encode("latin-1"), r"no UTF-8 text \(line 3"),
        ("a\nb\n".encode("utf-16-le"), "zero bytes"),
        (LIST.encode("utf-32"), "zero bytes"),
        (b"\xff\xfea", r"no UTF-8 text \(line 1: truncated data"),
        (b"", "names no class"),
        (b" \n\n", "names no class"),
        (b"a\nb\na \nc\nb\n", "names the classes a, b more than once"),
    ],
)
def test_a_list_of_classes_that_cannot_be_read_is_refused_with_what_to_do(tmp_path, content, said):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=said):
        listed_classes(tmp_path / "names.txt")
