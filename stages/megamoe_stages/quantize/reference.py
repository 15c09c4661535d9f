"""The definition of `quantize`."""

from __future__ import annotations

from torch import Tensor

from megamoe.numerics import nvfp4
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe_stages.quantize import contract


def quantize(
    x: Tensor,
    global_scale_enc: Tensor | None = None,
    *,
    scale_layout: str = "linear",
    fast: bool = False,
    zero_guard: str = "scale",
    four_over_six: str | None = None,
) -> NVFP4Tensor:
    """Quantises a tensor to NVFP4 along its last dim.

    A block of 16 with largest magnitude v gets the scale sf = E4M3(v * (enc * 1/6)), and each element the code
    E2M1(x * o) with o = 1 / (sf * (1 / enc)), where every operation is rounded to fp32 (TransformerEngine
    core_nvfp4.cuh). Where sf is 0, o is 0. A NaN becomes code 0x7 and takes no part in v; an infinity saturates.

    Args:
        x: bf16, fp16 or fp32 (..., rows, K), K a multiple of 16, contiguous.
        global_scale_enc: Encode scale, 6 * 448 / amax, positive and finite: fp32 (), one per batch entry (...), or one
            per batch entry and equal part of the rows (..., parts). None: one for the tensor, from its own amax (with
            256 for 448 under four_over_six; 1 where amax is 0 or infinite).
        scale_layout: "linear", or "128x4" for the tiles of tcgen05 and cuBLASLt, padded per batch entry.
        fast: sf = E4M3(enc * (v * 1/6)), the association of the rcp.approx kernels of FlashInfer and vLLM.
        zero_guard: "scale": zero codes where sf is 0; "amax": only where v is 0, and o at most FLT_MAX elsewhere.
        four_over_six: "mae" or "mse": scale a block's maximum to 4 instead of 6 where that lowers its summed absolute
            or squared error; a tie keeps 6.

    Returns:
        NVFP4Tensor of x's shape; global_scale_dec = 1 / global_scale_enc.

    Raises:
        ArgumentError: An argument's dtype, shape, device or value does not fit.
    """
    contract.check(
        x, global_scale_enc, scale_layout=scale_layout, fast=fast, zero_guard=zero_guard, four_over_six=four_over_six
    )
    if global_scale_enc is None:
        e4m3_max = nvfp4.E4M3_MAX if four_over_six is None else nvfp4.E4M3_MAX_FOUR_OVER_SIX
        global_scale_enc = nvfp4.global_scale_enc(nvfp4.amax(x), e4m3_max=e4m3_max)
    return nvfp4.quantize(
        x, global_scale_enc, scale_layout=scale_layout, fast=fast, zero_guard=zero_guard, four_over_six=four_over_six
    )
