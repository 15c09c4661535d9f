"""What multi_cta_attention accepts, what choosing may look at, and how far a variant may be from the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import ACTIVATIONS, bucket, check_multiple, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.testing.cases import Bound

BOUNDS: Mapping[str, Bound] = {
    "out": Bound(5e-3, "probabilities are rounded to q's dtype for the second GEMM; bf16 output rounds once more"),
    "lse": Bound(3e-7, "fp32 sums in another order"),
}


class AttentionOutput(NamedTuple):
    """What attention returns.

    Attributes:
        out: (Tq, heads, Dv), dtype of q; 0 where no key is visible.
        lse: fp32 (Tq, heads), natural log of the sum of exp(scaled score), without the sink; -inf where no key is
            visible.
    """

    out: Tensor
    lse: Tensor


class Problem(NamedTuple):
    """Facts that choosing a variant may look at."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    v_dim: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    masked: bool
    causal: bool
    entries: bool


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    softmax_scale: float,
    causal: bool = True,
    window: int | None = None,
    entries: int = 0,
) -> None:
    """Raises ArgumentError for what the op does not accept; looks at metadata only."""
    check_tensor("q", q, ["queries", "heads", "head_dim"], ACTIVATIONS)
    queries, heads, head_dim = q.shape
    check_tensor("k", k, ["keys", "kv_heads", head_dim], [q.dtype], like=q)
    keys, kv_heads, _ = k.shape
    check_tensor("v", v, [keys, kv_heads, "v_dim"], [q.dtype], like=q)
    check_multiple("q", head_dim, 1, "values a head")
    check_multiple("v", v.shape[2], 1, "values a head")
    check_multiple("k", kv_heads, 1, "kv heads")
    check_multiple("q", heads, kv_heads, "heads")
    check_tensor("cu_seqlens_q", cu_seqlens_q, ["sequences + 1"], [torch.int32], like=q)
    check_multiple("cu_seqlens_q", cu_seqlens_q.shape[0], 1, "entries")
    if cu_seqlens_q.shape[0] == 1 and queries:
        raise ArgumentError("cu_seqlens_q", "one entry, so no sequence", f"offsets of sequences with {queries} queries")
    check_tensor("cu_seqlens_k", cu_seqlens_k, [cu_seqlens_q.shape[0]], [torch.int32], like=q)
    if sink is not None:
        check_tensor("sink", sink, [heads], [torch.float32], like=q)
    if mask is not None:
        check_tensor("mask", mask, [queries, "keys of the longest sequence, or entries"], [torch.bool], like=q)
    check_scale(softmax_scale)
    check_causal(causal)
    check_window(window)
    check_entries(entries)


def check_scale(softmax_scale: object) -> None:
    """Raises ArgumentError unless `softmax_scale` is a finite number."""
    if not isinstance(softmax_scale, int | float) or not math.isfinite(softmax_scale):
        raise ArgumentError("softmax_scale", repr(softmax_scale), "a finite number, such as head_dim ** -0.5")


def check_causal(causal: object) -> None:
    """Raises ArgumentError unless `causal` is True or False."""
    if not isinstance(causal, bool):
        raise ArgumentError("causal", repr(causal), "True or False")


def check_window(window: object) -> None:
    """Raises ArgumentError unless `window` is None or a positive int."""
    if window is not None and (not _is_count(window) or window == 0):
        raise ArgumentError("window", repr(window), "None or at least 1 (it counts the query's own position)")


def check_entries(entries: object) -> None:
    """Raises ArgumentError unless `entries` is an int of at least 0."""
    if not _is_count(entries):
        raise ArgumentError("entries", repr(entries), "0 or more keys at the end of each sequence")


def _is_count(value: object) -> bool:
    """Whether it is an int that a kernel takes, not below 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def check_values(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Tensor | None = None,
    entries: int = 0,
) -> None:
    """For debugging: checks what `check` cannot without waiting for the device.

    Each cu_seqlens starts at 0, never falls and ends at the number of rows; a mask is as wide as the longest sequence
    of keys, or has a column for each of the `entries` (what lies beyond its width counts as hidden).

    Raises:
        ArgumentError: One of these does not hold.
    """
    for name, cu, rows in (("cu_seqlens_q", cu_seqlens_q, q.shape[0]), ("cu_seqlens_k", cu_seqlens_k, k.shape[0])):
        edges = cu.tolist()
        if edges[0] != 0 or edges[-1] != rows or edges != sorted(edges):
            raise ArgumentError(name, edges, f"offsets that rise from 0 to {rows}")
    longest = int(cu_seqlens_k.diff().max()) if cu_seqlens_k.shape[0] > 1 else 0
    columns, what = (entries, "the entries") if entries else (longest, "the longest sequence of keys")
    if mask is not None and mask.shape[1] < columns:
        raise ArgumentError("mask", f"{mask.shape[1]} columns", f"at least {columns}, {what}")


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    softmax_scale: float,
    causal: bool = True,
    window: int | None = None,
    entries: int = 0,
) -> Problem:
    """The facts of one call."""
    queries, heads, head_dim = q.shape
    keys, kv_heads, v_dim = v.shape
    masked = mask is not None
    return fast_problem(
        Problem,
        (
            q.device,
            q.dtype,
            head_dim,
            v_dim,
            heads,
            kv_heads,
            bucket(queries),
            bucket(keys),
            masked,
            causal,
            entries > 0,
        ),
    )


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    softmax_scale: float,
    causal: bool = True,
    window: int | None = None,
    entries: int = 0,
) -> AttentionOutput:
    """Outputs of the right shapes and dtypes, not filled."""
    rows = q.shape[:2]
    return AttentionOutput(q.new_empty((*rows, v.shape[2])), q.new_empty(rows, dtype=torch.float32))
