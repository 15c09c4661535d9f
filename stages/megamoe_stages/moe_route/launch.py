"""`moe_route` as one launch: the host side, and what `megamoe compile` compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import target_of
from megamoe.errors import ArgumentError
from megamoe_stages.moe_route import contract, kernel, limits
from megamoe_stages.moe_route.contract import Routing


def moe_route(
    logits: Tensor,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
    *,
    top_k: int,
    scaling: float,
) -> Routing:
    """See the reference, which defines the op; one launch on the current stream, no synchronisation.

    Raises:
        ArgumentError: As the reference, and for what `limits.supports` names.
    """
    contract.check(logits, bias, token_ids, table, top_k=top_k, scaling=scaling)
    tokens, experts = logits.shape
    if reasons := limits.supports({"experts": experts, "top_k": top_k, "tokens": tokens}):
        raise ArgumentError("moe_route", "; ".join(reasons), "what this kernel supports")
    if not logits.is_cuda:
        raise ArgumentError("logits", f"device {logits.device}", "a CUDA device")
    out = contract.fake(logits, bias, token_ids, table, top_k=top_k, scaling=scaling)
    if not tokens:
        return out
    target = target_of(logits.device)
    if token_ids is not None and table is not None:
        launch = _looking_up(token_ids.element_size(), table.element_size(), target)
        # of an int64 the low word is the number
        launch(logits, token_ids.view(torch.int32).view(-1), table.view(torch.int32), *out, scaling)
    else:
        launch = _choosing(kernel.logits_a_lane(experts), bias is not None, target)
        launch(logits, logits[0] if bias is None else bias, *out, scaling)
    return out


@functools.cache
def _choosing(logits_a_lane: int, biased: bool, target: Target) -> Callable[..., None]:
    return compiler.load(kernel.choosing(logits_a_lane, biased, target))


@functools.cache
def _looking_up(id_bytes: int, table_bytes: int, target: Target) -> Callable[..., None]:
    return compiler.load(kernel.looking_up(id_bytes, table_bytes, target))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    targets = (Target.SM90, Target.SM100)
    specs = [kernel.choosing(n, biased, t) for t in targets for n in kernel.LOGITS_A_LANE for biased in (False, True)]
    return specs + [kernel.looking_up(i, n, target) for target in targets for i in (4, 8) for n in (4, 8)]
