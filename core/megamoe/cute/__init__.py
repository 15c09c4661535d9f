"""Device code shared by the stages' kernels, in CuTe DSL: one source for the CPU, sm_90a and sm_100a.

`arith` holds the exact fp32 operations and the targets, `convert` the E4M3 and E2M1 encodings, `recipe` the NVFP4 block
recipe, `layout` the place of a block scale, `compiler` the compile cache, `inspect` what came out of the compiler, and
`report` the table of `megamoe compile`. Nothing is imported here: CuTe DSL takes seconds to load.
"""
