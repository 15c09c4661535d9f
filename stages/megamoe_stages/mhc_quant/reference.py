"""The definition of mhc_quant."""

from __future__ import annotations

from torch import Tensor

from megamoe.numerics import mhc, nvfp4
from megamoe_stages.mhc_quant import contract
from megamoe_stages.mhc_quant.contract import MhcOutput


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
    """Ends one mHC site and enters the next: from a sublayer's output to the next sublayer's quantised input.

        X'_j = post_j F + sum_i comb_ij X_i              rounded to x's dtype: the new streams
        pre', post', comb' = mix(X')                     of the next site, from the rounded streams
        y = sum_i pre'_i X'_i                            rounded to x's dtype
        normed = y / rms(y) * norm_weight                rounded to x's dtype
        quantized = nvfp4(normed)

    All in fp32 between the roundings. `comb` is summed over its FIRST index.

    Args:
        x: bf16, fp16 or fp32 (tokens, n, H), the streams that went into the site; H a multiple of 16.
        f: Same dtype (tokens, H), the sublayer's output F.
        post: fp32 (tokens, n), from the site that is left.
        comb: fp32 (tokens, n, n), from the site that is left.
        fn: fp32 (n(n + 2), nH), the next site's projection, rows in the order pre, post, comb.
        base: fp32 (n(n + 2),), the next site's biases.
        scale: fp32 (3,), the next site's factors of pre, post and comb.
        norm_weight: fp32 or x's dtype (H,), of the next sublayer's RMSNorm.
        global_scale_enc: fp32 (), encode scale 2688 / amax of `normed`.
        sinkhorn_iters: Number of column normalisations, at least 1.
        hc_eps: Added to pre', to the softmax and to every sum of the Sinkhorn iteration.
        norm_eps: Added to the mean squares of X' and of y.
        scale_layout: Layout of the block scales, "linear" or "128x4".

    Returns:
        MhcOutput(residual = X', normed, quantized, post', comb').

    Raises:
        ArgumentError: An argument does not fit.

    Source: HF modeling_deepseek_v4.py `DeepseekV4DecoderLayer` and `DeepseekV4HyperConnection`.
    """
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
    residual = mhc.post_mix(x, f, post, comb)
    site = mhc.mix(residual, fn, base, scale, sinkhorn_iters=sinkhorn_iters, hc_eps=hc_eps, norm_eps=norm_eps)
    normed = mhc.rms_norm(mhc.collapse(residual, site.pre), norm_weight, norm_eps)
    quantized = nvfp4.quantize(normed, global_scale_enc, scale_layout=scale_layout)
    return MhcOutput(residual, normed, quantized, site.post, site.comb)
