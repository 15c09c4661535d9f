/* Instructions in which the lanes of a warp exchange data, and control flow. */
#include "real.h"

/* All lanes that the member mask (operand k) names and that have not exited must be here, each named by its own mask.
   WAIT while some are elsewhere; NEXT with the mask of each lane otherwise. */
static Outcome gather(Machine *m, Warp *w, const Ins *i, u32 mask, int k, u32 *members) {
    const u32 *given = SRC(u32, k);
    u32 here = w->groups[w->running].mask;
    EACH_LANE {
        if (!(mask >> l & 1)) continue;
        if (!(given[l] >> l & 1)) return fault(m, w, i, DIVERGENCE, 1u << l, given[l], 0);
        members[l] = given[l] & w->live;
        if (members[l] & ~here) return WAIT;
        if (members[l] & ~mask) return fault(m, w, i, DIVERGENCE, members[l] & ~mask, given[l], 1);
    }
    return NEXT;
}
#define GATHER(k) u32 members[LANES]; Outcome together = gather(m, w, i, mask, k, members); if (together != NEXT) return together;

/* shfl.sync 9.7.9.6; operands d, p, a, b, c, membermask; aux 0 up, 1 down, 2 bfly, 3 idx. */
static Outcome op_shfl(Machine *m, Warp *w, const Ins *i, u32 mask) {
    GATHER(5)
    const u32 *a = SRC(u32, 2), *b = SRC(u32, 3), *c = SRC(u32, 4);
    u32 r[LANES], p = 0;
    for (u32 l = 0; l < LANES; l++) {
        u32 segment = c[l] >> 8 & 31, clamp = c[l] & 31, by = b[l] & 31, highest = (l & segment) | (clamp & ~segment), lowest = l & segment;
        s32 j = i->aux == 0 ? (s32)l - (s32)by : i->aux == 1 ? (s32)(l + by) : i->aux == 2 ? (s32)(l ^ by) : (s32)(lowest | (by & ~segment));
        int inside = i->aux == 0 ? j >= (s32)highest : j <= (s32)highest;
        if (!inside) j = (s32)l;
        r[l] = a[j & 31];
        p |= (u32)inside << l;
    }
    put_u32(DST(u32, 0), mask, r);
    put_mask(DST(u32, 1), mask, p);
    return NEXT;
}
/* vote.sync 9.7.13.9; operands d, a, membermask; aux 0 all, 1 any, 2 uni, 3 ballot; 8 negates a. */
static Outcome op_vote(Machine *m, Warp *w, const Ins *i, u32 mask) {
    GATHER(2)
    u32 a = *SRC(u32, 1) ^ (i->aux & 8 ? ~0u : 0), r[LANES] = {0}, bits = 0;
    EACH_LANE if (mask >> l & 1) {
        u32 yes = a & members[l];
        r[l] = yes;
        int v = (i->aux & 3) == 0 ? yes == members[l] : (i->aux & 3) == 1 ? yes != 0 : yes == members[l] || !yes;
        bits |= (u32)v << l;
    }
    if ((i->aux & 3) == 3) put_u32(DST(u32, 0), mask, r);
    else put_mask(DST(u32, 0), mask, bits);
    return NEXT;
}
/* match.sync 9.7.13.10; operands d, p, a, membermask; aux 1: all; 2: 64 bits. */
static Outcome op_match(Machine *m, Warp *w, const Ins *i, u32 mask) {
    GATHER(3)
    u32 r[LANES] = {0}, p = 0;
    EACH_LANE if (mask >> l & 1) {
        for (int k = 0; k < LANES; k++) if (members[l] >> k & 1) {
            int same = i->aux & 2 ? SRC(u64, 2)[l] == SRC(u64, 2)[k] : SRC(u32, 2)[l] == SRC(u32, 2)[k];
            r[l] |= (u32)same << k;
        }
        if (i->aux & 1) {
            if (r[l] == members[l]) p |= 1u << l; else r[l] = 0;
        }
    }
    put_u32(DST(u32, 0), mask, r);
    if (i->aux & 1) put_mask(DST(u32, 1), mask, p);
    return NEXT;
}
/* redux.sync 9.7.13.12; operands d, a, membermask; aux 0 and, 1 or, 2 xor, 3 add, 4 min, 5 max; 8 signed, 16 f32, 32 abs, 64 NaN. */
static Outcome op_redux(Machine *m, Warp *w, const Ins *i, u32 mask) {
    GATHER(2)
    const u32 *a = SRC(u32, 1);
    u32 r[LANES] = {0}, op = i->aux & 7;
    EACH_LANE if (mask >> l & 1) {
        int started = 0;
        u32 acc = 0;
        for (int k = 0; k < LANES; k++) {
            if (!(members[l] >> k & 1)) continue;
            u32 x = i->aux & 32 ? a[k] & 0x7fffffff : a[k];
            if (!started) { acc = x; started = 1; continue; }
            if (i->aux & 16) {
                f32 u = as_f32(acc), v = as_f32(x);
                int nans = u != u || v != v;
                if (nans) acc = i->aux & 64 || (u != u && v != v) ? 0x7fffffff : u != u ? x : acc;
                else if (op == 4 ? v < u || (v == u && signbit(v)) : v > u || (v == u && !signbit(v))) acc = x;
                continue;
            }
            int less = i->aux & 8 ? (s32)x < (s32)acc : x < acc;
            acc = op == 0 ? acc & x : op == 1 ? acc | x : op == 2 ? acc ^ x : op == 3 ? acc + x : op == 4 ? (less ? x : acc) : less ? acc : x;
        }
        r[l] = i->aux & 16 && as_f32(acc) != as_f32(acc) ? 0x7fffffff : acc;
    }
    put_u32(DST(u32, 0), mask, r);
    return NEXT;
}
/* elect.sync 9.7.13.13; operands d, p, membermask: the lowest lane leads. */
static Outcome op_elect(Machine *m, Warp *w, const Ins *i, u32 mask) {
    GATHER(2)
    u32 r[LANES] = {0}, p = 0;
    EACH_LANE if (mask >> l & 1) {
        r[l] = (u32)first_lane(members[l]);
        p |= (u32)(r[l] == (u32)l) << l;
    }
    put_u32(DST(u32, 0), mask, r);
    put_mask(DST(u32, 1), mask, p);
    return NEXT;
}
/* activemask 9.7.13.11. */
static Outcome op_activemask(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 r[LANES];
    EACH_LANE r[l] = mask;
    put_u32(DST(u32, 0), mask, r);
    return NEXT;
}
/* bar.warp.sync 9.7.13.3. */
static Outcome op_bar_warp(Machine *m, Warp *w, const Ins *i, u32 mask) {
    GATHER(0)
    return NEXT;
}

static Outcome op_nop(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m), UNUSED(w), UNUSED(i), UNUSED(mask);
    return NEXT;
}
static Outcome op_branch(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m), UNUSED(w), UNUSED(i), UNUSED(mask);
    return BRANCH;
}
static Outcome op_exit(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(i);
    retire_lanes(m, w, mask);
    return EXITED;
}
static Outcome op_trap(Machine *m, Warp *w, const Ins *i, u32 mask) { return fault(m, w, i, TRAP, mask, 0, 0); }
/* nanosleep 9.7.19.3: a warp that sleeps is waiting for somebody. */
static Outcome op_nanosleep(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m), UNUSED(w), UNUSED(i), UNUSED(mask);
    return YIELD;
}
/* %clock, %clock64, %globaltimer: instructions executed stand for time. */
static Outcome op_clock(Machine *m, Warp *w, const Ins *i, u32 mask) {
    if (i->aux) {
        u64 r[LANES];
        EACH_LANE r[l] = m->executed;
        put_u64(DST(u64, 0), mask, r);
    } else {
        u32 r[LANES];
        EACH_LANE r[l] = (u32)m->executed;
        put_u32(DST(u32, 0), mask, r);
    }
    return NEXT;
}
static Outcome op_python(Machine *m, Warp *w, const Ins *i, u32 mask) {
    Group *g = &w->groups[w->running];
    if (i->aux && g->mask != w->live) return WAIT; /* .aligned: all lanes first */
    if (i->aux && mask != g->mask) return fault(m, w, i, DIVERGENCE, g->mask & ~mask, 0, 2);
    if (g->python_epoch == m->progress + 1) return WAIT; /* was blocked, and nothing has happened since */
    return PYTHON;
}

#define ENTRY(name) {#name, op_##name},
const Op warp_ops[] = {
    ENTRY(shfl) ENTRY(vote) ENTRY(match) ENTRY(redux) ENTRY(elect) ENTRY(activemask) ENTRY(bar_warp)
    ENTRY(nop) ENTRY(branch) ENTRY(exit) ENTRY(trap) ENTRY(nanosleep) ENTRY(clock) ENTRY(python)
    {0, 0}};
