"""Kernels written with CuTe DSL's own utilities, under every policy: right results and no findings."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pytest
import torch

from ptxemu import POLICIES, emulate, run
from ptxemu.api import captured, load
from ptxemu.tensor import formats


def _fake(dtype: Any, *shape: int) -> Any:
    from cutlass.cute.runtime import make_fake_compact_tensor

    return make_fake_compact_tensor(dtype, shape, stride_order=tuple(range(len(shape)))[::-1], assumed_align=32)


def _compile(launcher: Any, arch: str, *args: Any) -> Any:
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream

    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    with tempfile.TemporaryDirectory() as folder:
        options = f"--gpu-arch {arch} --enable-tvm-ffi --keep-ptx --dump-dir {folder}"
        return cute.compile(launcher, *args, stream, options=options)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy at a multiple of 128 bytes."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    room = torch.zeros(data.numel() + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 128
    room[start : start + data.numel()] = data
    return room[start : start + data.numel()].view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("swizzle", range(4))
def test_tma_copy(swizzle: int) -> None:
    import cutlass

    from tests.ptxemu.tensor.dsl_hopper import Copy

    shape = (150, 72)  # neither is a multiple of the tile
    compiled = _compile(Copy(swizzle), "sm_90a", _fake(cutlass.Float16, *shape), _fake(cutlass.Float16, *shape))
    source = _aligned(torch.randn(*shape, generator=torch.Generator().manual_seed(swizzle)).half())
    for policy in POLICIES:
        target = _aligned(torch.zeros(*shape, dtype=torch.float16))
        run(compiled, source, target, policy=policy, undefined=[target]).raise_for_findings()
        assert torch.equal(source, target)


@pytest.mark.parametrize("a_registers", [False, True])
def test_wgmma_gemm(a_registers: bool) -> None:
    import cutlass

    from tests.ptxemu.tensor.dsl_hopper import Gemm

    m, n, k = 128, 128, 256
    a_fake, b_fake, c_fake = _fake(cutlass.Float16, m, k), _fake(cutlass.Float16, n, k), _fake(cutlass.Float32, m, n)
    compiled = _compile(Gemm(a_registers=a_registers, n=64), "sm_90a", a_fake, b_fake, c_fake)
    generator = torch.Generator().manual_seed(1)
    a, b = (_aligned(torch.randint(-8, 9, (rows, k), generator=generator).half()) for rows in (m, n))
    for policy in POLICIES:
        c = _aligned(torch.zeros(m, n))
        run(compiled, a, b, c, policy=policy, undefined=[c]).raise_for_findings()
        assert torch.equal(c, a.float() @ b.float().T)  # integers: every sum is exact


def _swizzled(scales: np.ndarray) -> torch.Tensor:
    """Scale factors (rows, columns) in the 128x4 order of cuBLAS."""
    rows, columns = scales.shape
    return torch.from_numpy(
        scales.reshape(rows // 128, 4, 32, columns // 4, 4).transpose(0, 3, 2, 1, 4).reshape(-1).copy()
    )


def _fp4(m: int, n: int, k: int) -> tuple[list[torch.Tensor], np.ndarray]:
    """Operands of an NVFP4 GEMM, and its result."""
    rng = np.random.default_rng(m + k)
    operands, values = [], []
    for rows in (m, n):
        data, scales = rng.integers(0, 256, (rows, k // 2), np.uint8), rng.integers(40, 72, (rows, k // 16), np.uint8)
        operands += [_aligned(torch.from_numpy(data)), _aligned(_swizzled(scales))]
        values.append(formats.unpack_nibbles("e2m1", data) * np.repeat(formats.decode("e4m3", scales), 16, 1))
    return [operands[0], operands[2], operands[1], operands[3]], values[0] @ values[1].T


def _blackwell(fp4: bool, ctas: int, m: int, n: int, k: int) -> tuple[Any, list[torch.Tensor], np.ndarray]:
    import cutlass

    from tests.ptxemu.tensor.dsl_blackwell import Gemm

    byte = cutlass.Uint8
    if fp4:
        fakes = [_fake(byte, m, k // 2), _fake(byte, n, k // 2), _fake(byte, m * k // 16), _fake(byte, n * k // 16)]
        operands, expected = _fp4(m, n, k)
    else:
        fakes = [_fake(cutlass.Float16, m, k), _fake(cutlass.Float16, n, k), _fake(byte, 32), _fake(byte, 32)]
        rng = np.random.default_rng(k)
        a, b = rng.integers(-8, 9, (m, k)), rng.integers(-8, 9, (n, k))
        operands = [_aligned(torch.from_numpy(x).half()) for x in (a, b)] + [
            _aligned(torch.zeros(32, dtype=torch.uint8))
        ] * 2
        expected = (a @ b.T).astype(np.float64)
    gemm = Gemm(fp4=fp4, ctas=ctas, tile=(128 * ctas, 128 * ctas))
    compiled = _compile(gemm, "sm_100a", *fakes, _fake(cutlass.Float32, m, n), k)
    return compiled, operands, expected


@pytest.mark.parametrize("ctas", [1, 2])
@pytest.mark.parametrize("fp4", [False, True])
def test_tcgen05_gemm(fp4: bool, ctas: int) -> None:
    compiled, operands, expected = _blackwell(fp4, ctas, 256, 256, 512)
    for policy in POLICIES:
        c = _aligned(torch.zeros(256, 256))
        run(compiled, *operands, c, policy=policy, undefined=[c]).raise_for_findings()
        # f16 holds integers, exactly; of NVFP4 each of the 8 sums a tile takes is rounded once
        bound = 8 * 2.0**-24 * np.abs(expected).max() if fp4 else 0.0
        assert np.abs(c.numpy() - expected).max() <= bound


MUTATIONS = {
    "tcgen05.wait::ld.sync.aligned;": "pending_register",
    "tcgen05.fence::after_thread_sync;": "missing_fence",
    "fence.mbarrier_init.release.cluster;": "missing_fence",
}


@pytest.mark.parametrize("dropped", MUTATIONS)
def test_dropped_waits_and_fences_are_found(dropped: str) -> None:
    """Each alone is reported even under the eager policy, which hides every race."""
    compiled, operands, _ = _blackwell(True, 1, 128, 128, 256)
    c = _aligned(torch.zeros(128, 128))
    ptx = compiled.artifacts.PTX
    assert dropped in ptx
    (launch,) = captured(compiled, *operands, c)
    report = emulate(
        load(ptx.replace(dropped, "")), launch.grid, launch.parameters, block=launch.block, cluster=launch.cluster,
        shared=launch.shared, extra=[t.reshape(-1).view(torch.uint8).numpy() for t in (*operands, c)],
    )  # fmt: skip
    assert MUTATIONS[dropped] in {str(kind) for kind in report.kinds()}
