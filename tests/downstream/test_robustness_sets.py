"""ImageNet-A, -R and -Sketch: 200 of 1000 classes, or all, found by their names, as the reference's masks do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from beitv2_fast.data.find import find_images
from beitv2_fast.data.views import EvalView
from beitv2_fast.models.classifier import Classifier, ClassifierConfig
from beitv2_fast.models.vit import ViTConfig, normalize
from beitv2_fast.weights.files import write

from ..support.downstream import EVALUATE, results
from ..support.training import call, write_images

SIZE = 16
WNIDS = sorted(f"n{(7919 * i) % 100_000_000:08d}" for i in range(1, 1001))  # sorted, as ImageNet's
SUBSET = WNIDS[3::5]  # 200


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Classifier]:
    """A classifier of 1000 classes, the list of their names, and the folders a (200 classes) and sketch (1000)."""
    folder = tmp_path_factory.mktemp("robust")
    torch.manual_seed(0)
    vit = ViTConfig(image_size=SIZE, patch_size=8, dim=16, depth=1, heads=2, position="relative")
    model = Classifier(ClassifierConfig(vit, 1000)).eval()
    torch.nn.init.normal_(model.head.weight)  # so that the classes' scores differ
    write(folder / "model.safetensors", model.state_dict(), "beitv2_fast", model.config)
    (folder / "names.txt").write_text("\n".join(WNIDS) + "\n")
    for name, classes in (("a", SUBSET), ("sketch", WNIDS)):
        for i, wnid in enumerate(classes):
            image = folder / name / wnid / "0.png"
            image.parent.mkdir(parents=True)
            image.write_bytes(picture(folder, i % 16))
    return folder, model


def picture(folder: Path, number: int) -> bytes:
    if not (folder / "pictures").is_dir():
        write_images(folder / "pictures", 16, SIZE)
    return (folder / "pictures" / f"{number:02d}.png").read_bytes()


@pytest.mark.parametrize(("name", "classes"), [("a", SUBSET), ("sketch", WNIDS)])
def test_a_set_is_evaluated_as_by_a_head_that_has_only_the_rows_of_its_classes(files, tmp_path, name, classes):
    folder, model = files
    command = ["--model", folder / "model.safetensors", "--data", folder / name, "--classes", folder / "names.txt"]
    assert call("evaluate", *command, *EVALUATE, "--out", tmp_path / "run") == 0
    found = results(tmp_path / "run")["rows"][0]

    images = find_images(folder / name)
    x = torch.stack([EvalView(SIZE, 1.0)(images.open(i))["image"] for i in range(len(images))])
    mask = torch.tensor([wnid in set(classes) for wnid in WNIDS])  # over the 1000 classes, as the reference's
    with torch.no_grad():
        pooled = model.fc_norm(model.forward_tokens(normalize(x))[:, 1:].mean(1))
        scores = F.linear(pooled, model.head.weight[mask], model.head.bias[mask])
    labels = torch.arange(len(classes))  # the folder's classes in the order of their names
    place = (scores > scores.gather(1, labels[:, None])).sum(1)
    assert found["classes"] == len(classes) and found["images"] == len(classes)
    assert found["top1"] == pytest.approx((place == 0).double().mean().item())
    assert found["top5"] == pytest.approx((place < 5).double().mean().item()) and found["top5"] > 0
    assert found["loss"] == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5)


def test_the_same_folder_under_other_names_is_refused_with_them(files, tmp_path, capsys):
    folder, _ = files
    write_images(tmp_path / "set" / "goldfish", 1, SIZE)
    command = ["--model", folder / "model.safetensors", "--data", tmp_path / "set", "--classes", folder / "names.txt"]
    assert call("evaluate", *command, "--out", tmp_path / "run", "--workers", 0, "--device", "cpu") == 2
    assert "has the classes goldfish, but the classifier knows 1000" in capsys.readouterr().err


def test_a_list_of_classes_that_is_no_text_is_one_paragraph(files, tmp_path, capsys):
    folder, _ = files
    (tmp_path / "names.txt").write_bytes("\n".join(WNIDS).encode("utf-16-le"))
    command = ["--model", folder / "model.safetensors", "--data", folder / "a", "--classes", tmp_path / "names.txt"]
    assert call("evaluate", *command, "--out", tmp_path / "run", "--device", "cpu") == 2
    assert "Save it as UTF-8" in capsys.readouterr().err and not (tmp_path / "run").exists()
