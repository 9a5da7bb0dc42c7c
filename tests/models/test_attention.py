"""Which implementation computes attention, decided with no GPU; all that run here agree."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from beitv2_fast.errors import UserError
from beitv2_fast.kernels.attention.reference import attention_reference
from beitv2_fast.models import attention as module
from beitv2_fast.models.attention import attend, choose_attention, prepare_bias

LOST_LIBRARY = "libcudart.so.12: cannot open shared object file: No such file or directory"


@pytest.fixture(autouse=True)
def fresh_choice():
    choose_attention.cache_clear()
    yield
    choose_attention.cache_clear()


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None) -> Tensor:
    """A stand-in with the demands of xformers: [B, N, H, d], bias expanded over the batch, aligned, of q's dtype."""
    if attn_bias is not None:
        assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert attn_bias.dtype == q.dtype and attn_bias.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
    scores = torch.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k)
    scores = scores if attn_bias is None else scores + attn_bias
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend: an xformers (or one that fails to load), a GPU of a capability."""

    def pretend(capability: tuple[int, int] = (8, 0), failure: Exception | None = None, installed: bool = True):
        ops = types.ModuleType("xformers.ops")
        ops.memory_efficient_attention = memory_efficient_attention
        library = types.ModuleType("xformers._cpp_lib")
        library._cpp_library_load_exception = failure
        package = types.ModuleType("xformers")
        package.ops, package._cpp_lib = ops, library
        names = {"xformers": package, "xformers.ops": ops, "xformers._cpp_lib": library}
        for name, value in names.items():
            monkeypatch.setitem(sys.modules, name, value if installed else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.version, "hip", None)

    return pretend


def lost_library() -> Exception:
    failure = RuntimeError("xFormers can't load C++/CUDA extensions.")
    failure.__cause__ = OSError(LOST_LIBRARY)
    return failure


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), "xformers"), ((8, 0), "xformers"), ((9, 0), "native"), ((10, 0), "sdpa"), ((12, 0), "sdpa")],
)
def test_ours_computes_where_it_was_measured_then_xformers_where_it_can_and_sdpa_on_newer_gpus(
    gpu, capability, expected
):
    gpu(capability)
    assert choose_attention("auto", "cuda") == expected
    for name in ("sdpa", "math") if capability < (8, 0) else ("native", "sdpa", "math"):
        assert choose_attention(name, "cuda") == name
    if capability <= (9, 0):
        assert choose_attention("xformers", "cuda") == "xformers"


def test_ours_is_refused_on_a_gpu_that_is_too_old(gpu):
    gpu((7, 5))
    with pytest.raises(UserError, match=r"need compute capability 8\.0"):
        choose_attention("native", "cuda")


def test_without_triton_a_gpu_gets_xformers_and_ours_is_refused(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert choose_attention("auto", "cuda") == "xformers"
    with pytest.raises(UserError, match="pip install triton"):
        choose_attention("native", "cuda")


def test_without_xformers_a_gpu_gets_sdpa_and_no_warning(gpu, recwarn):
    gpu(installed=False)
    assert choose_attention("auto", "cuda") == "sdpa"
    assert not recwarn.list


def test_rocm_gets_sdpa(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_attention("auto", "cuda") == "sdpa"


def test_an_xformers_whose_cuda_part_does_not_load_is_reported_with_the_cure(gpu):
    gpu(failure=lost_library())
    with pytest.warns(UserWarning, match=r"libcudart\.so\.12.*pip install nvidia-cuda-runtime-cu12.*Until then"):
        assert choose_attention("auto", "cuda") == "sdpa"
    with pytest.raises(UserError, match="pip install nvidia-cuda-runtime-cu12"):
        choose_attention("xformers", "cuda")


def test_an_xformers_of_another_torch_is_reported_as_such(gpu):
    gpu(failure=RuntimeError("xFormers was built for PyTorch 2.10"))
    with pytest.warns(UserWarning, match="built for another torch or Python"):
        assert choose_attention("auto", "cuda") == "sdpa"


@pytest.mark.parametrize(
    ("asked", "device", "said"),
    [
        ("xformers", "cpu", "no kernel for cpu"),
        ("native", "mps", "no kernel for mps"),
        ("fastest", "cpu", "must be one of"),
    ],
)
def test_what_cannot_run_here_is_refused_with_what_can(asked, device, said):
    with pytest.raises(UserError, match=said):
        choose_attention(asked, device)


def test_an_xformers_that_is_too_old_for_the_gpu_or_absent_is_refused_when_asked_for(gpu):
    gpu((10, 0))
    with pytest.raises(UserError, match=r"up to compute capability 9\.0"):
        choose_attention("xformers", "cuda")
    gpu(installed=False)
    with pytest.raises(UserError, match=r"beitv2-fast\[gpu\]"):
        choose_attention("xformers", "cuda")


def test_the_cpu_gets_the_native_kernel_or_without_a_compiler_the_definition(monkeypatch):
    monkeypatch.setattr(module, "native_ops", lambda: True)
    assert choose_attention("auto", "cpu") == "native"
    choose_attention.cache_clear()
    monkeypatch.setattr(module, "native_ops", lambda: False)
    assert choose_attention("auto", "cpu") == "math"
    with pytest.raises(UserError, match="was not compiled"):
        choose_attention("native", "cpu")


def test_the_choice_is_made_once(gpu, monkeypatch):
    gpu((8, 0))
    assert choose_attention("auto", "cuda") == "xformers"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert choose_attention("auto", "cuda") == "xformers"


@pytest.mark.parametrize("name", ["native", "xformers", "sdpa"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_all_implementations_agree_with_the_definition(gpu, monkeypatch, name, with_bias):
    gpu()
    monkeypatch.setattr(module, "choose_attention", lambda asked, device: asked)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 21, 3, 2, 16, generator=generator).requires_grad_()
    bias = torch.randn(1, 2, 21, 21, generator=generator).requires_grad_() if with_bias else None
    grad = torch.randn(2, 21, 32, generator=generator)
    inputs = [qkv, bias] if with_bias else [qkv]
    ours = attend(qkv, prepare_bias(bias, name) if with_bias else None, name)
    expected = attention_reference(qkv, bias, 0.25)[0].flatten(2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(out, inputs, grad) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "width", "who"),
    [
        (torch.bfloat16, 64, "native"),
        (torch.float16, 80, "native"),
        (torch.float32, 64, "sdpa"),
        (torch.bfloat16, 256, "sdpa"),
    ],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_on_a_gpu_ours_computes_low_precision_with_an_fp32_bias_and_sdpa_the_rest(
    gpu, monkeypatch, dtype, width, who, with_bias
):
    gpu((9, 0))
    called = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def ours(qkv, bias):
        called.append(("native", bias.dtype if with_bias else None))
        return native_attention(qkv, bias)

    def theirs(q, k, v, attn_mask):
        called.append(("sdpa", attn_mask.dtype if with_bias else None))
        return sdpa(q, k, v, attn_mask=attn_mask)

    native_attention = module.native_attention
    monkeypatch.setattr(module, "native_attention", ours)
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", theirs)
    with FakeTensorMode():
        qkv = torch.empty(2, 10, 3, 4, width, dtype=dtype, device="cuda")
        bias = torch.empty(1, 4, 10, 10, device="cuda")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype != torch.float32):
            prepared = prepare_bias(bias, "auto")
        out = attend(qkv, prepared if with_bias else None)
    assert out.shape == (2, 10, 4 * width) and out.dtype == dtype
    of_bias = torch.float32 if who == "native" else dtype
    assert called == [(who, of_bias if with_bias else None)]


@pytest.mark.parametrize("name", ["xformers", "sdpa"])
def test_the_bias_takes_the_dtype_of_autocast_once_for_all_layers(monkeypatch, name):
    monkeypatch.setattr(module, "choose_attention", lambda asked, device: asked)
    with torch.autocast("cpu", torch.bfloat16):
        bias = prepare_bias(torch.zeros(1, 2, 21, 21), name)
    assert bias.dtype == torch.bfloat16 and bias.shape == (1, 2, 21, 21)
    assert (bias.stride(2) % 8 == 0) == (name == "xformers")


class OnGpu:
    """What xformers asks of a tensor, from one on the meta device, which says that it is on a GPU."""

    device = torch.device("cuda:0")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __getattr__(self, name: str):
        return getattr(self.tensor, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dispatcher_of_xformers_takes_the_prepared_bias_and_its_gradient(monkeypatch, dtype):
    fmha = pytest.importorskip("xformers.ops.fmha")
    monkeypatch.setattr(fmha.common, "_built_with_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(module, "choose_attention", lambda asked, device: asked)
    q = OnGpu(torch.empty(2, 197, 12, 64, dtype=dtype, device="meta"))
    table = torch.empty(1, 12, 197, 197, dtype=dtype, device="meta").requires_grad_()

    def reasons(bias: Tensor) -> list[str]:
        inputs = fmha.common.Inputs(query=q, key=q, value=q, attn_bias=bias.expand(2, -1, -1, -1))
        ops = (fmha.cutlass.FwOp, fmha.cutlass.BwOp)
        return [reason for op in ops for reason in op.not_supported_reasons(inputs)]

    assert reasons(prepare_bias(table, "xformers")) == []
    assert reasons(table) != []
