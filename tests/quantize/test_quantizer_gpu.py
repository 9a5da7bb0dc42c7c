"""The quantizers on a GPU: over twenty steps the state has the CPU's bits, where it is made of codebook_update."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from beitv2_fast import FusedVectorQuantizer, ResidualVectorQuantizer
from beitv2_fast.kernels.checks import METRICS
from beitv2_fast.quantize.adapters import EmbeddingAdapter
from beitv2_fast.quantize.kmeans import kmeans
from beitv2_fast.quantize.options import LEARNING

from ..support.gpu import HERE, autocast, cuda_only, distance, here, no_waiting, pick

pytestmark = pytest.mark.gpu
STEPS = 20
K, D = pick(200, 24), 16
RULES = [(metric, rule) for metric in METRICS for rule in LEARNING if (metric, rule) != ("euclidean", "code_ema")]
EMA = [(metric, rule) for metric, rule in RULES if rule.endswith("_ema")]
# Restarts happen within twenty steps: in the eighth and the sixteenth step codes are dead that few vectors chose.
RESTARTS = {"kmeans_init": False, "dead_after": 3.0}


def vectors(step: int, count: int = pick(500, 60), dim: int = D) -> Tensor:
    """Around fewer places than there are codes, so that some are never chosen; the places move."""
    g = torch.Generator().manual_seed(step)
    centers = torch.randn(K // 2, dim, generator=torch.Generator().manual_seed(99)) + 0.1 * step
    return centers[torch.randint(K // 2, (count,), generator=g)] + 0.3 * torch.randn(count, dim, generator=g)


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    return here(copy.deepcopy(module)).train(), module.train()


def run(module: nn.Module, x: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.float32) -> dict:
    """A step forward and backward: outputs and the gradient."""
    leaf = x.clone().requires_grad_()
    out = module(leaf.to(dtype), mask)
    weight = torch.linspace(-1, 1, x[..., 0].numel() * x.shape[-1], device=x.device).view(x.shape)
    (out.loss + (out.quantized.float() * weight).sum()).backward()
    return {**out._asdict(), "gradient": leaf.grad}


def assert_near(ours: dict, theirs: dict) -> None:
    assert torch.equal(ours["indices"].cpu(), theirs["indices"]) and torch.equal(ours["counts"].cpu(), theirs["counts"])
    for name in ("quantized", "loss", "gradient"):
        assert distance(ours[name], theirs[name]) < 1e-5, name


def assert_same_bits(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    wrong = [name for name, value in ours.state_dict().items() if not torch.equal(value.cpu(), expected[name])]
    assert wrong == []
    assert all(q.codebook.device.type == HERE for q in ours.modules() if isinstance(q, FusedVectorQuantizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("metric", "learning"), EMA)
def test_codebooks_that_learn_by_ema_have_the_cpu_s_bits(metric, learning, dtype):
    ours, theirs = pair(FusedVectorQuantizer(K, D, metric=metric, learning=learning, **RESTARTS))
    for step in range(STEPS):
        x = vectors(step).to(dtype).float()
        found, expected = run(ours, here(x), dtype=dtype), run(theirs, x, dtype=dtype)
        assert torch.equal(found["indices"].cpu(), expected["indices"])
        assert_same_bits(ours, theirs)
        if dtype == torch.float32:
            assert_near(found, expected)
    assert ours.usage() == pytest.approx(theirs.usage())
    assert ours.usage()["replaced_codes"] > 0


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"heads": 2, "share_codebook": True}], ids=str)
@pytest.mark.parametrize(("metric", "learning"), EMA)
def test_heads_and_masks_keep_the_cpu_s_bits(metric, learning, options):
    ours, theirs = pair(FusedVectorQuantizer(K, D, metric=metric, learning=learning, **options, **RESTARTS))
    for step in range(STEPS):
        x = vectors(step).view(4, -1, D)
        mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(step)) < 0.7
        x = torch.where(mask[..., None], x, torch.nan)
        given = {} if step % 2 else {"mask": mask}
        x = torch.nan_to_num(x) if step % 2 else x
        found = run(ours, here(x), **here(given))
        assert_near(found, run(theirs, x, **given))
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize(("metric", "learning"), RULES)
def test_every_learning_rule_follows_the_cpu_over_twenty_steps(metric, learning, gradient):
    """A codebook that its optimizer moves differs in last digits; so rarely a vector has another code."""
    options = dict(metric=metric, learning=learning, gradient=gradient, **RESTARTS)
    ours, theirs = pair(FusedVectorQuantizer(K, D, **options))
    optimizers = [torch.optim.SGD(q.parameters(), 0.5) if learning == "gradient" else None for q in (ours, theirs)]
    for step in range(STEPS):
        x = vectors(step)
        found, expected = run(ours, here(x)), run(theirs, x)
        same = (found["indices"].cpu() == expected["indices"]).float().mean()
        assert same == 1 if learning != "gradient" else same > 0.99
        for optimizer in filter(None, optimizers):
            optimizer.step()
            optimizer.zero_grad()
        near = (ours.codebook.cpu() - theirs.codebook).abs().amax(-1) < 1e-4
        assert near.float().mean() > 0.95
        if learning != "gradient":
            assert distance(found["gradient"], expected["gradient"]) < 1e-4
            torch.testing.assert_close(ours.cluster_size.cpu(), theirs.cluster_size)
            assert torch.equal(ours.idle.cpu(), theirs.idle)


@pytest.mark.parametrize("metric", METRICS)
def test_k_means_finds_the_cpu_s_clusters(metric):
    x = vectors(0, pick(3000, 300))
    codes, bins = kmeans(here(x), K, metric=metric, iterations=5)
    expected, expected_bins = kmeans(x, K, metric=metric, iterations=5)
    near = (codes.cpu() - expected).abs().amax(1) < 1e-4
    assert near.float().mean() > 0.95 and (bins.cpu() - expected_bins).abs().sum() < 0.05 * len(x)
    assert bins.sum() == len(x)


@pytest.mark.parametrize(("metric", "learning"), RULES)
def test_a_k_means_start_and_the_steps_after_it(metric, learning):
    ours, theirs = pair(FusedVectorQuantizer(K, D, metric=metric, learning=learning, dead_after=3.0))
    run(ours, here(vectors(0))), run(theirs, vectors(0))
    assert ours.initialized and (ours.codebook.cpu() - theirs.codebook).abs().amax(1).lt(1e-3).float().mean() > 0.95
    ours.load_state_dict({name: value.clone() for name, value in theirs.state_dict().items()})
    for step in range(1, STEPS):
        found, expected = run(ours, here(vectors(step))), run(theirs, vectors(step))
        assert torch.equal(found["indices"].cpu(), expected["indices"])
        if learning.endswith("_ema"):
            assert_same_bits(ours, theirs)


def test_a_collapsed_codebook_is_started_again_by_k_means():
    options = dict(kmeans_init=False, restart_below=0.9, restart_after=4, dead_after=0.0)
    ours, theirs = pair(FusedVectorQuantizer(K, D, **options))
    for quantizer in (ours, theirs):
        quantizer.codebook.copy_(quantizer.codebook[:1].expand(K, -1).clone())
    for step in range(6):
        run(ours, here(vectors(step))), run(theirs, vectors(step))
        used = [len(q.codebook.unique(dim=0)) for q in (ours, theirs)]
        assert abs(used[0] - used[1]) <= 1 and (used[0] > K // 2) == (step >= 4)


@pytest.mark.parametrize("forwards", [2, 3])
def test_several_forwards_a_step_move_the_codebook_to_the_cpu_s_bits(forwards):
    ours, theirs = pair(FusedVectorQuantizer(K, D, **RESTARTS))
    ours.forwards_per_step = theirs.forwards_per_step = forwards
    for step in range(STEPS):
        run(ours, here(vectors(step))), run(theirs, vectors(step))
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"share_stages": True}, {"heads": 1, "decay": 0.5}], ids=str)
def test_residual_stages_have_the_cpu_s_bits(options):
    ours, theirs = pair(ResidualVectorQuantizer(K, D, 3, **options, **RESTARTS))
    for step in range(STEPS):
        found, expected = run(ours, here(vectors(step))), run(theirs, vectors(step))
        assert_near(found, expected)
        assert_same_bits(ours, theirs)
    x = vectors(50)
    codes = ours.eval().encode(here(x))
    assert torch.equal(codes.cpu(), theirs.eval().encode(x))
    assert torch.equal(ours.decode(codes).cpu(), theirs.decode(codes.cpu()))


def test_residual_stages_are_dropped_and_masked():
    module = here(ResidualVectorQuantizer(K, D, 4, dropout=0.5, kmeans_init=False)).train()
    x = here(vectors(0)).view(20, -1, D)
    mask = torch.rand(x.shape[:2], device=HERE) < 0.8
    found = run(module, x, mask)
    dropped = found["indices"] == -1
    assert dropped[~mask].all() and dropped[mask].any() and not dropped[mask][:, 0].any()
    assert (dropped.int().diff(dim=-1) >= 0).all()  # from a stage on
    assert (found["gradient"][~mask] == 0).all() and found["loss"].isfinite()


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"metric": "euclidean"}], ids=str)
def test_image_maps_encode_and_decode(options):
    ours, theirs = pair(FusedVectorQuantizer(K, D, channel_last=False, kmeans_init=False, **options))
    maps = vectors(0, 60).view(2, 5, 6, D).movedim(-1, 1)
    codes = ours.encode(here(maps))
    assert torch.equal(codes.cpu(), theirs.encode(maps))
    assert torch.equal(ours.decode(codes).cpu(), theirs.decode(codes.cpu()))
    mask = torch.rand(2, 5, 6) < 0.5
    found, expected = ours(here(maps), here(mask)), theirs(maps, mask)
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert distance(found.quantized, expected.quantized) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("metric", "learning"), RULES)
def test_autocast_changes_nothing(metric, learning, dtype):
    a, b = (here(FusedVectorQuantizer(K, D, metric=metric, learning=learning, kmeans_init=False)) for _ in range(2))
    with autocast(dtype):
        inside = run(a.train(), here(vectors(0)))
    outside = run(b.train(), here(vectors(0)))
    assert all(torch.equal(inside[name], outside[name]) for name in inside)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("options", [{}, {"metric": "euclidean"}, {"learning": "gradient"}, {"heads": 2}], ids=str)
def test_no_step_waits_for_the_device(options):
    """Not even those in which dead codes restart; the first asks the device how far a loaded codebook is."""
    quantizer, x = here(FusedVectorQuantizer(K, D, **options, **RESTARTS)).train(), here(vectors(0))
    codes = []
    for step in range(STEPS):
        if step < 9:
            run(quantizer, x)  # compiles, the first restart's ops among them
        else:
            with no_waiting():
                run(quantizer, x)
        codes.append(quantizer.codebook.detach().clone())
    assert (quantizer.steps == STEPS and not torch.equal(codes[8], codes[15])) or "learning" in options


def test_state_moves_there_and_back_and_goes_on_with_the_same_bits():
    ours, theirs = pair(FusedVectorQuantizer(K, D, dead_after=3.0))
    run(theirs, vectors(0))
    ours.load_state_dict(theirs.state_dict())
    for step in range(1, STEPS):
        ours.to("cpu" if step % 3 == 0 else HERE)
        device = ours.codebook.device
        run(ours, vectors(step).to(device)), run(theirs, vectors(step))
        wrong = [n for n, v in ours.state_dict().items() if not torch.equal(v.cpu(), theirs.state_dict()[n])]
        assert wrong == []


def test_the_codebook_stays_fp32_when_the_model_becomes_bf16_on_its_way():
    model = nn.Sequential(nn.Linear(D, D), FusedVectorQuantizer(K, D, kmeans_init=False)).to(HERE, torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16 and model[1].codebook.dtype == torch.float32
    out = model(here(vectors(0)).bfloat16())
    assert out.quantized.dtype == torch.bfloat16 and out.quantized.device.type == HERE


def test_a_replaced_embedding_quantizer_keeps_its_device_and_values():
    class Original(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.beta, self.legacy, self.sane_index_shape = nn.Embedding(K, D), 0.25, False, True
            self.n_e, self.remap, self.re_embed = K, torch.arange(0, K, 2), K // 2
            self.register_buffer("used", torch.arange(0, K, 2))
            self.unknown_index = 0

    torch.manual_seed(1)
    theirs = EmbeddingAdapter(original := Original())  # which shares its tensors, as ours those of a copy
    ours = EmbeddingAdapter(here(copy.deepcopy(original)))
    z = vectors(0, 60).view(2, 5, 6, D).movedim(-1, 1)
    found, expected = ours(here(z)), theirs(z)
    assert found[0].device.type == HERE and torch.equal(found[2][2].cpu(), expected[2][2])
    assert distance(found[0], expected[0]) < 1e-5 and distance(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("options", [{}, {"metric": "euclidean"}, {"learning": "gradient"}], ids=str)
def test_a_compiled_quantizer_has_the_eager_one_s_codebook(options, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    ours, eager = (here(FusedVectorQuantizer(K, D, **options, **RESTARTS)).train() for _ in range(2))
    compiled = torch.compile(ours, fullgraph=True)
    for step in range(10):
        found, expected = run(compiled, here(vectors(step))), run(eager, here(vectors(step)))
        assert torch.equal(found["indices"], expected["indices"])
        assert distance(found["gradient"], expected["gradient"]) < 1e-5
    torch.testing.assert_close(ours.codebook, eager.codebook)
    assert ours.steps == eager.steps == 10


@cuda_only
@pytest.mark.parametrize("metric", METRICS)
def test_a_captured_graph_encodes_what_its_input_holds(metric):
    quantizer, x = here(FusedVectorQuantizer(K, D, metric=metric, kmeans_init=False)).eval(), here(vectors(0))
    quantizer.encode(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = quantizer.encode(x)
    for step in range(3):
        x.copy_(vectors(step))
        graph.replay()
        assert torch.equal(codes, quantizer.encode(x))
