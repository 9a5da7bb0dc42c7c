"""State of a quantizer that comes by unusual ways: default dtypes, meta, to_empty, functional_call, resets by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from beitv2_fast import FusedVectorQuantizer
from beitv2_fast.quantize import collapse as dead_codes
from beitv2_fast.quantize.kmeans import kmeans

from ..support.quantizers import assert_same, everything, narrow, noise

RULES = ({}, {"metric": "euclidean"}, {"learning": "gradient"}, {"restart_below": 0.5, "heads": 2})
PRIVATE = ("window_counts", "window_replaced")


def quantizer(**options: object) -> FusedVectorQuantizer:
    return FusedVectorQuantizer(16, 8, **{"dead_after": 1.0, **options}).train()


def steps(q: FusedVectorQuantizer, start: int = 0, count: int = 10) -> dict[str, torch.Tensor]:
    for step in range(start, start + count):
        q(narrow(step, (60, 8)))
    return everything(q)


@pytest.fixture
def k_means(monkeypatch) -> list[int]:
    """Grows by one with every k-means."""
    calls: list[int] = []
    monkeypatch.setattr(dead_codes, "kmeans", lambda *args, **options: calls.append(1) or kmeans(*args, **options))
    return calls


@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_changes_no_state_but_a_parameter_s_dtype(options, dtype):
    expected = quantizer(**options)
    torch.set_default_dtype(dtype)
    try:
        other = quantizer(**options)
        trained = steps(other)
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.codebook.dtype == (dtype if "learning" in options else torch.float32)
    if "learning" not in options:
        assert_same(trained, steps(expected))
    else:
        assert all(t.dtype == everything(expected)[name].dtype for name, t in trained.items() if name != "codebook")
        assert other.usage()["replaced_codes"] > 0 and trained["codebook"].isfinite().all()


@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_loads_into_a_module_made_on_meta_or_of_uninitialized_memory(options, assign, dtype):
    trained = quantizer(**options)
    steps(trained)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in trained.state_dict().items()}
    reference = quantizer(**options)
    reference.load_state_dict(state)
    with torch.device("meta"):
        other = quantizer(**options)
    if not assign:
        other.to_empty(device="cpu")
        for t in (*other.parameters(), *other.buffers()):
            t.data.fill_(True if t.dtype == torch.bool else 77)
    other.load_state_dict(state, assign=assign)
    if assign and "learning" in options:
        reference.codebook.data = reference.codebook.data.to(dtype)  # a parameter takes the dtype
    assert_same(everything(other), everything(reference))
    assert all(getattr(other, name).eq(0).all() for name in PRIVATE)
    assert_same(steps(other, 10), steps(reference, 10))
    assert other.usage()["used_codes"] > 0 and other.usage()["replaced_codes"] == reference.usage()["replaced_codes"]


@pytest.mark.parametrize("options", RULES)
def test_reset_parameters_makes_uninitialized_memory_a_new_quantizer(options):
    with torch.device("meta"):
        other = quantizer(**options)
    other.to_empty(device="cpu").reset_parameters()
    assert_same(everything(other), everything(quantizer(**options)))
    assert_same(steps(other), steps(quantizer(**options)))


@pytest.mark.parametrize("options", RULES[:3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_from_pretrained_of_transformers_brings_back_the_state_and_an_empty_window(options, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.head, self.quantizer = torch.nn.Linear(8, 8), quantizer(**options)
            self.post_init()

    model = Model(transformers.PretrainedConfig()).train()
    steps(model.quantizer)
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, dtype=dtype).train()
    assert loaded.head.weight.dtype == (dtype or torch.float32)
    assert loaded.quantizer.usage() == {"used_codes": 0.0, "perplexity": 1.0, "replaced_codes": 0.0}
    twin = quantizer(**options)
    twin.load_state_dict(model.quantizer.state_dict())
    if dtype is not None and "learning" in options:
        twin.codebook.data = twin.codebook.data.to(dtype)
    assert_same(everything(loaded.quantizer), everything(twin))
    assert_same(steps(loaded.quantizer, 10), steps(twin, 10))


@pytest.mark.parametrize("on_a_device", [False, True])
def test_k_means_follows_the_state_that_functional_call_brings(on_a_device, monkeypatch, k_means):
    monkeypatch.setattr(dead_codes, "host_waits_for", lambda x: on_a_device)
    started, fresh = quantizer(), quantizer(seed=1)
    steps(started)
    own = everything(started)
    for _ in range(2):
        functional = everything(fresh)
        torch.func.functional_call(started, functional, noise(60, 8))
        direct = copy.deepcopy(fresh)
        direct.seed = started.seed
        direct(noise(60, 8))
        assert_same(functional, everything(direct))
    assert len(k_means) == 5
    assert_same(everything(started), own)
    twin = quantizer()
    steps(twin, 0, 12)
    assert_same(steps(started, 10, 2), everything(twin))


@pytest.mark.parametrize("on_a_device", [False, True])
def test_buffers_reset_by_hand_start_the_codebook_again(on_a_device, monkeypatch, k_means):
    monkeypatch.setattr(dead_codes, "host_waits_for", lambda x: on_a_device)
    q, fresh = quantizer(), everything(quantizer())
    steps(q)
    for name, tensor in (*q.named_parameters(), *q.named_buffers()):
        tensor.copy_(fresh[name])
    assert_same(steps(q), steps(quantizer()))
    q.initialized.fill_(False)
    steps(q, 10, 1)
    assert len(k_means) == 4


def test_a_step_on_a_device_does_not_look_at_it(monkeypatch, k_means):
    monkeypatch.setattr(dead_codes, "host_waits_for", lambda x: True)
    q = quantizer()
    expected = steps(quantizer(), 0, 20)
    steps(q, 0, 4)
    q.initialized.data.fill_(False)  # what a look would find
    steps(q, 4, 16)
    assert len(k_means) == 2  # one of each quantizer
    assert_same({**everything(q), "initialized": expected["initialized"]}, expected)


def test_a_captured_step_restarts_dead_codes_in_every_replay(monkeypatch):
    """A replay runs what the device was told, and nothing of the host: its clock stands still."""
    q, expected = quantizer(), quantizer()
    monkeypatch.setattr(dead_codes, "host_waits_for", lambda x: True)
    steps(q, 0, 2), steps(expected, 0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(dead_codes, "is_capturing", lambda x: True)
        for step in range(2, 30):
            q.clock[dead_codes.STEPS] = 3
            steps(q, step, 1)
    assert_same(everything(q), steps(expected, 2, 28))
    assert q.window_replaced > 0
    assert_same(steps(q, 30), steps(expected, 30))  # and the host knows again what step it is


def test_a_capture_before_the_first_step_is_refused(monkeypatch):
    monkeypatch.setattr(dead_codes, "host_waits_for", lambda x: True)
    monkeypatch.setattr(dead_codes, "is_capturing", lambda x: True)
    with pytest.raises(RuntimeError, match="training steps before the capture"):
        quantizer()(noise(60, 8))
