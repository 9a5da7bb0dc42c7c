"""ResidualVectorQuantizer: sums of codes, dropout of stages, masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast import FusedVectorQuantizer, GroupedResidualVectorQuantizer, ResidualVectorQuantizer

from ..support.quantizers import assert_same, noise, state


def residual(**options: object) -> ResidualVectorQuantizer:
    return ResidualVectorQuantizer(32, 8, 4, **options)


def test_every_stage_brings_the_sum_of_codes_nearer_to_the_vector():
    quantizer = residual().train()
    x = noise(300, 8)
    for _ in range(3):
        quantizer(x)
    indices = quantizer.encode(x)
    assert indices.shape == (300, 4)
    errors = [F.mse_loss(quantizer.decode(indices[:, :q]), x).item() for q in range(1, 5)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_output_indices_and_loss_are_those_of_the_formula():
    quantizer = residual(kmeans_init=False, commitment_weight=0.5).train()
    codebooks = [stage.codebook.clone() for stage in quantizer.stages]
    z = noise(6, 5, 8).requires_grad_()
    out = quantizer(z)
    rest, total, loss = z.detach(), 0, 0
    for i, codebook in enumerate(codebooks):
        code = codebook[torch.cdist(rest.flatten(0, 1), codebook).argmin(1)].view_as(rest)
        assert torch.equal(out.indices[..., i], torch.cdist(rest.flatten(0, 1), codebook).argmin(1).view(6, 5))
        loss += 0.5 * F.mse_loss(rest, code)
        rest, total = rest - code, total + code
    torch.testing.assert_close(out.quantized, total)
    torch.testing.assert_close(out.loss, loss)
    (gradient,) = torch.autograd.grad(out.quantized.sum(), z)
    assert torch.equal(gradient, torch.ones_like(z))


@pytest.mark.parametrize("channel_last", [True, False])
def test_decode_inverts_encode_and_eval_uses_all_stages(channel_last):
    quantizer = residual(dropout=1.0, channel_last=channel_last).train()
    z = noise(3, 8, 4, 8) if channel_last else noise(3, 8, 4, 5)
    quantizer(z)
    quantizer.eval()
    out = quantizer(z)
    assert (out.indices >= 0).all()
    assert torch.equal(out.indices, quantizer.encode(z))
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)


def test_dropout_leaves_later_stages_out_sample_by_sample():
    torch.manual_seed(0)
    quantizer = residual(dropout=1.0, kmeans_init=False).train()
    out = quantizer(noise(64, 5, 8))
    used = (out.indices >= 0).long()
    assert (used == used[:, :1]).all()  # the same for all vectors of a sample
    depth = used[:, 0].sum(-1)
    assert set(depth.tolist()) == {1, 2, 3}
    assert torch.equal(used[:, 0], (torch.arange(4) < depth[:, None]).long())
    assert out.counts.sum(-1).tolist() == [5 * int((depth > i).sum()) for i in range(4)]


@pytest.mark.parametrize("channel_last", [True, False])
def test_a_single_vector_is_one_sample_of_which_stages_are_left_out(channel_last):
    torch.manual_seed(0)
    quantizer = residual(dropout=1.0, kmeans_init=False, channel_last=channel_last, learning="frozen").train()
    z, all_stages = noise(8), quantizer.encode(noise(8))
    for depth in (None, torch.tensor(3), torch.tensor(1)):
        out = quantizer(z, depth=depth)
        used = int((out.indices >= 0).sum()) if depth is None else int(depth)
        assert 1 <= used < 4 and torch.equal(out.indices, torch.where(torch.arange(4) < used, all_stages, -1))
        torch.testing.assert_close(out.quantized, quantizer.decode(all_stages[:used]))
    masked = quantizer(z, torch.tensor(False), depth=torch.tensor(3))
    assert masked.indices.tolist() == [-1] * 4 and not masked.quantized.any() and masked.loss == 0


def test_masked_vectors_influence_nothing():
    a, b = residual().train(), residual().train()
    x = noise(2, 10, 8)
    mask = torch.arange(10) < torch.tensor([[10], [4]])
    padded, bare = a(torch.where(mask[..., None], x, 1e6), mask), b(x[mask])
    assert torch.equal(padded.indices[mask], bare.indices) and (padded.indices[~mask] == -1).all()
    torch.testing.assert_close(padded.quantized[mask], bare.quantized)
    assert (padded.quantized[~mask] == 0).all()
    torch.testing.assert_close(padded.loss, bare.loss)
    assert_same(state(a), state(b))


def test_shared_stages_have_one_codebook():
    quantizer = residual(share_stages=True).train()
    quantizer(noise(100, 8))
    assert len(quantizer.stages) == 1 and len(quantizer.state_dict()) == len(quantizer.stages[0].state_dict())
    indices = quantizer.encode(noise(5, 8))
    torch.testing.assert_close(quantizer.decode(indices), quantizer.stages[0].codebook[indices].sum(-2))


def test_low_precision_comes_back_in_its_dtype():
    out = residual().train()(noise(40, 8).bfloat16())
    assert out.quantized.dtype == torch.bfloat16 and out.loss.dtype == torch.float32


def test_wrong_options_and_indices_are_refused():
    with pytest.raises(ValueError, match="euclidean"):
        residual(metric="cosine")
    with pytest.raises(ValueError, match="dropout"):
        residual(dropout=2.0)
    with pytest.raises(ValueError, match="eval_beam_size"):
        residual(eval_beam_size=0)
    with pytest.raises(ValueError, match="1 to 4"):
        residual().decode(torch.zeros(3, 5, dtype=torch.int64))


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_vectors_that_are_no_numbers_of_floating_point_are_refused_as_by_one_quantizer(dtype, beam):
    quantizer = residual(eval_beam_size=beam)
    for called in (quantizer, quantizer.eval(), quantizer.encode):
        with pytest.raises(TypeError, match=f"floating-point dtype; got {dtype}".replace(".", r"\.")):
            called(torch.ones(5, 8, dtype=dtype))


@pytest.mark.parametrize("depth", [2, torch.tensor(2), torch.ones(4, dtype=torch.int64), torch.ones(5, 1).long()])
def test_a_depth_that_is_not_one_number_for_each_sample_is_refused(depth):
    with pytest.raises(ValueError, match=r"depth must be a tensor \[5\].*got"):
        residual()(noise(5, 3, 8), depth=depth)


def test_fp64_is_computed_in_fp64():
    quantizer = ResidualVectorQuantizer(2, 1, 2, kmeans_init=False).eval()
    for stage, codes in zip(quantizer.stages, ([0.0, 1.0], [-0.25, 0.25]), strict=True):
        stage.codebook.copy_(torch.tensor(codes)[:, None])
    # 1e-12 above the midpoint of the first codes, and a rest 1e-12 above that of the second ones.
    z = torch.tensor([[0.5 + 1e-12], [1e-12]], dtype=torch.float64, requires_grad=True)
    out = quantizer(z)
    assert out.indices.tolist() == quantizer.encode(z).tolist() == [[1, 0], [0, 1]]
    assert out.quantized.dtype == out.loss.dtype == torch.float64
    rest = z.detach().flatten() - torch.tensor([1.0, 0.0])
    expected = rest.square().mean() + (rest - torch.tensor([-0.25, 0.25])).square().mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("learning", ["sum_ema", "gradient"])
def test_a_shared_codebook_learns_from_all_stages_in_one_step(learning):
    options = {"kmeans_init": False, "learning": learning, "decay": 0.9}
    quantizer, one = (
        residual(share_stages=True, **options).train(),
        FusedVectorQuantizer(32, 8, metric="euclidean", **options),
    )
    z = noise(40, 8)
    depth = torch.arange(40) % 4 + 1
    out = quantizer(z, depth=depth)
    rests, rest = [], z
    for i in range(4):
        taking_part = depth > i
        rests.append(rest[taking_part])
        code = one.decode(one.encode(rest))
        rest = torch.where(taking_part[:, None], rest - code, rest)
    expected = one.train()(torch.cat(rests))
    for name in ("codebook", "cluster_size", "idle", "steps"):
        assert torch.equal(getattr(quantizer.stages[0], name), getattr(one, name)), name
    assert torch.equal(out.counts, expected.counts[None]) and out.counts.sum() == (depth.sum())
    assert torch.equal(quantizer.eval()(z).counts.sum(1), torch.tensor([160]))


def test_stages_may_have_codebooks_of_unequal_size():
    quantizer = ResidualVectorQuantizer([32, 16, 8], 8, 3).train()
    out = quantizer(noise(60, 8))
    assert [stage.num_codes for stage in quantizer.stages] == [32, 16, 8]
    assert out.counts.shape == (3, 32) and out.counts.sum(1).tolist() == [60, 60, 60]
    assert (out.indices.amax(0) < torch.tensor([32, 16, 8])).all() and out.perplexity.shape == (3,)
    indices = quantizer.encode(noise(60, 8))
    torch.testing.assert_close(quantizer.decode(indices), quantizer.eval()(noise(60, 8)).quantized)
    for sizes, share in (([32, 16], False), ([32, 16, 8], True)):
        with pytest.raises(ValueError, match="num_codes"):
            ResidualVectorQuantizer(sizes, 8, 3, share_stages=share)


def best_sum(x: torch.Tensor, codebooks: list[torch.Tensor]) -> torch.Tensor:
    """Of all sums of codes the one with the least cost, [N, Q]."""
    paths = torch.cartesian_prod(*(torch.arange(len(codes)) for codes in codebooks)).view(-1, len(codebooks))
    rest, cost = x[:, None], torch.zeros(len(x), len(paths))
    for codes, path in zip(codebooks, paths.T, strict=True):
        rest = rest - codes[path]
        cost = cost + rest.square().mean(-1)
    return paths[cost.argmin(1)]


@pytest.mark.parametrize("channel_last", [True, False])
def test_a_beam_of_all_sums_finds_the_best_one_in_eval_mode(channel_last):
    quantizer = ResidualVectorQuantizer(
        [5, 4, 6], 3, 3, eval_beam_size=20, kmeans_init=False, channel_last=channel_last
    ).eval()
    z = noise(2, 5, 3)
    expected = best_sum(z.flatten(0, 1), [stage.codebook for stage in quantizer.stages]).view(2, 5, 3)
    given = z if channel_last else z.movedim(-1, 1)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    out = quantizer(given, mask)
    assert torch.equal(out.indices, torch.where(mask[..., None], expected, -1))
    assert torch.equal(quantizer.encode(given, mask), out.indices) and torch.equal(quantizer.encode(given), expected)
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    rest, loss = z[mask], 0
    for stage, column in zip(quantizer.stages, expected[mask].T, strict=True):
        rest = rest - stage.codebook[column]
        loss += rest.square().mean()
    torch.testing.assert_close(out.loss, loss)
    greedy = ResidualVectorQuantizer([5, 4, 6], 3, 3, kmeans_init=False, channel_last=channel_last).eval()
    assert not torch.equal(greedy.encode(given), expected)
    quantizer.train(), greedy.train()
    assert torch.equal(quantizer(given).indices, greedy(given).indices)


def test_a_beam_ends_where_a_sample_s_depth_does():
    quantizer = ResidualVectorQuantizer(6, 3, 3, eval_beam_size=6, kmeans_init=False).eval()
    z, depth = noise(3, 4, 3), torch.tensor([1, 2, 3])
    indices = quantizer(z, depth=depth).indices
    for sample, d in enumerate(depth.tolist()):
        expected = best_sum(z[sample], [stage.codebook for stage in quantizer.stages][:d]).view(4, d)
        assert torch.equal(indices[sample, :, :d], expected) and (indices[sample, :, d:] == -1).all()


@pytest.mark.parametrize("channel_last", [True, False])
def test_groups_are_stacks_of_their_own_on_parts_of_the_width(channel_last):
    options = {"channel_last": channel_last, "kmeans_init": False, "eval_beam_size": 3}
    grouped = GroupedResidualVectorQuantizer(32, 8, 3, groups=2, **options).train()
    alone = [ResidualVectorQuantizer(32, 4, 3, **options).train() for _ in range(2)]
    for g, stack in enumerate(alone):
        stack.load_state_dict({name: t[g] if t.dim() else t for name, t in grouped.state_dict().items()})
    z, axis = (noise(5, 6, 8), -1) if channel_last else (noise(5, 8, 6), 1)
    mask = torch.arange(6) < torch.tensor([[6], [2], [1], [5], [0]])
    for call in ({}, {"mask": mask, "depth": torch.tensor([1, 2, 3, 1, 2])}):
        for training in (True, False):
            parts = [stack.train(training)(p, **call) for stack, p in zip(alone, z.chunk(2, axis), strict=True)]
            out = grouped.train(training)(z, **call)
            assert torch.equal(out.quantized, torch.cat([part.quantized for part in parts], axis))
            assert torch.equal(out.indices, torch.stack([part.indices for part in parts], -2))
            assert torch.equal(out.counts, torch.stack([part.counts for part in parts]))
            torch.testing.assert_close(out.loss, (parts[0].loss + parts[1].loss) / 2)
    torch.testing.assert_close(grouped(z).quantized, grouped.decode(grouped.encode(z)))
    with pytest.raises(ValueError, match="width 8"):
        grouped(noise(5, 9, 9))
    with pytest.raises(ValueError, match="multiple of heads"):
        GroupedResidualVectorQuantizer(32, 8, 3, groups=3)


def test_groups_that_share_a_codebook_are_one_stack_for_all_parts():
    options = {"kmeans_init": False, "eval_beam_size": 3}
    shared = ResidualVectorQuantizer(32, 8, 3, heads=2, share_codebook=True, **options).eval()
    alone = ResidualVectorQuantizer(32, 4, 3, **options).eval()
    alone.load_state_dict(shared.state_dict())
    z, depth = noise(5, 6, 8), torch.tensor([1, 2, 3, 1, 2])
    assert torch.equal(shared(z, depth=depth).indices, alone(z.unflatten(-1, (2, 4)), depth=depth).indices)


def test_a_sample_takes_part_in_as_many_stages_in_every_group():
    torch.manual_seed(0)
    grouped = GroupedResidualVectorQuantizer(32, 8, 4, groups=2, dropout=1.0, kmeans_init=False).train()
    depth = (grouped(noise(64, 5, 8)).indices >= 0).sum(-1)
    assert (depth == depth[:, :1, :1]).all() and set(depth.unique().tolist()) == {1, 2, 3}


def test_encoding_with_beams_takes_masks_single_vectors_and_nan_as_without():
    plain = residual(kmeans_init=False).eval()
    beams = residual(kmeans_init=False, eval_beam_size=3).eval()
    x, mask = noise(4, 5, 8), torch.arange(5) < torch.tensor([[5], [4], [1], [0]])
    x[0, 2, 1] = torch.nan
    out = beams.encode(x, mask)
    assert torch.equal(out < 0, plain.encode(x, mask) < 0) and (out[0, 2] == 0).all()
    assert torch.equal(beams.encode(x[0, 1]), out[0, 1])
    for wrong in (mask[0], mask.long()):
        with pytest.raises((TypeError, ValueError), match="mask"):
            beams.encode(x, wrong)


def test_a_stack_with_beams_is_exported_for_any_number_of_vectors():
    quantizer = residual(kmeans_init=False, eval_beam_size=3).eval()
    program = torch.export.export(quantizer, (noise(6, 8),), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False)
    for x in (noise(11, 8, seed=1), noise(0, 8)):
        torch.testing.assert_close(program.module()(x), quantizer(x), rtol=0, atol=0)
