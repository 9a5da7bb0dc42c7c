"""codebook_search: the exact index, on every instruction set; shapes, strides, special values, memory, registration."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beitv2_fast.kernels import codebook_search, native
from beitv2_fast.kernels.codebook_search import reference
from beitv2_fast.kernels.native import native_ops
from bench.harness import peak_memory

from ..support.counting import allocations
from ..support.search_oracle import PROBLEMS, exact_indices, exact_nearest, exact_score, in_turn

METRICS = ("cosine", "euclidean")
INF, NAN = torch.inf, torch.nan


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_index_is_the_one_of_exact_arithmetic(version, name, metric):
    if version == "reference" and name == "beyond double":
        pytest.skip("the definition is float64; the C++ op goes further")
    for seed in range(2):
        x, codebook = PROBLEMS[name](seeded(seed))
        assert torch.equal(codebook_search(x, codebook, metric=metric).indices, exact_indices(x, codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", (1, 2, 3, 5, 17, 63, 64, 65, 257, 1024))
def test_every_width(version, metric, width):
    x, codebook = torch.randn(50, width, generator=seeded()), torch.randn(203, width, generator=seeded(1))
    for codes in (codebook, codebook.half(), codebook.bfloat16()):
        want = exact_indices(x, codes, metric)
        for rows in (50, 8, 3, 1):
            assert torch.equal(codebook_search(x[:rows], codes, metric=metric).indices, want[:rows])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "name", ("random", "clustered", "duplicated", "integers", "last bits", "one code", "unequal lengths")
)
def test_every_number_of_vectors(version, name, metric):
    """Few take one pass over the codes; more are screened in fp32, many in bytes where the CPU has them."""
    x, codebook = PROBLEMS[name](seeded())
    want = exact_indices(x, codebook, metric)
    for rows in (1, 2, 4, 5, 8, 9, 16, 17, 33):
        strided = x[-rows:].T.contiguous().T
        assert torch.equal(codebook_search(strided, codebook, metric=metric).indices, want[-rows:]), rows


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("codes", (2, 5, 134))
def test_every_number_of_wide_vectors(version, metric, dtype, codes):
    """The wider, the more of them take one pass over the codes. The second half of these are copies of the first."""
    codebook = torch.randn((codes + 1) // 2, 1796, generator=seeded()).to(dtype).repeat(2, 1)[:codes]
    x = codebook[torch.arange(70) % codes] + torch.randn(70, 1796, generator=seeded(1))
    x[[13, 50], [5, 1795]] = torch.tensor([NAN, INF])
    finite, distinct = x.isfinite().all(-1), codebook[: (codes + 1) // 2]
    want = torch.zeros(70, dtype=torch.int64).index_put((finite,), exact_indices(x[finite], distinct, metric))
    for rows in range(1, 71) if version != "reference" else (7, 70):
        assert torch.equal(codebook_search(x[-rows:], codebook, metric=metric).indices, want[-rows:]), rows
    codebook[0, 1790] = NAN
    for rows in (9, 40, 64):
        assert (codebook_search(codebook[1:2].expand(rows, -1), codebook, metric=metric).indices == 1).all(), rows


@pytest.mark.parametrize("metric", METRICS)
def test_few_vectors_to_which_each_code_is_nearer_than_the_one_before(version, metric):
    x = F.normalize(torch.randn(3, 24, generator=seeded()), dim=-1)
    codebook = torch.linspace(0.1, 1, 1500)[:, None] * x[1] + 1e-6 * torch.randn(1500, 24, generator=seeded(1))
    for k in (1, 5):
        assert torch.equal(
            codebook_search(x, codebook, metric=metric, k=k).indices, exact_nearest(x, codebook, metric, k)
        )


def test_few_vectors_find_copies_of_their_code_in_order_whichever_threads_meet_them(version):
    codes = torch.randn(512, 64, generator=seeded())
    x, copies = codes[[7, 300]], 512 * torch.arange(16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = codebook_search(x, codes.repeat(16, 1), metric="euclidean", k=16).indices
            assert torch.equal(found, torch.stack([copies + 7, copies + 300]))
            assert codebook_search(x, codes.repeat(16, 1), metric="euclidean").indices.tolist() == [7, 300]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("metric", METRICS)
def test_near_ties_of_wide_vectors(version, metric):
    """More than bytes tell apart, in more than one block of vectors."""
    base = torch.randn(8, 770, generator=seeded())
    codebook = F.normalize(base.repeat(40, 1) + 1e-3 * torch.randn(320, 770, generator=seeded(1)), dim=-1)
    codebook = torch.cat([codebook, codebook[:100]])
    x = base.repeat(25, 1) + 0.1 * torch.randn(200, 770, generator=seeded(2))
    assert torch.equal(codebook_search(x, codebook, metric=metric).indices, exact_indices(x, codebook, metric))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("metric", METRICS)
def test_low_and_double_precision_are_searched_as_given(version, dtype, metric):
    x, codebook = torch.randn(100, 19, generator=seeded()), torch.randn(300, 19, generator=seeded(1))
    for a, v in ((x.to(dtype), codebook), (x, codebook.to(dtype)), (x.to(dtype), codebook.to(dtype))):
        found = codebook_search(a, v, metric=metric, return_codes=True)
        assert torch.equal(found.indices, exact_indices(a, v, metric))
        assert found.codes.dtype == v.dtype
        assert torch.equal(found.codes, v[found.indices])


@pytest.mark.parametrize("metric", METRICS)
def test_of_equal_codes_the_first_is_found_wherever_they_lie_in_a_matrix_product(version, metric):
    for rows, codes, width in ((8, 5, 16), (50, 100, 19), (69, 149, 40), (3, 17, 7), (33, 64, 33)):
        x = torch.randn(rows, width, generator=seeded())
        codebook = torch.randn(1, width, generator=seeded(1)).expand(codes, width)
        assert codebook_search(x, codebook, metric=metric).indices.tolist() == [0] * rows, (rows, codes, width)


@st.composite
def strided(draw, rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[rows, width] with the strides of a transposed, sliced, flipped-in-memory or expanded tensor; some exact ties."""
    layout = draw(st.sampled_from(("contiguous", "transposed", "every other", "sliced", "expanded")))
    integers = draw(st.booleans())
    values = torch.randn(2 * rows + 2, 2 * width + 2, generator=seeded(seed))
    values = (2 * values).round() if integers else values
    values = values.to(dtype)
    if layout == "transposed":
        return values[:width, :rows].T if width <= 2 * rows + 2 and rows <= 2 * width + 2 else values[:rows, :width]
    if layout == "every other":
        return values[: 2 * rows : 2, : 2 * width : 2]
    if layout == "expanded":
        return values[:1, :width].expand(rows, width)
    return values[1 : rows + 1, 1 : width + 1] if layout == "sliced" else values[:rows, :width].contiguous()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_stride_and_dtype(version, data):
    rows, codes, width = (data.draw(st.integers(*bounds)) for bounds in ((0, 70), (1, 150), (1, 40)))
    dtypes = st.sampled_from((torch.float32, torch.float16, torch.bfloat16))
    x = data.draw(strided(rows, width, data.draw(dtypes), 0))
    codebook = data.draw(strided(codes, width, data.draw(dtypes), 1))
    metric = data.draw(st.sampled_from(METRICS))
    found = codebook_search(
        x, codebook, metric=metric, return_normalized=True, return_codes=True, return_distances=True
    )
    assert torch.equal(found.indices, exact_indices(x, codebook, metric))
    compared = F.normalize(x.double(), dim=-1) if metric == "cosine" else x.double()
    assert found.normalized.dtype == found.distances.dtype == torch.float32
    torch.testing.assert_close(found.normalized.double(), compared, atol=1e-7, rtol=1e-6)
    assert torch.equal(found.codes, codebook[found.indices])
    distances = (compared - found.codes.double()).square().sum(-1)
    torch.testing.assert_close(found.distances.double(), distances, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_with_nan_or_inf_get_index_0_and_a_nan_distance(version, metric):
    x, codebook = torch.randn(40, 6, generator=seeded()), torch.randn(70, 6, generator=seeded(1))
    clean = codebook_search(x, codebook, metric=metric, return_distances=True)
    for row, value in ((3, NAN), (17, INF), (18, -INF)):
        x[row, 2] = value
    found = codebook_search(x, codebook, metric=metric, return_distances=True, return_normalized=True)
    bad = torch.tensor([3, 17, 18])
    good = torch.ones(40, dtype=torch.bool).index_fill(0, bad, False)
    assert found.indices[bad].tolist() == [0, 0, 0] and found.distances[bad].isnan().all()
    assert torch.equal(found.indices[good], clean.indices[good])
    assert torch.equal(found.distances[good], clean.distances[good])
    want = F.normalize(x, dim=-1) if metric == "cosine" else x
    torch.testing.assert_close(found.normalized, want, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
def test_codes_with_nan_or_inf_are_never_chosen(version, metric):
    x, codebook = torch.randn(200, 6, generator=seeded()), torch.randn(70, 6, generator=seeded(1))
    bad = torch.tensor([0, 5, 31, 32, 69])
    codebook[bad, torch.tensor([0, 1, 2, 3, 4])] = torch.tensor([NAN, INF, -INF, NAN, INF])
    good = torch.ones(70, dtype=torch.bool).index_fill(0, bad, False).nonzero()[:, 0]
    found = codebook_search(x, codebook, metric=metric).indices
    assert torch.equal(found, good[exact_indices(x, codebook[good], metric)])
    assert codebook_search(torch.zeros(1, 6), codebook, metric="cosine").indices.tolist() == [1]
    assert codebook_search(x, torch.full((3, 6), NAN), metric=metric).indices.unique().tolist() == [0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("exponent", (-100, -21, -19, 19, 21, 100))
def test_codes_of_any_size_beside_some_with_nan_or_inf(version, metric, exponent):
    x, codebook = torch.randn(40, 40, generator=seeded()), torch.randn(300, 40, generator=seeded(1)) * 2.0**exponent
    codebook[::7, 3] = torch.tensor([NAN, INF, -INF]).repeat(15)[:43]
    good = codebook.isfinite().all(-1).nonzero()[:, 0]
    for rows in (x * 2.0**exponent, x, x[:2]):
        found = codebook_search(rows, codebook, metric=metric).indices
        assert torch.equal(found, good[exact_indices(rows, codebook[good], metric)])


@pytest.mark.parametrize("rows", (4, 12, 32))
def test_subnormal_codes_are_told_apart_where_a_thread_takes_those_of_fp32_for_zero(version, rows):
    x, codebook = torch.randn(rows, 32, generator=seeded()), 2e-5 * torch.randn(512, 32, generator=seeded(1))
    codebook[0, 0] = 2e-4
    expected = exact_indices(x, codebook.half(), "cosine")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        assert torch.equal(codebook_search(x, codebook.half()).indices, expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("rows", (3, 12, 200))
def test_vectors_whose_squares_overflow_only_together_find_the_first_of_zero_codes(version, rows):
    x, codebook = torch.full((rows, 512), 2**59.9), torch.zeros(512, 512)
    assert not codebook_search(x, codebook, metric="euclidean").indices.any()
    few = codebook_search(x, codebook, metric="euclidean", k=3).indices
    assert torch.equal(few, torch.arange(3).expand(rows, 3))


def test_zero_vectors_and_zero_codes(version):
    x, codebook = torch.zeros(5, 8), torch.randn(50, 8, generator=seeded())
    codebook[[20, 30]] = 0.0
    found = codebook_search(x, codebook, return_normalized=True, return_distances=True)
    assert found.indices.tolist() == [0] * 5 and torch.equal(found.normalized, x)
    torch.testing.assert_close(found.distances, codebook[0].square().sum().expand(5))
    found = codebook_search(x, codebook, metric="euclidean", return_distances=True)
    assert found.indices.tolist() == [20] * 5 and found.distances.tolist() == [0.0] * 5
    for metric in METRICS:
        assert codebook_search(torch.randn(9, 8), torch.zeros(40, 8), metric=metric).indices.tolist() == [0] * 9


def test_normalized_vectors_of_extreme_length_are_unit_or_divided_by_the_eps(version):
    direction = F.normalize(torch.randn(1, 16, generator=seeded(), dtype=torch.float64), dim=-1)
    x = (direction * torch.tensor([[1e38], [1e-6], [1e-20], [1e-42]], dtype=torch.float64)).float()
    found = codebook_search(x, torch.randn(9, 16), return_normalized=True).normalized
    torch.testing.assert_close(found.double(), F.normalize(x.double(), dim=-1), atol=0, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_no_vectors(version, metric):
    wanted = {"return_normalized": True, "return_codes": True, "return_distances": True}
    found = codebook_search(torch.empty(0, 4), torch.randn(3, 4), metric=metric, **wanted)
    assert [tuple(t.shape) for t in found] == [(0,), (0, 4), (0, 4), (0,)]


@pytest.mark.parametrize("k", (None, 3))
@pytest.mark.parametrize("metric", METRICS)
def test_codebooks_in_turn_give_the_bits_of_each_alone(version, metric, k):
    x, codebook = in_turn()
    options = {"metric": metric, "k": k, "return_normalized": True, "return_codes": True, "return_distances": True}
    together = codebook_search(x, codebook, **options)
    for g, codes in enumerate(codebook):
        for found, expected in zip(together, codebook_search(x[g::4], codes, **options), strict=True):
            torch.testing.assert_close(found[g::4], expected, rtol=0, atol=0, equal_nan=True)


def test_rows_that_codebooks_cannot_share_are_refused():
    with pytest.raises(ValueError, match=r"4 codebooks take turns, so the rows of x must be a multiple; got 39"):
        codebook_search(torch.randn(39, 6), torch.randn(4, 5, 6))
    with pytest.raises(ValueError, match=r"codebook \[K, D\] or \[G, K, D\] with the same D"):
        codebook_search(torch.randn(4, 10, 6), torch.randn(4, 5, 6))


@pytest.mark.parametrize("wanted", ("normalized", "codes", "distances"))
def test_each_output_alone_is_the_one_of_all_together(version, wanted):
    x, codebook = torch.randn(30, 9, generator=seeded()), torch.randn(40, 9, generator=seeded(1))
    everything = codebook_search(x, codebook, return_normalized=True, return_codes=True, return_distances=True)
    alone = codebook_search(x, codebook, **{f"return_{wanted}": True})
    assert torch.equal(getattr(alone, wanted), getattr(everything, wanted))
    assert [getattr(alone, name) is None for name in ("normalized", "codes", "distances")].count(True) == 2


def test_any_number_of_threads_gives_the_same_bits(version):
    x, codebook = torch.randn(3000, 32, generator=seeded()), torch.randn(500, 32, generator=seeded(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(codebook_search(x, codebook, return_normalized=True, return_distances=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.indices, results[0].indices)
        assert torch.equal(other.normalized, results[0].normalized)
        assert torch.equal(other.distances, results[0].distances)


def test_more_scores_than_32_bits_count():
    if not native_ops():
        pytest.skip("the C++ ops are not compiled")
    x, codebook = torch.randn(8300, 2, generator=seeded()), torch.randn(262_144, 2, generator=seeded(1))
    assert len(x) * len(codebook) > 2**31
    found = codebook_search(x, codebook, metric="euclidean").indices
    sample = torch.randint(len(x), (40,), generator=seeded(2))
    assert torch.equal(found[sample], exact_indices(x[sample], codebook, "euclidean"))


@pytest.mark.parametrize("rows", (20_000, 200_000))
def test_memory_does_not_grow_with_vectors_times_codes(rows):
    if not native_ops():
        pytest.skip("the C++ ops are not compiled")
    x, codebook = torch.randn(rows, 8, generator=seeded()), torch.randn(8192, 8, generator=seeded(1))
    peak = peak_memory(lambda: codebook_search(x, codebook))
    if peak is None:
        pytest.skip("nobody counts this process's memory")
    assert peak < 8 * rows + 10e6  # indices, packed codes, a thread's buffers; one byte per score would be 1.6 GB


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float32, 16), (torch.float16, 40), (torch.bfloat16, 8), (torch.bfloat16, 40)]
)
def test_few_vectors_make_no_copy_of_the_codebook(dtype, rows):
    if not native_ops():
        pytest.skip("the C++ ops are not compiled")
    x, codebook = torch.randn(rows, 256, generator=seeded()), torch.randn(16_384, 256, generator=seeded(1)).to(dtype)
    peak = peak_memory(lambda: codebook_search(x, codebook))
    if peak is None:
        pytest.skip("nobody counts this process's memory")
    assert peak < 2e6  # the codebook in fp32 is 17 MB


def test_the_references_memory_does_not_grow_with_vectors_times_codes():
    x, codebook = torch.randn(200_000, 4, generator=seeded()), torch.randn(256, 4, generator=seeded(1))
    peak, _, _ = allocations(lambda: reference.codebook_search_reference(x, codebook, "cosine"))
    assert 10e6 < peak < 100e6  # all scores at once are 410 MB


def test_it_compiles_in_one_graph_for_any_number_of_vectors(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    @torch.compile(fullgraph=True, dynamic=True)
    def assign(x, codebook):
        return codebook_search(x, codebook, return_codes=True, return_distances=True)

    codebook = torch.randn(50, 6, generator=seeded())
    for rows in (10, 33):
        x = torch.randn(rows, 6, generator=seeded(1), requires_grad=True)
        eager, compiled = codebook_search(x, codebook, return_codes=True, return_distances=True), assign(x, codebook)
        assert all(
            torch.equal(a, b)
            for a, b in zip((eager.indices, eager.codes), (compiled.indices, compiled.codes), strict=True)
        )
        assert torch.equal(eager.distances, compiled.distances) and not compiled.codes.requires_grad


def test_autocast_does_not_touch_the_search():
    x, codebook = (
        torch.randn(500, 32, generator=seeded()),
        F.normalize(torch.randn(900, 32, generator=seeded(1)), dim=-1),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = codebook_search(x, codebook, return_distances=True)
    assert torch.equal(found.indices, exact_indices(x, codebook, "cosine")) and found.distances.dtype == torch.float32


@pytest.fixture
def library_folder(tmp_path, monkeypatch):
    """An empty folder where the compiled ops are looked for."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native_ops.cache_clear()
    yield tmp_path
    native_ops.cache_clear()


@pytest.mark.parametrize("damaged", (False, True))
def test_without_the_compiled_ops_the_reference_runs_and_one_warning_says_so(library_folder, damaged, recwarn):
    if damaged:
        (library_folder / native.LIBRARY).write_bytes(b"not a library")
    x, codebook = torch.randn(20, 7, generator=seeded()), torch.randn(30, 7, generator=seeded(1))
    for _ in range(2):
        assert torch.equal(codebook_search(x, codebook).indices, exact_indices(x, codebook, "cosine"))
    said = [str(w.message) for w in recwarn if "beitv2_fast" in str(w.message)]
    assert len(said) == 1 and "slower" in said[0] and "pip install" in said[0]


def test_the_environment_names_the_instruction_set():
    if not native_ops():
        pytest.skip("the C++ ops are not compiled")
    code = (
        "import torch; from beitv2_fast.kernels import codebook_search; "
        "search = lambda: codebook_search(torch.ones(1, 2), torch.ones(1, 2)); "
    )
    run = lambda name, then: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code + then],
        env={**os.environ, "BEITV2_FAST_CPU_CAPABILITY": name},
        capture_output=True,
        text=True,
        timeout=300,
    )
    chosen = run("portable", "search(); print(torch.ops.beitv2_fast_cpu.capability())")
    assert chosen.stdout.strip() == "portable", chosen.stderr
    wrong = run("avx1024", "search()")
    assert wrong.returncode and "avx1024" in wrong.stderr and "this machine has: portable" in wrong.stderr


def rational_indices(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> list[int]:
    """As exact_indices, of values whose squares float64 does not hold."""
    rows, codes = x.tolist(), codebook.tolist()
    return [max(range(len(codes)), key=lambda j: (exact_score(row, codes[j], metric), -j)) for row in rows]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("of_x", "of_codes"), [(664, 664), (-664, -664), (1020, 1020), (1000, 0), (0, -900), (-900, 0)]
)
def test_fp64_whose_squares_overflow_or_vanish_is_searched_like_all_others(metric, of_x, of_codes):
    x, codebook = torch.randn(12, 5, generator=seeded()).double(), torch.randn(30, 5, generator=seeded(1)).double()
    x, codebook = (torch.ldexp(t, torch.tensor(e)) for t, e in ((x, of_x), (codebook, of_codes)))
    assert x.isfinite().all() and codebook.isfinite().all()
    assert codebook_search(x, codebook, metric=metric).indices.tolist() == rational_indices(x, codebook, metric)


def test_a_vector_is_told_from_zero_to_the_depth_that_the_documentation_states(version):
    """Euclidean: what decides is a part 2 |x| / |v| of the scores, and these have 2^-53 or, in C++, 2^-100 of |v|^2."""
    codebook = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.5]])
    depth = 40 if version == "reference" else 90
    shallow, deep = torch.tensor([[-(2.0**-depth), 0.0]]), torch.tensor([[-(2.0**-116), 0.0]])
    assert codebook_search(shallow, codebook, metric="euclidean").indices.tolist() == [1]
    found = codebook_search(deep, codebook, metric="euclidean").indices.tolist()
    assert found in ([0], [1])  # their distances are the same to 2^-114; exact arithmetic says 1
    assert codebook_search(deep, codebook, metric="cosine").indices.tolist() == [1]  # no length of a code competes
