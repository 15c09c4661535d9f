"""attention_quant: its definition on numbers worked out by hand, and the fused kernel for sm_90a, emulated.

The kernel's epilogue is held against `inverse_rope_quant` on the fp32 output of the very same schedule, which a
kernel of these tests writes out: every byte equal.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ptxemu
from megamoe.cute import compiler
from megamoe.cute.inspect import kernels
from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import dequantize
from megamoe_stages.attention_quant import contract, kernel, limits, sm90
from megamoe_stages.attention_quant.cases import CASES, make
from megamoe_stages.attention_quant.contract import QuantizedAttention
from megamoe_stages.attention_quant.reference import attention_quant
from megamoe_stages.inverse_rope_quant.reference import inverse_rope_quant
from megamoe_stages.multi_cta_attention import launch_512
from megamoe_stages.multi_cta_attention.shape_512 import (
    MASKED,
    MASKED_NARROW,
    NARROW,
    SHARED_BYTES,
    WIDE,
    Shape,
)
from tests.stages import attention_fp32

SMS = 2  # so that CTAs take several pieces of rows
PROBLEMS: dict[str, dict[str, Any]] = {
    "two-tiles": {"lq": [20, 3], "lk": [70, 9], "heads": 4, "kv_heads": 2, "sink": True},
    "window": {"lq": [3], "lk": [150], "heads": 64, "kv_heads": 1, "groups": 8, "window": 128, "sink": True},
    "many-pieces": {"lq": [5] + [0] * 69, "lk": [9] + [1] * 69, "heads": 3, "kv_heads": 3, "groups": 3},
    "nothing-seen": {"lq": [9, 3], "lk": [4, 0], "heads": 6, "kv_heads": 1, "groups": 3},
}


def inputs(name: str, **more: Any) -> dict[str, Any]:
    return make(torch.Generator().manual_seed(2), head_dim=512, **{**PROBLEMS[name], **more})


def common(a: dict[str, Any]) -> tuple[Any, ...]:
    sink = a.get("sink")
    sinks = torch.zeros(a["q"].shape[1]) if sink is None else sink
    return a["q"], a["k"], a["v"], a["cu_seqlens_q"], a["cu_seqlens_k"], sinks


def masked(a: dict[str, Any]) -> tuple[Any, ...]:
    return launch_512.mask_arguments(a["q"], a["k"], a.get("mask"), a.get("entries", 0))


def numbers(a: dict[str, Any]) -> tuple[Any, ...]:
    has_sink = int(a.get("sink") is not None)
    return a["softmax_scale"], int(a["causal"]), a["window"] or 0, has_sink


def unfused(a: dict[str, Any], shape: Shape) -> tuple[QuantizedAttention, Tensor]:
    """What the two ops make of the same fp32 output, and that output."""
    o = torch.full(a["q"].shape, torch.nan)
    lse = torch.full(a["q"].shape[:2], torch.nan)
    artifact = compiler.compile_kernel(attention_fp32.spec(shape))
    ptxemu.run(artifact, *common(a), *masked(a), o, lse, *numbers(a), SMS).raise_for_findings()
    turned = (a["positions"], a["cos"], a["sin"], a["global_scale_enc"])
    out = inverse_rope_quant(o, *turned, groups=a["groups"], scale_layout=a["scale_layout"])
    return QuantizedAttention(out, lse), o


def fused(a: dict[str, Any], shape: Shape) -> QuantizedAttention:
    """What the kernel writes, over poisoned memory."""
    out, lse = contract.fake(**a)
    out.codes.fill_(0xAA), out.scales.view(torch.uint8).fill_(0x55), lse.fill_(torch.nan)
    artifact = compiler.compile_kernel(kernel.spec(a["scale_layout"] == "128x4", shape._replace(angles=True)))
    turned = (a["positions"].view(torch.int32), a["cos"], a["sin"], a["global_scale_enc"])
    written = (out.codes, out.scales.view(torch.uint8), out.global_scale_dec, lse)
    ptxemu.run(artifact, *common(a), *masked(a), *turned, *written, *numbers(a), SMS).raise_for_findings()
    return QuantizedAttention(out, lse)


def assert_same(got: QuantizedAttention, want: QuantizedAttention) -> None:
    assert torch.equal(got.out.codes, want.out.codes)
    assert torch.equal(got.out.scales.view(torch.uint8), want.out.scales.view(torch.uint8))
    assert torch.equal(got.out.global_scale_dec, want.out.global_scale_dec)
    assert torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_equal_byte_for_byte_to_the_unfused_pair(name: str, scale_layout: str) -> None:
    a = inputs(name, scale_layout=scale_layout)
    want, o = unfused(a, WIDE)
    assert torch.isfinite(o).all()
    assert_same(fused(a, WIDE), want)


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_cta_a_cluster_too_with_int32_positions(name: str) -> None:
    a = inputs(name, index_dtype=torch.int32)
    assert_same(fused(a, NARROW), unfused(a, NARROW)[0])


@pytest.mark.parametrize("shape", [MASKED, MASKED_NARROW])
def test_compressed_entries_too(shape: Shape) -> None:
    """DeepSeek-V4's layers with compressed keys: window, picked entries and sink under one softmax, then NVFP4."""
    a = inputs("two-tiles", lk=[150, 80], entries=70, mask=0.3, window=30, scale_layout="128x4")
    assert_same(fused(a, shape), unfused(a, shape)[0])


@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
@pytest.mark.parametrize("enc", [1e5, 2.0**-120, 2.0**120])
def test_scales_that_saturate_or_vanish(enc: float, scale_layout: str) -> None:
    """The short recipe is wrong for these; the epilogue has to notice."""
    a = {**inputs("nothing-seen", scale_layout=scale_layout), "global_scale_enc": torch.tensor(enc)}
    assert_same(fused(a, WIDE), unfused(a, WIDE)[0])


def test_positions_outside_of_the_tables_are_read_as_the_last() -> None:
    a = inputs("nothing-seen")
    last = a["cos"].shape[0] - 1
    wild = {**a, "positions": torch.where(a["positions"] % 2 == 0, 1 << 20, -5)}
    assert_same(fused(wild, WIDE), unfused({**a, "positions": torch.full_like(a["positions"], last)}, WIDE)[0])


def test_by_hand() -> None:
    """Each query sees its own key only, so the output is its value, turned back by a quarter."""
    v = torch.zeros(2, 1, 16)
    v[0, 0, :2], v[1, 0, :2] = torch.tensor([6.0, -3.0]), torch.tensor([0.0, 6.0])
    cu = torch.tensor([0, 2], dtype=torch.int32)
    cos, sin = torch.zeros(1, 8), torch.ones(1, 8)  # (x0, x1) becomes (x1, -x0)
    out, lse = attention_quant(
        v,
        v,
        v,
        cu,
        cu,
        torch.zeros(2, dtype=torch.int32),
        cos,
        sin,
        torch.ones(()),
        softmax_scale=0.0,
        groups=1,
        window=1,
    )
    assert dequantize(out)[0, :, :2].tolist() == [[-3.0, -6.0], [6.0, 0.0]]
    assert lse.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("shape", kernel.SHAPES)
@pytest.mark.parametrize("tiled", [False, True])
def test_no_kernel_spills(tiled: bool, shape: Shape) -> None:
    artifact = compiler.compile_kernel(kernel.spec(tiled, shape))
    assert artifact.seconds < 60
    assert not [k for k in kernels(artifact.cubin) if k.spills]


@pytest.mark.parametrize("shape", kernel.SHAPES)
def test_shared_memory_holds_what_a_kernel_needs(shape: Shape) -> None:
    assert shape.record_at + 32 <= shape.angles_at
    assert shape.angles_at < shape.shared_bytes <= SHARED_BYTES


def test_limits() -> None:
    assert not limits.supports({})
    assert not limits.supports({"dtype": "bfloat16", "head_dim": 512, "v_dim": 512, "rope_dim": 64, "queries": 4096})
    assert "float16" in limits.supports({"dtype": "float16"})[0]
    assert "head_dim 128" in limits.supports({"head_dim": 128})[0]
    assert "rope_dim 32" in limits.supports({"rope_dim": 32})[0]
    assert not limits.supports({"masked": True})
    assert "scales" in limits.supports({"queries": 1 << 22, "heads": 64, "groups": 8})[0]
    assert "times heads" in limits.supports({"queries": 1, "heads": 64, "kv_heads": 1, "keys": 1 << 25})[0]


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ArgumentError, match="head_dim 64"):
        sm90.attention_quant(**CASES["d64"].inputs("d64"))
    with pytest.raises(ArgumentError, match="CUDA device"):
        sm90.attention_quant(**CASES["d512"].inputs("d512"))
