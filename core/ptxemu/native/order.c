/* What happens before what: vector clocks of the warps of a cluster, and what two checks make of them.

   A warp's own entry counts its releases. An object (mbarrier, barrier, all flags of a cluster together) holds what those
   who released to it had seen. Strong accesses and atomics count as release and acquire of one object for the cluster,
   scopes are not looked at, and objects are never forgotten between phases: an order that is not there may be assumed, never
   the other way round.

   1. A load of shared memory is performed when its value is used: the copy engine may overtake it until then (seen on an H200).
      An asynchronous copy to what a warp's load reads needs a release by that warp after the use, which the warp that issues
      the copy has acquired. Only loads that were pending at some signal of their warp are kept after their use: for the
      others a missing order is what the policies show.
   2. A thread that reads what a thread of another CTA stored in shared memory must have acquired a release after the store. */
#include <stdlib.h>

#include "ptxemu.h"

struct ClockRoom { struct ClockRoom *next; u32 at[]; };

static u32 *new_clock(Cluster *c) {
    struct ClockRoom *room = calloc(1, sizeof *room + c->warp_count * sizeof *room->at);
    room->next = c->clocks, c->clocks = room;
    return room->at;
}
static void join(u32 *into, const u32 *from, u32 count) {
    for (u32 k = 0; k < count; k++) into[k] = from[k] > into[k] ? from[k] : into[k];
}
void order_start(Warp *w) {
    Cluster *c = w->cta->cluster;
    w->place = w->cta->rank * (c->warp_count / c->cta_count) + w->index;
    c->warps[w->place] = w;
    w->clock = new_clock(c);
    w->clock[w->place] = 1;
}
void order_free(Cluster *c) {
    for (struct ClockRoom *room = c->clocks, *next; room; room = next) next = room->next, free(room);
    free(c->warps);
}

/* ---- releases and acquires */

static void signalled(Machine *m, Warp *w, const Ins *i) {
    for (u64 left = w->loads ? w->loads->pending : 0; left; left &= left - 1) {
        Load *load = &w->loads->of[__builtin_ctzll(left)];
        if (!load->signalled) load->signalled = 1, load->signal_pc = (u32)(i - m->code);
    }
}
static void published(Warp *w) {
    for (u64 left = w->loads ? w->loads->taken & ~w->loads->pending : 0; left; left &= left - 1) {
        Load *load = &w->loads->of[__builtin_ctzll(left)];
        if (!load->after) load->after = w->clock[w->place];
    }
}
void order_release(Machine *m, Warp *w, const Ins *i, u32 **object) {
    signalled(m, w, i);
    order_complete(w, object);
    w->clock[w->place]++;
}
void order_complete(Warp *w, u32 **object) {
    Cluster *c = w->cta->cluster;
    published(w);
    if (!*object) *object = new_clock(c);
    join(*object, w->clock, c->warp_count);
}
void order_signal(Machine *m, Warp *w, const Ins *i, u32 **object) {
    Cluster *c = w->cta->cluster;
    signalled(m, w, i);
    if (!w->fenced) return;
    if (!*object) *object = new_clock(c);
    join(*object, w->fenced, c->warp_count);
}
void order_acquire(Warp *w, const u32 *object) {
    if (object) join(w->clock, object, w->cta->cluster->warp_count);
}
void order_see(Warp *w, const u32 *object) {
    if (!object) return;
    if (!w->seen) w->seen = new_clock(w->cta->cluster);
    join(w->seen, object, w->cta->cluster->warp_count);
}
void order_fence(Machine *m, Warp *w) {
    Cluster *c = w->cta->cluster;
    loads_performed(m, w);
    published(w);
    if (w->seen) join(w->clock, w->seen, c->warp_count);
    if (!w->fenced) w->fenced = new_clock(c);
    memcpy(w->fenced, w->clock, c->warp_count * sizeof *w->clock);
    w->clock[w->place]++;
}
/* Barriers no longer wait for a warp that has exited: it counts as having arrived at all of them. */
void order_exit(Warp *w) {
    Cluster *c = w->cta->cluster;
    if (w->loads) w->loads->taken = w->loads->pending = 0;
    order_complete(w, &c->barrier_clock);
    for (u32 k = 0; k < NAMED_BARRIERS; k++) if (w->cta->named[k].clock) order_complete(w, &w->cta->named[k].clock);
}

/* ---- stores to other CTAs */

void check_order(Machine *m, Warp *w, const Ins *i, int lane, u64 address, const Region *r, u64 offset, u32 bytes) {
    for (u64 k = offset >> 2; k <= (offset + bytes - 1) >> 2; k++) {
        if (!r->epoch[k] || !r->stamp[k]) continue;
        const Warp *writer = m->warps[r->writer[k]];
        if (!writer || writer->cta == w->cta || writer->cta->cluster != w->cta->cluster) continue;
        if (w->clock[writer->place] < r->stamp[k]) {
            note(m, w, i, UNORDERED_READ, 1u << lane, address, writer->id);
            return;
        }
    }
}

/* ---- loads under way */

static void forget(Loads *s, u32 k) {
    Load *load = &s->of[k];
    for (u32 t = 0; t < load->target_count; t++) if (s->loading[load->target[t]] == k + 1) s->loading[load->target[t]] = 0;
    s->taken &= ~(1ull << k), s->pending &= ~(1ull << k);
}
static void blame_copy(Machine *m, const Warp *w, const Load *load) {
    s64 detail = (s64)((u64)load->hit_pc << 32 | (load->signalled ? load->signal_pc : NO_PC));
    note(m, w, &m->code[load->pc], PENDING_LOAD, load->mask, load->low, detail);
}
/* The value is there: from now on a copy is in order, once others have been told so. */
static void used(Machine *m, Warp *w, u32 k) {
    Loads *s = w->loads;
    Load *load = &s->of[k];
    if (load->hit) blame_copy(m, w, load);
    int kept = load->signalled && !load->hit;
    forget(s, k);
    if (kept) s->taken |= 1ull << k, load->used = 1;
}
/* Barriers and fences wait for loads. */
void loads_performed(Machine *m, Warp *w) {
    for (u64 left = w->loads ? w->loads->pending : 0; left; left &= left - 1) used(m, w, (u32)__builtin_ctzll(left));
}
void loads_touched(Machine *m, Warp *w, u32 pc) {
    Loads *s = w->loads;
    for (u32 t = m->touch_start[pc]; t < m->touch_start[pc + 1]; t++) {
        u32 word = m->touched[t] >> 1, k = s->loading[word];
        if (!k--) continue;
        if (!(m->touched[t] & 1)) { used(m, w, k); continue; }
        s->loading[word] = 0; /* overwritten: nobody wanted the value */
        if (!--s->of[k].unread) forget(s, k);
    }
}
void load_issued(Machine *m, Warp *w, u32 pc, u32 mask, const u64 *address, u32 bytes, const u32 *targets, u32 count) {
    Loads *s = w->loads;
    if (!m->touch_start) return; /* the kernel has no asynchronous copy that could overtake a load */
    if (!s) s = w->loads = calloc(1, sizeof *s + m->register_words), s->loading = (u8 *)(s + 1);
    if (s->taken == ~0ull) forget(s, s->victim++ % MOST_LOADS); /* too many to keep: one may escape */
    u32 k = (u32)__builtin_ctzll(~s->taken);
    Load *load = &s->of[k];
    load->mask = mask, load->bytes = bytes, load->pc = pc;
    load->signalled = load->used = load->hit = 0, load->after = 0;
    u32 low = ~0u, high = 0;
    EACH_LANE {
        u32 at = load->address[l] = (u32)address[l], first = mask >> l & 1 ? at : ~0u, last = mask >> l & 1 ? at : 0;
        low = first < low ? first : low, high = last > high ? last : high;
    }
    load->low = low, load->high = high + bytes;
    load->target_count = 0;
    for (u32 t = 0; t < count; t++)
        if (s->loading[targets[t]] != k + 1) s->loading[targets[t]] = (u8)(k + 1), load->target[load->target_count++] = targets[t];
    load->unread = load->target_count;
    s->taken |= 1ull << k, s->pending |= 1ull << k;
}
/* For operations that Python executes. */
void emu_load_issued(Machine *m, Warp *w, u32 pc, u32 mask, const u64 *address, u32 bytes, const u32 *targets, u32 count) {
    load_issued(m, w, pc, mask, address, bytes, targets, count);
}

static int overlaps(const Load *load, const s64 *addresses, u64 count, u32 width) {
    for (u64 k = 0; k < count; k++) {
        u32 at = (u32)addresses[k];
        if (at >= load->high || at + width <= load->low) continue;
        for (u32 left = load->mask; left; left &= left - 1) {
            u32 read = load->address[first_lane(left)];
            if (at < read + load->bytes && read < at + width) return 1;
        }
    }
    return 0;
}
/* A warp issues an asynchronous write of `width` bytes at each shared::cluster address. */
void emu_overwrite(Machine *m, Warp *w, u32 pc, const s64 *addresses, u64 count, u32 width) {
    Cluster *c = w->cta->cluster;
    for (u32 place = 0; place < c->warp_count; place++) {
        Warp *reader = c->warps[place];
        Loads *s = reader ? reader->loads : NULL;
        for (u64 left = s ? s->taken : 0; left; left &= left - 1) {
            u32 k = (u32)__builtin_ctzll(left);
            Load *load = &s->of[k];
            if (!overlaps(load, addresses, count, width)) continue;
            int ordered = reader == w ? load->used : load->used && load->after && w->clock[place] >= load->after;
            if (!ordered && !load->hit) load->hit = 1, load->hit_pc = pc;
            if (!ordered && load->used) blame_copy(m, reader, load);
            if (load->used) forget(s, k);
        }
    }
}
