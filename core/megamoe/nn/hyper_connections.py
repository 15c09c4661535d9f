"""mHC residual streams round a sublayer: enter the first site, advance from site to site, leave the last.

state = enter(x, sites[0])
for site in sites[1:]:
state = advance(state.residual, sublayer(state), state.post, state.comb, site)
x = leave(state.residual, sublayer(state), state.post, state.comb)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megamoe.numerics import mhc
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.ops import op


@dataclass(frozen=True, slots=True, eq=False)
class HyperSite:
    """Parameters of one site: what stands before one sublayer.

    Attributes:
        fn: fp32 (n(n + 2), nH), rows in the order pre, post, comb.
        base: fp32 (n(n + 2),).
        scale: fp32 (3,).
        norm_weight: fp32 or the streams' dtype (H,), of the sublayer's RMSNorm.
        hc_eps: Added to pre and to every sum of the Sinkhorn iteration.
        norm_eps: Added to the mean squares.
        sinkhorn_iters: Column normalisations of comb.
    """

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm_weight: Tensor
    hc_eps: float = 1e-6
    norm_eps: float = 1e-6
    sinkhorn_iters: int = 20


class HyperState(NamedTuple):
    """What a sublayer and the next site need.

    Attributes:
        residual: (tokens, n, H), the streams that went into the site.
        normed: (tokens, H) of the same dtype, the sublayer's input.
        quantized: NVFP4 of `normed`; None in the exact mode.
        post: fp32 (tokens, n).
        comb: fp32 (tokens, n, n).
    """

    residual: Tensor
    normed: Tensor
    quantized: NVFP4Tensor | None
    post: Tensor
    comb: Tensor


def enter(x: Tensor, site: HyperSite, global_scale_enc: Tensor | None = None) -> HyperState:
    """Enters a site with no sublayer before it: the first one of a model.

    Args:
        x: bf16, fp16 or fp32 (tokens, n, H), the streams.
        site: The site.
        global_scale_enc: fp32 (), encode scale of `normed`; None for the exact mode.

    Raises:
        ArgumentError: `global_scale_enc` or H does not fit NVFP4 (from the op `quantize`).
    """
    pre, post, comb = mhc.mix(
        x,
        site.fn,
        site.base,
        site.scale,
        sinkhorn_iters=site.sinkhorn_iters,
        hc_eps=site.hc_eps,
        norm_eps=site.norm_eps,
    )
    normed = mhc.rms_norm(mhc.collapse(x, pre), site.norm_weight, site.norm_eps)
    quantized = None if global_scale_enc is None else op("quantize")(normed, global_scale_enc)
    return HyperState(x, normed, quantized, post, comb)


def advance(
    x: Tensor, f: Tensor, post: Tensor, comb: Tensor, site: HyperSite, global_scale_enc: Tensor | None = None
) -> HyperState:
    """Ends the site before a sublayer and enters the next one, by the op `mhc_quant`.

    Args:
        x: bf16, fp16 or fp32 (tokens, n, H), the streams that went into the site that ends.
        f: Same dtype (tokens, H), the sublayer's output.
        post: fp32 (tokens, n), of the site that ends.
        comb: fp32 (tokens, n, n), of the site that ends.
        site: The next site.
        global_scale_enc: fp32 (), encode scale of the next `normed`; None for the exact mode.

    Raises:
        ArgumentError: An argument does not fit the op.
    """
    if global_scale_enc is None:
        return enter(leave(x, f, post, comb), site)
    return HyperState(
        *op("mhc_quant")(
            x,
            f,
            post,
            comb,
            site.fn,
            site.base,
            site.scale,
            site.norm_weight,
            global_scale_enc,
            sinkhorn_iters=site.sinkhorn_iters,
            hc_eps=site.hc_eps,
            norm_eps=site.norm_eps,
        )
    )


def leave(x: Tensor, f: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Ends a site with no site after it: the streams (tokens, n, H) after the last sublayer; see `advance`."""
    return mhc.post_mix(x, f, post, comb)
