"""`grouped_gemm` on Hopper (sm_90a): one kernel for few rows an expert, another for many."""

from __future__ import annotations

from torch import Tensor

from megamoe.cute import decode_limits, prepare
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import check_readable
from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe_stages.grouped_gemm import contract, decode, limits, prefill

MOST_ROWS = 4  # of one expert, up to which streaming its weights into `mma` was faster


def grouped_gemm(
    a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None = None
) -> Tensor:
    """See `reference.grouped_gemm` and `limits.supports`; on the current stream, no synchronisation.

    Raises:
        ArgumentError: As the reference, and for what `limits.supports` names, and data not aligned to 16 bytes.
    """
    contract.check(a, weights, offsets, row_index)
    rows = contract.rows_of(a, row_index)
    of_weights: dict[str, str | int | float | bool] = {
        "scale_layout": contract.layout_kind(weights),
        "part_rows": contract.part_rows(weights),
    }
    if reasons := limits.supports({**facts(a, weights, rows), **of_weights}):
        raise ArgumentError("grouped_gemm", "; ".join(reasons), "what this kernel supports")
    check_operands(a, weights)
    out = contract.fake(a, weights, offsets, row_index)
    if rows:
        experts, padded_n = weights.codes.shape[:2]
        few = decode_limits.takes(rows, experts, *contract.logical_size(weights))
        if experts == 1:
            few = few and rows <= MOST_ROWS and decode_limits.busy(padded_n, prefill.processors(out.device))
        (decode if few else prefill).run(a, weights, offsets, row_index, out)
    return out


def facts(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, rows: int) -> dict[str, str | int | float | bool]:
    """What `limits.gemm_refuses` looks at besides the layout."""
    dtype = str(contract.out_dtype(a)).removeprefix("torch.")
    return {"dtype": dtype, "rows": rows, "experts": weights.codes.shape[0]}


def check_operands(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor) -> None:
    """Raises ArgumentError unless the kernels can read their operands, 16 bytes at a time."""
    check_readable("a", a.codes if isinstance(a, NVFP4Tensor) else a)
    check_readable("weights.codes", weights.codes)
    check_readable("weights.scales", weights.scales)


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [prepare.spec(), *decode.kernels(), *prefill.kernels()]
