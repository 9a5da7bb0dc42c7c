"""Whole models on a GPU against the CPU: losses, gradients, an optimizer's step, low precision, compilation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.distributed import World
from beitv2_fast.models.features import features
from beitv2_fast.show.attention import attention_probabilities
from beitv2_fast.training.ema import ModelEMA
from beitv2_fast.training.monitor import Undo, poisoned
from beitv2_fast.training.optim import TorchBackend, parameter_groups

from ..support.gpu import HERE, TOLERANCE, autocast, cuda_only, deterministic, distance, here, no_waiting
from ..support.model_cases import CASES, Case
from .test_models import gradients

pytestmark = pytest.mark.gpu
LOW_PRECISION = [torch.bfloat16, torch.float16]
WORLD = World(0, 1, torch.device(HERE))


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(params=[4, 1], ids=["four images", "one image"])
def count(request, case: Case) -> int:
    """1: integers equal to 1 are constants in Triton."""
    return max(request.param, case.least)


def assert_near(ours: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    """Each gradient. One that is 0 but for rounding, as of a bias before a batch norm, is measured by the largest."""
    assert ours.keys() == exact.keys()
    floor = 1e-3 * max(gradient.norm().item() for gradient in exact.values())
    errors = {n: (ours[n].cpu() - g.cpu()).norm().item() / (g.norm().item() + floor) for n, g in exact.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < tolerance, (worst, errors[worst])


def whole(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.cpu().flatten() for gradient in gradients.values()])


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().cpu().clone() for name, b in model.named_buffers()}


def test_losses_gradients_and_buffers_are_the_cpu_s(case, count):
    theirs, batch = case.build(), case.batch(count)
    ours = here(case.build())
    loss, exact = case.loss(ours, *here(batch)), case.loss(theirs, *batch)
    assert loss.device.type == HERE
    torch.testing.assert_close(loss.cpu(), exact, rtol=1e-4, atol=1e-5)
    assert_near(gradients(ours, loss), gradients(theirs, exact), TOLERANCE[torch.float32])
    for name, buffer in buffers(theirs).items():
        torch.testing.assert_close(buffers(ours)[name], buffer, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_under_autocast_they_stay_near_the_cpu_s_fp32(case, count, dtype):
    # One code: no rounding decides which of several is nearest.
    options = {"num_codes": 1} if case is CASES["tokenizer"] else {}
    theirs, batch = case.build(**options), case.batch(count)
    ours = here(case.build(**options))
    with autocast(dtype):
        loss = case.loss(ours, *here(batch))
    exact = case.loss(theirs, *batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.cpu(), exact, rtol=TOLERANCE[dtype] / 3, atol=0)
    scale = 2.0**10 if dtype == torch.float16 else 1.0  # as a GradScaler would, against gradients under fp16's range
    found = {name: g / scale for name, g in gradients(ours, loss * scale).items()}
    expected = gradients(theirs, exact)
    if case is CASES["segmenter"]:  # its batch norms, over a few pixels of a few images, magnify what was rounded
        assert distance(whole(found), whole(expected)) < 10 * TOLERANCE[dtype]
    else:
        assert_near(found, expected, TOLERANCE[dtype])


def step_both(case: Case, config: PretrainConfig) -> tuple[list[nn.Module], list[Tensor], list[TorchBackend]]:
    """Two steps of the backend, here and on the CPU, from the CPU's gradients."""
    models = [here(case.build()), case.build()]
    backends = [
        TorchBackend(model, parameter_groups(model, 0.05), config, replace(WORLD, device=torch.device(device)))
        for model, device in zip(models, (HERE, "cpu"), strict=True)
    ]
    for _ in range(2):
        backends[1].backward(case.loss(models[1], *case.batch(4)), last=True)
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            ours.grad = here(theirs.grad)
        norms = [backend.step(1e-2) for backend in backends]
    return models, norms, backends


@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_an_optimizer_s_step_moves_the_weights_as_on_the_cpu(case, clip):
    (ours, theirs), norms, backends = step_both(case, PretrainConfig(clip_grad=clip))
    torch.testing.assert_close(norms[0].cpu(), norms[1], rtol=1e-5, atol=0)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5, msg=name)
    states = [backend.optimizer_state() for backend in backends]
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name].cpu(), value, rtol=1e-4, atol=1e-9, msg=name)


def test_a_gradient_that_is_not_finite_changes_nothing(case):
    model = here(case.build())
    backend = TorchBackend(model, parameter_groups(model, 0.05), PretrainConfig(), WORLD)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    undo = Undo(model)
    batch = here(case.batch(4))
    for waiting in (True, False):  # first it compiles, and the optimizer makes its state
        backend.backward(poisoned(case.loss(model, *batch) * torch.nan), last=True)
        with no_waiting() if not waiting else nullcontext():
            undo.back(norm := backend.step(1e-2))
        undo.tell()
        assert not norm.isfinite()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_optimizer_s_state_restored_from_the_cpu_goes_on_to_the_same_bits():
    case, config = CASES["classifier"], PretrainConfig()
    models = [here(case.build()) for _ in range(2)]
    batch = here(case.batch(4))

    def trained(model: nn.Module, backend: TorchBackend) -> None:
        backend.backward(case.loss(model, *batch), last=True)
        backend.step(1e-2)

    backends = [TorchBackend(model, parameter_groups(model, 0.05), config, WORLD) for model in models]
    trained(models[0], backends[0])
    models[1].load_state_dict({name: value.cpu().clone() for name, value in models[0].state_dict().items()})
    backends[1].restore({name: value.cpu().clone() for name, value in backends[0].optimizer_state().items()})
    for parameters in (model.parameters() for model in models):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
    for backend in backends:
        backend.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_the_moving_average_of_the_weights_is_the_cpu_s(case):
    averages = []
    for model in (here(case.build()), case.build()):
        ema = ModelEMA(model, 0.9)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        ema.update(model, step=3)
        averages.append(ema.model)
    for a, b in zip(*(average.parameters() for average in averages), strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("name", ["tokenizer", "student", "classifier"])
def test_checkpointing_gives_the_same_bits_with_drop_path(name):
    case, results = CASES[name], []
    for checkpointing in (False, True):
        model = here(case.build(checkpointing=checkpointing, drop_path=0.4))
        torch.manual_seed(7)
        with deterministic():
            results.append(gradients(model, case.loss(model, *here(case.batch(4)))))
    assert all(torch.equal(results[0][name], gradient) for name, gradient in results[1].items())


def test_drop_path_repeats_with_the_seed_and_differs_without(case):
    model, batch = here(case.build(drop_path=0.5)).train(), here(case.batch(8))
    losses, drawn = [], []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loss = case.loss(model, *batch)
        losses.append(loss.detach())
        drawn.append(whole(gradients(model, loss)))
        if "quantize.codebook" in model.state_dict():
            model = here(case.build(drop_path=0.5))  # whose codebook has not moved
    torch.testing.assert_close(losses[0], losses[1])
    assert distance(drawn[2], drawn[0]) > 0.01  # a new head's loss hardly changes


def test_forward_and_backward_wait_for_nothing(case):
    model, batch = here(case.build()), here(case.batch(4))
    for dtype in (torch.float32, torch.bfloat16):
        for waiting in (True, False):  # first it compiles, and the quantizer looks at its clock
            model.zero_grad(set_to_none=True)
            if waiting:
                with autocast(dtype):
                    loss = case.loss(model, *batch)
                loss.backward()
                continue
            with no_waiting():
                with autocast(dtype):
                    loss = case.loss(model, *batch)
                loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["tokenizer", "student", "student, no aggregation", "classifier"])
def test_features_and_attention_maps_are_the_cpu_s(name):
    case = CASES[name]
    theirs, (images, *_) = case.build().eval(), case.batch(3)
    ours = here(case.build()).eval()
    for a, b in zip(features(ours, images.to(HERE)), features(theirs, images), strict=True):
        assert distance(a, b) < TOLERANCE[torch.float32]
    for layer in (1, None):
        maps = [attention_probabilities(m, x, layer) for m, x in ((ours, images.to(HERE)), (theirs, images))]
        assert distance(*maps) < TOLERANCE[torch.float32]


def test_a_tokenizer_s_codes_and_similarity_are_the_cpu_s():
    case = CASES["tokenizer"]
    theirs, (images, target) = case.build().eval(), case.batch(4)
    ours = here(case.build()).eval()
    codes = ours.encode(images.to(HERE)).cpu()
    assert (codes == theirs.encode(images)).float().mean() > 0.99
    assert distance(ours.similarity(images.to(HERE), target.to(HERE)), theirs.similarity(images, target)) < 1e-2


def test_a_student_s_guesses_are_the_cpu_s():
    for name in ("student", "student, separate heads", "student, no aggregation"):
        theirs, (images, mask, *_) = CASES[name].build().eval(), CASES[name].batch(2)
        ours = here(CASES[name].build()).eval()
        with torch.no_grad():
            pairs = zip(ours.predict(images.to(HERE), mask.to(HERE)), theirs.predict(images, mask), strict=True)
        assert all(distance(a, b) < TOLERANCE[torch.float32] for a, b in pairs)


@pytest.mark.parametrize("attention", ["native", "sdpa", "math"])
@pytest.mark.parametrize("name", ["student", "classifier"])
def test_every_attention_gives_the_bias_tables_the_cpu_s_gradients(name, attention):
    case = CASES[name]
    theirs, batch = case.build(attention="math"), case.batch(4)
    exact = {n: g for n, g in gradients(theirs, case.loss(theirs, *batch)).items() if "bias_table" in n}
    for dtype in (torch.float32, torch.bfloat16):
        ours = here(case.build(attention=attention))
        with autocast(dtype):
            loss = case.loss(ours, *here(batch))
        found = {n: g for n, g in gradients(ours, loss).items() if "bias_table" in n}
        assert len(exact) == (1 if name == "student" else 3)
        assert_near(found, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tokenizer", "student", "student, separate heads", "classifier"])
def test_a_compiled_step_has_the_losses_and_gradients_of_the_eager_one(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    case, results = CASES[name], []
    for compiled in (False, True):
        model = here(case.build(depth=2))
        run = torch.compile(model, fullgraph=True) if compiled else model
        with autocast(dtype):
            loss = case.loss(run, *here(case.batch(2)))
        results.append({"loss": loss.detach().cpu(), **gradients(model, loss)})
    torch.testing.assert_close(results[1].pop("loss"), results[0].pop("loss"), rtol=TOLERANCE[dtype] / 3, atol=0)
    assert_near(results[1], results[0], TOLERANCE[dtype])


@cuda_only
@pytest.mark.parametrize("name", ["student", "classifier", "segmenter", "tokenizer"])
def test_memory_of_a_second_step_is_that_of_the_first(name):
    case = CASES[name]
    model, batch, peaks = here(case.build()), here(case.batch(4)), []
    for _ in range(4):
        torch.cuda.reset_peak_memory_stats()
        gradients(model, case.loss(model, *batch))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[3] == peaks[2]


@pytest.mark.parametrize("name", [name for name in CASES if name != "segmenter"])  # whose upsampling cannot
def test_the_same_step_has_the_same_bits_every_time(name):
    case, results = CASES[name], []
    for _ in range(2):
        model = here(case.build())
        with deterministic():
            results.append(gradients(model, case.loss(model, *here(case.batch(4)))))
    assert all(torch.equal(results[0][n], gradient) for n, gradient in results[1].items())
