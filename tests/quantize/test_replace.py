"""replace_quantizers: what it finds in a model, leaves alone and refuses, whatever the library."""

from __future__ import annotations

import pytest
from torch import nn

from beitv2_fast import EmbeddingAdapter, NormEMAAdapter, replace_quantizers

from ..support.other_quantizers import NormEMAVectorQuantizer, VectorQuantizer2


def test_a_shared_quantizer_stays_shared_and_subclasses_are_left_alone():
    class Subclass(VectorQuantizer2):
        pass

    shared = VectorQuantizer2(32, 4, 0.25)
    model = nn.ModuleList([shared, nn.Sequential(shared), Subclass(32, 4, 0.25)]).eval()
    replace_quantizers(model, {VectorQuantizer2: EmbeddingAdapter})
    assert model[0] is not shared and model[1][0] is model[0] and type(model[2]) is Subclass
    assert not model[0].training


@pytest.mark.parametrize(
    ("cls", "adapter"), [(VectorQuantizer2, EmbeddingAdapter), (NormEMAVectorQuantizer, NormEMAAdapter)]
)
def test_what_is_replaced_already_is_left_alone(cls, adapter):
    model = nn.Sequential(cls(32, 4, 0.25))
    adapters = {cls: adapter}
    ours = replace_quantizers(model, adapters)[0]
    with pytest.raises(ValueError, match="replaced already"):
        replace_quantizers(model, adapters)
    model.append(cls(32, 4, 0.25))
    replace_quantizers(model, adapters)
    assert model[0] is ours and type(model[1]) is type(ours)


def test_a_model_without_quantizers_and_a_wrong_policy_are_errors():
    with pytest.raises(ValueError, match="holds no quantizer"):
        replace_quantizers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unsupported must be"):
        replace_quantizers(nn.Linear(2, 2), unsupported="ignore")
