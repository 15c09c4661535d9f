"""What mhc_quant accepts and returns, what choosing a variant may look at, and how exact a variant must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import ACTIVATIONS, bucket, check_multiple, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor, check_scale_layout
from megamoe.testing.cases import Bound
from megamoe_stages.quantize import contract as quantize_contract

_SUMS = "order of fp32 sums flips a rounding of the streams by one ulp"
_MIX = "a flipped stream value moves the logits of its token"
BOUNDS: Mapping[str, Bound] = {  # for bf16; fp16 and fp32 cases ask for more. How they were found: NOTES.md
    "residual": Bound(4e-4, f"{_SUMS} of bf16; of 8192 values a large one alone moves 1.6e-4"),
    "normed": Bound(1.5e-3, f"{_SUMS} of bf16, then of y, then of normed"),
    "quantized": Bound(2e-2, "an ulp of normed flips a code or a block scale; of 2048 values one flip moves 1.5e-2"),
    "post": Bound(2e-4, _MIX),
    "comb": Bound(2e-4, _MIX),
}


class MhcOutput(NamedTuple):
    """Results of mhc_quant.

    Attributes:
        residual: (tokens, n, H) of x's dtype, the new streams.
        normed: (tokens, H) of x's dtype, the next sublayer's input.
        quantized: NVFP4 of `normed`.
        post: fp32 (tokens, n), for the next post.
        comb: fp32 (tokens, n, n), for the next post.
    """

    residual: Tensor
    normed: Tensor
    quantized: NVFP4Tensor
    post: Tensor
    comb: Tensor


class Problem(NamedTuple):
    """Facts that choosing a variant may look at.

    Attributes:
        device: Where the tensors live.
        dtype: Of `x`.
        norm_dtype: Of `norm_weight`.
        rows: Tokens, rounded up to a power of two.
        streams: n.
        hidden: H.
        sinkhorn_iters: Iterations.
        scale_layout: "linear" or "128x4".
    """

    device: torch.device
    dtype: torch.dtype
    norm_dtype: torch.dtype
    rows: int
    streams: int
    hidden: int
    sinkhorn_iters: int
    scale_layout: str


def check(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    global_scale_enc: Tensor,
    *,
    sinkhorn_iters: int = 20,
    hc_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    scale_layout: str = "linear",
) -> None:
    """Raises ArgumentError for arguments that no variant takes; see `reference.mhc_quant`."""
    fp32 = (torch.float32,)
    check_tensor("x", x, ("tokens", "streams", "H"), ACTIVATIONS)
    tokens, n, hidden = x.shape
    if n < 1:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", "at least one stream")
    check_multiple("x", hidden, BLOCK, "hidden dims")
    check_tensor("f", f, (tokens, hidden), (x.dtype,), like=x)
    check_tensor("post", post, (tokens, n), fp32, like=x)
    check_tensor("comb", comb, (tokens, n, n), fp32, like=x)
    check_tensor("fn", fn, (n * (n + 2), n * hidden), fp32, like=x)
    check_tensor("base", base, (n * (n + 2),), fp32, like=x)
    check_tensor("scale", scale, (3,), fp32, like=x)
    check_tensor("norm_weight", norm_weight, (hidden,), tuple(dict.fromkeys((torch.float32, x.dtype))), like=x)
    check_tensor("global_scale_enc", global_scale_enc, (), fp32, like=x)
    if sinkhorn_iters < 1:
        raise ArgumentError("sinkhorn_iters", sinkhorn_iters, "at least 1")
    for name, eps in (("hc_eps", hc_eps), ("norm_eps", norm_eps)):
        if not eps >= 0:
            raise ArgumentError(name, eps, "a number >= 0")
    check_scale_layout(scale_layout)


def problem(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    global_scale_enc: Tensor,
    *,
    sinkhorn_iters: int = 20,
    hc_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    scale_layout: str = "linear",
) -> Problem:
    """The facts of one call."""
    tokens, n, hidden = x.shape
    return fast_problem(
        Problem, (x.device, x.dtype, norm_weight.dtype, bucket(tokens), n, hidden, sinkhorn_iters, scale_layout)
    )


def fake(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    global_scale_enc: Tensor,
    *,
    sinkhorn_iters: int = 20,
    hc_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    scale_layout: str = "linear",
) -> MhcOutput:
    """Empty results of the right shapes."""
    normed = torch.empty_like(f)
    quantized = quantize_contract.fake(normed, global_scale_enc, scale_layout=scale_layout)
    return MhcOutput(torch.empty_like(x), normed, quantized, torch.empty_like(post), torch.empty_like(comb))


def bytes_moved(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    global_scale_enc: Tensor,
    *,
    sinkhorn_iters: int = 20,
    hc_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    scale_layout: str = "linear",
) -> int:
    """Bytes read and written once: streams in and out, f and normed, codes and block scales (weights left out)."""
    streams, hidden = 2 * x.numel() * x.element_size(), f.numel()
    return streams + 2 * hidden * f.element_size() + hidden // 2 + hidden // BLOCK
