"""DeepSeek-V4's attention output: inverse RoPE, the grouped projection `wo_a`, and `wo_b` over all groups."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from megamoe.contracts import check_nvfp4, check_tensor
from megamoe.errors import ArgumentError
from megamoe.nn.weights import Weight, given, is_kernel, keep
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor
from megamoe.numerics.rope import inverse_rope
from megamoe.ops import op

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


class AttentionOutput(nn.Module):
    """Projects attention's output to the hidden size.

        z[t, g] = wo_a[g] @ inverse_rope(o)[t, heads of group g],    y[t] = wo_b @ z[t, all groups]

    An NVFP4 weight has its input quantised; a plain one is the exact mode of that projection, in the weight's dtype.

    Args:
        wo_a: (G, r, heads / G * D).
        wo_b: (1, H, G * r).
        o_scale_enc: fp32 (), encode scale of the turned heads; for an NVFP4 `wo_a`.
        z_scale_enc: fp32 (), encode scale of z; for an NVFP4 `wo_b`.

    Raises:
        ArgumentError: Shapes do not fit together, or an NVFP4 weight comes without its scale.
    """

    wo_a: Weight | Tensor
    wo_b: Weight | Tensor
    o_scale_enc: Tensor | None
    z_scale_enc: Tensor | None

    def __init__(
        self,
        wo_a: NVFP4Tensor | Tensor,
        wo_b: NVFP4Tensor | Tensor,
        *,
        o_scale_enc: Tensor | None = None,
        z_scale_enc: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_weight("wo_a", wo_a, ("groups", "r", "K"))
        groups, rank, _ = self._shape_a = tuple(wo_a.shape)
        _check_weight("wo_b", wo_b, (1, "hidden", groups * rank))
        for name, weight, scale in (("o_scale_enc", wo_a, o_scale_enc), ("z_scale_enc", wo_b, z_scale_enc)):
            if isinstance(weight, NVFP4Tensor):
                check_tensor(name, scale, (), (torch.float32,))
        keep(self, "wo_a", wo_a)
        keep(self, "wo_b", wo_b)
        self.register_buffer("o_scale_enc", o_scale_enc)
        self.register_buffer("z_scale_enc", z_scale_enc)

    def forward(self, o: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Projects.

        Args:
            o: bf16, fp16 or fp32 (tokens, heads, D), attention's output before inverse RoPE.
            positions: int32 or int64 (tokens,), rows of the tables.
            cos: fp32 (P, R/2).
            sin: fp32 (P, R/2).

        Returns:
            (tokens, H) of o's dtype.

        Raises:
            ArgumentError: `o` does not fit the weights, or an argument does not fit the op.
        """
        groups, _, k = self._shape_a
        if o.ndim != 3 or o.shape[1] * o.shape[2] != groups * k:
            raise ArgumentError("o", f"shape {tuple(o.shape)}", f"(tokens, heads, D) with heads * D = {groups * k}")
        if isinstance(self.wo_a, Tensor):
            rotated = inverse_rope(o, cos.index_select(0, positions), sin.index_select(0, positions))
            rows = rotated.view(o.shape[0], groups, k).transpose(0, 1)  # (G, tokens, K)
            return self._across(torch.bmm(rows.to(self.wo_a.dtype), self.wo_a.mT)).to(o.dtype)
        return self.project(op("inverse_rope_quant")(o, positions, cos, sin, self.o_scale_enc, groups=groups), o.dtype)

    def project(self, rows: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
        """Projects turned heads that are quantised already, where `wo_a` is NVFP4.

        Args:
            rows: Logical (G, tokens, heads / G * D), linear scales, quantised with `o_scale_enc`.
            dtype: Of the result.

        Returns:
            (tokens, H).

        Raises:
            ArgumentError: `wo_a` is not NVFP4, or `rows` does not fit it.
        """
        groups, rank, _ = self._shape_a
        wo_a, tokens = self.wo_a, rows.shape[1]
        if isinstance(wo_a, Tensor):
            raise ArgumentError("rows", "NVFP4", "forward, as wo_a is a plain tensor")
        # Linear scales, so the groups follow one another as the rows of one matrix.
        a = NVFP4Tensor(rows.codes.flatten(0, 1), rows.scales.flatten(0, 1), rows.global_scale_dec)
        offsets = torch.arange(groups + 1, dtype=torch.int32, device=rows.codes.device) * tokens
        z: Tensor = op("grouped_gemm")(a, wo_a.operand, offsets)
        return self._across(z.view(groups, tokens, rank)).to(dtype)

    @property
    def groups(self) -> int:
        """G."""
        groups: int = self._shape_a[0]
        return groups

    def weight(self, name: str) -> NVFP4Tensor | Tensor:
        """The weights "wo_a" or "wo_b" as they were given."""
        return given(self, name)

    def prepare(self) -> Self:
        """Rearranges NVFP4 weights for the kernels that would run on them; see `Experts.prepare`."""
        for name, scale in (("wo_a", self.o_scale_enc), ("wo_b", self.z_scale_enc)):
            weight = getattr(self, name)
            if isinstance(weight, Weight) and scale is not None:
                groups, _, k = weight.shape
                rows = NVFP4Tensor(
                    torch.empty(groups, k // 2, dtype=torch.uint8, device=scale.device),
                    torch.empty(groups, k // BLOCK, dtype=torch.float8_e4m3fn, device=scale.device),
                    scale,
                )
                offsets = torch.empty(groups + 1, dtype=torch.int32, device=scale.device)
                if is_kernel(op("grouped_gemm").decide(rows, weight.as_if_prepared, offsets)):
                    weight.prepare()
        return self

    def _across(self, z: Tensor) -> Tensor:
        """Projects z (G, tokens, r) to (tokens, H)."""
        z = z.transpose(0, 1).flatten(1)
        wo_b = self.wo_b
        if isinstance(wo_b, Tensor):
            return nn.functional.linear(z.to(wo_b.dtype), wo_b[0])
        offsets = torch.arange(2, dtype=torch.int32, device=z.device) * z.shape[0]
        y: Tensor = op("grouped_gemm")(op("quantize")(z, self.z_scale_enc), wo_b.operand, offsets)
        return y


def _check_weight(name: str, weight: NVFP4Tensor | Tensor, shape: tuple[int | str, ...]) -> None:
    if isinstance(weight, NVFP4Tensor):
        check_nvfp4(name, weight, shape)
    else:
        check_tensor(name, weight, shape, _WEIGHTS)
