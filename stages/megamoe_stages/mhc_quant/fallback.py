"""mhc_quant as separate launches: batched GEMM, skinny GEMM, Sinkhorn, batched GEMM, RMSNorm, quantise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megamoe.numerics.mhc import POST_MULTIPLIER
from megamoe_stages.mhc_quant import contract
from megamoe_stages.mhc_quant.contract import MhcOutput
from megamoe_stages.quantize.fallback import quantize


def mhc_quant(
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
    """See `reference.mhc_quant`."""
    contract.check(
        x,
        f,
        post,
        comb,
        fn,
        base,
        scale,
        norm_weight,
        global_scale_enc,
        sinkhorn_iters=sinkhorn_iters,
        hc_eps=hc_eps,
        norm_eps=norm_eps,
        scale_layout=scale_layout,
    )
    tokens, n, hidden = x.shape
    added = post[:, :, None] * f[:, None, :].float()  # (tokens, n, H)
    residual = torch.baddbmm(added, comb.mT, x.float()).to(x.dtype)
    streams = residual.float()
    normed_streams = functional.rms_norm(streams.view(tokens, n * hidden), (n * hidden,), eps=norm_eps)
    logits = functional.linear(normed_streams, fn)  # (tokens, n(n + 2))
    per_row = torch.cat([part.expand(size) for part, size in zip(torch.split(scale, 1), (n, n, n * n), strict=True)])
    pre, next_post, mixing = torch.split(torch.addcmul(base, logits, per_row), [n, n, n * n], dim=-1)
    y = torch.bmm(torch.sigmoid(pre)[:, None].add(hc_eps), streams)[:, 0].to(x.dtype)  # (tokens, H)
    normed = functional.rms_norm(y.float(), (hidden,), norm_weight.float(), norm_eps).to(x.dtype)
    return MhcOutput(
        residual,
        normed,
        quantize(normed, global_scale_enc, scale_layout=scale_layout),
        torch.sigmoid(next_post) * POST_MULTIPLIER,
        _sinkhorn(mixing.reshape(tokens, n, n), sinkhorn_iters, hc_eps),
    )


def _sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Sinkhorn's iteration on the factors of the rows and columns; the matrix is scaled once, at the end.

    With C = rows_i S_ij cols_j, a row sum of C is rows_i (S cols)_i, so a step is one small product and one division.
    """
    start = torch.softmax(logits, dim=-1) + eps  # (tokens, n, n)
    floor = start.new_full((), eps)
    rows = start.new_ones(start.shape[:-1])[..., None]  # (tokens, n, 1)
    cols = rows
    for step in range(iters):
        if step > 0:
            rows = rows / torch.addcmul(floor, rows, torch.bmm(start, cols))
        cols = cols / torch.addcmul(floor, cols, torch.bmm(start.mT, rows))
    return rows * start * cols.mT
