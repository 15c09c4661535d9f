/* mbarrier objects, PTX ISA 9.7.13.15. Their state lies in a table; the 8 bytes in shared memory are only marked. */
#include <stdlib.h>

#include "ptxemu.h"

enum { MOST = (1 << 20) - 1 };
/* aux; the same numbers as in isa_sync.py. */
enum { NARROW = 1, EXPECT_TX = 2, DROP = 4, NO_COMPLETE = 8, STATE = 16, PARITY = 32, BLOCKING = 64, COUNT = 128, RELAXED = 256 };
/* Note.detail of a BAD_MBARRIER fault, for the message. */
enum { NOT_INITIALISED = 1, BAD_ADDRESS, BAD_COUNT, OVER_ARRIVE, TX_RANGE, TWICE };

static Cta *cta_of(const Warp *w, u64 address) {
    Cluster *c = w->cta->cluster;
    u32 rank = (u32)address >> 24;
    u64 window = address & WINDOW_MASK;
    if ((window && window != SHARED_WINDOW) || rank >= c->cta_count) return NULL;
    Cta *cta = c->ctas[rank];
    u64 offset = (u32)address - cta->shared.base;
    return cta->live_warps && offset < cta->shared.size && cta->shared.size - offset >= 8 ? cta : NULL;
}

Mbarrier *find_mbarrier(Machine *m, Warp *w, const Ins *i, u32 lane_mask, u64 address, int *bad) {
    Cta *cta = address & 7 ? NULL : cta_of(w, address);
    Mbarrier *b = cta ? &cta->bars[((u32)address - cta->shared.base) >> 3] : NULL;
    *bad = !b || !b->valid;
    if (!*bad) return b;
    fault(m, w, i, BAD_MBARRIER, lane_mask, address, cta ? NOT_INITIALISED : BAD_ADDRESS);
    return NULL;
}
void mbarrier_settle(Mbarrier *b) {
    if (!b->pending && !b->tx) b->phase++, b->pending = b->expected;
}

static Outcome op_mbarrier_init(Machine *m, Warp *w, const Ins *i, u32 mask) {
    u64 address[LANES];
    addresses(w, i, 0, i->aux & NARROW, address);
    EACH_LANE if (mask >> l & 1) {
        Cta *cta = address[l] & 7 ? NULL : cta_of(w, address[l]);
        u32 count = SRC(u32, 1)[l];
        if (!cta) return fault(m, w, i, BAD_MBARRIER, 1u << l, address[l], BAD_ADDRESS);
        if (!count || count > MOST) return fault(m, w, i, BAD_MBARRIER, 1u << l, address[l], BAD_COUNT);
        u64 offset = (u32)address[l] - cta->shared.base;
        Mbarrier *b = &cta->bars[offset >> 3];
        if (b->valid) return fault(m, w, i, BAD_MBARRIER, 1u << l, address[l], TWICE);
        *b = (Mbarrier){(u32)address[l], count, count, 1, 0, 0, w->id, m->epoch, b->clock};
        memset(cta->shared.flags + offset, MBARRIER | INIT, 8);
    }
    return NEXT;
}
static Outcome op_mbarrier_inval(Machine *m, Warp *w, const Ins *i, u32 mask) {
    u64 address[LANES];
    int bad;
    addresses(w, i, 0, i->aux & NARROW, address);
    EACH_LANE if (mask >> l & 1) {
        Mbarrier *b = find_mbarrier(m, w, i, 1u << l, address[l], &bad);
        if (bad) return FAULT;
        Cta *cta = cta_of(w, address[l]);
        u64 offset = (u32)address[l] - cta->shared.base;
        b->valid = 0;
        memset(cta->shared.flags + offset, 0, 8);
    }
    return NEXT;
}
/* mbarrier.expect_tx, complete_tx: operands address, bytes; aux EXPECT_TX. */
static Outcome op_mbarrier_tx(Machine *m, Warp *w, const Ins *i, u32 mask) {
    u64 address[LANES];
    int bad;
    addresses(w, i, 0, i->aux & NARROW, address);
    w->spin_count = 0;
    EACH_LANE if (mask >> l & 1) {
        Mbarrier *b = find_mbarrier(m, w, i, 1u << l, address[l], &bad);
        if (bad) return FAULT;
        b->tx += i->aux & EXPECT_TX ? (s64)SRC(u32, 1)[l] : -(s64)SRC(u32, 1)[l];
        if (b->tx > MOST || b->tx < -MOST) return fault(m, w, i, BAD_MBARRIER, 1u << l, address[l], TX_RANGE);
        mbarrier_settle(b);
    }
    return NEXT;
}
/* mbarrier.arrive, arrive_drop: operands [state,] address [, count or bytes]. */
static Outcome op_mbarrier_arrive(Machine *m, Warp *w, const Ins *i, u32 mask) {
    u64 address[LANES];
    int bad, at = i->aux & STATE ? 1 : 0;
    const Mbarrier *told = NULL;
    addresses(w, i, at, i->aux & NARROW, address);
    w->spin_count = 0;
    EACH_LANE if (mask >> l & 1) {
        Mbarrier *b = find_mbarrier(m, w, i, 1u << l, address[l], &bad);
        if (bad) return FAULT;
        u32 given = i->aux & (COUNT | EXPECT_TX) ? SRC(u32, at + 1)[l] : 1, count = i->aux & EXPECT_TX ? 1 : given;
        if (i->aux & EXPECT_TX) b->tx += given;
        if (b->tx > MOST) return fault(m, w, i, BAD_MBARRIER, 1u << l, address[l], TX_RANGE);
        if (!count || count > MOST) return fault(m, w, i, BAD_MBARRIER, 1u << l, address[l], BAD_COUNT);
        if (count > b->pending) return fault(m, w, i, BAD_MBARRIER, 1u << l, address[l], OVER_ARRIVE);
        if (at) DST(u64, 0)[l] = b->phase << 32 | b->pending;
        if (b != told) i->aux & RELAXED ? order_signal(m, w, i, &b->clock) : order_release(m, w, i, &b->clock), told = b;
        b->pending -= count;
        if (i->aux & DROP) b->expected -= count;
        mbarrier_settle(b);
    }
    return NEXT;
}
/* test_wait, try_wait: operands p, address, parity or state. A try_wait waits until one of its lanes can go on. */
static Outcome op_mbarrier_wait(Machine *m, Warp *w, const Ins *i, u32 mask) {
    u64 address[LANES];
    u32 done = 0;
    int bad;
    const Mbarrier *heard = NULL;
    addresses(w, i, 1, i->aux & NARROW, address);
    EACH_LANE if (mask >> l & 1) {
        Mbarrier *b = find_mbarrier(m, w, i, 1u << l, address[l], &bad);
        if (bad) return FAULT;
        int over = i->aux & PARITY ? (b->phase & 1) != (SRC(u32, 2)[l] & 1) : b->phase > SRC(u64, 2)[l] >> 32;
        done |= (u32)over << l;
        if (over && b != heard) i->aux & RELAXED ? order_see(w, b->clock) : order_acquire(w, b->clock), heard = b;
    }
    if (!done && i->aux & BLOCKING) return WAIT;
    put_mask(DST(u32, 0), mask, done);
    return done == mask ? NEXT : YIELD;
}
/* mbarrier.pending_count: operands d, state. */
static Outcome op_mbarrier_pending(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 r[LANES];
    EACH_LANE r[l] = (u32)SRC(u64, 1)[l];
    put_u32(DST(u32, 0), mask, r);
    return NEXT;
}

#define ENTRY(name) {#name, op_##name},
const Op mbarrier_ops[] = {
    ENTRY(mbarrier_init) ENTRY(mbarrier_inval) ENTRY(mbarrier_tx) ENTRY(mbarrier_arrive) ENTRY(mbarrier_wait) ENTRY(mbarrier_pending)
    {0, 0}};
