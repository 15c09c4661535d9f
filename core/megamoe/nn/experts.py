"""The routed experts of a mixture-of-experts layer."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

from megamoe.contracts import ACTIVATIONS, INDICES, check_nvfp4, check_tensor
from megamoe.errors import ArgumentError
from megamoe.nn.weights import Weight, given, is_kernel, keep
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.ops import op

ORDERS = ("gate_up", "up_gate")


class Experts(nn.Module):
    """Sends each token through its experts: down(silu(min(gate, limit)) * clamp(up, -limit, limit)), weighted, summed.

    The routing weight multiplies the second GEMM's output in fp32, as in Hugging Face's DeepseekV4Experts. Nothing
    waits for the device, and the sum has one order, so a CUDA graph may hold a call: everything is compiled and
    planned by a first call of the same sizes outside of it.

    With NVFP4 weights the layer is the ops `moe_permute`, `swiglu_quant`, `grouped_gemm` and `moe_combine`; plain
    activations enter the first GEMM as they are (W4A16), NVFP4 ones as NVFP4 (W4A4), and between the GEMMs all are
    NVFP4. With plain weights, the exact mode, the same steps run without quantisation.

    Args:
        gate_up: (E, 2I, H): NVFP4Tensor, or Tensor for the exact mode.
        down: (E, H, I), of the same kind as `gate_up`.
        limit: Of the clamp; None clamps nothing.
        activation_scale_enc: fp32 (), encode scale of what enters `down`; None only in the exact mode.
        order: "gate_up" where the gate rows of `gate_up` come first, "up_gate" where the up rows do.

    Raises:
        ArgumentError: Shapes, kinds or devices of the weights do not fit together, or the scale is missing.
    """

    gate_up: Weight  # a buffer in the exact mode, and so is down
    down: Weight
    activation_scale_enc: Tensor | None

    def __init__(
        self,
        gate_up: NVFP4Tensor | Tensor,
        down: NVFP4Tensor | Tensor,
        *,
        limit: float | None,
        activation_scale_enc: Tensor | None = None,
        order: str = "gate_up",
    ) -> None:
        super().__init__()
        _check_weights(gate_up, down, activation_scale_enc, order)
        self.limit = limit
        self.order = order
        self.quantized = isinstance(gate_up, NVFP4Tensor)
        self.num_experts, self.hidden, self.intermediate = down.shape
        keep(self, "gate_up", gate_up, order)
        keep(self, "down", down)
        self.register_buffer("activation_scale_enc", activation_scale_enc)

    def prepare(self, *, always: bool = False) -> Self:
        """Rearranges NVFP4 weights for the kernels, in place of those that came; `weight` still gives these.

        On Hopper that is the layout of `numerics.fragments`, with gate and up rows interleaved. Done once, on the
        device that holds the weights; state_dict then holds, and load_state_dict takes, the rearranged form.

        Args:
            always: Also where the ops would not take a kernel for such weights. Otherwise weights stay as they are
                where that is so: nothing but these kernels is fast on them.

        Returns:
            This module.

        Raises:
            ArgumentError: A block scale is NaN or negative, or is zero for a block that is not.
        """
        if self.quantized and (always or self._kernels_wait()):
            self.gate_up.prepare()
            self.down.prepare()
        return self

    def forward(
        self,
        x: Tensor | NVFP4Tensor,
        indices: Tensor,
        weights: Tensor,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Runs the experts.

        Args:
            x: (T, H). An NVFP4Tensor enters the first GEMM as it is, a plain tensor unquantised; the exact mode takes
                a plain one of the weights' dtype.
            indices: int32 or int64 (T, k), each in 0..E - 1.
            weights: fp32 (T, k); bf16 and fp16 are taken as fp32.
            dtype: Of the result; None for x's own, bf16 for an NVFP4Tensor.

        Returns:
            (T, H).

        Raises:
            ArgumentError: A shape, dtype, device or kind does not fit.
        """
        self._check_inputs(x, indices, weights)
        order = op("moe_permute")(indices, self.num_experts)
        if isinstance(x, Tensor) and not self.quantized:
            outputs = self._exact(x, order.tokens, order.offsets)
        else:
            outputs = self._nvfp4(x, order.tokens, order.offsets)
        dtype = dtype or (torch.bfloat16 if isinstance(x, NVFP4Tensor) else x.dtype)
        total: Tensor = op("moe_combine")(outputs, order.rows, weights.float(), dtype=str(dtype).removeprefix("torch."))
        return total

    def weight(self, name: str) -> NVFP4Tensor | Tensor:
        """The weights "gate_up" or "down" as they were given, bit for bit."""
        return given(self, name)

    def extra_repr(self) -> str:
        """Sizes for people."""
        kind = "nvfp4" if self.quantized else "exact"
        return f"{kind}, experts={self.num_experts}, hidden={self.hidden}, intermediate={self.intermediate}"

    def _kernels_wait(self) -> bool:
        """Whether kernels would be chosen for prepared weights, for a row an expert."""
        enc = self.get_buffer("activation_scale_enc")
        offsets = torch.empty(self.num_experts + 1, dtype=torch.int32, device=enc.device)
        x, hidden = (
            torch.empty(self.num_experts, width, dtype=torch.bfloat16, device=enc.device)
            for width in (self.hidden, self.intermediate)
        )
        gate_up, down = self.gate_up.as_if_prepared, self.down.as_if_prepared
        first = op("swiglu_quant").decide(x, gate_up, offsets, enc, limit=self.limit, order="interleaved")
        return is_kernel(first) and is_kernel(op("grouped_gemm").decide(hidden, down, offsets))

    def _nvfp4(self, x: Tensor | NVFP4Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        hidden = op("swiglu_quant")(
            x,
            self.gate_up.operand,
            offsets,
            self.activation_scale_enc,
            row_index=tokens,
            limit=self.limit,
            order=self.gate_up.order,
            scale_layout="linear" if self.down.prepared else self.down.scale_layout,
        )
        outputs: Tensor = op("grouped_gemm")(hidden, self.down.operand, offsets)
        return outputs

    def _exact(self, x: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        ends = offsets[1:]
        first, second = grouped_mm(x[tokens], self.get_buffer("gate_up").mT, offs=ends).chunk(2, dim=-1)  # (M, I) each
        gate, up = (first, second) if self.order == "gate_up" else (second, first)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        outputs: Tensor = grouped_mm(silu(gate) * up, self.get_buffer("down").mT, offs=ends)
        return outputs

    def _check_inputs(self, x: Tensor | NVFP4Tensor, indices: Tensor, weights: Tensor) -> None:
        if isinstance(x, NVFP4Tensor) and self.quantized:
            check_nvfp4("x", x, ("tokens", self.hidden))
        else:
            dtypes = ACTIVATIONS if self.quantized else [self.get_buffer("down").dtype]
            check_tensor("x", x, ("tokens", self.hidden), dtypes)
        data = x.codes if isinstance(x, NVFP4Tensor) else x
        check_tensor("indices", indices, (x.shape[0], "k"), INDICES, like=data)
        check_tensor("weights", weights, tuple(indices.shape), ACTIVATIONS, like=data)


def _check_weights(
    gate_up: NVFP4Tensor | Tensor, down: NVFP4Tensor | Tensor, activation_scale_enc: Tensor | None, order: str
) -> None:
    if isinstance(gate_up, NVFP4Tensor):
        check_nvfp4("gate_up", gate_up, ("experts", "2I", "H"))
        experts, rows, hidden = gate_up.shape
        check_nvfp4("down", down, (experts, hidden, rows // 2), like=gate_up.codes)
        check_tensor("activation_scale_enc", activation_scale_enc, (), [torch.float32], like=gate_up.codes)
    else:
        check_tensor("gate_up", gate_up, ("experts", "2I", "H"), ACTIVATIONS)
        experts, rows, hidden = gate_up.shape
        check_tensor("down", down, (experts, hidden, rows // 2), [gate_up.dtype], like=gate_up)
    if rows % 2:
        raise ArgumentError("gate_up", f"{rows} rows an expert", "as many gate rows as up rows")
    if order not in ORDERS:
        raise ArgumentError("order", repr(order), f"one of {', '.join(map(repr, ORDERS))}")
