"""The cost model's counts are those of the modules: FLOPs by torch's counter, parameters, bytes kept for backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from beitv2_fast.kernels.native import native_ops
from beitv2_fast.models.student import Student, StudentConfig
from beitv2_fast.models.tokenizer import Tokenizer, TokenizerModelConfig
from beitv2_fast.models.vit import ViTConfig
from bench import model_cost, reference_structure
from bench.model_cost import ATTENTION_PRODUCTS, meta_parameters, student_parts, tokenizer_parts

from ..support.counting import kept

BATCH, MASKED = 2, 6
VIT = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 3, "heads": 2}
TOKENIZER = TokenizerModelConfig(
    ViTConfig(**VIT, position="absolute"), decoder_depth=2, num_codes=64, code_dim=8, teacher_dim=20, kmeans_init=False
)
STUDENT = StudentConfig(ViTConfig(**VIT, layer_scale=0.1), num_codes=64, early_layer=2)


def counted(loss: Callable[[], Tensor]) -> dict[str, int]:
    """FLOPs of a forward and backward by kind: products of matrices, batched ones (attention), convolutions."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    kinds = {"mm": "linear", "addmm": "linear", "bmm": "attention"}
    kinds |= {"convolution": "embedding", "convolution_backward": "embedding"}
    result: Counter[str] = Counter()
    for op, flops in counter.get_flop_counts()["Global"].items():
        result[kinds[op._overloadpacket.__name__ if hasattr(op, "_overloadpacket") else op.__name__]] += flops
    return dict(result)


def modeled(parts: list[model_cost.Part], without: str) -> dict[str, float]:
    """The same from the model, without the frozen network's parts and the optimizer."""
    result: Counter[str] = Counter()
    for part in parts:
        if part.name.startswith(without) or part.name == "AdamW":
            continue
        kind = next((k for k in ("attention", "embedding") if k in part.name), "linear")
        result[kind] += part.flops
    result["attention"] *= (ATTENTION_PRODUCTS - 1) / ATTENTION_PRODUCTS  # the reference's structure keeps its scores
    return dict(result)


def test_flops_of_a_tokenizer_step_are_those_that_torch_counts():
    model = reference_structure.Tokenizer(TOKENIZER)
    images, target = torch.rand(BATCH, 3, 32, 32), torch.randn(BATCH, 16, 20)
    found = counted(lambda: model(images, target))
    found["linear"] -= 2 * BATCH * 16 * 64 * 8  # the one-hot update, a product that ours does not have
    assert found == modeled(tokenizer_parts(TOKENIZER, BATCH, 0), "teacher")


def test_flops_of_a_pre_training_step_are_those_that_torch_counts():
    model = reference_structure.Student(STUDENT)
    mask = torch.rand(BATCH, 16).argsort(1) < MASKED
    labels = torch.zeros(BATCH * MASKED, dtype=torch.int64)
    found = counted(lambda: model(torch.rand(BATCH, 3, 32, 32), mask, labels))
    assert found == modeled(student_parts(STUDENT, BATCH, MASKED, 0), "tokenizer")


@pytest.mark.parametrize(("model", "config"), [(Tokenizer, TOKENIZER), (Student, STUDENT)])
def test_parameters_are_counted_as_the_module_has_them(model, config):
    assert meta_parameters(model, config) == sum(p.numel() for p in model(config).parameters())


def test_activations_kept_for_backward_are_those_of_the_module_within_a_tenth():
    """Of one block's worth, the difference between two depths: heads and embeddings are small change."""
    if not native_ops():
        pytest.skip("the C++ ops are not compiled, and the fallback for attention keeps its scores")

    def measured(depth: int) -> int:
        model = Student(StudentConfig(ViTConfig(**{**VIT, "depth": depth}, layer_scale=0.1), 64, early_layer=1)).train()
        mask = torch.rand(BATCH, 16).argsort(1) < MASKED
        labels = torch.zeros(BATCH * MASKED, dtype=torch.int64)
        images = torch.rand(BATCH, 3, 32, 32)
        with torch.autocast("cpu", torch.bfloat16):
            return kept(model, images, mask, labels, MASKED)

    parts = model_cost.block_parts("block", ViTConfig(**VIT, layer_scale=0.1), BATCH, 1)
    assert measured(4) - measured(3) == pytest.approx(sum(part.kept for part in parts), rel=0.1)


def test_the_report_says_that_it_is_a_model(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["model_cost"])
    model_cost.main()
    text = capsys.readouterr().out
    assert text.count("model, not measured") == 4 and "A100" in text and "H100" in text
