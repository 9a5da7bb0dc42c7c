"""Batches follow from (seed, epoch, index): the same for any number of workers and ranks, and after a resume."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys

import pytest
import torch
from PIL import Image

from beitv2_fast.data.draws import EpochSampler
from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import eval_loader, train_loader
from beitv2_fast.data.views import EvalView, PretrainView, TokenizerView
from beitv2_fast.errors import DataError

COUNT = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """22 noise images in two classes, every third one gray"""
    root = tmp_path_factory.mktemp("noise")
    generator = random.Random(0)
    for i in range(COUNT):
        path = root / ("even" if i % 2 == 0 else "odd") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        mode = "L" if i % 3 == 0 else "RGB"
        Image.frombytes(mode, (30, 26), generator.randbytes(30 * 26 * len(mode))).save(path)
    return root


@pytest.fixture(params=["torchvision", "dali"])
def loader(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed (extra: dali)")
    return request.param


@pytest.fixture
def dataset(folder, loader):
    return ImageFolder(find_images(folder), PretrainView(16, 8, (4, 4), 6, 2), seed=3, loader=loader)


def batches(dataset, **options):
    return list(train_loader(dataset, **{"batch_size": 4, "seed": 1, "total_steps": 12, **options}))


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_holds_the_view_s_tensors_labels_and_indices(dataset):
    batch = batches(dataset, total_steps=1)[0]
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert shapes == {
        "student": ((4, 3, 16, 16), torch.float32),
        "tokenizer": ((4, 3, 8, 8), torch.float32),
        "mask": ((4, 16), torch.bool),
        "label": ((4,), torch.int64),
        "index": ((4,), torch.int64),
        "view": ((4,), torch.int64),
    }
    assert batch["label"].tolist() == [dataset.images.labels[i] for i in batch["index"]]


def test_a_folder_without_classes_gives_no_labels(folder):
    dataset = ImageFolder(find_images(folder / "odd"), EvalView(8))
    assert dataset[0, 1].keys() == {"image", "index", "view"}


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_no_pixel(dataset, workers):
    assert_same(batches(dataset), batches(dataset, workers=workers))


@pytest.mark.parametrize("start", [0, 3, 5, 7, 12])
def test_resuming_at_a_step_continues_the_uninterrupted_batches(dataset, start):
    assert_same(batches(dataset)[start:], batches(dataset, start_step=start))


def test_images_kept_in_memory_change_no_pixel(folder, dataset):
    kept = ImageFolder(dataset.images, dataset.view, dataset.seed, in_memory=True)
    assert kept.decoded_bytes == 30 * 26 * (8 * 1 + 14 * 3) and dataset.decoded_bytes == 0
    assert_same(batches(dataset), batches(kept))


def test_ranks_divide_the_batches_of_one_rank(dataset):
    whole = batches(dataset, batch_size=4)
    ranks = [batches(dataset, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    pairs = zip(*ranks, strict=True)
    joined = [{name: torch.cat([first[name], second[name]]) for name in first} for first, second in pairs]
    assert_same(whole, joined)


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (2, 2), (1, 4), (7, 1), (3, 3), (11, 2)])
def test_every_image_is_seen_once_an_epoch_whatever_the_number_of_ranks(batch_size, world_size):
    epochs, total = 3, -(-3 * COUNT // (batch_size * world_size))
    ranks = [
        EpochSampler(COUNT, batch_size=batch_size, rank=rank, world_size=world_size, seed=1, total_steps=total)
        for rank in range(world_size)
    ]
    keys = [key for step in zip(*ranks, strict=True) for batch in step for key in batch]
    by_epoch = [[index for epoch, index in keys[: epochs * COUNT] if epoch == e] for e in range(epochs)]
    assert all(sorted(order) == list(range(COUNT)) for order in by_epoch)
    assert len({tuple(order) for order in by_epoch}) == epochs
    # The order is that of one rank with batches of one.
    one = EpochSampler(COUNT, batch_size=1, seed=1, total_steps=epochs * COUNT)
    assert keys[: epochs * COUNT] == [key for batch in one for key in batch]


def test_another_epoch_shows_other_crops_and_masks(dataset):
    dataset = ImageFolder(dataset.images, dataset.view, dataset.seed)
    assert not torch.equal(dataset[0, 7]["tokenizer"], dataset[1, 7]["tokenizer"])
    assert not torch.equal(dataset[0, 7]["mask"], dataset[2, 7]["mask"])


def test_another_seed_gives_another_order_and_other_crops(dataset):
    first, second = batches(dataset, seed=1), batches(dataset, seed=2)
    assert [b["index"].tolist() for b in first] != [b["index"].tolist() for b in second]
    other = ImageFolder(dataset.images, dataset.view, seed=4)
    assert not torch.equal(dataset[0, 7]["tokenizer"], other[0, 7]["tokenizer"])


def test_the_loader_leaves_torch_s_generator_alone(dataset):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(dataset)
    assert torch.equal(before, torch.get_rng_state())


def test_sampler_and_loader_know_their_length(dataset):
    sampler = EpochSampler(COUNT, batch_size=4, start_step=3, total_steps=12)
    assert len(sampler) == len(list(sampler)) == 9
    assert len(train_loader(dataset, batch_size=4, start_step=3, total_steps=12)) == 9


def test_a_batch_larger_than_the_data_set_is_refused(dataset):
    with pytest.raises(DataError, match=r"A batch of 24 images \(12 on each of 2 ranks\) is larger than the data set"):
        train_loader(dataset, batch_size=12, world_size=2, total_steps=3)
    with pytest.raises(DataError, match=r"A batch of 24 images is larger than the data set"):
        train_loader(dataset, batch_size=24, total_steps=3)
    assert len(list(train_loader(dataset, batch_size=11, world_size=2, total_steps=1))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"start_step": 13}, "start_step is 13"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_impossible_samplers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(COUNT, **{"batch_size": 4, "total_steps": 12, **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_in_order(folder, workers, loader):
    dataset = ImageFolder(find_images(folder), EvalView(8), loader=loader)
    seen = list(eval_loader(dataset, 5, workers))
    assert torch.cat([batch["index"] for batch in seen]).tolist() == list(range(COUNT))
    assert [len(batch["image"]) for batch in seen] == [5, 5, 5, 5, 2]


def test_ranks_share_the_evaluation_and_see_every_image_once(folder):
    dataset = ImageFolder(find_images(folder), EvalView(8))
    ranks = [torch.cat([b["index"] for b in eval_loader(dataset, 5, 0, rank, 3)]).tolist() for rank in range(3)]
    assert sorted(index for seen in ranks for index in seen) == list(range(COUNT))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["vanishes", "breaks", "is cut"])
def test_a_file_that_vanishes_or_breaks_is_named(tmp_path, workers, damage, loader):
    for i in range(4):
        Image.frombytes("RGB", (40, 40), random.Random(i).randbytes(4800)).save(tmp_path / f"{i}.png")
    dataset = ImageFolder(find_images(tmp_path), TokenizerView(8), loader=loader)
    file = tmp_path / "2.png"
    if damage == "vanishes":
        file.unlink()
    else:
        file.write_bytes(b"broken" if damage == "breaks" else file.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"^The image \S+2.png could be read when it was checked") as caught:
        batches(dataset, total_steps=1, workers=workers)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_workers_survive_a_signal_that_reaches_every_process(dataset, name):
    expected = batches(dataset)
    others = set(multiprocessing.active_children())  # of other tests
    iterator = iter(train_loader(dataset, batch_size=4, seed=1, total_steps=12, workers=1))
    seen = [next(iterator)]
    workers = [str(process.pid) for process in set(multiprocessing.active_children()) - others]
    assert workers
    subprocess.run(["kill", f"-{name}", *workers], check=True)
    assert_same(expected, seen + list(iterator))


def test_a_worker_that_dies_is_an_error_and_no_hang(dataset):
    others = set(multiprocessing.active_children())  # of other tests
    iterator = iter(train_loader(dataset, batch_size=4, seed=1, total_steps=100, workers=1))
    next(iterator)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    with pytest.raises(DataError, match="A process that loaded images died"):
        list(iterator)


def test_workers_end_when_their_parent_tells_them_to(dataset):
    others = set(multiprocessing.active_children())  # of other tests
    iterator = iter(train_loader(dataset, batch_size=4, seed=1, total_steps=12, workers=1))
    next(iterator)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0


def test_a_program_that_ends_within_an_epoch_is_not_held_up_by_its_workers(folder, loader):
    program = (
        "import sys\n"
        "from beitv2_fast.data.find import find_images\n"
        "from beitv2_fast.data.images import ImageFolder\n"
        "from beitv2_fast.data.loaders import train_loader\n"
        "from beitv2_fast.data.views import TokenizerView\n"
        "dataset = ImageFolder(find_images(sys.argv[1]), TokenizerView(8), loader=sys.argv[2])\n"
        "loader = train_loader(dataset, batch_size=2, total_steps=1000, workers=2)\n"
        "iterator = iter(loader)\n"
        "next(iterator)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(folder), loader], timeout=600).returncode == 0
