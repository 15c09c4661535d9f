"""Calls of torch's own kernels, to time beside an op's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import islice

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

_BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
_LAST = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False) -> dict[str, Callable[[], Tensor]]:
    """Torch's scaled_dot_product_attention by each of its fast backends that takes these, or else by a slower one.

    Args:
        q: (batch, heads, queries, D); any strides.
        k: (batch, heads, keys, D).
        v: (batch, heads, keys, Dv).
        scale: What the scores are multiplied by.
        causal: Query i sees keys 0 to i.

    Returns:
        By name, callables that return (batch, heads, queries, Dv); none where no backend takes these.
    """

    def with_backend(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

        return call

    found = {f"SDPA {name}": with_backend(backend) for name, backend in _BACKENDS.items()}
    runs = {name: call for name, call in found.items() if _runs(call)}
    if runs:
        return runs
    slower = ((f"SDPA {name}", with_backend(backend)) for name, backend in _LAST.items())
    return dict(islice(((name, call) for name, call in slower if _runs(call)), 1))


def _runs(call: Callable[[], Tensor]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend does not take it
            call()
    except RuntimeError:
        return False
    return True
