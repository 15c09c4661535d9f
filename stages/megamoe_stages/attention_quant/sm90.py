"""`attention_quant` as one kernel on Hopper (sm_90a)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import check_readable, dtype_name
from megamoe.errors import ArgumentError
from megamoe_stages.attention_quant import contract, kernel, limits
from megamoe_stages.attention_quant.contract import QuantizedAttention
from megamoe_stages.multi_cta_attention.launch import LEAST_SCALE, processors, window_argument
from megamoe_stages.multi_cta_attention.launch_512 import mask_arguments
from megamoe_stages.multi_cta_attention.shape_512 import Shape


def attention_quant(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    softmax_scale: float,
    groups: int,
    causal: bool = True,
    window: int | None = None,
    entries: int = 0,
    scale_layout: str = "linear",
) -> QuantizedAttention:
    """See the reference and `limits.supports`; on the current stream, no synchronisation.

    One launch, and another one that packs a mask. The output is quantised from fp32, as in the reference. A position
    outside of the tables is read as the last one.

    Raises:
        ArgumentError: As the reference, and for what `limits.supports` names, and data not aligned to 16 bytes.
    """
    contract.check(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        positions,
        cos,
        sin,
        global_scale_enc,
        sink,
        mask,
        softmax_scale=softmax_scale,
        groups=groups,
        causal=causal,
        window=window,
        entries=entries,
        scale_layout=scale_layout,
    )
    queries, heads, head_dim = q.shape
    facts: dict[str, str | int | float | bool | None] = {
        "dtype": dtype_name(q),
        "head_dim": head_dim,
        "v_dim": v.shape[2],
        "rope_dim": 2 * cos.shape[1],
        "queries": queries,
        "heads": heads,
        "kv_heads": k.shape[1],
        "keys": k.shape[0],
        "groups": groups,
        "scale_layout": scale_layout,
    }
    if reasons := limits.supports(facts):
        raise ArgumentError("attention_quant", "; ".join(reasons), "what this kernel supports")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("cos", cos), ("sin", sin)):
        check_readable(name, tensor)
    out, lse = contract.fake(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        positions,
        cos,
        sin,
        global_scale_enc,
        softmax_scale=softmax_scale,
        groups=groups,
        scale_layout=scale_layout,
    )
    if queries == 0:
        torch.reciprocal(global_scale_enc, out=out.global_scale_dec)
        return QuantizedAttention(out, lse)
    if k.shape[0] == 0:  # there is no tensor map of nothing
        k = v = k.new_zeros((1, *k.shape[1:]))
    if softmax_scale < 0:
        q, softmax_scale = -q, -softmax_scale  # the kernel takes the largest product for the largest score
    shape = kernel.shape_for(window, masked=mask is not None or entries > 0)
    launcher(scale_layout == "128x4", shape)(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        global_scale_enc.view(1) if sink is None else sink,
        *mask_arguments(q, k, mask, entries),
        positions.view(torch.int32),
        cos,
        sin,
        global_scale_enc,
        out.codes,
        out.scales.view(torch.uint8),
        out.global_scale_dec,
        lse,
        max(softmax_scale, LEAST_SCALE),
        int(causal),
        window_argument(q, k, window),
        int(sink is not None),
        processors(q.device),
    )
    return QuantizedAttention(out, lse)


@functools.cache
def launcher(tiled: bool, shape: Shape) -> Callable[..., None]:
    """The compiled kernel."""
    return compiler.load(kernel.spec(tiled, shape))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [kernel.spec(tiled, shape) for tiled in (False, True) for shape in kernel.SHAPES]
