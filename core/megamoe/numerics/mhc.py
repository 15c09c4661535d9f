"""Manifold-constrained hyper-connections (mHC) of DeepSeek-V4: n residual streams, mixed by learned weights.

Before a sublayer the streams X are collapsed into its input, after it they are mixed and its output F is added:

    pre, post, comb = mix(X);  y = sum_i pre_i X_i;  F = sublayer(rms_norm(y));  X'_j = post_j F + sum_i comb_ij X_i

`comb` is used transposed: the sum runs over its FIRST index. All arithmetic is fp32.
Source: HF modeling_deepseek_v4.py `DeepseekV4HyperConnection` and `DeepseekV4DecoderLayer`; arXiv 2512.24880.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

POST_MULTIPLIER = 2.0  # post = 2 sigmoid(.): 1 where the logit is 0


class Mix(NamedTuple):
    """Weights of one site for every token, fp32.

    Attributes:
        pre: (..., n), collapses the streams.
        post: (..., n), spreads the sublayer's output over the streams.
        comb: (..., n, n), from stream (first index) to stream (second index); columns sum to 1.
    """

    pre: Tensor
    post: Tensor
    comb: Tensor


def mix(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    sinkhorn_iters: int = 20,
    hc_eps: float = 1e-6,
    norm_eps: float = 1e-6,
) -> Mix:
    """Computes the weights of a site from its streams.

    Args:
        x: bf16, fp16 or fp32 (..., n, H).
        fn: fp32 (n(n + 2), nH), rows in the order pre, post, comb.
        base: fp32 (n(n + 2),).
        scale: fp32 (3,), one each for pre, post and comb.
        sinkhorn_iters: See `sinkhorn`.
        hc_eps: Added to pre, and to every sum of `sinkhorn`.
        norm_eps: Added to the mean square of the nH values.

    Returns:
        Mix.
    """
    n = x.shape[-2]
    flat = x.flatten(-2).float()  # (..., nH)
    rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    logits = (flat @ fn.T) * rms  # (..., n(n + 2)); no norm weight
    pre, post, comb = (
        part * s + b for part, s, b in zip(_parts(logits, n), scale.unbind(), _parts(base, n), strict=True)
    )
    return Mix(
        torch.sigmoid(pre) + hc_eps,
        POST_MULTIPLIER * torch.sigmoid(post),
        sinkhorn(comb.reshape(*comb.shape[:-1], n, n), iters=sinkhorn_iters, eps=hc_eps),
    )


def sinkhorn(logits: Tensor, *, iters: int = 20, eps: float = 1e-6) -> Tensor:
    """Makes a matrix nearly doubly stochastic: softmax of the rows, then rows and columns normalised in turn.

    Args:
        logits: fp32 (..., n, n).
        iters: Number of column normalisations; the last step is one.
        eps: Added to the softmax and to every sum.

    Returns:
        fp32 (..., n, n), columns (sums over the first index) 1 up to eps.
    """
    comb = torch.softmax(logits, dim=-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def collapse(x: Tensor, pre: Tensor) -> Tensor:
    """A sublayer's input before its norm, sum_i pre_i x_i.

    Args:
        x: bf16, fp16 or fp32 (..., n, H).
        pre: fp32 (..., n).

    Returns:
        (..., H) of x's dtype, rounded once.
    """
    return (pre[..., None] * x.float()).sum(-2).to(x.dtype)


def post_mix(x: Tensor, f: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams after a sublayer, x'_j = post_j f + sum_i comb_ij x_i.

    Args:
        x: bf16, fp16 or fp32 (..., n, H), the streams that went into the site.
        f: Same dtype (..., H), the sublayer's output.
        post: fp32 (..., n).
        comb: fp32 (..., n, n).

    Returns:
        (..., n, H) of x's dtype, rounded once.
    """
    added = post[..., None] * f.float()[..., None, :]
    return (added + comb.transpose(-1, -2) @ x.float()).to(x.dtype)


def rms_norm(y: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalisation, y / rms(y) * weight.

    Args:
        y: bf16, fp16 or fp32 (..., H).
        weight: fp32 (or y's dtype) (H,); multiplied in fp32.
        eps: Added to the mean square.

    Returns:
        (..., H) of y's dtype, rounded once.
    """
    wide = y.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight.float() * wide).to(y.dtype)


def _parts(values: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    pre, post, comb = torch.split(values, [n, n, n * n], dim=-1)
    return pre, post, comb
