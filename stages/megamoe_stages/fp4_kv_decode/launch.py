"""The host side of the fused decode on sm_90a: a launch that appends what is new, and one that attends."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.strips import DTYPES
from megamoe_stages.fp4_kv_decode import append, kernel, mqa_shape
from megamoe_stages.fp4_kv_decode.contract import DecodeOutput, Extra
from megamoe_stages.fp4_kv_decode.shape import ROWS, SHAPES, TILE, Shape

_LEAST_TILES = 4  # of a CTA, where the tokens are split
_MOST_SPLITS = 64


class Side:
    """Keys or values: codes and scales as rows of tokens, and the decode scale."""

    def __init__(self, codes: Tensor, scales: Tensor, scale: Tensor) -> None:
        self.codes = codes.view(-1, codes.shape[3])
        self.scales = scales.view(torch.uint8).view(-1, scales.shape[3])
        self.scale = scale


def append_new(
    keys: Side, values: Side, k_new: Tensor, v_new: Tensor | None, block_table: Tensor, lengths: Tensor, page: int
) -> tuple[object, ...]:
    """The arguments of the append kernel; `k_new` is not empty."""
    _, new, kv_heads, dim = k_new.shape
    rows = k_new.view(-1, dim)
    return (
        rows,
        rows if v_new is None else v_new.view(-1, v_new.shape[3]),
        keys.codes,
        keys.scales,
        values.codes,
        values.scales,
        keys.scale,
        values.scale,
        block_table,
        lengths,
        new,
        kv_heads,
        page,
        keys.codes.shape[0] // (kv_heads * page),
        1 if v_new is None else 2,
    )


def attend(
    q: Tensor,
    keys: Side,
    values: Side,
    block_table: Tensor,
    lengths: Tensor,
    sink: Tensor | None,
    indices: Tensor | None,
    extra: Extra | None,
    out: DecodeOutput,
    *,
    softmax_scale: float,
    window: int | None,
    splits: int,
    kv_heads: int,
    page: int,
    sms: int,
    fresh: int,
) -> tuple[Shape | mqa_shape.Shape, tuple[object, ...]]:
    """The decode kernel to launch and its arguments; nothing is empty, unless there is a second cache.

    `fresh` tokens of each sequence are appended by the launch before.
    """
    batch, queries, heads, dim = q.shape
    v_dim = out.out.shape[3]
    apart = indices is not None or (extra is not None and extra.indices is not None)
    rows = heads // kv_heads * (1 if apart else queries)
    problems = batch * (queries if apart else 1) * kv_heads * -(-rows // ROWS)
    tokens = block_table.shape[1] * page if indices is None else indices.shape[2]
    if window is not None:
        tokens = min(tokens, window + queries - 1)
    second = keys, block_table, lengths, block_table, 1
    if extra is not None:
        entries = extra.room if extra.indices is None else extra.indices.shape[2]
        tokens = -(-tokens // TILE) * TILE + entries
        picks = extra.table if extra.indices is None else extra.indices.flatten(0, 1)
        second = Side(extra.codes, extra.scales, extra.scale), extra.table, extra.lengths, picks, extra.codes.shape[2]
    more, *places, extra_page = second
    shape: Shape | mqa_shape.Shape
    shape = mqa_shape.Shape(extra is not None) if values is keys else Shape(dim, v_dim)
    splits = min(splits, -(-tokens // TILE)) or choose_splits(problems, tokens, sms, pairs=shape.shared)
    parts = splits
    if shape.shared and splits > 1:
        shape, splits = mqa_shape.Shape(shape.extra, paired=True), splits + splits % 2
        problems, parts = problems * 2, splits // 2
    merged = problems if parts > 1 else 0
    return shape, (
        q.view(-1, dim),
        keys.codes,
        keys.scales,
        values.codes,
        values.scales,
        block_table,
        lengths,
        block_table if indices is None else indices.flatten(0, 1),
        more.codes,
        more.scales,
        *places,
        more.scale,
        keys.scale,
        values.scale,
        keys.scale.view(1) if sink is None else sink,
        out.out.view(-1, v_dim),
        out.lse.view(-1),
        q.new_empty(merged * parts * ROWS, shape.out_columns, dtype=torch.float32),
        q.new_empty(merged * parts * ROWS, 2, dtype=torch.float32),
        q.new_zeros(merged, dtype=torch.int32),
        softmax_scale,
        queries,
        heads,
        kv_heads,
        page,
        keys.codes.shape[0] // (kv_heads * page),
        extra_page,
        more.codes.shape[0] // (kv_heads * extra_page),
        0 if window is None else window,
        int(indices is not None),
        int(extra is not None and extra.indices is not None),
        int(sink is not None),
        splits,
        fresh,
    )


def choose_splits(problems: int, tokens: int, sms: int, *, pairs: bool = False) -> int:
    """Into how many parts the tokens go: as many as fill the machine, unless a CTA would get but a few tiles.

    Args:
        problems: CTAs without splits.
        tokens: At most.
        sms: Of the GPU.
        pairs: CTAs work in pairs, which cost little: two for any two tiles, and an even number.
    """
    tiles, room = -(-tokens // TILE), sms // problems
    splits = max(1, min(room, tiles // _LEAST_TILES, _MOST_SPLITS))
    if pairs:
        splits = max(splits, min(2, tiles, room))
        splits -= splits % 2 if splits > 1 else 0
    return splits


@functools.cache
def append_kernel(dtype: torch.dtype) -> Callable[..., None]:
    """The compiled append kernel."""
    return compiler.load(append.spec(str(dtype).removeprefix("torch.")))


@functools.cache
def decode_kernel(shape: Shape | mqa_shape.Shape) -> Callable[..., None]:
    """The compiled decode kernel."""
    return compiler.load(kernel.spec(shape))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return (
        [append.spec(dtype) for dtype in DTYPES]
        + [kernel.spec(shape) for shape in mqa_shape.SHAPES]
        + [kernel.spec(shape) for shape in SHAPES]
    )
