"""What fp4_kv_decode accepts, what choosing may look at, and how far a variant may be from the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import ACTIVATIONS, E4M3Tensor, bucket, check_multiple, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import BLOCK
from megamoe.testing.cases import EXACT, Bound

BOUNDS: Mapping[str, Bound] = {
    "out": Bound(5e-3, "probabilities are rounded to q's dtype for the second GEMM; bf16 output rounds once more"),
    "lse": Bound(1e-6, "fp32 sums in another order"),
    "k_codes": EXACT,
    "k_scales": EXACT,
    "v_codes": EXACT,
    "v_scales": EXACT,
}


class DecodeOutput(NamedTuple):
    """What decode attention returns.

    Attributes:
        out: (batch, queries, heads, Dv), dtype of q; 0 where no key is visible.
        lse: fp32 (batch, queries, heads), natural log of the sum of exp(scaled score), without the sink; -inf where no
            key is visible.
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
    page: int
    batch: int
    queries: int
    tokens: int
    shared: bool
    appends: bool
    indexed: bool
    extra: bool


class Extra(NamedTuple):
    """A second cache, of keys that are the values, by the op's arguments that start with `extra_`."""

    codes: Tensor
    scales: Tensor
    table: Tensor
    lengths: Tensor
    scale: Tensor
    indices: Tensor | None

    @classmethod
    def of(
        cls,
        codes: Tensor | None,
        scales: Tensor | None,
        table: Tensor | None,
        lengths: Tensor | None,
        scale: Tensor | None,
        indices: Tensor | None,
    ) -> Extra | None:
        """The second cache of arguments that `check` has seen; None where there is none."""
        if codes is None or scales is None or table is None or lengths is None or scale is None:
            return None
        return cls(codes, scales, table, lengths, scale, indices)

    @property
    def room(self) -> int:
        """Entries that the table has room for."""
        return self.table.shape[1] * self.codes.shape[2]

    @property
    def seen(self) -> int:
        """How many entries a query may see, by the sizes alone."""
        held = self.room if self.codes.shape[0] else 0
        return held if self.indices is None else min(held, self.indices.shape[2])


def check(
    q: Tensor,
    k_codes: Tensor,
    k_scales: E4M3Tensor,
    block_table: Tensor,
    lengths: Tensor,
    k_scale: Tensor,
    v_codes: Tensor | None = None,
    v_scales: E4M3Tensor | None = None,
    v_scale: Tensor | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    sink: Tensor | None = None,
    indices: Tensor | None = None,
    extra_codes: Tensor | None = None,
    extra_scales: E4M3Tensor | None = None,
    extra_table: Tensor | None = None,
    extra_lengths: Tensor | None = None,
    extra_scale: Tensor | None = None,
    extra_indices: Tensor | None = None,
    *,
    softmax_scale: float,
    window: int | None = None,
    splits: int = 0,
) -> None:
    """Raises ArgumentError for what the op does not accept; looks at metadata only."""
    check_tensor("q", q, ["batch", "queries", "heads", "head_dim"], ACTIVATIONS)
    batch, queries, heads, head_dim = q.shape
    check_multiple("q", head_dim, BLOCK, "values a head")
    _check_cache("k", k_codes, k_scales, k_scale, [None, "kv_heads", "page"], head_dim, like=q)
    pages, kv_heads, page, _ = k_codes.shape
    check_multiple("k_codes", kv_heads, 1, "kv heads")
    check_multiple("k_codes", page, 1, "tokens a page")
    check_multiple("q", heads, kv_heads, "heads")
    check_tensor("block_table", block_table, [batch, "max_pages"], [torch.int32], like=q)
    check_tensor("lengths", lengths, [batch], [torch.int32], like=q)
    if k_new is not None:
        check_tensor("k_new", k_new, [batch, "new", kv_heads, head_dim], ACTIVATIONS, like=q)
    if v_codes is None:
        for name, value in (("v_scales", v_scales), ("v_scale", v_scale), ("v_new", v_new)):
            if value is not None:
                raise ArgumentError(name, "a tensor", "None without v_codes: the keys are the values")
    else:
        _check_cache("v", v_codes, v_scales, v_scale, [pages, kv_heads, page], None, like=q)
        if (k_new is None) != (v_new is None):
            raise ArgumentError("v_new", "None" if v_new is None else "a tensor", "new values exactly with new keys")
        if v_new is not None and k_new is not None:
            v_dim = v_codes.shape[3] * 2
            check_tensor("v_new", v_new, [batch, k_new.shape[1], kv_heads, v_dim], [k_new.dtype], like=q)
    if sink is not None:
        check_tensor("sink", sink, [heads], [torch.float32], like=q)
    if indices is not None:
        check_tensor("indices", indices, [batch, queries, "picked"], [torch.int32], like=q)
    if extra_codes is None:
        for name, value in (
            ("extra_scales", extra_scales),
            ("extra_table", extra_table),
            ("extra_lengths", extra_lengths),
            ("extra_scale", extra_scale),
            ("extra_indices", extra_indices),
        ):
            if value is not None:
                raise ArgumentError(name, "a tensor", "None without extra_codes")
    else:
        if v_codes is not None:
            raise ArgumentError("extra_codes", "a tensor", "None with v_codes: its keys are the values")
        _check_cache("extra", extra_codes, extra_scales, extra_scale, [None, kv_heads, "page"], head_dim, like=q)
        check_multiple("extra_codes", extra_codes.shape[2], 1, "tokens a page")
        check_tensor("extra_table", extra_table, [batch, "max_pages"], [torch.int32], like=q)
        check_tensor("extra_lengths", extra_lengths, [batch], [torch.int32], like=q)
        if extra_indices is not None:
            check_tensor("extra_indices", extra_indices, [batch, queries, "picked"], [torch.int32], like=q)
        if k_new is not None:
            _check_apart({"extra_codes": extra_codes, "extra_scales": extra_scales}, (k_codes, k_scales))
    _check_options(softmax_scale, window, splits, indexed=indices is not None)


def _check_cache(
    side: str,
    codes: Tensor,
    scales: Tensor | None,
    scale: Tensor | None,
    slots: list[int | str | None],
    dim: int | None,
    *,
    like: Tensor,
) -> None:
    """Checks one side of the cache: codes, block scales and the decode scale."""
    check_tensor(f"{side}_codes", codes, [*slots, dim // 2 if dim else "bytes"], [torch.uint8], like=like)
    check_multiple(f"{side}_codes", codes.shape[3] * 2, BLOCK, "values a head")
    shape = [*codes.shape[:3], codes.shape[3] * 2 // BLOCK]
    check_tensor(f"{side}_scales", scales, shape, [torch.float8_e4m3fn], like=like)
    check_tensor(f"{side}_scale", scale, [], [torch.float32], like=like)


def _check_apart(named: Mapping[str, Tensor | None], written: tuple[Tensor, ...]) -> None:
    """Refuses tensors that share memory with what is appended to: a kernel may read them while it is written.

    By addresses, so whatever made the tensors; memory that is mapped at two addresses is not found.
    """
    places = [_bytes_of(tensor) for tensor in written]
    for name, tensor in named.items():
        start, end = _bytes_of(tensor) if tensor is not None else (0, 0)
        for first, last in places:
            if start and start < last and first < end:  # a meta tensor starts at 0
                raise ArgumentError(name, "memory that k_new is written to", "a second cache apart from the first")


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """Where a contiguous tensor lies: the addresses of its first byte and behind its last one."""
    start = tensor.data_ptr()
    return start, start + tensor.nbytes


def _check_options(softmax_scale: object, window: object, splits: object, *, indexed: bool) -> None:
    if not isinstance(softmax_scale, int | float) or not math.isfinite(softmax_scale):
        raise ArgumentError("softmax_scale", repr(softmax_scale), "a finite number, such as head_dim ** -0.5")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ArgumentError("window", repr(window), "None or at least 1 (it counts the query's own position)")
    if window is not None and indexed:
        raise ArgumentError("window", repr(window), "None with indices: they alone say what is visible")
    if not isinstance(splits, int) or splits < 0:
        raise ArgumentError("splits", repr(splits), "0 (the variant chooses) or more")


def check_values(
    k_codes: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    k_scale: Tensor,
    v_scale: Tensor | None = None,
    indices: Tensor | None = None,
    extra_codes: Tensor | None = None,
    extra_table: Tensor | None = None,
    extra_lengths: Tensor | None = None,
    extra_scale: Tensor | None = None,
    extra_indices: Tensor | None = None,
    *,
    window: int | None = None,
    queries: int = 1,
) -> None:
    """For debugging: checks what `check` cannot without waiting for the device.

    Lengths fit the table; table entries are pages or -1; no page is used twice; every token that a query may see lies
    on a page; decode scales are positive and finite; indices are tokens or -1, none twice for a query.

    Args:
        k_codes: As the op's.
        block_table: As the op's.
        lengths: As the op's.
        k_scale: As the op's.
        v_scale: As the op's.
        indices: As the op's.
        extra_codes: As the op's; with `extra_table` and `extra_lengths`.
        extra_table: As the op's.
        extra_lengths: As the op's.
        extra_scale: As the op's.
        extra_indices: As the op's.
        window: As the op's.
        queries: Number of queries of each sequence.

    Raises:
        ArgumentError: One of these does not hold.
    """
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale), ("extra_scale", extra_scale)):
        if scale is not None and not 0 < float(scale) < math.inf:
            raise ArgumentError(name, float(scale), "a positive finite decode scale")
    reach = None if window is None else window + queries - 1
    _check_pages(k_codes, ("block_table", block_table), ("lengths", lengths), ("indices", indices), reach)
    if extra_codes is not None and extra_table is not None and extra_lengths is not None:
        table, held = ("extra_table", extra_table), ("extra_lengths", extra_lengths)
        _check_pages(extra_codes, table, held, ("extra_indices", extra_indices), None)


def _check_pages(
    codes: Tensor,
    block_table: tuple[str, Tensor],
    lengths: tuple[str, Tensor],
    indices: tuple[str, Tensor | None],
    reach: int | None,
) -> None:
    """Checks the table, lengths and indices of a cache, each with its name; `reach`: last tokens that are seen."""
    (table_name, table), (lengths_name, held), (indices_name, picked) = block_table, lengths, indices
    pages, page = codes.shape[0], codes.shape[2]
    capacity = table.shape[1] * page
    if held.numel() and not 0 <= int(held.min()) <= int(held.max()) <= capacity:
        raise ArgumentError(lengths_name, held.tolist(), f"0 to {capacity} tokens, what the table holds")
    used = table[table != -1]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < pages:
        raise ArgumentError(table_name, f"pages {int(used.min())} to {int(used.max())}", f"-1, or 0 to {pages - 1}")
    if bool((used.sort().values.diff() == 0).any()):
        raise ArgumentError(table_name, "a page twice", "each page once: appending writes to it")
    for b, length in enumerate(held.tolist()):
        first = 0 if reach is None else max(0, length - reach)
        if picked is None and bool((table[b, first // page : -(-length // page)] < 0).any()):
            raise ArgumentError(table_name, f"-1 among the pages of sequence {b}", "a page for each visible token")
    if picked is not None:
        if bool(((picked < -1) | (picked >= held[:, None, None])).any()):
            raise ArgumentError(indices_name, "a position outside its sequence", "-1, or 0 to lengths - 1")
        ordered = picked.sort(-1).values
        if bool(((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any()):
            raise ArgumentError(indices_name, "a position twice for one query", "each position at most once")


def problem(
    q: Tensor,
    k_codes: Tensor,
    k_scales: E4M3Tensor,
    block_table: Tensor,
    lengths: Tensor,
    k_scale: Tensor,
    v_codes: Tensor | None = None,
    v_scales: E4M3Tensor | None = None,
    v_scale: Tensor | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    sink: Tensor | None = None,
    indices: Tensor | None = None,
    extra_codes: Tensor | None = None,
    extra_scales: E4M3Tensor | None = None,
    extra_table: Tensor | None = None,
    extra_lengths: Tensor | None = None,
    extra_scale: Tensor | None = None,
    extra_indices: Tensor | None = None,
    *,
    softmax_scale: float,
    window: int | None = None,
    splits: int = 0,
) -> Problem:
    """The facts of one call; `tokens`: how many a query may see by the tables, the window or the indices."""
    batch, queries, heads, head_dim = q.shape
    _, kv_heads, page, _ = k_codes.shape
    shared = v_codes is None
    v_dim = head_dim if v_codes is None else v_codes.shape[3] * 2
    tokens = block_table.shape[1] * page if indices is None else indices.shape[2]
    if window is not None and window < tokens:
        tokens = window
    if extra_codes is not None and extra_table is not None:
        room = extra_table.shape[1] * extra_codes.shape[2]
        tokens += room if extra_indices is None else extra_indices.shape[2]
    return fast_problem(
        Problem,
        (
            q.device,
            q.dtype,
            head_dim,
            v_dim,
            heads,
            kv_heads,
            page,
            bucket(batch),
            queries,
            bucket(tokens),
            shared,
            k_new is not None,
            indices is not None,
            extra_codes is not None,
        ),
    )


def fake(
    q: Tensor,
    k_codes: Tensor,
    k_scales: E4M3Tensor,
    block_table: Tensor,
    lengths: Tensor,
    k_scale: Tensor,
    v_codes: Tensor | None = None,
    v_scales: E4M3Tensor | None = None,
    v_scale: Tensor | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    sink: Tensor | None = None,
    indices: Tensor | None = None,
    extra_codes: Tensor | None = None,
    extra_scales: E4M3Tensor | None = None,
    extra_table: Tensor | None = None,
    extra_lengths: Tensor | None = None,
    extra_scale: Tensor | None = None,
    extra_indices: Tensor | None = None,
    *,
    softmax_scale: float,
    window: int | None = None,
    splits: int = 0,
) -> DecodeOutput:
    """Outputs of the right shapes and dtypes, not filled."""
    rows = q.shape[:3]
    v_dim = q.shape[3] if v_codes is None else v_codes.shape[3] * 2
    return DecodeOutput(q.new_empty((*rows, v_dim)), q.new_empty(rows, dtype=torch.float32))
