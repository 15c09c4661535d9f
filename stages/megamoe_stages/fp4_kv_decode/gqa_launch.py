"""The host side of the decode kernel for grouped queries: a launch."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.counters import counters
from megamoe_stages.fp4_kv_decode import gqa_kernel
from megamoe_stages.fp4_kv_decode.contract import DecodeOutput
from megamoe_stages.fp4_kv_decode.gqa_shape import SHAPES, TILE, Shape
from megamoe_stages.fp4_kv_decode.launch import Side

_MOST_ROWS = 1 << 31  # of a cache, tokens of a kv head: the kernel counts them in 32 bits


def fits(codes: Tensor) -> bool:
    """Whether the kernel can count the rows of a cache (pages, kv_heads, page, bytes)."""
    return codes.shape[0] * codes.shape[1] * codes.shape[2] < _MOST_ROWS


def attend(
    q: Tensor,
    keys: Side,
    values: Side,
    block_table: Tensor,
    lengths: Tensor,
    sink: Tensor | None,
    out: DecodeOutput,
    *,
    softmax_scale: float,
    window: int | None,
    splits: int,
    kv_heads: int,
    page: int,
    sms: int,
    fresh: int,
    shape: Shape,
) -> tuple[object, ...]:
    """The arguments of the kernel; nothing is empty. `splits` times the problems is how many CTAs share them.

    `fresh` tokens of each sequence are appended by the launch before.
    """
    batch, queries, heads, dim = q.shape
    tokens = block_table.shape[1] * page
    if window is not None:
        tokens = min(tokens, window + queries - 1 + TILE)
    problems = batch * kv_heads
    wanted = problems * splits if splits else sms
    ctas = min(wanted, -(-problems * (-(-tokens // TILE) + 1) // shape.warps), sms)
    return (
        q.view(-1, dim),
        keys.codes,
        keys.scales,
        values.codes,
        values.scales,
        block_table,
        lengths,
        keys.scale,
        values.scale,
        keys.scale.view(1) if sink is None else sink,
        out.out.view(-1, shape.v_dim),
        out.lse.view(-1),
        out.lse.new_empty(2 * ctas, shape.part_floats),
        out.lse.new_empty(2 * ctas, 2 * shape.columns),
        counters("gqa", problems, lengths),
        softmax_scale,
        queries,
        heads,
        kv_heads,
        page,
        keys.codes.shape[0] // (kv_heads * page),
        0 if window is None else window,
        int(sink is not None),
        fresh,
    )


@functools.cache
def decode_kernel(shape: Shape) -> Callable[..., None]:
    """The compiled kernel."""
    return compiler.load(gqa_kernel.spec(shape))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [gqa_kernel.spec(shape) for shape in SHAPES]
