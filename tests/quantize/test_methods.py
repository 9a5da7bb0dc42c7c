"""Modules whose searching methods are replaced, beside their originals: what they return, gradients, and all state."""

from __future__ import annotations

import copy
import importlib
import io
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beitv2_fast import Unsupported, replace_quantizers, with_methods
from beitv2_fast.kernels import codebook_search
from beitv2_fast.kernels.native import native_ops
from beitv2_fast.quantize import soft

from ..support import other_quantizers as other
from ..support.other_quantizers import VectorQuantizer2
from ..support.quantizers import everything, noise
from ..support.replaced import TOLERANCE

MAP, AUDIO, ROWS = (2, 8, 5, 6), (2, 8, 20), (2, 16, 8)


@dataclass
class Theirs:
    """A class of ADAPTERS, or a stand-in for one that no package brings: how it is made and called."""

    name: str
    shape: tuple[int, ...]
    call: str = "forward"
    stand_in: type | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name.split(".")[-1], *self.options])

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        if self.stand_in is not None:
            return self.stand_in(**self.options)
        module, cls = self.name.rsplit(".", 1)
        package = pytest.importorskip(module, exc_type=ImportError)
        widths = {"embed_dim": 8, "codebook_dim": 8, "hidden_size": 8, "num_patches": 4}
        built: nn.Module = getattr(package, cls)(SimpleNamespace(codebook_size=32, num_embeddings=32, **widths))
        for tensor in everything(built).values():
            if tensor.shape == (32, 8):
                tensor.copy_(noise(32, 8, seed=1))
        return built

    def swap(self, theirs: nn.Module) -> nn.Module:
        return replace_quantizers(copy.deepcopy(theirs), self.stand_in and {self.stand_in: self.name})


def of_transformers(name: str, *how: Any) -> Theirs:
    return Theirs("transformers.models.{0}.modeling_{0}.{1}".format(*name.split(".")), *how)


AUDIOCRAFT = "audiocraft.quantization.core_vq.EuclideanCodebook", ROWS, "forward", other.EuclideanCodebook
LLAMAGEN = "tokenizer.tokenizer_image.vq_model.VectorQuantizer", MAP, "forward", other.LlamaGen
IBQ = "src.IBQ.modules.vqvae.quantize.IndexPropagationQuantize", MAP, "forward", other.IBQ
TRAINED = [
    Theirs(*AUDIOCRAFT),
    Theirs(*AUDIOCRAFT, {"decay": 0.99, "epsilon": 1e-3}),
    Theirs(*AUDIOCRAFT, {"kmeans_init": True}),
    Theirs("dac.nn.quantize.VectorQuantize", AUDIO, "forward", other.Descript),
    Theirs("models.modeling_visual_tokenzier.VectorQuantizer", ROWS, "tokenize", other.LaVIT),
    Theirs("taming.modules.vqvae.quantize.VectorQuantizer", MAP, "forward", other.Taming, {"beta": 0.5}),
    Theirs(*LLAMAGEN, {"beta": 0.5}),
    Theirs(*LLAMAGEN, {"l2_norm": False}),
    Theirs(*LLAMAGEN, {"entropy_loss_ratio": 0.01}),
    Theirs(*LLAMAGEN, {"entropy_loss_ratio": 0.01, "l2_norm": False}),
    Theirs(*IBQ, {"beta": 0.5}),
    Theirs(*IBQ, {"use_entropy_loss": True, "batch_maximization_weight": 2.0}),
    Theirs(*LLAMAGEN, {"show_usage": False}),
    of_transformers("chameleon.ChameleonVQVAEVectorQuantizer", MAP),
    of_transformers("dac.DacVectorQuantize", AUDIO),
    of_transformers("glm_image.GlmImageVQVAEVectorQuantizer", MAP),
    of_transformers("janus.JanusVQVAEVectorQuantizer", MAP),
]
SEARCHED = [
    of_transformers("apertus1p5.Apertus1p5VisionTokenizerVectorQuantizer", MAP),
    of_transformers("emu3.Emu3VQVAEVectorQuantizer", (2, 3, 8, 4, 5)),
    of_transformers("encodec.EncodecEuclideanCodebook", ROWS, "encode"),
    of_transformers("mimi.MimiEuclideanCodebook", ROWS, "encode"),
    of_transformers("wavtokenizer.WavTokenizerEuclideanCodebook", ROWS, "encode"),
    of_transformers("xcodec.XcodecEuclideanCodebook", ROWS, "encode"),
]


def step(module: nn.Module, call: str, z: Tensor) -> list[Any]:
    """What comes out, all state, and the gradients of a sum of what comes out."""
    module.zero_grad()
    torch.manual_seed(0)
    x = z.clone().requires_grad_()
    out = getattr(module, call)(x)
    learnt = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    for i, t in enumerate(learnt):
        t.backward(noise(t.numel(), seed=i).view_as(t) / t.numel(), retain_graph=True)
    return [out, x.grad, {name: p.grad for name, p in module.named_parameters()}, everything(module)]


def assert_alike(modules: tuple[nn.Module, nn.Module], call: str, z: Tensor) -> None:
    theirs, ours = (step(module, call, z) for module in modules)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def assert_same_training(modules: tuple[nn.Module, nn.Module], call: str, shape: tuple[int, ...], steps: int) -> None:
    optimizers = [torch.optim.SGD([*m.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1) for m in modules]
    for i in range(steps):
        assert_alike(modules, call, noise(*shape, seed=i))
        for optimizer in optimizers:
            optimizer.step()
    for module in modules:
        module.eval()
    assert_alike(modules, call, noise(*shape, seed=steps))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(soft, "CHUNK_SCORES", 7 * 32)


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_a_training_of_20_steps_agrees(case):
    theirs = case.make()
    ours = case.swap(theirs)
    assert isinstance(ours, type(theirs)) and ours.state_dict().keys() == theirs.state_dict().keys()
    assert_same_training((theirs, ours), case.call, case.shape, 20)


@pytest.mark.parametrize("case", SEARCHED, ids=str)
def test_what_is_only_searched_agrees(case):
    theirs = case.make().eval()
    ours = case.swap(theirs)
    assert isinstance(ours, type(theirs)) and ours.state_dict().keys() == theirs.state_dict().keys()
    assert_alike((theirs, ours), case.call, noise(*case.shape))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any op returned; within our own ops test_form_memory.py looks."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.skipif(not native_ops(), reason="the definitions in Python hold chunks of it")
@pytest.mark.parametrize("case", [*TRAINED, *SEARCHED], ids=str)
def test_vectors_times_codes_are_no_tensor_any_more(case):
    theirs = case.make()
    elements = []
    for module in (theirs, case.swap(theirs)):
        with Largest() as largest:
            step(module, case.call, noise(*case.shape))
        elements.append(largest.elements)
    matrix = noise(*case.shape).numel() // 8 * 32
    assert elements[0] >= matrix
    assert elements[1] < matrix or case.stand_in is other.Taming  # which returns one


STACKS = {
    "DacResidualVectorQuantizer": {
        "encoder_hidden_size": 2,
        "downsampling_ratios": [2, 2],
        "n_codebooks": 3,
        "quantizer_dropout": 0.5,
    },
    "EncodecResidualVectorQuantizer": {"target_bandwidths": [2.25]},
    "MimiSplitResidualVectorQuantizer": {
        "num_quantizers": 4,
        "hidden_size": 8,
        "vector_quantization_hidden_dimension": 8,
    },
}


@pytest.mark.parametrize("cls", STACKS)
def test_residual_stacks_of_transformers_agree(cls):
    transformers, name = pytest.importorskip("transformers", exc_type=ImportError), cls.split("Residual")[0]
    name = name.removesuffix("Split")
    config = getattr(transformers, f"{name}Config")(codebook_size=32, codebook_dim=8, **STACKS[cls])
    torch.manual_seed(0)
    theirs = getattr(importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}"), cls)(
        config
    )
    codebooks = [t for name, t in theirs.named_buffers() if name.endswith(("embed", "embed_sum"))]
    for i, codebook in enumerate(codebooks):
        codebook.copy_(noise(32, 8, seed=i))
    modules = theirs, replace_quantizers(copy.deepcopy(theirs))
    if not codebooks:  # which learns by gradient
        assert_same_training(modules, "forward", AUDIO, steps=5)
        return
    codes = [module.encode(noise(*AUDIO, seed=9)) for module in modules]
    assert len(codes[0]) == len(codebooks) and torch.equal(codes[1], codes[0])
    codes = codes[0].transpose(0, 1) if name == "Mimi" else codes[0]
    torch.testing.assert_close(modules[1].decode(codes), modules[0].decode(codes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_codebook_in_half_precision_is_searched_as_it_is(dtype):
    case = SEARCHED[2]
    ours = case.swap(case.make()).to(dtype)
    z = noise(*case.shape).to(dtype)
    exact = torch.cdist(z.double(), ours.embed.double()).argmin(-1)
    assert torch.equal(ours.encode(z), exact) and ours.decode(exact).dtype == dtype


def replicated(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate does it, for its own device."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replicated(child))
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        setattr(replica, name, tensor.clone())
    return replica


def loaded(module: nn.Module) -> nn.Module:
    """Through a file of the whole module."""
    torch.save(module, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, loaded, replicated], ids=lambda copied: copied.__name__)
@pytest.mark.parametrize("case", [TRAINED[-2], SEARCHED[0], SEARCHED[1]], ids=str)
def test_a_copy_searches_its_own_codes(case, copied):
    theirs = case.make()
    ours = case.swap(theirs)
    again = copied(copied(ours))
    theirs.embedding.weight = again.embedding.weight = nn.Parameter(noise(32, 8, seed=5))
    torch.testing.assert_close(again(noise(*case.shape)), theirs(noise(*case.shape)), **TOLERANCE)
    assert type(again) is type(ours) and isinstance(again, type(theirs))


def test_a_method_is_traced():
    theirs, z = SEARCHED[1].make(), noise(*SEARCHED[1].shape)
    traced = torch.export.export(SEARCHED[1].swap(theirs), (z,), strict=True)
    assert torch.equal(traced.module()(z), theirs(z))


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        (Theirs(*IBQ), lambda q: setattr(q, "cosine_similarity", True), "cosine_similarity"),
        (Theirs(*IBQ), lambda q: setattr(q, "remap", "used.npy"), "remap"),
        (TRAINED[5], lambda q: setattr(q, "l2_normalize", True), "l2_normalize"),
        (TRAINED[5], lambda q: setattr(q.embedding, "max_norm", 1.0), "embedding.max_norm"),
        (TRAINED[0], lambda q: setattr(q, "norm", nn.LayerNorm(8)), "norm"),
        (TRAINED[3], lambda q: q.register_parameter("scale", nn.Parameter(torch.ones(1))), "scale"),
        (TRAINED[5], lambda q: setattr(q.embedding, "padding_idx", 0), "padding_idx"),
    ],
)
def test_what_a_class_has_beside_the_known_attributes_is_refused_by_name(case, change, named):
    theirs = case.make()
    change(theirs)
    with pytest.raises(Unsupported, match=named):
        case.swap(theirs)


def nearest_of_two(module: nn.Module, z: Tensor) -> Tensor:
    return codebook_search(z, module.weight, metric="euclidean").indices


def test_a_class_of_ones_own_takes_methods_of_ones_own():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    swapped = replace_quantizers(model, {nn.Linear: with_methods(forward=nearest_of_two)})
    assert swapped is model and isinstance(model[1], nn.Linear)
    with pytest.raises(Unsupported, match="out_features"):
        replace_quantizers(nn.Linear(3, 2), {nn.Linear: with_methods("weight in_features", forward=nearest_of_two)})
    z = noise(5, 3)
    assert torch.equal(model[1](z), torch.cdist(z, model[1].weight).argmin(1))


class Pickled(nn.Module):
    """A class of ones own with all that a class may have."""

    subclasses: ClassVar[list[type]] = []

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        assert args or kwargs, "made without the arguments of its constructor"
        return super().__new__(cls)

    def __init__(self, codes: int, width: int = 3):
        super().__init__()
        self.weight = nn.Parameter(noise(codes, width))

    def __init_subclass__(cls, *, of: str = "") -> None:
        Pickled.subclasses.append(cls)

    def forward(self, z: Tensor) -> Tensor:
        return torch.cdist(z, self.weight).argmin(1)


class ByArguments(Pickled, of="__getnewargs__"):
    def __getnewargs__(self) -> tuple[int]:
        return (len(self.weight),)


class ByNamedArguments(Pickled, of="__getnewargs_ex__"):
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"codes": len(self.weight)}


class ByConstructor(Pickled, of="__reduce__"):
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self.weight.shape), {"weight": self.weight.data}

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        self.weight.data = state["weight"]


class ByConstructorOnly(Pickled, of="__reduce__ without weights"):
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self.weight.shape)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, loaded], ids=lambda copied: copied.__name__)
@pytest.mark.parametrize("cls", [ByArguments, ByNamedArguments, ByConstructor, ByConstructorOnly])
def test_a_copy_is_made_as_the_class_says(cls, copied):
    theirs = cls(7)
    with torch.no_grad():
        theirs.weight.copy_(noise(7, 3, seed=1))
    ours = with_methods(forward=nearest_of_two)(theirs)
    assert ours.weight is theirs.weight
    again, expected = copied(copied(ours)), copied(copied(theirs))
    assert type(again) is type(ours) and type(ours) is not cls
    assert torch.equal(again.weight, expected.weight) and torch.equal(again(noise(5, 3)), expected(noise(5, 3)))
    assert vars(again).keys() == vars(expected).keys()


def test_a_class_keeps_its_name_and_its_description_and_hears_of_no_subclass():
    known = [*Pickled.subclasses]
    made = type(with_methods(forward=nearest_of_two)(ByArguments(7)))
    assert made is not ByArguments and Pickled.subclasses == known
    for name in ("__doc__", "__module__", "__name__", "__qualname__"):
        assert getattr(made, name) == getattr(ByArguments, name)
    assert type(with_methods(forward=nearest_of_two)(Pickled(7))).__doc__ == Pickled.__doc__ is not None


@pytest.mark.parametrize("method", [partial(nearest_of_two), nn.Identity()], ids=["partial", "module"])
def test_a_method_that_is_no_function_is_refused(method):
    with pytest.raises(TypeError, match=r"forward must be a function.*got .*def forward\(module"):
        with_methods(forward=method)


@pytest.mark.parametrize("known", ["", "weight in_features out_features bias"])
def test_an_attribute_that_hides_a_method_is_refused(known):
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].forward = model[0].forward  # as the hooks of accelerate do
    adapters = {nn.Linear: with_methods(known, forward=nearest_of_two)}
    with pytest.raises(Unsupported, match=r"0 \(Linear\): forward is set on the module itself.*hooks.*replace"):
        replace_quantizers(model, adapters)
    del model[0].forward
    replace_quantizers(model, adapters)
    z = noise(5, 3)
    assert torch.equal(model(z), torch.cdist(z, model[0].weight).argmin(1))


def test_methods_are_replaced_once():
    ours = with_methods(forward=nearest_of_two)(nn.Linear(3, 2))
    with pytest.raises(Unsupported, match=r"replaced already.*in one call"):
        with_methods(extra_repr=nn.Linear.extra_repr)(ours)


def test_the_name_of_a_class_that_is_not_there_is_an_error_that_tells_those_that_are():
    with pytest.raises(ValueError, match=r"no 'taming'.*taming\.modules\.vqvae\.quantize\.VectorQuantizer2"):
        replace_quantizers(VectorQuantizer2(32, 8, 0.25), {VectorQuantizer2: "taming"})
    name = "taming.modules.vqvae.quantize.VectorQuantizer2"
    assert type(replace_quantizers(VectorQuantizer2(32, 8, 0.25), {VectorQuantizer2: name})) is not VectorQuantizer2
