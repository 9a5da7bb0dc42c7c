"""docs/quantizer_compatibility.md is what this folder's tests compare; ``python -m`` this module writes it anew."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from beitv2_fast import ADAPTERS, Unsupported, replace_quantizers

from ..support.quantizers import noise
from ..support.replaced import vector_quantize
from .test_methods import SEARCHED, TRAINED
from .test_vq_pytorch_options import KEPT, REFUSED, WITHOUT_EFFECT

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quantizer_compatibility.md"
VQ = "vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize"
# Of adapters that are classes: what their own tests compare them with.
COMPARED = {
    VQ: "20 steps; options below",
    "vector_quantize_pytorch.sim_vq.SimVQ": "20 steps; `rotation_trick`, `commitment_weight`, `frozen_codebook_dim`, "
    "`codebook_transform`, `channel_first`; in `ResidualSimVQ`",
    "diffusers.models.autoencoders.vae.VectorQuantizer": "20 steps; `legacy`, `remap`, `unknown_index`, "
    "`sane_index_shape`; in `VQModel`",
    "norm_ema_quantizer.NormEMAVectorQuantizer": "20 steps of a stand-in; `beta`, `embedding.update`, codes of any "
    "length",
    "src.IBQ.modules.vqvae.quantize.VectorQuantizer2": "as taming's",
    "taming.modules.vqvae.quantize.VectorQuantizer2": "20 steps of a stand-in; `legacy`",
}
# The arguments of VectorQuantize's forward, beside x.
CALL = "indices mask lens sample_codebook_temp freeze_codebook return_loss_breakdown ema_update_weight topk"
REFUSED_IN_A_CALL = "codebook_transform_fn accum_ema_update ema_update"
HEAD = """# What `replace_quantizers` swaps

Written by `python -m tests.quantize.test_compatibility` from the tests that compare a module with its replacement; one
of them fails when this page is stale. Classes are told by their full names. A copy under another name is named by the
caller, by the class that it is a copy of:

    replace_quantizers(model, {TheirQuantizer: "tokenizer.tokenizer_image.vq_model.VectorQuantizer"})

Where methods are replaced, the module's weights, state dict and other methods stay, and its class becomes a subclass.
An attribute, parameter or submodule that is in use and not in the third column is refused by its name, before anything
is changed; with `unsupported="keep"` that quantizer stays as it is. What searches no codebook (FSQ, LFQ, BSQ, Gumbel)
is left alone.

| their class | ours | reckons with | compared: values, gradients, state |
|---|---|---|---|
"""
OWN = """
## A class of your own

A function for each method that searches, `codebook_search` or `vector_quantize` of `beitv2_fast.kernels` in it:

```python
import torch
from beitv2_fast import replace_quantizers, with_methods
from beitv2_fast.kernels import codebook_search


class MyQuantizer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = torch.nn.Parameter(torch.randn(64, 8))

    def forward(self, z):  # [B, T, 8] -> [B, T]
        return torch.cdist(z, self.codes.expand(len(z), -1, -1)).argmin(-1)


def forward(module, z):
    return codebook_search(z.flatten(0, 1), module.codes, metric="euclidean").indices.view(z.shape[:-1])


model = torch.nn.Sequential(MyQuantizer())
z = torch.randn(2, 5, 8)
indices = model(z)
replace_quantizers(model, {MyQuantizer: with_methods("codes", forward=forward)})
assert torch.equal(model(z), indices)
```
"""


def code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names.split()))


def row(name: str) -> str:
    """Of the table."""
    adapter = ADAPTERS[name]
    cases = [case for case in (*TRAINED, *SEARCHED) if ADAPTERS[case.name] is adapter]
    cases = [case for case in cases if case.name == name] or cases
    if isinstance(adapter, type):
        ours, known = f"`{adapter.__name__}`", code(getattr(adapter, "known", "")) or "all that it has"
    else:
        held = inspect.getclosurevars(adapter).nonlocals
        ours, known = "its " + code(" ".join(held["methods"])), code(held["known"])
    return f"| `{name}` | {ours} | {known} | {COMPARED.get(name) or compared(cases)} |"


def compared(cases: list[Any]) -> str:
    steps = "20 steps" if any(case in TRAINED for case in cases) else "the search"
    stand_in = " of a stand-in" if all(case.stand_in for case in cases) else ""
    options = code(" ".join({option for case in cases for option in case.options}))
    return f"{steps}{stand_in}" + (f"; {options}" if options else "")


def page() -> str:
    rows = "\n".join(row(name) for name in sorted(map(str, ADAPTERS)))
    refused = ", ".join(f"`{name}`" for name in sorted(REFUSED))
    return f"""{HEAD}{rows}

## `VectorQuantize` of vector-quantize-pytorch 1.32

- Options kept: {code(KEPT)}.
- Refused: {refused}.
- Without effect where their option is not used: {code(" ".join(WITHOUT_EFFECT))}.
- Arguments of a call kept: {code(CALL)}; refused: {code(REFUSED_IN_A_CALL)}.
- Its layers are swapped inside `ResidualVQ`, `GroupedResidualVQ`, `HierarchicalVQ` and `RandomProjectionQuantizer`;
  an implicit neural codebook around them is refused.
{OWN}"""


def test_the_page_is_what_the_tests_compare():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_known_class_is_compared():
    tested = {id(ADAPTERS[case.name]) for case in (*TRAINED, *SEARCHED)}
    assert [name for name, adapter in ADAPTERS.items() if name not in COMPARED and id(adapter) not in tested] == []


def test_every_argument_of_a_call_of_vector_quantize_pytorch_has_been_thought_of():
    package = pytest.importorskip("vector_quantize_pytorch")
    names = set(inspect.signature(package.VectorQuantize.forward).parameters) - {"self", "x"}
    assert names == {*CALL.split(), *REFUSED_IN_A_CALL.split()}


@pytest.mark.parametrize("name", REFUSED_IN_A_CALL.split())
def test_arguments_of_a_call_that_are_refused_are_named(name):
    with pytest.raises(Unsupported, match=name):
        replace_quantizers(vector_quantize())(noise(2, 3, 16), **{name: 1})


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
