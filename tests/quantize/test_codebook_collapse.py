"""k-means start, dead-code replacement and restart after a collapse, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from beitv2_fast import FusedVectorQuantizer
from beitv2_fast.kernels.sampling import sample_rows
from beitv2_fast.quantize import collapse
from beitv2_fast.quantize.kmeans import kmeans

from ..support.quantizers import noise

METRICS = ("cosine", "euclidean")


def clusters(count: int, centers: int = 4, dim: int = 8) -> torch.Tensor:
    directions = F.normalize(noise(centers, dim), dim=-1)
    return directions[torch.arange(count) % centers] + 0.01 * noise(count, dim, seed=1)


def distance_to_codes(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> torch.Tensor:
    x = F.normalize(x, dim=-1) if metric == "cosine" else x
    return torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)


@pytest.mark.parametrize("metric", METRICS)
def test_kmeans_leaves_no_code_empty_and_comes_closer_than_a_sample(metric):
    x = torch.cat([noise(4, 8).repeat(50, 1), noise(200, 8)])  # a sample of 16 rows holds duplicates
    codebook, bins = kmeans(x, 16, metric=metric)
    assert bins.sum() == 400 and (bins > 0).all()
    sample, _ = kmeans(x, 16, metric=metric, iterations=1)
    assert distance_to_codes(x, codebook, metric).mean() < 0.9 * distance_to_codes(x, sample, metric).mean()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("distinct", [1, 3, 8])
def test_kmeans_survives_duplicates_and_fewer_vectors_than_codes(metric, distinct):
    x = noise(distinct, 8).repeat(3, 1)
    codebook, bins = kmeans(x, 32, metric=metric)
    assert codebook.isfinite().all() and bins.sum() == 3 * distinct
    assert distance_to_codes(x, codebook, metric).max() < 1e-5
    if metric == "cosine":
        torch.testing.assert_close(codebook.norm(dim=-1), torch.ones(32))


def test_kmeans_leaves_out_vectors_that_are_not_finite():
    x = clusters(64)
    bad = torch.cat([x, torch.full((5, 8), torch.nan), torch.full((5, 8), torch.inf)])
    assert torch.equal(kmeans(bad, 4)[1].sum(), torch.tensor(64))
    assert kmeans(bad[64:], 4)[1].sum() == 0
    assert kmeans(bad[:0], 4)[0].isfinite().all()


def test_the_first_batch_initializes_the_codebook_by_k_means():
    quantizer = FusedVectorQuantizer(16, 8, decay=1.0).train()  # the EMA step leaves the codes where they are
    before, x = quantizer.codebook.clone(), noise(100, 8)
    quantizer(x)
    assert bool(quantizer.initialized)
    distances = (distance_to_codes(x, codebook, "cosine").mean() for codebook in (quantizer.codebook, before))
    assert next(distances) < 0.8 * next(distances)
    quantizer(noise(100, 8, seed=1))
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(16))
    started = quantizer.codebook.clone()
    quantizer(noise(100, 8, seed=2))
    torch.testing.assert_close(quantizer.codebook, started)


def test_a_first_batch_of_padding_leaves_the_initialization_to_the_next():
    quantizer = FusedVectorQuantizer(4, 8).train()
    quantizer(noise(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool))
    assert not quantizer.initialized
    quantizer(clusters(64))
    assert quantizer.initialized


def test_rows_are_drawn_once_and_in_proportion_to_their_weights():
    x = torch.arange(8.0)[:, None]
    weights = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 10])
    first = torch.zeros(8)
    for salt in range(400):
        rows, found = sample_rows(x, 8, salt * 7919, weights)
        assert found.tolist() == [True] * 7 + [False]
        assert rows[:7].unique().numel() == 7 and 0 not in rows[:7]
        first[rows[0].long()] += 1
    # 10/16 of 400 with a standard deviation of 10
    assert 210 < first[7] < 290


def collapsed(learning: str, **options) -> tuple[FusedVectorQuantizer, torch.Tensor, torch.Tensor]:
    """A quantizer of 32 codes of which most are far from the data, the data, and which codes are idle."""
    options = {"kmeans_init": False, "learning": learning, "dead_after": 2.0, **options}
    quantizer = FusedVectorQuantizer(32, 8, **options).train()
    x = clusters(128)
    idle = torch.ones(32, dtype=torch.bool).index_fill(0, quantizer.encode(x).unique(), False)
    assert idle.sum() > 20
    return quantizer, x, idle


@pytest.mark.parametrize("learning", ["code_ema", "sum_ema", "gradient"])
def test_idle_codes_restart_at_vectors_of_the_batch_with_all_of_their_state(learning):
    quantizer, x, idle = collapsed(learning)
    for _ in range(8):
        quantizer(x)
    assert quantizer.usage()["replaced_codes"] >= idle.sum()
    restarted = quantizer.codebook.detach()[idle]
    assert distance_to_codes(restarted, F.normalize(x, dim=-1), "cosine").max() < 1e-6
    assert len(restarted.unique(dim=0)) == len(restarted)
    assert (quantizer.idle[idle] == 0).all()
    assert (quantizer.cluster_size[idle] > 0).all()
    if learning == "sum_ema":
        torch.testing.assert_close(quantizer.embed_avg[idle], restarted * quantizer.cluster_size[idle][:, None])


@pytest.mark.parametrize("learning", ["code_ema", "sum_ema"])
def test_stale_statistics_do_not_overwrite_a_revived_code(learning):
    quantizer, x, idle = collapsed(learning)
    for _ in range(8):
        quantizer(x)
    revived = quantizer.codebook.clone()
    quantizer(noise(4, 8, seed=5))  # a batch that most revived codes are not chosen in
    unchosen = idle & (quantizer.idle > 0)
    assert unchosen.sum() > 15
    torch.testing.assert_close(quantizer.codebook[unchosen], revived[unchosen], atol=1e-5, rtol=0)
    for _ in range(50):  # and chosen ones move among the vectors that choose them, not back
        quantizer(x)
    assert distance_to_codes(quantizer.codebook[idle], F.normalize(x, dim=-1), "cosine").max() < 0.1


@pytest.mark.parametrize("metric", METRICS)
def test_with_more_dead_codes_than_vectors_no_vector_is_used_twice(metric):
    quantizer = FusedVectorQuantizer(64, 8, metric=metric, kmeans_init=False, dead_after=0.1).train()
    x = noise(5, 8)
    for _ in range(8):
        quantizer(x)
    assert 0 < quantizer.usage()["replaced_codes"] <= 5
    assert len(quantizer.codebook.unique(dim=0)) == 64


def test_codes_whose_cluster_fell_under_the_threshold_restart():
    quantizer, x, idle = collapsed("sum_ema", dead_after=0, dead_below=0.95)
    for _ in range(8):
        quantizer(x)
    assert (quantizer.cluster_size >= 0.95).all()
    assert distance_to_codes(quantizer.codebook[idle], F.normalize(x, dim=-1), "cosine").max() < 1e-6


def test_without_dead_after_dead_codes_stay_dead_as_in_the_reference():
    quantizer, x, idle = collapsed("code_ema", dead_after=0)
    before = quantizer.codebook.clone()
    for _ in range(64):
        quantizer(x)
    torch.testing.assert_close(quantizer.codebook[idle], before[idle])


@pytest.mark.parametrize("metric", METRICS)
def test_k_means_starts_again_after_a_collapse_and_only_then(metric, monkeypatch):
    calls = []
    monkeypatch.setattr(collapse, "kmeans", lambda *args, **kw: calls.append(0) or kmeans(*args, **kw))
    options = {"metric": metric, "dead_after": 0, "restart_below": 0.9, "restart_after": 10}
    quantizer = FusedVectorQuantizer(32, 8, **options).train()
    narrow, wide = noise(64, 8) * 0.01 + torch.ones(8), noise(64, 8, seed=1)
    for _ in range(25):
        quantizer(narrow)  # k-means gave every code its vectors: no collapse
    assert len(calls) == 1
    assert quantizer.encode(wide).unique().numel() < 0.8 * 32
    for _ in range(6):
        quantizer(wide)
    assert len(calls) == 1  # not yet: the window of ten steps saw both
    for _ in range(10):
        quantizer(wide)
    assert len(calls) == 2
    assert quantizer.encode(wide).unique().numel() > 0.9 * 32


# Two ranks ---------------------------------------------------------------------------------------------------------

RANKED = {
    "cosine": {"dead_after": 0.5},
    "euclidean": {"metric": "euclidean", "dead_after": 0.5},
    "gradient": {"learning": "gradient", "dead_after": 0.5, "metric": "euclidean"},
    "drawn": {"temperature": 0.3, "dead_after": 0.5},
    "heads": {"heads": 2, "restart_below": 0.9, "restart_after": 5, "dead_after": 0.5},
}
SPLITS = ((40, 24), (64, 0), (3, 61), (32, 32))


def train_steps(options: dict, rank: int | None) -> dict[str, torch.Tensor]:
    """Twenty steps on a stream whose vectors lie on one axis after another: codes die and restart all the time."""
    quantizer = FusedVectorQuantizer(24, 8, **options).train()
    for step in range(20):
        x = noise(64, 8, seed=step) * 0.1 + torch.eye(8)[step // 5 * 2]
        mask = noise(64, seed=step) > -1
        if rank is not None:
            part = x.split(SPLITS[step % 4])[rank], mask.split(SPLITS[step % 4])[rank]
            torch.manual_seed(rank)  # nothing may depend on a rank's own generator
        quantizer(*(part if rank is not None else (x, mask)))
    assert quantizer.usage()["replaced_codes"] > 0
    return {**dict(quantizer.named_buffers()), "codebook": quantizer.codebook.detach()}


def two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    states = {name: train_steps(options, rank) for name, options in RANKED.items()}
    states["alone"] = train_steps({"sync": False, **RANKED["cosine"]}, rank)
    states["group"] = train_steps({"sync": dist.new_group([0, 1]), **RANKED["cosine"]}, rank)
    torch.save(states, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(two_ranks, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKED)
def test_all_state_is_the_same_bits_on_both_ranks_and_as_on_one(ranks, name):
    alone = train_steps(RANKED[name], None)
    for buffer, expected in alone.items():
        assert torch.equal(ranks[0][name][buffer], ranks[1][name][buffer]), buffer
        assert torch.equal(ranks[0][name][buffer], expected), buffer


@pytest.mark.slow
def test_ranks_learn_by_themselves_or_with_those_of_a_group(ranks):
    for rank, states in enumerate(ranks):
        by_itself = train_steps(RANKED["cosine"], rank)
        assert all(torch.equal(states["alone"][name], value) for name, value in by_itself.items())
        assert all(torch.equal(states["group"][name], value) for name, value in states["cosine"].items())
    assert not torch.equal(ranks[0]["alone"]["codebook"], ranks[1]["alone"]["codebook"])
