"""Device code shared by the stages' kernels, in CuTe DSL: one source for the CPU, sm_90a and sm_100a.

Numbers: `arith` holds the exact fp32 operations and the targets, `convert` the E4M3 and E2M1 encodings, `recipe` the
NVFP4 block recipe, `layout` the place of a block scale. Instructions: `asm` for all of them, `smem` and `gmem` for
accesses to shared and global memory, `copies` and `tma` for asynchronous ones, `mbarrier` and `cluster` for who waits
for whom, `warp`, `wgmma` and `attention_mma` for matrix products. Host: `compiler` the compile cache, `inspect` what
came out of the compiler, and `report` the table of `megamoe compile`. Nothing is imported here: CuTe DSL takes seconds
to load.
"""
