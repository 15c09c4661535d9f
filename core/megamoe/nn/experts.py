"""The routed experts of a mixture-of-experts layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

from megamoe.contracts import ACTIVATIONS, INDICES, check_nvfp4, check_tensor
from megamoe.errors import ArgumentError
from megamoe.nn.routing import Permutation, combine, permute
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.ops import op


class Experts(nn.Module):
    """Sends each token through its experts: down(silu(min(gate, limit)) * clamp(up, -limit, limit)), weighted, summed.

    The routing weight multiplies the second GEMM's output in fp32, as in Hugging Face's DeepseekV4Experts. Nothing
    waits for the device, and the sum has one order.

    With NVFP4 weights the two GEMMs are the ops `swiglu_quant` and `grouped_gemm`. With plain weights, the exact mode,
    the same steps run without quantisation.

    Args:
        gate_up: (E, 2I, H), the gate rows first: NVFP4Tensor, or Tensor for the exact mode.
        down: (E, H, I), of the same kind as `gate_up`.
        limit: Of the clamp; None clamps nothing.
        activation_scale_enc: fp32 (), encode scale of what enters `down`; None only in the exact mode.

    Raises:
        ArgumentError: Shapes, kinds or devices of the weights do not fit together, or the scale is missing.
    """

    activation_scale_enc: Tensor | None

    def __init__(
        self,
        gate_up: NVFP4Tensor | Tensor,
        down: NVFP4Tensor | Tensor,
        *,
        limit: float | None,
        activation_scale_enc: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_weights(gate_up, down, activation_scale_enc)
        self.limit = limit
        self.quantized = isinstance(gate_up, NVFP4Tensor)
        self.num_experts, self.hidden, self.intermediate = down.shape
        self._layouts: dict[str, str] = {}
        self._keep("gate_up", gate_up)
        self._keep("down", down)
        self.register_buffer("activation_scale_enc", activation_scale_enc)

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
        order = permute(indices, self.num_experts)
        if isinstance(x, Tensor) and not self.quantized:
            outputs = self._exact(x[order.tokens], order)
        else:
            outputs = self._nvfp4(_take_rows(x, order.tokens), order)
        return combine(outputs, order, weights, dtype or (torch.bfloat16 if isinstance(x, NVFP4Tensor) else x.dtype))

    def weight(self, name: str) -> NVFP4Tensor | Tensor:
        """The weights "gate_up" or "down" as they were given."""
        if not self.quantized:
            return self.get_buffer(name)
        codes, scales, dec = (self.get_buffer(f"{name}_{part}") for part in ("codes", "scales", "global_scale_dec"))
        return NVFP4Tensor(codes, scales, dec, self._layouts[name])

    def extra_repr(self) -> str:
        """Sizes for people."""
        kind = "nvfp4" if self.quantized else "exact"
        return f"{kind}, experts={self.num_experts}, hidden={self.hidden}, intermediate={self.intermediate}"

    def _keep(self, name: str, weight: NVFP4Tensor | Tensor) -> None:
        if isinstance(weight, NVFP4Tensor):
            self.register_buffer(f"{name}_codes", weight.codes)
            self.register_buffer(f"{name}_scales", weight.scales)
            self.register_buffer(f"{name}_global_scale_dec", weight.global_scale_dec)
            self._layouts[name] = weight.scale_layout
        else:
            self.register_buffer(name, weight)

    def _nvfp4(self, rows: Tensor | NVFP4Tensor, order: Permutation) -> Tensor:
        hidden = op("swiglu_quant")(
            rows,
            self.weight("gate_up"),
            order.offsets,
            self.activation_scale_enc,
            limit=self.limit,
            scale_layout=self._layouts["down"],
        )
        outputs: Tensor = op("grouped_gemm")(hidden, self.weight("down"), order.offsets)
        return outputs

    def _exact(self, rows: Tensor, order: Permutation) -> Tensor:
        ends = order.offsets[1:]
        gate, up = grouped_mm(rows, self.get_buffer("gate_up").mT, offs=ends).chunk(2, dim=-1)  # (M, I) each
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


def _take_rows(x: Tensor | NVFP4Tensor, tokens: Tensor) -> Tensor | NVFP4Tensor:
    """Rows `tokens` of x, NVFP4 in x's own scale layout."""
    if not isinstance(x, NVFP4Tensor):
        return x[tokens]
    scales = x.linear_scales().view(torch.uint8)[tokens].view(torch.float8_e4m3fn)
    return NVFP4Tensor(x.codes[tokens], scales, x.global_scale_dec).with_layout(x.scale_layout)


def _check_weights(
    gate_up: NVFP4Tensor | Tensor, down: NVFP4Tensor | Tensor, activation_scale_enc: Tensor | None
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
