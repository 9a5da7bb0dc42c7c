"""Kernels of other packages, as those launch them, for ``gpu_model``: flash-kmeans and Cut Cross-Entropy.

Only compiled, from the installed packages; a package that is absent is reported by name.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.gpu_kernels import TRITON_TYPE, Case


def flash_kmeans_cases(n: int = 12_544, k: int = 8192, d: int = 32, dtype: str = "fp16") -> Iterator[Case]:
    """Assign (cosine and Euclidean, its table's blocks for an H100 at this size) and update.

    In fp32 its dot is Triton's default, one TF32 product: faster than an exact one, and not exact.
    """
    from flash_kmeans import assign_euclid_triton as assign
    from flash_kmeans import centroid_update_triton as update

    blocks = assign._heuristic_euclid_config_h100_smallD(n, k, d, None)
    block_n, block_k = blocks["BLOCK_N"], blocks["BLOCK_K"]
    kind, size = TRITON_TYPE[dtype], 4 if dtype == "fp32" else 2
    shapes = {
        "B": 1, "N": n, "K": k, "D": d, "stride_x_b": n * d, "stride_x_n": d, "stride_x_d": 1, "stride_c_b": k * d,
        "stride_c_k": d, "stride_c_d": 1, "stride_out_b": n, "stride_out_n": 1,
        "BLOCK_N": block_n, "BLOCK_K": block_k, "D_PAD": d,
    }  # fmt: skip
    norms = {"stride_xsq_b": n, "stride_xsq_n": 1, "stride_csq_b": k, "stride_csq_k": 1}
    programs = -(-n // block_n)
    for metric, kernel, extra in (
        ("cosine", assign._cosine_assign_kernel, {}),
        ("euclidean", assign._euclid_assign_kernel, norms),
    ):
        signature = {"x_ptr": kind, "c_ptr": kind, "out_ptr": "*i32"}
        if extra:
            signature |= {"x_sq_ptr": "*fp32", "c_sq_ptr": "*fp32"}
        yield Case(
            "flash-kmeans", f"assign, {metric}, {dtype}", kernel, signature, {**shapes, **extra},
            blocks["num_warps"], blocks["num_stages"], tensor_core=True, programs=programs, steps=k / block_k,
            units=block_n * block_k, flops=2 * n * k * d, read=size * (n + k) * d, written=4 * n,
            l2=programs * size * (k + block_n) * d,
        )  # fmt: skip
    yield Case(
        "flash-kmeans", f"update, {dtype}", update._centroid_update_kernel,
        {"x_ptr": kind, "cluster_ptr": "*i32", "sum_ptr": "*fp32", "count_ptr": "*i32", "stride_x_n": "i32",
         "stride_x_b": "i32", "stride_sum_b": "i32", "stride_sum_k": "i32", "stride_count_b": "i32"},
        {"stride_x_d": 1, "stride_sum_d": 1, "stride_count_k": 1, "B": 1, "N": n, "K": k, "D": d, "BLOCK_D": 128},
        4, 3, ("stride_x_n", "stride_x_b", "stride_sum_b", "stride_sum_k", "stride_count_b"),
        programs=n, steps=1, units=d, flops=n * d, read=size * n * d + 4 * n, written=4 * k * (d + 1),
        l2=n * (d * (size + 4) + 8),
    )  # fmt: skip


def cut_cross_entropy_cases(m: int = 9600, v: int = 8192, d: int = 768) -> Iterator[Case]:
    """Forward (log-sum-exp) and backward with the blocks it takes when it does not tune; bf16, all gradients."""
    from cut_cross_entropy import cce_backward, cce_lse_forward, tl_autotune

    operands = {"E": "*bf16", "C": "*bf16", "LSE": "*fp32", "B": "i32", "V": "i32", "D": "i32", "B_BIN": "i32"}
    strides = {"stride_eb": "i32", "stride_cv": "i32"}
    aligned = ("stride_eb", "stride_cv", "D", "V", "B")
    fixed = {"stride_ed": 1, "stride_cd": 1, "stride_vb": 1, "HAS_VALIDS": False, "HAS_SOFTCAP": False, "GROUP_B": 8}
    fixed |= {"Valids": None, "softcap": None, "EVEN_D": True}
    config = tl_autotune._cce_forward_best_config()
    block_b, block_v, block_d = (config.kwargs[name] for name in ("BLOCK_B", "BLOCK_V", "BLOCK_D"))
    programs = -(-m // block_b) * -(-v // block_v)
    yield Case(
        "Cut Cross-Entropy", "forward", cce_lse_forward._cce_lse_forward_kernel,
        {**operands, **strides, "Locks": "*u32", "num_locks": "i32"},
        {**fixed, "LA": None, "stride_lse_b": 1, "HAS_LA": False, "DOT_PRECISION": "ieee",
         "BLOCK_B": block_b, "BLOCK_V": block_v, "BLOCK_D": block_d},
        config.num_warps, config.num_stages, aligned, tensor_core=True, programs=programs, steps=d / block_d,
        units=block_b * block_v * block_d / d, outer_steps=1, flops=2 * m * v * d, read=2 * (m + v) * d, written=4 * m,
        l2=programs * 2 * (block_b + block_v) * d,
    )  # fmt: skip
    config = tl_autotune._cce_backward_best_config()
    block_b, block_v, block_d = (config.kwargs[name] for name in ("BLOCK_B", "BLOCK_V", "BLOCK_D"))
    programs = -(-m // block_b) * -(-v // block_v)
    locks = {f"n_d{which}_locks_{axis}": "i32" for which in "ec" for axis in (0, 1)}
    yield Case(
        "Cut Cross-Entropy", "backward", cce_backward._cce_backward_kernel,
        {**operands, **strides, **locks, "dOut": "*fp32", "grad_scale": "fp32", "Targets": "*i64", "dE": "*bf16",
         "dC": "*bf16", "dELocks": "*i32", "dCLocks": "*i32", "filter_eps": "fp32"},
        {**fixed, "VocabOrdering": None, "BLOCK_B": block_b, "BLOCK_V": block_v, "BLOCK_D": block_d,
         "MM_BACK_BLOCK_D": 2 * block_d, "MM_BACK_EVEN_D": True, "ITEM_DO": True, "HAS_VOCAB_ORDERING": False,
         "FILTER_GRAD": True, "HAS_TARGETS": True, "SHIFT": False, "REQUIRES_GRAD": True},
        config.num_warps, config.num_stages, aligned, tensor_core=True, programs=programs, steps=3 * d / block_d,
        units=block_b * block_v * block_d / d, outer_steps=1, flops=6 * m * v * d, read=2 * (m + v) * d,
        written=2 * (m + v) * d, l2=programs * 2 * (block_b + block_v) * d * 5,
    )  # fmt: skip
