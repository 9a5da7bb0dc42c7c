"""Attention probabilities of one layer, beside what the models compute with them."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.errors import UserError
from beitv2_fast.models.classifier import Classifier, ClassifierConfig
from beitv2_fast.models.student import Student, StudentConfig
from beitv2_fast.models.tokenizer import Tokenizer, TokenizerModelConfig
from beitv2_fast.models.vit import ViTConfig, normalize
from beitv2_fast.show.attention import attention_probabilities, most_attended, query_attention

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order
SHAPE = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 3, "heads": 3, "init_std": 0.5}


def small(kind: str) -> Student | Classifier | Tokenizer:
    torch.manual_seed(0)
    if kind == "student":
        model = Student(StudentConfig(ViTConfig(**SHAPE, layer_scale=0.1), num_codes=8, early_layer=2))
    elif kind == "classifier":
        model = Classifier(ClassifierConfig(ViTConfig(**SHAPE, position="relative"), 2))
    else:
        model = Tokenizer(TokenizerModelConfig(ViTConfig(**SHAPE, position="absolute"), 1, 8, 4, 6))
    for name, parameter in model.named_parameters():  # zero at first, and then a wrong use of them would not show
        if name.endswith(("relative_position_bias_table", "q_bias", "v_bias")):
            torch.nn.init.normal_(parameter)
    return model.eval()


def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["student", "classifier", "tokenizer"])
@pytest.mark.parametrize("layer", [1, 3])
def test_the_values_weighed_by_the_probabilities_are_what_the_layer_computes(kind, layer):
    model = small(kind)
    vit = model.encoder if kind == "tokenizer" else model
    seen = {}
    hook = vit.blocks[layer - 1].attn.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    with torch.no_grad():
        vit.forward_tokens(2 * images() - 1 if kind == "tokenizer" else normalize(images()))
    hook.remove()
    attn = vit.blocks[layer - 1].attn
    probabilities = attention_probabilities(model, images(), layer)  # [B, H, N, N]
    with torch.no_grad():
        values = seen["x"] @ attn.qkv.weight[-24:].T + attn.v_bias
        values = values.unflatten(-1, (3, 8)).transpose(1, 2)  # [B, H, N, d]
        expected = attn.proj((probabilities @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["out"], expected, **TOLERANCE)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 17), **TOLERANCE)


def test_the_last_layer_is_meant_if_none_is_named():
    model = small("student")
    assert torch.equal(attention_probabilities(model, images()), attention_probabilities(model, images(), 3))


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_that_does_not_exist_is_named(layer):
    with pytest.raises(UserError, match=f"layer {layer} does not exist.*1 to 3"):
        attention_probabilities(small("student"), images(), layer)


def test_the_attention_of_a_query_patch_is_its_row_without_cls():
    probabilities = torch.rand(2, 3, 17, 17)
    found = query_attention(probabilities, 6, (4, 4))
    assert found.shape == (2, 3, 4, 4)
    assert torch.equal(found[1, 2, 3, 1], probabilities[1, 2, 7, 1 + 3 * 4 + 1])


def test_the_most_attended_patches_are_the_fewest_that_hold_the_share():
    attention = torch.tensor([[0.5, 0.02], [0.08, 0.4]])
    assert most_attended(attention, 0.6).tolist() == [[True, False], [False, True]]
    assert most_attended(attention, 0.4).tolist() == [[True, False], [False, False]]
    assert most_attended(2 * attention, 0.6).tolist() == [[True, False], [False, True]]


def test_the_most_attended_patches_are_those_of_each_head_by_itself():
    attention = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(most_attended(attention), torch.stack([most_attended(a) for a in attention]))
