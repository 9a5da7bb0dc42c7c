"""A compiled quantizer (inductor) has eager's values, gradients and state in every step, for each kind of option."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from beitv2_fast.quantize.quantizer import Quantized

from ..support.quantizers import narrow, quantizer

CASES = {  # a covering set: rule, metric, gradient, heads, restarts, with a mask (True) and without
    "code_ema": ({}, True),
    "code_ema, quick": ({"decay": 0.5, "dead_after": 1.0}, False),
    "sum_ema": ({"metric": "euclidean", "dead_after": 1.0}, True),
    "sum_ema, k-means again": ({"learning": "sum_ema", "restart_below": 0.5, "restart_after": 4}, False),
    "sum_ema, heads": ({"metric": "euclidean", "heads": 2, "dead_below": 0.5}, True),
    "gradient, cosine": ({"learning": "gradient"}, False),
    "gradient, euclidean": ({"learning": "gradient", "metric": "euclidean", "dead_after": 1.0}, False),
    "gradient, rotation, heads, drawn": (
        {"learning": "gradient", "gradient": "rotation", "heads": 2, "temperature": 0.5},
        True,
    ),
    "rotation, shared heads": ({"gradient": "rotation", "heads": 2, "share_codebook": True, "dead_after": 1.0}, False),
    "frozen": ({"learning": "frozen", "metric": "euclidean"}, True),
    "residual": ({"num_quantizers": 3}, True),
    "residual, shared, gradient": ({"num_quantizers": 2, "share_stages": True, "learning": "gradient"}, False),
}


@pytest.fixture(scope="module", autouse=True)
def compiled_anew(tmp_path_factory):
    """What lies in the user's cache of compiled code may be stale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def train_step(
    run: Callable[..., Quantized], model: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What a step of ``run``, the model or its compiled form, returns, its gradients and the state before the
    optimizer's step, which follows."""
    z = x.clone().requires_grad_()
    out = run(z, mask)
    (out.loss + out.quantized.square().sum()).backward()
    result = {name: value.detach() for name, value in out._asdict().items()} | {"z.grad": z.grad}
    result |= {f"after backward: {name}": value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            result[f"{name}.grad"] = parameter.grad
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
    return result


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_training_step_has_eager_s_values_gradients_and_state(case):
    options, masked = CASES[case]
    eager, model = quantizer(**options), quantizer(**options)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    mask = torch.arange(20).expand(3, 20) < torch.tensor([[20], [15], [3]]) if masked else None
    for step in range(10):
        expected, got = (
            train_step(eager, eager, narrow(step), mask),
            train_step(compiled, model, narrow(step), mask),
        )
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=f"step {step}, {name}")
    assert eager.usage() == pytest.approx(model.usage())


def test_a_compiled_quantizer_decodes_what_it_found_before_it_learned_again():
    def two_steps(q, z):
        first = q(z)
        found = q.decode(first.indices)
        q(z + 1)
        return first.quantized, found

    options = {"metric": "euclidean", "decay": 0.5}
    eager, model = quantizer(**options), quantizer(**options)
    torch._dynamo.reset()
    expected = two_steps(eager, narrow(0))
    torch.testing.assert_close(torch.compile(two_steps, fullgraph=True)(model, narrow(0)), expected)


def test_a_compiled_quantizer_starts_again_where_its_buffers_are_reset_by_hand():
    eager, model = quantizer(), quantizer()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for step in range(4):
        if step == 2:
            for q in (eager, model):
                q.initialized.data.fill_(False)
        for q in (eager, compiled):
            q(narrow(step))
        torch.testing.assert_close(model.codebook, eager.codebook)
        if step == 2:
            anew = quantizer()
            anew.steps.fill_(2)
            anew(narrow(step))
            torch.testing.assert_close(model.codebook, anew.codebook)


def test_a_compiled_quantizer_that_a_checkpoint_recomputes_is_refused():
    model = quantizer()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    out = torch.utils.checkpoint.checkpoint(compiled, narrow(0).requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="out of the checkpointed region"):
        out.quantized.square().sum().backward()
