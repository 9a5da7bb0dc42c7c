"""FusedVectorQuantizer beyond the golden steps: options, shapes, masks, dtypes, state."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import get_type_hints

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast import FusedVectorQuantizer
from beitv2_fast.kernels.checks import METRICS
from beitv2_fast.quantize.options import LEARNING, QuantizerOptions

from ..support.dispatched import Dispatched
from ..support.golden import load
from ..support.quantizers import assert_same, noise, state
from ..support.quantizers import quantizer as make


def plain(num_codes: int = 16, dim: int = 8, **options) -> FusedVectorQuantizer:
    return FusedVectorQuantizer(num_codes, dim, **{"kmeans_init": False, **options})


def test_every_option_is_in_the_signature_with_the_type_that_functions_hand_on():
    signature = inspect.signature(FusedVectorQuantizer).parameters
    options = {name: p for name, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert [*signature] == ["num_codes", "dim", *options] and len(options) == 22
    hints = get_type_hints(FusedVectorQuantizer.__init__)
    assert {name: hints[name] for name in options} == get_type_hints(QuantizerOptions)
    quantizer = FusedVectorQuantizer(16, 8, metric="euclidean", decay=0.5)
    given = {"metric": "euclidean", "learning": "sum_ema", "decay": 0.5}
    assert all(getattr(quantizer, name) == given.get(name, p.default) for name, p in options.items())
    assert repr(quantizer).endswith("(num_codes=16, dim=8, metric='euclidean', learning='sum_ema', decay=0.5)")


def test_a_batch_tells_its_counts_and_usage_those_since_the_last_reset():
    quantizer = plain(4).eval()
    out = quantizer(quantizer.codebook[:2])
    assert out.counts.tolist() == [1, 1, 0, 0] and out.perplexity == pytest.approx(2)
    assert quantizer.usage(reset=True) == pytest.approx({"used_codes": 0.5, "perplexity": 2.0, "replaced_codes": 0})
    assert quantizer.usage()["used_codes"] == 0.0


@pytest.mark.parametrize(
    ("metric", "learning"),
    [(m, rule) for m in METRICS for rule in LEARNING if (m, rule) != ("euclidean", "code_ema")],
)
def test_the_quantized_vector_is_the_nearest_code_and_decode_finds_it_again(metric, learning):
    quantizer = plain(metric=metric, learning=learning).train()
    x = noise(50, 8)
    codebook = quantizer.codebook.detach().clone()
    out = quantizer(x)
    y = F.normalize(x, dim=-1) if metric == "cosine" else x
    nearest = torch.cdist(y.double(), codebook.double()).argmin(1)
    assert torch.equal(out.indices, nearest)
    torch.testing.assert_close(out.quantized, codebook[nearest])
    quantizer.eval()
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x)), quantizer(x).quantized)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_codebook_learned_by_gradient_gets_the_gradient_of_both_losses(metric):
    quantizer = plain(metric=metric, learning="gradient", commitment_weight=0.25, codebook_weight=2.0).train()
    x = noise(30, 8).requires_grad_()
    out = quantizer(x)
    out.loss.backward()
    reference, z = quantizer.codebook.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    v, y = (F.normalize(t, dim=-1) if metric == "cosine" else t for t in (reference, z))
    codes = v[out.indices]
    loss = 0.25 * F.mse_loss(y, codes.detach()) + 2 * F.mse_loss(codes, y.detach())
    loss.backward()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(quantizer.codebook.grad, reference.grad)
    torch.testing.assert_close(x.grad, z.grad)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_rotation_turns_the_gradient_as_it_turns_the_vector(metric):
    quantizer = plain(metric=metric, gradient="rotation", commitment_weight=0.0).train()
    x = noise(1, 8).requires_grad_()
    out = quantizer(x)
    y = F.normalize(x.detach(), dim=-1) if metric == "cosine" else x.detach()
    code = out.quantized.detach()
    torch.testing.assert_close(code, quantizer.decode(out.indices), atol=0.2, rtol=0.2)  # moved by its EMA step
    # The gradient along the code's direction arrives along the vector's direction.
    (along,) = torch.autograd.grad((out.quantized * F.normalize(code, dim=-1)).sum(), x)
    expected = code.norm() / y.norm() * F.normalize(y, dim=-1)
    if metric == "cosine":
        expected = torch.zeros_like(x)  # and from there nothing passes the normalization
    torch.testing.assert_close(along, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_vector_without_a_direction_passes_the_rotation_straight_through(dtype, masked):
    quantizer = plain(metric="euclidean", gradient="rotation", commitment_weight=0.0).eval()
    length = 4e-5 if dtype == torch.float16 else 5e-7
    z = torch.zeros(2, 8, dtype=dtype)
    z[1, 0] = length
    z.requires_grad_()
    out = quantizer(z, torch.ones(2, dtype=torch.bool) if masked else None)
    torch.testing.assert_close(out.quantized, quantizer.decode(out.indices).to(dtype))
    upstream = noise(2, 8).to(dtype)
    assert torch.equal(torch.autograd.grad(out.quantized, z, upstream)[0], upstream)


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"heads": 2, "share_codebook": True}, {"num_quantizers": 4}])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_indices_of_any_integer_type_are_decoded(options, dtype):
    quantizer = make(kmeans_init=False, **options).eval()
    indices = quantizer.encode(noise(5, 8))
    assert torch.equal(quantizer.decode(indices.to(dtype)), quantizer.decode(indices))
    with pytest.raises(TypeError, match="integers"):
        quantizer.decode(indices.float())


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"heads": 2, "share_codebook": True}, {"num_quantizers": 4}])
def test_an_index_too_large_for_its_codebook_is_no_code_of_the_next(options):
    quantizer = make(kmeans_init=False, **options).eval()
    indices = quantizer.encode(noise(5, 8))
    indices.view(-1)[0] = 16
    with pytest.raises(IndexError):
        quantizer.decode(indices)


@pytest.mark.parametrize(("channel_last", "shape"), [(True, (2, 5, 8)), (False, (2, 8, 3, 4)), (False, (6, 8))])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("share", [False, True])
def test_shapes_of_vectors_maps_and_heads(channel_last, shape, heads, share):
    options = {"heads": heads, "share_codebook": share, "channel_last": channel_last}
    quantizer = plain(**options).train()
    z = noise(*shape)
    last = z if channel_last or z.dim() == 2 else z.movedim(1, -1)
    one = copy.deepcopy(quantizer)
    out = quantizer(z)
    assert out.quantized.shape == z.shape
    assert out.indices.shape == (last.shape[:-1] if heads == 1 else (*last.shape[:-1], heads))
    # Each head is a quantizer of its own part of the vector.
    books = one.codebook.expand(heads, -1, -1) if share or heads == 1 else one.codebook
    for h, (part, codebook) in enumerate(zip(last.chunk(heads, dim=-1), books, strict=True)):
        expected = (F.normalize(part, dim=-1) @ codebook.T).argmax(-1)
        assert torch.equal(out.indices if heads == 1 else out.indices[..., h], expected)
    torch.testing.assert_close(one.eval().decode(out.indices), one(z).quantized)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_heads_learn_in_one_pass_as_quantizers_of_their_own(metric):
    options = {"metric": metric, "kmeans_init": False}
    quantizer, z = FusedVectorQuantizer(6, 12, heads=3, **options), noise(40, 12)
    alone = [FusedVectorQuantizer(6, 4, **options) for _ in range(3)]
    names = [name for name, buffer in quantizer.named_buffers() if buffer.dim() > 0]
    for head, one in enumerate(alone):
        for name in names:
            getattr(one, name).copy_(getattr(quantizer, name)[head])
    with Dispatched() as seen:
        out = quantizer(z)
    of_each = [one(z.chunk(3, -1)[head]) for head, one in enumerate(alone)]
    assert torch.equal(out.quantized, torch.cat([one.quantized for one in of_each], -1))
    assert torch.equal(out.indices, torch.stack([one.indices for one in of_each], -1))
    torch.testing.assert_close(out.loss, torch.stack([one.loss for one in of_each]).mean())
    assert seen.counts["beitv2_fast::vector_quantize"] == 1
    assert seen.counts["beitv2_fast::codebook_statistics"] == 1
    assert seen.counts["beitv2_fast::apply_codebook_statistics"] == 1
    assert torch.equal(out.counts, torch.stack([one.counts for one in of_each]))
    for name in names:
        assert torch.equal(getattr(quantizer, name), torch.stack([getattr(one, name) for one in alone])), name


@pytest.mark.parametrize("options", [{}, {"metric": "euclidean"}, {"heads": 2, "share_codebook": True}, {"heads": 2}])
def test_masked_vectors_influence_nothing(options):
    with_padding, without = plain(**options).train(), plain(**options).train()
    x = noise(3, 10, 8)
    mask = torch.arange(10) < torch.tensor([[10], [4], [0]])
    padded = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    bare = x[mask].requires_grad_()
    a, b = with_padding(padded, mask), without(bare)
    assert torch.equal(a.indices[mask], b.indices)
    assert (a.indices[~mask] == -1).all() and (a.quantized[~mask] == 0).all()
    torch.testing.assert_close(a.quantized[mask], b.quantized)
    torch.testing.assert_close(a.loss, b.loss)
    assert_same(state(with_padding), state(without))
    assert with_padding.usage() == without.usage()
    (a.loss + a.quantized.square().sum()).backward()
    (b.loss + b.quantized.square().sum()).backward()
    torch.testing.assert_close(padded.grad[mask], bare.grad)
    assert (padded.grad[~mask] == 0).all()
    assert torch.equal(with_padding.eval().encode(padded, mask)[mask], without.eval().encode(bare))


def test_a_batch_without_vectors_changes_no_code():
    quantizer = plain().train()
    before = quantizer.codebook.clone()
    out = quantizer(noise(2, 3, 8).fill_(torch.nan), torch.zeros(2, 3, dtype=torch.bool))
    empty = quantizer(noise(0, 8))
    assert out.loss == 0 and empty.loss == 0
    torch.testing.assert_close(quantizer.codebook, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs_and_agree_with_fp32(dtype):
    x = noise(40, 8).to(dtype)
    a, b = plain().train(), plain().train()
    out, expected = a(x), b(x.float())
    assert out.quantized.dtype == dtype
    assert torch.equal(out.indices, expected.indices)
    torch.testing.assert_close(out.quantized, expected.quantized.to(dtype))
    torch.testing.assert_close(out.loss.float(), expected.loss)
    torch.testing.assert_close(a.codebook, b.codebook)


def test_autocast_changes_nothing():
    for options in ({}, {"learning": "gradient"}):
        a, b = plain(**options).train(), plain(**options).train()
        with torch.autocast("cpu", torch.bfloat16):
            inside = a(noise(40, 8))
        outside = b(noise(40, 8))
        assert torch.equal(inside.quantized, outside.quantized) and inside.quantized.dtype == torch.float32
        assert torch.equal(inside.loss, outside.loss)
        assert_same(state(a), state(b))


def test_the_codebook_stays_fp32_when_the_model_becomes_bf16():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), plain())
    before = model[1].codebook.clone()
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[1].codebook, before)
    assert model(noise(4, 8).bfloat16()).quantized.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"metric": "euclidean"}, {"learning": "gradient"}])
def test_eval_changes_only_the_usage(options):
    quantizer = plain(**options).eval()
    before = state(quantizer)
    quantizer(noise(40, 8))
    changed = {name for name, value in quantizer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == (set() if options.get("metric") == "euclidean" else {"cluster_size"})
    quantizer = plain(**options, track_eval_usage=False).eval()
    assert quantizer(noise(40, 8)).counts.sum() == 40
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert quantizer.usage()["used_codes"] == 0


def test_a_copy_and_a_pickle_train_on_to_the_same_bits():
    quantizer = FusedVectorQuantizer(16, 8, dead_after=1.0).train()
    quantizer(noise(60, 8))
    twins = [copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))]
    twins.append(FusedVectorQuantizer(16, 8, dead_after=1.0))
    twins[-1].load_state_dict(quantizer.state_dict())
    for step in range(20):
        for q in (quantizer, *twins):
            q(noise(60, 8, seed=step) * torch.eye(8)[step % 8])
    assert quantizer.usage()["replaced_codes"] > 0
    for twin in twins:
        assert_same(state(quantizer), state(twin))


def test_a_loaded_codebook_is_not_initialized_again():
    quantizer = FusedVectorQuantizer(16, 8)
    trained = FusedVectorQuantizer(16, 8).train()
    trained(noise(60, 8))
    for name, buffer in quantizer.named_buffers():  # as ZeRO restores buffers, past load_state_dict
        buffer.copy_(dict(trained.named_buffers())[name])
    quantizer.train()(noise(60, 8, seed=1))
    trained(noise(60, 8, seed=1))
    assert_same(state(quantizer), state(trained))


def test_the_names_of_the_published_tokenizer_load():
    golden, _ = load("quantizer_small")
    codebook = golden["step4.codebook"]
    quantizer = FusedVectorQuantizer(*codebook.shape)
    published = {
        "embedding.weight": codebook,
        "embedding.initted": torch.ones(1),
        "embedding.cluster_size": torch.zeros(len(codebook)),
        "embedding.embed_avg": codebook,
        "cluster_size": golden["eval.cluster_size"],
    }
    torch.nn.Sequential(quantizer).load_state_dict({f"0.{name}": value for name, value in published.items()})
    assert torch.equal(quantizer.codebook, codebook) and bool(quantizer.initialized)
    assert torch.equal(quantizer.eval().encode(golden["eval.z"].movedim(1, -1)).flatten(), golden["eval.indices"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "manhattan"}, "metric must be one of"),
        ({"learning": "ema"}, "learning must be one of"),
        ({"gradient": "none"}, "gradient must be one of"),
        ({"metric": "euclidean", "learning": "code_ema"}, "sum_ema"),
        ({"heads": 3}, "multiple of heads"),
        ({"decay": 1.5}, "decay must lie in"),
        ({"commitment_weight": -1.0}, r"commitment_weight must lie in \[0, inf\]; got -1.0"),
        ({"dead_below": 1.0}, "sum_ema"),
        ({"kmeans_iterations": 0}, r"kmeans_iterations must lie in \[1, inf\]"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        FusedVectorQuantizer(16, 8, **options)


def test_bad_input_is_refused():
    quantizer = plain()
    with pytest.raises(ValueError, match="width 8"):
        quantizer(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="dimension 1"):
        plain(channel_last=False)(torch.zeros(3, 7, 8, 8))
    for dtype in (torch.int64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="floating-point"):
            quantizer(torch.zeros(3, 8, dtype=dtype))
    with pytest.raises(ValueError, match="on meta, the codebook on cpu; move one"):
        quantizer(torch.zeros(3, 8, device="meta"))
    with pytest.raises(ValueError, match="mask must be"):
        quantizer(torch.zeros(2, 3, 8), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool"):
        quantizer(torch.zeros(2, 3, 8), torch.ones(2, 3))
    with pytest.raises(ValueError, match="one for each head"):
        plain(heads=2).decode(torch.zeros(3, dtype=torch.int64))
    for options, buffer in (({}, "codebook"), ({}, "cluster_size"), ({"learning": "sum_ema"}, "embed_avg")):
        cast = plain(**options).train()  # as FSDP's MixedPrecision(buffer_dtype=...) does it
        setattr(cast, buffer, getattr(cast, buffer).bfloat16())
        with pytest.raises(TypeError, match=f"{buffer} must be torch.float32; got torch.bfloat16.*keep the buffer"):
            cast(noise(60, 8))
