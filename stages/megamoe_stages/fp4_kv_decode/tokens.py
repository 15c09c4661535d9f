"""Which tokens a CTA of the decode kernels goes through, and where in the cache they lie.

A warp of producers has a few tokens of each tile of 64; index, page and row are looked up one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
from cutlass import Constexpr, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, smem
from megamoe.cute.warp import WARP
from megamoe_stages.fp4_kv_decode.shape import TILE


class Store(NamedTuple):
    """One side of the cache: addresses of codes and scales, and bytes a row of each."""

    codes: Int64
    scales: Int64
    code_bytes: int
    scale_bytes: int


class Tokens(NamedTuple):
    """The tokens of a cache that a CTA goes through.

    Attributes:
        block_table: (batch, max_pages) int32.
        indices: (rows, picked) int32; not read unless indexed.
        indexed: Whether the tokens are picked ones.
        sequence: Row of `block_table`.
        row: Of `indices`.
        length: Tokens that exist, unless on a page that does not.
        first: Where tile 0 of the CTA would start.
        end: Where the last tile ends.
        by_page: Divides by the tokens of a page.
        page: Tokens of a page.
        pages: Of the cache.
        kv_heads: Of the cache.
        kv_head: The CTA's.
    """

    block_table: cute.Tensor
    indices: cute.Tensor
    indexed: Int32
    sequence: Int32
    row: Int32
    length: Int32
    first: Int32
    end: Int32
    by_page: cute.FastDivmodDivisorV2
    page: Int32
    pages: Int32
    kv_heads: Int32
    kv_head: Int32

    def store(self, codes: cute.Tensor, scales: cute.Tensor, dim: int) -> Store:
        """A side of the cache by its addresses."""
        return Store(asm.address(codes), asm.address(scales), dim // 2, dim // 16)


class Work(NamedTuple):
    """The tiles of a CTA: some of the first cache, then some of the second.

    Attributes:
        tiles: How many there are.
        near: How many are of the first cache; not what is left of them for this CTA where that is less than 0.
        fresh: The first of them with tokens that the kernel before this one appends; negative for none.
        tokens: The first cache.
        entries: The second one; the first one again where there is no second.
        keys: The keys of the first one.
        values: Its values.
        extra: The keys of the second one, which are its values.
    """

    tiles: Int32
    near: Int32
    fresh: Int32
    tokens: Tokens
    entries: Tokens
    keys: Store
    values: Store
    extra: Store


@cute.jit
def wait_for_appended(tile: Int32, work: Constexpr[Work]) -> None:
    """Waits for the kernel before this one, where a tile is the first that needs it; tiles come one after the other."""
    if tile == work.fresh:
        cute.arch.griddepcontrol_wait()


def own_token(shape: Any) -> Int32:
    """This thread's token in a tile: a warp has a few of them, whole, so that its copies go to few lines of memory."""
    thread, _, _ = cute.arch.thread_idx()
    return thread // WARP * shape.tokens_a_warp + thread % shape.tokens_a_warp


def store_mask(at: Int32, wide: Int32, mask: Uint32, shape: Any) -> None:
    """Writes which tokens of a warp exist, by the vote of the lanes of their first blocks; a thread."""
    size = shape.tokens_a_warp // 8
    smem.store_low(at + wide * size, mask, size)


@cute.jit
def find_token(tile: Int32, work: Constexpr[Work], shape: Constexpr[Any]) -> Int32:
    """This thread's token of a tile, -1 for none; may still be on its way when this returns."""
    token = Int32(-1)
    if cutlass.const_expr(shape.extra):
        if tile < work.near:
            token = token_of(tile, work.tiles, work.tokens, shape)
        else:
            token = token_of(tile, work.tiles, work.entries, shape)
    else:
        token = token_of(tile, work.tiles, work.tokens, shape)
    return token


@cute.jit
def token_of(tile: Int32, tiles: Int32, tokens: Constexpr[Tokens], shape: Constexpr[Any]) -> Int32:
    """The same in one cache."""
    place = tokens.first + tile * TILE + own_token(shape)
    token = arith.select((tile < tiles) & (place < tokens.end), place, Int32(-1))
    if (tokens.indexed != 0) & (token >= 0):
        token = tokens.indices[tokens.row, token]
    return token


@cute.jit
def find_page(token: Int32, tile: Int32, work: Constexpr[Work], shape: Constexpr[Any]) -> tuple[Int32, Int32]:
    """Page of a tile's token, -1 for none, and where in it; the page may still be on its way."""
    home, within = Int32(-1), Int32(0)
    if cutlass.const_expr(shape.extra):
        if tile < work.near:
            home, within = page_of(token, work.tokens)
        else:
            home, within = page_of(token, work.entries)
    else:
        home, within = page_of(token, work.tokens)
    return home, within


@cute.jit
def page_of(token: Int32, tokens: Constexpr[Tokens]) -> tuple[Int32, Int32]:
    """The same in one cache."""
    home, within = Int32(-1), Int32(0)
    if (token >= 0) & (token < tokens.length):
        number, within = divmod(token, tokens.by_page)
        home = tokens.block_table[tokens.sequence, number]
    return home, within


def find_row(home: Int32, within: Int32, tile: Int32, work: Work, shape: Any) -> Int32:
    """The row of the cache of a tile's token: -1 for none, -2 - row for one of the second cache."""
    row = row_of(home, within, work.tokens)
    if shape.extra:
        far = row_of(home, within, work.entries)
        row = arith.select(tile < work.near, row, arith.select(far >= 0, -2 - far, far))
    return row


def row_of(home: Int32, within: Int32, tokens: Tokens) -> Int32:
    """The same in one cache."""
    row = (home * tokens.kv_heads + tokens.kv_head) * tokens.page + within
    return arith.select((home >= 0) & (home < tokens.pages), row, Int32(-1))
