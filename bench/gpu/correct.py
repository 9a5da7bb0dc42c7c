"""Section correct: whole models on the device against the same models on the CPU: losses, gradients, codebooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from beitv2_fast.config.presets import PRETRAIN, TOKENIZER
from beitv2_fast.models.attention import IMPLEMENTATIONS
from beitv2_fast.weights.build import build_student, build_tokenizer
from bench.gpu.run import Run
from bench.harness import DEVICE

# Of a gradient's norm. fp32 sums in another order; bf16 keeps 8 bits of every activation.
TOLERANCES = {"fp32": 2e-3, "bf16": 6e-2}
SMALL = {"dim": 192, "depth": 3, "heads": 3, "image_size": 96}
NUM_CODES, MASKED, TARGET_DIM = 1000, 14, 64
QUANTIZER_STEPS = 12  # k-means in the first, dead codes restart in the eighth

Loss = Callable[[nn.Module, torch.device], Tensor]


def correct(run: Run) -> None:
    small = {**SMALL, "dim": 24} if run.tiny else SMALL
    # "fp32" means TF32 in the convolution of the patch embedding, unless it is told otherwise.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch in (4, 1):  # of one image: sizes of 1 become constants in a Triton kernel
            for attention in IMPLEMENTATIONS if batch == 4 else ("auto",):
                _student(run, small, batch, attention)
        _tokenizer(run, small)


def _student(run: Run, small: dict[str, int], batch: int, attention: str) -> None:
    with run.item("student", batch=batch, attention=attention):
        run.need_time()
        config = replace(PRETRAIN["base"], **small, early_layer=2, num_masked=MASKED, attention="math")
        cpu = build_student(config, NUM_CODES).train()
        _fill_tables(cpu)
        there = build_student(replace(config, attention=attention), NUM_CODES).train()
        images, labels = torch.randn(batch, 3, 96, 96), torch.randint(NUM_CODES, (batch * MASKED,))
        mask = torch.rand(batch, 36).argsort(1) < MASKED

        def loss(model: nn.Module, device: torch.device) -> Tensor:
            return model(images.to(device), mask.to(device), labels.to(device), MASKED).loss

        _compare(run, "student", cpu, there, loss, batch=batch, attention=attention)


def _fill_tables(model: nn.Module) -> None:
    """Bias tables start at zero, where a wrong index would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias_table" in name:
                parameter.normal_(0, 0.5)


def _compare(run: Run, what: str, cpu: nn.Module, there: nn.Module, loss: Loss, **about: object) -> None:
    there.load_state_dict(cpu.state_dict())
    there.to(DEVICE)
    expected = loss(cpu, torch.device("cpu"))
    expected.backward()
    exact = {name: parameter.grad for name, parameter in cpu.named_parameters()}
    for precision, tolerance in TOLERANCES.items():
        there.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            found = loss(there, DEVICE)
        found.backward()
        errors = {name: _difference(parameter.grad.cpu(), exact[name]) for name, parameter in there.named_parameters()}
        worst = max(errors, key=errors.get)
        run.say(
            what, **about, precision=precision, loss=found.item(), cpu_loss=expected.item(), worst=worst,
            difference=errors[worst], tolerance=tolerance, right=errors[worst] < tolerance,
        )  # fmt: skip


def _difference(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm().clamp(min=1e-12)).item()


def _tokenizer(run: Run, small: dict[str, int]) -> None:
    """Steps of forward and backward, in which the codebook learns: the codes that agree, and the worst gradient."""
    with run.item("tokenizer"):
        run.need_time()
        config = replace(TOKENIZER["base"], **small, num_codes=500, decoder_depth=1, attention="math")
        cpu = build_tokenizer(config, TARGET_DIM).train()
        there = copy.deepcopy(cpu).to(DEVICE)
        for step in range(QUANTIZER_STEPS):
            images, target = torch.rand(8, 3, 96, 96), torch.randn(8, 36, TARGET_DIM)
            losses = []
            for model, device in ((cpu, torch.device("cpu")), (there, DEVICE)):
                model.zero_grad(set_to_none=True)
                out = model(images.to(device), target.to(device))
                out.loss.backward()
                losses.append(out.loss.item())
            if step in (0, 1, 7, QUANTIZER_STEPS - 1):
                moved = (cpu.quantize.codebook - there.quantize.codebook.cpu()).abs().amax(1)
                pairs = zip(cpu.parameters(), there.parameters(), strict=True)
                difference = max(_difference(b.grad.cpu(), a.grad) for a, b in pairs)
                same = torch.equal(cpu.quantize.codebook, there.quantize.codebook.cpu())
                run.say(
                    "tokenizer", step=step, losses=losses, difference=difference, bits_of_the_codebook=same,
                    codes_within_1e_4=(moved < 1e-4).float().mean().item(),
                )  # fmt: skip
