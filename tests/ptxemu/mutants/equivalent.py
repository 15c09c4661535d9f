"""Mutants that do what the kernel does, each with the reason: they are named in the report, and not counted."""

from __future__ import annotations

import re

from tests.ptxemu.mutants.suite import Mutant

_DEALLOC = "tcgen05.wait::ld completed every load before the barrier, and what follows it only frees"
_TMA = "only data of TMA crosses the wait, in shared memory; the products before it were issued by the same thread"
_SECOND = "the other fence.mbarrier_init, or the cluster barrier, of the same threads orders the same initialisation"
_CLUSTER = "a cluster barrier of all threads stands directly before"
_REGISTERS = "no thread touched the accumulators since the products before (PTX ISA 9.7.15.7.1)"
_QUARTERS = "the wait after the next quarter comes before a register of A is written again, or the stage is freed"
_WEIGHTS = "those that finish send nothing before they have got sums from all CTAs, whose senders have waited"

REASONS = {
    r"exchange/drop-init-fence/0": "fence.proxy.async and a cluster barrier follow before another CTA uses it",
    r"exchange/drop-barrier/0": "a CTA of one warp, which itself initialised the mbarrier; a cluster barrier follows",
    r"wgmma_gemm/drop-wgmma-fence/[123]": _REGISTERS,
    r"wgmma_gemm/drop-barrier/4": "the last one: nothing writes shared memory afterwards",
    r"tcgen05_\w+/drop-before-fence/0": _DEALLOC,
    r"tcgen05_f16/drop-after-fence/[012]": _TMA,
    r"tcgen05_nvfp4_pair/drop-after-fence/[01]": _TMA,
    r"tcgen05_nvfp4_pair/drop-init-fence/[01]": _SECOND,
    r"(exchange|tcgen05_\w+)/relax-cluster-arrive/0": "no data cross it: only mbarriers, and their fence is before it",
    r"(exchange|moe_permute)/relax-cluster-arrive/1": "the last one: it keeps shared memory alive, no data cross it",
    r"tcgen05_f16/drop-cluster-wait/0": "a cluster of one CTA, and a barrier of all its threads directly after",
    r"tcgen05_\w+/drop-barrier/0": _CLUSTER,
    r"grouped_gemm_prefill/drop-wgmma-wait/[12]": _QUARTERS,
    r"grouped_gemm_prefill/later-group/[1245]": _QUARTERS,
    r"grouped_gemm_prefill/drop-wgmma-commit/([12]|14)": _QUARTERS,
    r"grouped_gemm_prefill/relax-atomic/0": "the count of taken pieces: nothing that a CTA stored is found by it",
    r"grouped_gemm_prefill/init-one-more/(19|21)": "of a place for a CTA's pieces that so few pieces never come to",
    r"grouped_gemm_split/(drop-arrive|arrive-elsewhere)/2": "it frees the last stage of a CTA's only piece",
    r"mhc_quant_wide/drop-cluster-wait/[23]": _WEIGHTS,
    r"mhc_quant_wide/relax-cluster-arrive/[01]": "what crosses it: mbarriers, whose fence is before it, and padding",
    r"mhc_quant_wide/pass-wait/8": "the same phase was waited for directly before, for another token",
    r"mhc_quant_wide/forget-bytes/7": "the fourth buffer of squares, and there are three turns",
}


def reason(mutant: Mutant) -> str | None:
    """Why a mutant does what the kernel does; None for all others."""
    return next((why for pattern, why in REASONS.items() if re.fullmatch(pattern, mutant.name)), None)
