/* Barriers of the CTA and of the cluster, and fences. */
#include "ptxemu.h"

/* bar and barrier 9.7.13.1. aux 0 sync, 1 arrive, 2 red.popc, 3 red.and, 4 red.or; 8: the predicate is negated.
   Operands: [d,] barrier, count or 0 [, predicate]. */
enum { BAR_SYNC, BAR_ARRIVE, BAR_POPC, BAR_AND, BAR_OR, BAR_KIND = 7, BAR_NEGATED = 8 };

static Outcome op_bar(Machine *m, Warp *w, const Ins *i, u32 mask) {
    Group *g = &w->groups[w->running];
    u32 kind = i->aux & BAR_KIND;
    int at = kind >= BAR_POPC, lane = first_lane(mask);
    if (g->mask != w->live) return WAIT;
    if (mask != g->mask) return fault(m, w, i, DIVERGENCE, g->mask & ~mask, 0, 2);
    u32 number = SRC(u32, at)[lane], count = SRC(u32, at + 1)[lane];
    if (number >= NAMED_BARRIERS || count % LANES) return fault(m, w, i, BAD_BARRIER, mask, number, count);
    NamedBarrier *b = &w->cta->named[number];
    if (!g->arrived) {
        if (b->arrived && b->needed != count) return fault(m, w, i, BAD_BARRIER, mask, number, count);
        u32 p = kind >= BAR_POPC ? (*SRC(u32, at + 2) ^ (i->aux & BAR_NEGATED ? ~0u : 0)) & w->live : 0;
        if (!b->arrived) b->reduced = kind == BAR_AND;
        b->reduced = kind == BAR_POPC ? b->reduced + (u32)__builtin_popcount(p)
                   : kind == BAR_AND ? b->reduced && p == w->live : kind == BAR_OR ? b->reduced || p : b->reduced;
        b->needed = count;
        b->arrived += LANES;
        loads_performed(m, w);
        order_release(m, w, i, &b->clock);
        g->arrived = 1;
        g->wait_phase = b->phase;
    }
    u32 target = b->needed ? b->needed : w->cta->live_warps * LANES;
    if (b->phase == g->wait_phase && b->arrived >= target) {
        if (b->arrived > target) return fault(m, w, i, BAD_BARRIER, mask, number, b->arrived);
        b->phase++, b->arrived = 0, b->result = b->reduced;
        order_pass(w->cta->cluster, &b->done, b->clock);
    }
    if (kind != BAR_ARRIVE && b->phase == g->wait_phase) return WAIT;
    g->arrived = 0;
    if (kind != BAR_ARRIVE) order_acquire(w, b->done);
    if (kind == BAR_POPC) {
        u32 r[LANES];
        EACH_LANE r[l] = b->result;
        put_u32(DST(u32, 0), mask, r);
    } else if (kind > BAR_POPC) put_mask(DST(u32, 0), mask, b->result ? ~0u : 0);
    return NEXT;
}

static void settle_cluster(Cluster *c) {
    if (!c->barrier_pending && c->live_lanes) c->barrier_phase++, c->barrier_pending = c->live_lanes;
}
/* barrier.cluster 9.7.13.4. */
enum { ALIGNED = 1, RELAXED = 2 };
static Outcome op_cluster_arrive(Machine *m, Warp *w, const Ins *i, u32 mask) {
    Cluster *c = w->cta->cluster;
    Group *g = &w->groups[w->running];
    if (i->aux & ALIGNED && g->mask != w->live) return WAIT;
    if (mask & w->cluster_waiting) return fault(m, w, i, BAD_BARRIER, mask, 0, -1);
    if (w->cluster_phase != c->barrier_phase) w->cluster_arrived = 0;
    w->cluster_phase = c->barrier_phase;
    w->cluster_arrived |= mask;
    w->cluster_waiting |= mask;
    c->barrier_pending -= (u32)__builtin_popcount(mask);
    if (i->aux & RELAXED) order_signal(m, w, i, &c->barrier_clock);
    else loads_performed(m, w), order_release(m, w, i, &c->barrier_clock);
    settle_cluster(c);
    return NEXT;
}
static Outcome op_cluster_wait(Machine *m, Warp *w, const Ins *i, u32 mask) {
    Group *g = &w->groups[w->running];
    if (i->aux & ALIGNED && g->mask != w->live) return WAIT;
    if (mask & ~w->cluster_waiting) return fault(m, w, i, BAD_BARRIER, mask & ~w->cluster_waiting, 0, -2);
    if (w->cta->cluster->barrier_phase == w->cluster_phase) return WAIT;
    w->cluster_waiting &= ~mask;
    order_acquire(w, w->cta->cluster->barrier_clock);
    return NEXT;
}

/* Lanes that exit no longer take part in barriers. */
void retire_lanes(Machine *m, Warp *w, u32 mask) {
    Cluster *c = w->cta->cluster;
    u32 arrived = w->cluster_phase == c->barrier_phase ? w->cluster_arrived : 0;
    UNUSED(m);
    w->live &= ~mask;
    w->exited |= mask;
    c->live_lanes -= (u32)__builtin_popcount(mask);
    c->barrier_pending -= (u32)__builtin_popcount(mask & ~arrived);
    if (!w->live) order_exit(w);
    settle_cluster(c);
    if (!w->live) w->cta->live_warps--, c->live_warps--;
}

/* fence.proxy.async 9.7.13.4: what this warp wrote before may be read by the asynchronous proxy. */
static Outcome op_fence_async(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(i), UNUSED(mask);
    loads_performed(m, w);
    w->fence_epoch = w->init_fence_epoch = ++m->epoch;
    return NEXT;
}
static Outcome op_fence_mbarrier_init(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(i), UNUSED(mask);
    w->init_fence_epoch = ++m->epoch;
    return NEXT;
}

/* fence, membar 9.7.13.4 */
static Outcome op_fence(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(mask);
    order_fence(m, w, i->aux);
    return NEXT;
}

#define ENTRY(name) {#name, op_##name},
const Op sync_ops[] = {ENTRY(bar) ENTRY(cluster_arrive) ENTRY(cluster_wait) ENTRY(fence) ENTRY(fence_async) ENTRY(fence_mbarrier_init) {0, 0}};
