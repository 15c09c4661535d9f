"""`fp4_kv_decode` on Hopper (sm_90a)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megamoe.contracts import E4M3Tensor
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import check_readable
from megamoe.errors import ArgumentError
from megamoe_stages.fp4_kv_decode import contract, gqa_launch, launch, limits
from megamoe_stages.fp4_kv_decode.contract import DecodeOutput, Extra
from megamoe_stages.fp4_kv_decode.gqa_shape import shape_of


def fp4_kv_decode(
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
    """See the reference and `limits.supports`; at most two launches, on the current stream, no synchronisation.

    Raises:
        ArgumentError: As the reference, and for what `limits.supports` names, and data not aligned to 16 bytes.
    """
    contract.check(
        q,
        k_codes,
        k_scales,
        block_table,
        lengths,
        k_scale,
        v_codes,
        v_scales,
        v_scale,
        k_new,
        v_new,
        sink,
        indices,
        extra_codes,
        extra_scales,
        extra_table,
        extra_lengths,
        extra_scale,
        extra_indices,
        softmax_scale=softmax_scale,
        window=window,
        splits=splits,
    )
    keys = values = launch.Side(k_codes, k_scales, k_scale)
    if v_codes is not None and v_scales is not None and v_scale is not None:
        values = launch.Side(v_codes, v_scales, v_scale)
    extra = Extra.of(extra_codes, extra_scales, extra_table, extra_lengths, extra_scale, extra_indices)
    if extra is not None and extra.seen == 0:
        extra = None
    dims = {"head_dim": q.shape[3], "v_dim": values.codes.shape[1] * 2, "shared": v_codes is None}
    facts: dict[str, str | int | float | bool | None]
    facts = {"dtype": str(q.dtype).removeprefix("torch."), **dims, "extra": extra is not None}
    if reasons := limits.supports(facts):
        raise ArgumentError("fp4_kv_decode", "; ".join(reasons), "what this kernel supports")
    caches = {"k_codes": k_codes, "k_scales": k_scales, "v_codes": v_codes, "v_scales": v_scales}
    caches |= {"extra_codes": extra_codes, "extra_scales": extra_scales}
    for name, tensor in {"q": q, **caches, "k_new": k_new, "v_new": v_new}.items():
        if tensor is not None and tensor.numel():
            check_readable(name, tensor)
    pages, kv_heads, page, _ = k_codes.shape
    fresh = k_new.shape[1] if k_new is not None and k_new.numel() and pages and block_table.shape[1] else 0
    out = contract.fake(q, k_codes, k_scales, block_table, lengths, k_scale, v_codes, softmax_scale=softmax_scale)
    seen = pages * block_table.shape[1] * (1 if indices is None else indices.shape[2])
    attend: Callable[[], None] | None = None
    if q.numel() and (seen or extra is not None):
        options: dict[str, Any] = {"softmax_scale": softmax_scale, "window": window, "splits": splits, "fresh": fresh}
        options |= {"kv_heads": kv_heads, "page": page}
        options["sms"] = torch.cuda.get_device_properties(q.device).multi_processor_count
        grouped = None
        if indices is None and v_codes is not None and gqa_launch.fits(k_codes):
            grouped = shape_of(q.shape[3], out.out.shape[3], q.shape[1] * q.shape[2] // kv_heads, page)
        if grouped is not None:
            arguments = gqa_launch.attend(q, keys, values, block_table, lengths, sink, out, shape=grouped, **options)
            attend = functools.partial(gqa_launch.decode_kernel(grouped), *arguments)
        else:
            kernel, arguments = launch.attend(
                q, keys, values, block_table, lengths, sink, indices, extra, out, **options
            )
            attend = functools.partial(launch.decode_kernel(kernel), *arguments)
    elif q.numel():
        out.out.zero_()
        out.lse.fill_(-torch.inf)
    if k_new is not None and fresh:  # behind whatever made room for the other: they are to follow each other at once
        arguments = launch.append_new(keys, values, k_new, v_new, block_table, lengths, page)
        launch.append_kernel(k_new.dtype)(*arguments)
    if attend is not None:
        attend()
    return out


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [*launch.kernels(), *gqa_launch.kernels()]
