"""Positions at another image size: the spline, the geometric offsets, state dicts, and timm's function beside ours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast import create_model
from beitv2_fast.errors import CheckpointError
from beitv2_fast.models.classifier import Classifier, ClassifierConfig
from beitv2_fast.models.positions import (
    geometric_offsets,
    resize_bias_table,
    resize_embedding,
    resize_positions,
    spline_matrix,
)
from beitv2_fast.models.student import Student, StudentConfig
from beitv2_fast.models.tokenizer import Tokenizer, TokenizerModelConfig
from beitv2_fast.models.vit import ViTConfig
from beitv2_fast.runs.checkpoints import save_weights

TINY = dict(patch_size=8, dim=24, depth=2, heads=2)


def smooth_table(side: int, heads: int = 3) -> torch.Tensor:
    """A table as training makes them: a bias that falls with the distance, another width for each head."""
    axis = torch.arange(2 * side - 1.0) - side + 1
    distance = axis[:, None].square() + axis[None, :].square()
    widths = torch.linspace(6, 60, heads)
    table = torch.exp(-distance.flatten()[:, None] / widths)
    return torch.cat([table, torch.tensor([[5.0], [6.0], [7.0]]).expand(3, heads)])


def test_the_spline_passes_through_its_nodes_and_reproduces_every_cubic():
    nodes = torch.tensor([-4.0, -2.5, -1.0, 0.0, 1.2, 3.0, 5.0], dtype=torch.float64)
    points = torch.linspace(-4, 5, 50, dtype=torch.float64)
    assert torch.allclose(spline_matrix(nodes, nodes), torch.eye(7, dtype=torch.float64), atol=1e-14)
    for power in range(4):
        torch.testing.assert_close(spline_matrix(nodes, points) @ nodes**power, points**power, rtol=1e-12, atol=1e-12)


def test_the_spline_has_continuous_first_and_second_derivatives():
    nodes = torch.tensor([-4.0, -2.5, -1.0, 0.0, 1.2, 3.0, 5.0], dtype=torch.float64)
    values, e = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1e-4

    def at(x):
        return spline_matrix(nodes, torch.tensor([x], dtype=torch.float64)) @ values

    for x in nodes[1:-1].tolist():
        left, right = (at(x) - at(x - e)) / e, (at(x + e) - at(x)) / e
        assert (left - right).abs() < 1e-2
        before, after = (at(x - 3 * e) - 2 * at(x - 2 * e) + at(x - e)), (at(x + e) - 2 * at(x + 2 * e) + at(x + 3 * e))
        assert (before - after).abs() / e**2 < 1e-2


def test_fewer_than_four_nodes_give_the_polynomial_through_them():
    nodes = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    points = torch.linspace(-1, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(spline_matrix(nodes, points) @ nodes**2, points**2)
    assert torch.equal(spline_matrix(nodes[:1], points), torch.ones(9, 1, dtype=torch.float64))


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 32), (16, 37)])
def test_the_old_offsets_span_the_new_table_in_a_geometric_progression(old, new):
    offsets = geometric_offsets(2 * old - 1, 2 * new - 1)
    assert offsets[old - 1] == 0 and torch.equal(offsets, -offsets.flip(0))
    steps = offsets[old - 1 :].diff()
    assert steps[0] == 1
    torch.testing.assert_close(steps[1:] / steps[:-1], (steps[1] / steps[0]).expand(old - 2))
    assert offsets[-1].item() == pytest.approx(new - 1, abs=1e-3)


@pytest.mark.parametrize("new", [(24, 24), (32, 32), (20, 28)])
def test_a_smooth_table_agrees_with_timms_linear_interpolation_between_the_same_offsets(new):
    timm = pytest.importorskip("timm.layers.pos_embed_rel")
    table = smooth_table(14)
    shape = ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, 3)
    ours, theirs = resize_bias_table(table, new), timm.resize_rel_pos_bias_table(table, new, shape)
    assert ours.shape == shape and torch.equal(ours[-3:], table[-3:])
    # theirs is linear between the points where ours is a cubic spline; at the points both are the old value
    assert (ours - theirs).abs().max() < 0.06
    assert (ours - theirs).abs().mean() < 0.005


def test_the_table_is_the_spline_of_each_axis_by_itself():
    table = torch.randn(27 * 27 + 3, 2, generator=torch.Generator().manual_seed(0))
    ours = resize_bias_table(table, (14, 24))[:-3].unflatten(0, (27, 47))
    matrix = spline_matrix(geometric_offsets(27, 47), torch.arange(-23.0, 24, dtype=torch.float64))
    nodes = geometric_offsets(27, 27)
    other = spline_matrix(nodes, torch.arange(-13.0, 14, dtype=torch.float64))
    expected = torch.einsum("ys,xt,sth->yxh", other, matrix, table[:-3].double().unflatten(0, (27, 27)))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


def test_embeddings_are_interpolated_bicubically_and_cls_stays():
    timm = pytest.importorskip("timm.layers.pos_embed")
    embedding = torch.randn(1, 197, 8, generator=torch.Generator().manual_seed(0))
    ours = resize_embedding(embedding, (24, 32))
    assert torch.equal(ours[:, 0], embedding[:, 0]) and ours.shape == (1, 769, 8)
    theirs = timm.resample_abs_pos_embed(embedding, (24, 32), antialias=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", ["shared_relative", "relative", "absolute"])
def test_a_student_goes_on_at_another_size(position):
    small, large = (Student(StudentConfig(ViTConfig(s, **TINY, position=position), 16, 1)) for s in (32, 48))
    state = resize_positions(small.state_dict(), large)
    large.load_state_dict(state)
    kept = [name for name, value in small.state_dict().items() if torch.equal(value, state.get(name, value[:0]))]
    changed = set(small.state_dict()) - set(kept)
    assert all(name.endswith(("pos_embed", "relative_position_bias_table")) for name in changed)
    assert len(changed) == {"shared_relative": 1, "relative": 4, "absolute": 1}[position]
    assert large.eval().encode(torch.rand(1, 3, 48, 48))[0].isfinite().all()


def test_a_tokenizers_encoder_and_decoder_are_resized():
    configs = [TokenizerModelConfig(ViTConfig(s, **TINY, position="absolute"), 1, 16, 8, 4) for s in (32, 48)]
    small, large = map(Tokenizer, configs)
    large.load_state_dict(resize_positions(small.state_dict(), large))
    assert large.eval().encode(torch.rand(2, 3, 48, 48)).shape == (2, 36)


def test_the_same_size_changes_nothing():
    model = Classifier(ClassifierConfig(ViTConfig(32, **TINY, position="relative"), 5))
    state = resize_positions(model.state_dict(), model)
    assert all(
        value is model.state_dict()[name] or torch.equal(value, model.state_dict()[name])
        for name, value in state.items()
    )


def test_a_smaller_table_keeps_the_near_offsets():
    table = smooth_table(14)
    near = table[:-3].unflatten(0, (27, 27))[6:21, 6:21]
    ours = resize_bias_table(table, (8, 8))[:-3].unflatten(0, (15, 15))
    assert F.l1_loss(ours, near) < 0.01


def test_positions_of_no_square_grid_are_refused():
    with pytest.raises(CheckpointError, match="no square grid"):
        resize_embedding(torch.zeros(1, 1 + 12, 4), (4, 4))
    with pytest.raises(CheckpointError, match="no square grid"):
        resize_bias_table(torch.zeros(5 * 7 + 3, 4), (4, 4))


def test_create_model_takes_another_image_size(tmp_path):
    small = Student(StudentConfig(ViTConfig(32, **TINY), 16, 1))
    save_weights(small.state_dict(), tmp_path / "student.safetensors")
    options = dict(checkpoint=tmp_path / "student.safetensors", image_size=48, heads=2)
    student = create_model(**options)
    assert student.vit_config.image_size == 48
    expected = resize_bias_table(small.rel_pos_bias.relative_position_bias_table.detach(), (6, 6))
    assert torch.equal(student.rel_pos_bias.relative_position_bias_table, expected)
