"""Small kernels as PTX text: a ring of bulk copies, an exchange in a cluster, double buffering with cp.async."""

from __future__ import annotations

from tests.ptxemu.tensor.kernels import BARRIER, copy_out, kernel, wait

STAGES = 2
SLABS = 6
SLAB = 512  # bytes
RING_WORDS = SLABS * SLAB // 4


def ring() -> str:
    """out = src + 1: warp 0 fills stages by bulk copies, warp 1 adds, and stores each slab by a bulk copy."""
    body = f"""
  mov.u32 %r1, full; mov.u32 %r2, empty; mov.u32 %r3, stages; mov.u32 %r4, staged;
  ld.param.u64 %rd1, [src]; ld.param.u64 %rd2, [out];
  setp.eq.u32 %p1, %r0, 0;
  @%p1 mbarrier.init.shared.b64 [%r1], 1; @%p1 mbarrier.init.shared.b64 [%r1+8], 1;
  @%p1 mbarrier.init.shared.b64 [%r2], 32; @%p1 mbarrier.init.shared.b64 [%r2+8], 32;
  fence.mbarrier_init.release.cluster;
  bar.sync 0;
  mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r7, 0;
  setp.ge.u32 %p2, %r0, 32;
  @%p2 bra CONSUME;
  @!%p1 bra END;
PRODUCE:
  shl.b32 %r8, %r6, 3; add.u32 %r9, %r2, %r8; xor.b32 %r10, %r7, 1;
EMPTY:
  mbarrier.try_wait.parity.shared.b64 %p3, [%r9], %r10;
  @!%p3 bra EMPTY;
  add.u32 %r11, %r1, %r8; mul.lo.u32 %r12, %r6, {SLAB}; add.u32 %r12, %r3, %r12;
  mbarrier.arrive.expect_tx.shared.b64 _, [%r11], {SLAB};
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r12], [%rd1], {SLAB}, [%r11];
  add.u64 %rd1, %rd1, {SLAB}; add.u32 %r5, %r5, 1; add.u32 %r6, %r6, 1;
  setp.eq.u32 %p4, %r6, {STAGES}; @%p4 mov.u32 %r6, 0; @%p4 xor.b32 %r7, %r7, 1;
  setp.lt.u32 %p5, %r5, {SLABS}; @%p5 bra PRODUCE;
  bra END;
CONSUME:
  sub.u32 %r20, %r0, 32; shl.b32 %r20, %r20, 4; setp.eq.u32 %p6, %r20, 0;
NEXT:
  shl.b32 %r8, %r6, 3; add.u32 %r11, %r1, %r8; add.u32 %r9, %r2, %r8;
FULL:
  mbarrier.try_wait.parity.shared.b64 %p3, [%r11], %r7;
  @!%p3 bra FULL;
  mul.lo.u32 %r12, %r6, {SLAB}; add.u32 %r12, %r12, %r20; add.u32 %r13, %r3, %r12; add.u32 %r14, %r4, %r12;
  ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r13];
  add.u32 %r30, %r30, 1; add.u32 %r31, %r31, 1; add.u32 %r32, %r32, 1; add.u32 %r33, %r33, 1;
  mbarrier.arrive.shared.b64 _, [%r9];
  @%p6 cp.async.bulk.wait_group.read {STAGES - 1};
  bar.sync 1, 32;
  st.shared.v4.b32 [%r14], {{%r30, %r31, %r32, %r33}};
  fence.proxy.async.shared::cta;
  bar.sync 2, 32;
  @%p6 cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r14], {SLAB};
  @%p6 cp.async.bulk.commit_group;
  add.u64 %rd2, %rd2, {SLAB}; add.u32 %r5, %r5, 1; add.u32 %r6, %r6, 1;
  setp.eq.u32 %p4, %r6, {STAGES}; @%p4 mov.u32 %r6, 0; @%p4 xor.b32 %r7, %r7, 1;
  setp.lt.u32 %p5, %r5, {SLABS}; @%p5 bra NEXT;
  @%p6 cp.async.bulk.wait_group 0;
END:
"""
    size = STAGES * SLAB
    shared = f""".shared .align 8 .b8 full[{8 * STAGES}]; .shared .align 8 .b8 empty[{8 * STAGES}];
  .shared .align 128 .b8 stages[{size}]; .shared .align 128 .b8 staged[{size}];"""
    return kernel(body, params=".param .u64 src, .param .u64 out", shared=shared, threads=64)


def exchange() -> str:
    """Each CTA of a pair sends 128 bytes into the other one's memory, which waits for them on its mbarrier."""
    body = f"""{BARRIER}
  mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mov.u32 %r3, sent; mov.u32 %r4, buf; shl.b32 %r5, %r0, 2;
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], 128;
  mapa.shared::cluster.u32 %r6, %r4, %r2; mapa.shared::cluster.u32 %r9, %r280, %r2;
  mad.lo.u32 %r8, %r1, 100, %r0; add.u32 %r10, %r3, %r5; st.shared.u32 [%r10], %r8;
  fence.proxy.async.shared::cta;
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  @%p14 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r6], [%r3], 128, [%r9];
  {wait()}
  ld.param.u64 %rd60, [out]; mad.wide.u32 %rd60, %r1, 128, %rd60;
""" + copy_out("buf", 128).replace("ld.param.u64 %rd60, [out];", "")
    body += "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    shared = """.shared .align 128 .b8 buf[128]; .shared .align 8 .b8 bar[16]; .shared .align 16 .b8 sent[128];"""
    return kernel(body, params=".param .u64 out", shared=shared)


def cp_async() -> str:
    """Two tiles of 64 rows of 16 bytes, both under way at once; each comes out with its rows in reverse order."""
    loads = "\n".join(
        f"cp.async.cg.shared.global [%r1+{1024 * i}], [%rd1+{1024 * i}], 16; cp.async.commit_group;" for i in range(2)
    )
    stores = "\n".join(
        f"""cp.async.wait_group {1 - i}; bar.sync 0; ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r2+{1024 * i}];
  st.global.v4.b32 [%rd2+{1024 * i}], {{%r10, %r11, %r12, %r13}};"""
        for i in range(2)
    )
    body = f"""
  mov.u32 %r1, buf; shl.b32 %r3, %r0, 4; add.u32 %r1, %r1, %r3; mov.u32 %r2, buf+1008; sub.u32 %r2, %r2, %r3;
  ld.param.u64 %rd1, [src]; ld.param.u64 %rd2, [out]; cvt.u64.u32 %rd3, %r3;
  add.u64 %rd1, %rd1, %rd3; add.u64 %rd2, %rd2, %rd3;
  {loads} {stores}"""
    shared = ".shared .align 128 .b8 buf[2048];"
    return kernel(body, params=".param .u64 src, .param .u64 out", shared=shared, threads=64)
