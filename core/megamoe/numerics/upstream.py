"""The conversion primitives of the upstream plan, under their names there, as whole-tensor functions.

Upstream quantises |x| to a half step 0..12 and then maps that number to one of the eight E2M1 magnitudes. That rounds
twice: an odd half step above 4 is itself a tie, so what lay beside it has already been lost, and no map can get it back
(9 to 11% of the codes of normal data come out wrong). `half_step_to_e2m1_idx` keeps the map, `quantize_e2m1_nibble`
rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import encode_e2m1, encode_e4m3

# Index of the E2M1 magnitude for each half step; 5, 7, 9, 10 and 11 have none of their own and go to the nearest one,
# a tie to the even index.
HALF_STEP_TO_E2M1 = (0, 1, 2, 3, 4, 4, 5, 6, 6, 6, 6, 7, 7)


def fp8_e4m3_from_float32(x: Tensor) -> Tensor:
    """Rounds once, to nearest even, to E4M3 bytes, saturating at 448.

    Args:
        x: Any float dtype and shape; taken as fp32.

    Returns:
        uint8, same shape; NaN of either sign gives 0x7f, infinity 0x7e or 0xfe.
    """
    return encode_e4m3(x).view(torch.uint8)


def fp8_e4m3_to_float32(byte: Tensor) -> Tensor:
    """E4M3 bytes (uint8) to fp32, exactly; 0x7f and 0xff are NaN.

    Raises:
        ArgumentError: `byte` is not uint8.
    """
    if byte.dtype != torch.uint8:
        raise ArgumentError("byte", byte.dtype, "uint8")
    return byte.view(torch.float8_e4m3fn).float()


def half_step_to_e2m1_idx(half_step: Tensor) -> Tensor:
    """Upstream's second rounding: the half step round(2|x|) to an E2M1 magnitude index. Kept for the record.

    It is wrong for |x| in (2.5, 2.75), (3.25, 3.5) and (5, 5.25], where one rounding gives the other neighbour. Use
    `quantize_e2m1_nibble`.

    Args:
        half_step: Any integer dtype and shape, values 0..12.

    Returns:
        uint8 indices 0..7 into `nvfp4.E2M1_VALUES`, same shape.

    Raises:
        ArgumentError: A value outside 0..12.
    """
    if ((half_step < 0) | (half_step > 12)).any():
        raise ArgumentError("half_step", f"values {half_step.min()}..{half_step.max()}", "0..12")
    table = torch.tensor(HALF_STEP_TO_E2M1, dtype=torch.uint8, device=half_step.device)
    return table[half_step.long()]


def quantize_e2m1_nibble(x: Tensor) -> Tensor:
    """Rounds once, to nearest even, to E2M1 codes (uint8 0..15, same shape): `nvfp4.encode_e2m1`."""
    return encode_e2m1(x)
