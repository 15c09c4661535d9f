"""The tensor and asynchronous units: importing this registers their operations with the engine.

| module | what |
|---|---|
| `formats` | number formats, both directions |
| `layouts`, `operands` | swizzles, matrix descriptors, from shared memory to numbers |
| `tensormap`, `tma` | tensor maps and the copies through them |
| `bulk`, `groups`, `reduce` | other asynchronous copies, their groups, reductions in memory |
| `fragments`, `mma_sync` | ldmatrix, stmatrix, movmatrix, mma.sync |
| `wgmma` | Hopper's warpgroup matrix multiply |
| `tmem`, `umma`, `idesc` | Blackwell's tensor memory and matrix multiply |
| `launch_control` | cluster launch control, dependent launches, changes to tensor maps |
"""

from ptxemu.tensor import bulk, fragments, launch_control, mma_sync, tma, tmem, umma, wgmma

__all__ = ["bulk", "fragments", "launch_control", "mma_sync", "tma", "tmem", "umma", "wgmma"]
