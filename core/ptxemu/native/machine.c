/* The scheduler: warps run in turns, each until it waits; the interface to Python. */
#include <stdlib.h>

#include "ptxemu.h"

enum { QUANTUM = 4096, RANDOM_QUANTUM = 64 };
/* What a turn of a warp came to. */
enum { RAN, IDLE, SPUN, EVENT, OVER };

static const Op *const tables[] = {integer_ops, compare_ops, float_ops, half_ops, convert_ops, memory_ops, atomic_ops, warp_ops, sync_ops, mbarrier_ops};
enum { TABLES = sizeof tables / sizeof *tables, MOST_OPS = 1024 };
static Handler handlers[MOST_OPS];
static const char *names[MOST_OPS];
static u32 op_count;

/* How many operations there are; their numbers follow the order of the names. */
u32 emu_op_count(void) {
    if (!op_count)
        for (u32 t = 0; t < TABLES; t++)
            for (const Op *o = tables[t]; o->name; o++) names[op_count] = o->name, handlers[op_count++] = o->run;
    return op_count;
}
const char *emu_op_name(u32 k) { return names[k]; }

static u64 random_bits(Machine *m) { /* xorshift64 */
    m->rng ^= m->rng << 13, m->rng ^= m->rng >> 7, m->rng ^= m->rng << 17;
    return m->rng;
}

/* Joins groups that have come to the same instruction, unless one of them has already arrived at a barrier there. */
static void merge(Warp *w) {
    for (u32 a = 0; a < w->group_count; a++)
        for (u32 b = a + 1; b < w->group_count;)
            if (w->groups[a].pc == w->groups[b].pc && !w->groups[a].arrived && !w->groups[b].arrived) {
                w->groups[a].mask |= w->groups[b].mask;
                w->groups[a].blocked = 0;
                w->groups[a].python_epoch = 0;
                w->groups[b] = w->groups[--w->group_count];
            } else b++;
}
static void drop_group(Warp *w, u32 g) { w->groups[g] = w->groups[--w->group_count]; }

static void check_pending(Machine *m, Warp *w, const Ins *i, u32 mask) {
    for (u32 k = 0; k < i->count; k++)
        if (!(i->o[k] >> 30) && w->pending[i->o[k] >> 2]) note(m, w, i, PENDING_REGISTER, mask, i->o[k], w->pending[i->o[k] >> 2]);
}

/* One turn of a warp. */
static int turn(Machine *m, Warp *w, u64 quantum) {
    int result = IDLE;
    if (w->group_count > 1) merge(w); /* the last turn may have ended where groups meet */
    for (u32 g = 0; g < w->group_count; g++) w->groups[g].blocked = 0;
    while (w->group_count) {
        u32 chosen = GROUPS, limit = ~0u;
        for (u32 g = 0; g < w->group_count; g++)
            if (!w->groups[g].blocked && (chosen == GROUPS || w->groups[g].pc < w->groups[chosen].pc)) chosen = g;
        if (chosen == GROUPS) return result;
        Group *g = &w->groups[chosen];
        w->running = chosen;
        for (u32 k = 0; k < w->group_count; k++)
            if (k != chosen && w->groups[k].pc >= g->pc && w->groups[k].pc < limit) limit = w->groups[k].pc;
        for (;;) {
            const Ins *i = &m->code[g->pc];
            u32 mask = g->mask;
            if (i->guard != NO_GUARD) {
                u32 p = *(const u32 *)(const void *)operand(w, i->guard);
                mask &= i->negated ? ~p : p;
            }
            Outcome outcome = NEXT;
            if (mask) {
                if (w->pending_count) check_pending(m, w, i, mask);
                if (w->loads && w->loads->pending) loads_touched(m, w, g->pc);
                outcome = handlers[i->op](m, w, i, mask);
                if (outcome == WAIT) { g->blocked = 1; break; }
                if (outcome == FAULT) return OVER;
            }
            if (outcome == PYTHON) {
                m->event_warp = w->id, m->event_group = chosen, m->event_pc = g->pc, m->event_mask = mask;
                return EVENT;
            }
            m->executed++, w->executed++, m->hits[g->pc]++;
            if (m->trace) m->trace(w->id, g->pc, mask);
            result = RAN;
            if (outcome == BRANCH) {
                if (mask == g->mask) g->pc = i->target;
                else {
                    Group other = {.pc = i->target, .mask = mask};
                    g->mask &= ~mask, g->pc++;
                    w->groups[w->group_count++] = other;
                }
                merge(w);
                if (--quantum == 0) return RAN;
                break;
            }
            g->pc++;
            if (outcome == EXITED) {
                g->mask &= ~mask;
                if (!g->mask) { drop_group(w, chosen); break; }
            }
            if (--quantum == 0) return RAN;
            if (outcome == YIELD) { merge(w); return SPUN; }
            if (g->pc >= limit) { merge(w); break; }
        }
    }
    return RAN;
}

static void shuffle(Machine *m) {
    for (u32 k = m->warp_count; k > 1; k--) {
        u32 j = (u32)(random_bits(m) % k), t = m->order[k - 1];
        m->order[k - 1] = m->order[j], m->order[j] = t;
    }
}

/* The random schedule is unfair: at times a warp or a CTA is held back, or all warps but one, so that the others run far
   ahead of what they should have waited for. */
enum { LAG_NONE, LAG_WARP, LAG_CTA, LAG_OTHERS, LAG_KINDS, LAG_MOST_ROUNDS = 200 };
static void begin_round(Machine *m) {
    shuffle(m);
    if (m->lag_rounds) { m->lag_rounds--; return; }
    Warp *victim = m->warp_count ? m->warps[random_bits(m) % m->warp_count] : NULL;
    m->lag = victim ? (u32)(random_bits(m) % LAG_KINDS) : LAG_NONE;
    m->lag_rounds = (u32)(random_bits(m) % LAG_MOST_ROUNDS);
    if (m->lag) m->lag_warp = victim->id, m->lag_cta = victim->cta;
}
static int lags(const Machine *m, const Warp *w) {
    return m->lag == LAG_WARP ? w->id == m->lag_warp : m->lag == LAG_CTA ? w->cta == m->lag_cta : m->lag == LAG_OTHERS && w->id != m->lag_warp;
}
/* Nobody but those held back can go on: now and then something asynchronous happens first, or they may run. */
static int release_lag(Machine *m) {
    if (!m->lag) return 0;
    if (!m->poll || random_bits(m) & 1) m->lag = LAG_NONE;
    return 1;
}

/* Runs until Python is needed. */
int emu_run(Machine *m) {
    if (m->random && !m->executed && !m->lag_rounds) begin_round(m);
    for (;;) {
        while (m->cursor < m->warp_count) {
            Warp *w = m->warps[m->order[m->cursor]];
            if (!w || !w->group_count || lags(m, w)) { m->cursor++; continue; }
            u64 quantum = m->random ? 1 + random_bits(m) % RANDOM_QUANTUM : QUANTUM;
            int r = turn(m, w, quantum);
            if (r == OVER) return EVENT_FAULT;
            if (r != IDLE) m->progressed |= r != SPUN, m->spinning |= r == SPUN;
            if (r == EVENT) return EVENT_CALLBACK;
            m->cursor++;
            if (!w->group_count && !w->cta->cluster->live_warps) {
                m->event_cluster = w->cta->cluster->id;
                return EVENT_CLUSTER_END;
            }
        }
        u32 progressed = m->progressed;
        m->idle_spin = m->spinning;
        m->cursor = m->progressed = m->spinning = 0;
        int held = !progressed && release_lag(m);
        if (m->random) begin_round(m);
        if (!progressed && !held) return EVENT_STUCK;
        if (m->executed > m->budget) return EVENT_BUDGET;
        if (m->poll) return EVENT_ROUND;
    }
}
/* After a callback: the instruction is done, or its lanes wait. */
void emu_resume(Machine *m, int blocked) {
    Warp *w = m->warps[m->event_warp];
    Group *g = &w->groups[m->event_group];
    if (blocked) {
        g->python_epoch = m->progress + 1;
        return;
    }
    m->progress++, m->executed++, w->executed++, m->hits[g->pc]++;
    if (m->trace) m->trace(w->id, g->pc, m->event_mask);
    m->progressed = 1;
    g->python_epoch = 0;
    g->pc++;
    merge(w);
}

Machine *emu_machine_new(u32 code_count) {
    Machine *m = calloc(1, sizeof *m);
    m->hits = calloc(code_count, sizeof *m->hits);
    m->noted = calloc(code_count, sizeof *m->noted);
    m->code_count = code_count, m->epoch = 1;
    emu_op_count();
    return m;
}
void emu_machine_free(Machine *m) {
    order_end(m);
    free(m->hits), free(m->noted), free(m->warps), free(m->order), free(m);
}
/* A CTA of a cluster; the arrays of its shared memory belong to Python. */
Cluster *emu_cluster_new(u32 ctas, u32 warps_per_cta, u32 threads_per_cta, u32 id) {
    Cluster *c = calloc(1, sizeof *c);
    c->ctas = calloc(ctas, sizeof *c->ctas);
    c->cta_count = ctas, c->live_warps = ctas * warps_per_cta, c->live_lanes = c->barrier_pending = ctas * threads_per_cta, c->id = id;
    c->warp_count = ctas * warps_per_cta;
    c->warps = calloc(c->warp_count, sizeof *c->warps);
    return c;
}
Cta *emu_cta_new(Cluster *c, u32 rank, u32 warps, u8 *data, u8 *flags, u32 *epoch, u32 *writer, u32 *stamp, u64 size) {
    Cta *cta = calloc(1, sizeof *cta);
    cta->warps = warps, cta->first = (c->id * c->cta_count + rank) * warps, cta->author = cta->first + 1;
    Region shared = {((u64)rank << 24) + 0x400, size, data, flags, epoch, writer, stamp, 0, cta->author};
    cta->shared = shared, cta->rank = rank, cta->live_warps = warps, cta->cluster = c;
    cta->bars = calloc(size / 8 + 1, sizeof *cta->bars);
    c->ctas[rank] = cta;
    return cta;
}
Warp *emu_warp_new(Machine *m, Cta *cta, u32 id, u32 index, u32 live, u8 *registers, u8 *constants, u8 *special, u8 *pending) {
    Warp *w = calloc(1, sizeof *w);
    w->base[0] = registers, w->base[1] = constants, w->base[2] = special;
    w->cta = cta, w->live = live, w->exited = ~live, w->index = index, w->id = id, w->pending = pending;
    w->group_count = 1, w->groups[0].mask = live, w->spin_pc = ~0u;
    w->cluster_phase = ~0ull;
    order_start(w);
    if (id >= m->warp_room) {
        m->warp_room = 2 * id + 32;
        m->warps = realloc(m->warps, m->warp_room * sizeof *m->warps);
        m->order = realloc(m->order, m->warp_room * sizeof *m->order);
    }
    while (m->warp_count <= id) m->warps[m->warp_count] = NULL, m->order[m->warp_count] = m->warp_count, m->warp_count++;
    m->warps[id] = w;
    return w;
}
void emu_warp_local(Warp *w, u8 *data, u8 *flags, u64 bytes_per_lane) {
    Region local = {0x100, bytes_per_lane, data, flags, NULL, NULL, NULL, 0, 0};
    w->local = local;
}
void emu_warp_free(Machine *m, Warp *w) {
    m->warps[w->id] = NULL;
    w->cta->cluster->warps[w->place] = NULL;
    order_forget(w);
    free(w->loads), free(w);
}
void emu_cluster_free(Cluster *c) {
    for (u32 k = 0; k < c->cta_count; k++) free(c->ctas[k]->bars), free(c->ctas[k]);
    order_free(c);
    free(c->ctas), free(c);
}
Mbarrier *emu_mbarrier(const Cluster *c, u32 address) {
    u32 rank = address >> 24;
    if (rank >= c->cta_count || address & 7) return NULL;
    Cta *cta = c->ctas[rank];
    u64 offset = address - cta->shared.base;
    if (offset >= cta->shared.size) return NULL;
    Mbarrier *b = &cta->bars[offset >> 3];
    return b->valid ? b : NULL;
}
/* 0, or why not: 3 bad count, 4 over-arrive, 5 transaction count out of range. */
int emu_mbarrier_update(Machine *m, Warp *w, Mbarrier *b, u32 arrivals, s64 tx) {
    enum { MOST = (1 << 20) - 1 };
    b->tx += tx;
    if (b->tx > MOST || b->tx < -MOST) return 5;
    if (arrivals > b->pending) return 4;
    order_complete(w, &b->clock);
    b->pending -= arrivals;
    mbarrier_settle(b);
    m->progress++;
    return 0;
}
/* Sizes of the structures that Python mirrors, in the order of native.py. */
u32 emu_size(u32 which) {
    static const u32 sizes[] = {sizeof(Region), sizeof(Mbarrier), sizeof(NamedBarrier), sizeof(Cta), sizeof(Cluster), sizeof(Group), sizeof(Warp), sizeof(Note), sizeof(Machine), sizeof(Product), sizeof(Ins)};
    return sizes[which];
}
