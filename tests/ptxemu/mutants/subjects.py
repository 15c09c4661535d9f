"""The kernels that are mutated: small problems, with their arguments at fixed addresses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

import ptxemu
from ptxemu.api import captured, load
from ptxemu.report import Report
from tests.ptxemu.mutants import raw
from tests.ptxemu.tensor.kernels import aligned


@dataclass
class Subject:
    """A kernel with a launch of it.

    Attributes:
        ptx: Unmutated.
        arguments: Of the launch, as `ptxemu.emulate` takes them: arrays, or parameters as they are.
        memory: All arrays that the kernel reaches, as bytes.
        outputs: Those of them that it writes.
        right: Whether the outputs hold the right result, by a reference of their own.
        geometry: Grid, block, cluster and shared memory.
    """

    ptx: str
    arguments: Sequence[Any]
    memory: list[np.ndarray]
    outputs: list[np.ndarray]
    right: Callable[[], bool]
    geometry: dict[str, Any]

    def __post_init__(self) -> None:
        self.initial = [array.copy() for array in self.memory]

    def run(self, ptx: str, policy: str, seed: int, budget: int) -> tuple[Report, bytes]:
        """Runs the kernel, or what became of it, on fresh inputs; its findings and its outputs."""
        for array, before in zip(self.memory, self.initial, strict=True):
            array[...] = before
        for array in self.outputs:
            array[...] = 0xEE
        report = ptxemu.emulate(
            load(ptx), args=self.arguments, policy=policy, seed=seed, budget=budget, undefined=self.outputs,
            extra=[] if self.arguments and isinstance(self.arguments[0], np.ndarray) else self.memory, **self.geometry,
        )  # fmt: skip
        return report, b"".join(array.tobytes() for array in self.outputs)


RING = 8  # stages of grouped_gemm_decode here, so that few slabs go round it several times
SUBJECTS: dict[str, Callable[[], Subject]] = {}


def subject(build: Callable[[], Subject]) -> Callable[[], Subject]:
    """Registers a kernel by the name of the function that builds it; built once."""
    SUBJECTS[build.__name__] = once = functools.cache(build)
    return once


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor."""
    array: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    return array


def launched(compiled: Any, args: Sequence[Any], outputs: Sequence[torch.Tensor], right: Callable[[], bool]) -> Subject:
    """The one launch that a compiled launcher makes of its arguments."""
    (launch,) = captured(compiled, *args)
    tensors = {a.data_ptr(): a for a in args if isinstance(a, torch.Tensor)}
    memory = {address: _bytes(tensor) for address, tensor in tensors.items()}
    ptx = compiled.ptx if hasattr(compiled, "ptx") else compiled.artifacts.PTX
    return Subject(
        ptx, launch.parameters, list(memory.values()), [memory[t.data_ptr()] for t in outputs], right,
        {"grid": launch.grid, "block": launch.block, "cluster": launch.cluster, "shared": launch.shared},
    )  # fmt: skip


def _written(ptx: str, inputs: Iterable[np.ndarray], expected: np.ndarray, **geometry: Any) -> Subject:
    """A kernel given as PTX with its inputs and, last, its output."""
    out = aligned(np.zeros_like(expected))
    arrays = [*map(aligned, inputs), out]
    memory = [a.reshape(-1).view(np.uint8) for a in arrays]
    return Subject(ptx, memory, memory, memory[-1:], lambda: bool(np.array_equal(out, expected)), geometry)


@subject
def bulk_ring() -> Subject:
    source = np.random.default_rng(1).integers(0, 1 << 32, raw.RING_WORDS, np.uint32)
    return _written(raw.ring(), [source], source + np.uint32(1), grid=1)


@subject
def exchange() -> Subject:
    return _written(
        raw.exchange(), [], np.stack([100 + np.arange(32), np.arange(32)]).astype(np.uint32), grid=2, cluster=2
    )


@subject
def cp_async() -> Subject:
    source = np.random.default_rng(2).integers(0, 1 << 32, (2, 64, 4), np.uint32)
    expected = np.stack([source[0, ::-1], source[1, ::-1]])
    return _written(raw.cp_async(), [source], expected, grid=1)


@subject
def tma_copy() -> Subject:
    import cutlass

    from tests.ptxemu.tensor import test_dsl as dsl
    from tests.ptxemu.tensor.dsl_hopper import Copy

    shape = (150, 72)  # neither is a multiple of the tile
    compiled = dsl._compile(Copy(3), "sm_90a", dsl._fake(cutlass.Float16, *shape), dsl._fake(cutlass.Float16, *shape))
    source = dsl._aligned(torch.randn(*shape, generator=torch.Generator().manual_seed(3)).half())
    target = dsl._aligned(torch.zeros(*shape, dtype=torch.float16))
    return launched(compiled, (source, target), [target], lambda: torch.equal(source, target))


@subject
def wgmma_gemm() -> Subject:
    import cutlass

    from tests.ptxemu.tensor import test_dsl as dsl
    from tests.ptxemu.tensor.dsl_hopper import Gemm

    m, n, k = 64, 64, 256
    a_fake, b_fake = dsl._fake(cutlass.Float16, m, k), dsl._fake(cutlass.Float16, n, k)
    compiled = dsl._compile(Gemm(a_registers=False, n=64), "sm_90a", a_fake, b_fake, dsl._fake(cutlass.Float32, m, n))
    generator = torch.Generator().manual_seed(1)
    a, b = (dsl._aligned(torch.randint(-8, 9, (rows, k), generator=generator).half()) for rows in (m, n))
    c = dsl._aligned(torch.zeros(m, n))
    return launched(compiled, (a, b, c), [c], lambda: torch.equal(c, a.float() @ b.float().T))


def _tcgen05(fp4: bool, ctas: int, k: int) -> Subject:
    from tests.ptxemu.tensor import test_dsl as dsl

    side = 128 * ctas
    compiled, operands, expected = dsl._blackwell(fp4, ctas, side, side, k)
    c = dsl._aligned(torch.zeros(side, side))
    bound = 8 * 2.0**-24 * np.abs(expected).max() if fp4 else 0.0  # see test_dsl
    return launched(compiled, (*operands, c), [c], lambda: bool(np.abs(c.numpy() - expected).max() <= bound))


@subject
def tcgen05_f16() -> Subject:
    return _tcgen05(False, 1, 192)


@subject
def tcgen05_nvfp4_pair() -> Subject:
    return _tcgen05(True, 2, 512)


Recorded = list[tuple[Any, tuple[Any, ...]]]


def _recorder(launches: Recorded) -> Callable[[Any], Callable[..., None]]:
    """What stands for `compiler.load`: launches run in the emulator, and are kept."""
    from megamoe.cute import compiler

    def of(spec: Any) -> Callable[..., None]:
        artifact = compiler.compile_kernel(spec)

        def launch(*args: Any) -> None:
            ptxemu.run(artifact, *args).raise_for_findings()
            launches.append((artifact, args))

        return launch

    return of


@subject
def grouped_gemm_decode() -> Subject:
    from megamoe.cute import decode_limits, gemm_decode_host
    from megamoe_stages.grouped_gemm import cases, contract, decode, decode_kernel
    from megamoe_stages.grouped_gemm.reference import grouped_gemm

    given = cases.make(
        torch.Generator().manual_seed(5), rows=(2, 0, 1, 1), n=320, k=384, layout="hopper", values="integers"
    )
    out = contract.fake(**given).fill_(torch.nan)
    expected = grouped_gemm(**given)
    launches: Recorded = []
    record = _recorder(launches)
    with (
        mock.patch.object(decode, "launcher", lambda shape, target: record(decode_kernel.spec(shape, target))),
        mock.patch.object(gemm_decode_host, "ctas", lambda device: 1),
        mock.patch.object(decode_limits, "ring_stages", lambda k, tiles: RING),
    ):
        decode.run(given["a"], given["weights"], given["offsets"], given.get("row_index"), out)
    return launched(*launches[-1], [out], lambda: torch.equal(out, expected))


@subject
def grouped_gemm_prefill() -> Subject:
    from megamoe.cute import pack
    from megamoe_stages.grouped_gemm import cases, prefill, prefill_kernel
    from megamoe_stages.grouped_gemm.reference import grouped_gemm

    given = cases.make(torch.Generator().manual_seed(1), rows=(3, 0, 9), n=48, k=1152, values="integers")
    expected = grouped_gemm(**given)
    out = torch.full_like(expected, torch.nan)
    index = torch.arange(expected.shape[0], dtype=torch.int32)
    launches: Recorded = []
    record = _recorder(launches)
    with (
        mock.patch.object(prefill, "_launcher", lambda *flags: record(prefill_kernel.spec(*flags))),
        mock.patch.object(prefill, "_packer", lambda *flags: record(pack.spec(*flags))),
        mock.patch.object(prefill, "processors", lambda device: 1),
    ):
        prefill.run(given["a"], given["weights"].with_layout("hopper"), given["offsets"], index, out)
    return launched(*launches[-1], [out], lambda: torch.equal(out, expected))


@subject
def grouped_gemm_split() -> Subject:
    """One expert, whose k two CTAs share; each goes round a ring of few stages."""
    from megamoe_stages.grouped_gemm import cases, prefill, prefill_kernel
    from megamoe_stages.grouped_gemm.reference import grouped_gemm

    given = cases.make(torch.Generator().manual_seed(2), rows=(11,), n=48, k=1280, values="integers")
    expected = grouped_gemm(**given)
    out = torch.full_like(expected, torch.nan)
    launches: Recorded = []
    record = _recorder(launches)
    cut = prefill.Cut(prefill_kernel.DENSE[0]._replace(stages=3), ctas=2, sharing=2)
    with (
        mock.patch.object(prefill, "_launcher", lambda *flags: record(prefill_kernel.spec(*flags))),
        mock.patch.object(prefill, "processors", lambda device: 2),
        mock.patch.object(prefill, "cut", lambda *_, **__: cut),
    ):
        prefill.run(given["a"], given["weights"].with_layout("hopper"), given["offsets"], None, out)
    return launched(*launches[-1], [out], lambda: torch.equal(out, expected))


def _mhc_quant(spec: Any, tokens: int, hidden: int) -> Subject:
    """One of the stage's kernels, on one cluster."""
    from megamoe.cute import compiler
    from megamoe_stages.mhc_quant import reference
    from megamoe_stages.mhc_quant.cases import make

    iterations, eps = 1, 1e-6
    given = make(torch.Generator().manual_seed(1), tokens=tokens, hidden=hidden)
    for name in ("sinkhorn_iters", "hc_eps", "norm_eps", "scale_layout"):
        given.pop(name, None)
    expected = reference.mhc_quant(**given, sinkhorn_iters=iterations, hc_eps=eps, norm_eps=eps)
    residual, normed, post, comb = (torch.empty_like(given[n]) for n in ("x", "f", "post", "comb"))
    codes = torch.empty((tokens, hidden // 2), dtype=torch.uint8)
    scales = torch.empty((tokens, hidden // 16), dtype=torch.uint8)
    dec = torch.empty_like(given["global_scale_enc"])
    outputs = (residual, normed, codes, scales, dec, post, comb)
    compiled = compiler.compile_kernel(spec)

    def right() -> bool:
        """Close: that rounding is within the stage's bounds is for its own tests."""
        pairs = ((residual, expected.residual), (normed, expected.normed), (post, expected.post), (comb, expected.comb))
        return all(torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-2) for got, want in pairs)

    return launched(compiled, (*given.values(), *outputs, iterations, eps, eps, 0, 1), outputs, right)


@subject
def mhc_quant() -> Subject:
    from megamoe.cute.arith import Target
    from megamoe_stages.mhc_quant import narrow_kernel, narrow_places

    hidden = 512
    return _mhc_quant(narrow_kernel.spec(narrow_places.cut(hidden), "float32", Target.SM90), 17, hidden)


@subject
def mhc_quant_wide() -> Subject:
    """Three turns round two stages, with clerks as H = 7168 has them, the last turn not full."""
    from megamoe.cute.arith import Target
    from megamoe_stages.mhc_quant import wide_kernel
    from megamoe_stages.mhc_quant.wide_cut import Cut

    cut = Cut(ctas=2, tiles=7, group=8, stages=2, kept=28)
    return _mhc_quant(wide_kernel.spec(cut, "float32", Target.SM90), 21, cut.hidden)


@subject
def moe_permute() -> Subject:
    from megamoe.cute import compiler
    from megamoe.cute.arith import Target
    from megamoe_stages.moe_permute import cases, contract, kernel, reference

    inputs = cases.CASES["skewed"].inputs("skewed")
    indices, experts = inputs["indices"], inputs["experts"]
    out = contract.fake(indices, experts)
    expected = reference.moe_permute(indices, experts)
    compiled = compiler.compile_kernel(kernel.spec(kernel.cut(indices.numel()), indices.element_size(), Target.SM90))
    words = indices.view(torch.int32).view(-1)
    outputs = (out.tokens, out.rows.view(-1), out.offsets)

    def right() -> bool:
        return all(torch.equal(got.view(-1), want.view(-1)) for got, want in zip(out, expected, strict=True))

    return launched(compiled, (words, *outputs, indices.shape[1]), outputs, right)
