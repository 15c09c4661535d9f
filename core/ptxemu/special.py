"""Special registers, PTX ISA 10."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ptxemu.machine import CTA, Launch

_LANES = np.arange(32, dtype=np.uint64)
_MULTIPROCESSORS = 132


def special_value(name: str, launch: Launch, cta: CTA, warp: int) -> NDArray[np.uint64] | None:
    """A special register of a warp that does not change while it runs, (32,); None for a name that is not known."""
    if name in {"%tid.x", "%tid.y", "%tid.z"}:
        return _thread(launch.block, warp)[name]
    if name in _LANE_VALUES:
        return _LANE_VALUES[name]
    value = _scalar(name, launch, cta, warp)
    return None if value is None else np.full(32, value, np.uint64)


_LANE_VALUES = {
    "%laneid": _LANES,
    "%lanemask_eq": np.uint64(1) << _LANES,
    "%lanemask_lt": (np.uint64(1) << _LANES) - np.uint64(1),
    "%lanemask_le": (np.uint64(2) << _LANES) - np.uint64(1),
    "%lanemask_gt": np.uint64(0xFFFFFFFF) & ~((np.uint64(2) << _LANES) - np.uint64(1)),
    "%lanemask_ge": np.uint64(0xFFFFFFFF) & ~((np.uint64(1) << _LANES) - np.uint64(1)),
}


@functools.lru_cache(maxsize=256)
def _thread(block: tuple[int, int, int], warp: int) -> dict[str, NDArray[np.uint64]]:
    linear = _LANES + np.uint64(32 * warp)
    x, y, _ = (np.uint64(n) for n in block)
    return {"%tid.x": linear % x, "%tid.y": linear // x % y, "%tid.z": linear // (x * y)}


def _scalar(name: str, launch: Launch, cta: CTA, warp: int) -> int | None:
    """A special register that all lanes of a warp share."""
    whole, _, axis = name.rpartition(".")
    cluster = launch.cluster
    if whole:
        k = "xyz".find(axis)
        axes: dict[str, int] = {
            "%ctaid": cta.index[k],
            "%ntid": launch.block[k],
            "%nctaid": launch.grid[k],
            "%cluster_ctaid": cta.index[k] - cta.cluster.origin[k],
            "%cluster_nctaid": cluster[k],
            "%clusterid": cta.cluster.origin[k] // cluster[k],
            "%nclusterid": launch.grid[k] // cluster[k],
        }
        return axes.get(whole) if k >= 0 else None
    count = cluster[0] * cluster[1] * cluster[2]
    flat = cta.index[0] + launch.grid[0] * (cta.index[1] + launch.grid[1] * cta.index[2])
    scalars = {
        "%warpid": warp,
        "%nwarpid": 64,
        "%smid": flat % _MULTIPROCESSORS,
        "%nsmid": _MULTIPROCESSORS,
        "%gridid": 0,
        "%cluster_ctarank": cta.rank,
        "%cluster_nctarank": count,
        "%is_explicit_cluster": int(count > 1),
        "%dynamic_smem_size": launch.shared_bytes,
        "%total_smem_size": cta.shared.size,
        "%reserved_smem_offset_begin": 0,
    }
    return scalars.get(name)
