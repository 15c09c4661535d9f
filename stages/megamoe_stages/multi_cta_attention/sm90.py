"""`multi_cta_attention` on Hopper (sm_90a)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import ALIGNMENT, check_readable, dtype_name
from megamoe.errors import ArgumentError
from megamoe_stages.multi_cta_attention import contract, launch, launch_512, limits, shape_512
from megamoe_stages.multi_cta_attention.contract import AttentionOutput
from megamoe_stages.multi_cta_attention.shape import shape_of

_MOST_PLANS = 4096
_plans: dict[tuple[object, ...], Plan] = {}


class Plan(NamedTuple):
    """What follows from the shapes, dtypes and devices of a call's tensors, all of which were checked.

    Attributes:
        kernel: The launcher.
        rows: Of a CTA; 0 for head_dim 512.
        sms: Of the GPU.
        empty: There is nothing to attend to.
    """

    kernel: Callable[..., None]
    rows: int
    sms: int
    empty: bool


def multi_cta_attention(
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
    """See the reference and `limits.supports`; on the current stream, no synchronisation.

    One launch, and another one that packs a mask at head_dim 512. Tensors like those of an earlier call are not checked
    again but for their addresses.

    Raises:
        ArgumentError: As the reference, and for what `limits.supports` names, and data not aligned to 16 bytes.
    """
    contract.check_scale(softmax_scale)
    contract.check_causal(causal)
    contract.check_window(window)
    contract.check_entries(entries)
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, sink, mask)
    try:
        key = (
            q.shape[2] == shape_512.DIM and shape_512.is_narrow(window),
            entries > 0,
            *[None if t is None else (t.shape, t.dtype, t.device, t.is_contiguous()) for t in tensors],
        )
        plan = _plans.get(key)
    except AttributeError:  # not a tensor, as the check will say
        key, plan = (), None
    if plan is None:
        contract.check(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            sink,
            mask,
            softmax_scale=softmax_scale,
            causal=causal,
            window=window,
            entries=entries,
        )
        plan = _plan(q, k, v, mask, window, entries)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    out = AttentionOutput(
        q.new_empty((q.shape[0], q.shape[1], v.shape[2])), q.new_empty(q.shape[:2], dtype=torch.float32)
    )
    if plan.empty:
        out.out.zero_()
        out.lse.fill_(-torch.inf)
        return out
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT:
        _check_addresses(q, k, v)
    given = (q, k, v, cu_seqlens_q, cu_seqlens_k, sink, mask, out)
    if plan.rows == 0:
        arguments = launch_512.attend(
            *given, softmax_scale=softmax_scale, causal=causal, window=window, entries=entries, sms=plan.sms
        )
    else:
        rows, sms = plan.rows, plan.sms
        arguments = launch.attend(*given, softmax_scale=softmax_scale, causal=causal, window=window, rows=rows, sms=sms)
    plan.kernel(*arguments)
    return out


def _plan(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None, entries: int) -> Plan:
    masked = mask is not None
    wide = q.shape[2] == shape_512.DIM
    shape = None if wide else shape_of(q.shape[2], v.shape[2], dtype_name(q), masked=masked)
    facts: dict[str, str | int | float | bool | None] = {
        "dtype": dtype_name(q),
        "head_dim": q.shape[2],
        "v_dim": v.shape[2],
        "heads": q.shape[1],
        "kv_heads": k.shape[1],
        "queries": q.shape[0],
        "keys": k.shape[0],
        "masked": masked,
        "entries": entries > 0,
    }
    reasons = limits.supports(facts)
    if reasons or (shape is None and not wide):
        raise ArgumentError("multi_cta_attention", "; ".join(reasons), "what this kernel supports")
    _check_addresses(q, k, v)
    empty = q.numel() == 0 or k.numel() == 0 or (mask is not None and entries == 0 and mask.numel() == 0)
    if shape is None:
        kernel = launch_512.attend_kernel(
            shape_512.shape_for(window, masked=masked or entries > 0, dtype=dtype_name(q))
        )
        return Plan(kernel, 0, launch.processors(q.device), empty)
    return Plan(launch.attend_kernel(shape), shape.rows, launch.processors(q.device), empty)


def _check_addresses(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.numel():
            check_readable(name, tensor)


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return launch.kernels() + launch_512.kernels()
