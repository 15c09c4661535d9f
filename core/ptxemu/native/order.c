/* What happens before what: vector clocks of warps, and what three checks make of them. PTX ISA 8.8 and 8.9.

   A warp's own entry counts its releases. An object (mbarrier, barrier, all flags of a cluster together, a word of global
   memory) holds what those who released to it had seen, and an acquire takes that over (8.9.4, 8.9.5: through any number
   of others). A relaxed write releases what the last fence covered, a relaxed read acquires at the next fence (8.8). Objects are
   never forgotten between values, and an mbarrier's not between phases: an order that is not there may be assumed, never the other way round.

   Between clusters only a word of global memory orders anything, by accesses and fences of gpu or sys scope (8.5); within a
   cluster, strong accesses and atomics anywhere are one object, and scopes are not looked at. That a CTA has exited
   orders nothing before the launch ends.

   1. A load of shared memory is performed when its value is used: the copy engine may overtake it until then (seen on an H200).
      An asynchronous copy to what a warp's load reads needs a release by that warp after the use, which the warp that issues
      the copy has acquired. Only loads that were pending at some signal of their warp are kept after their use: for the
      others a missing order is what the policies show.
   2. A thread that reads what a thread of another CTA stored in shared or global memory must have acquired a release after
      the store, unless both are strong. A stamp is the writer's own entry, with STRONG_STAMP for a strong store; SHARED_STAMP for a
      word whose parts CTAs share, which is not judged. */
#include <stdlib.h>

#include "ptxemu.h"

static Clock *new_clock(Cluster *c) {
    Clock *clock = calloc(1, sizeof *clock + c->warp_count * sizeof *clock->at);
    clock->next = c->clocks, c->clocks = clock;
    return clock;
}

/* ---- of other clusters: rows of a cluster's number and its warps' entries, by number; shared, and never changed */

struct Far { u32 users, count, at[]; };

static u32 far_row(u32 warps) { return 1 + warps; }
static Far *far_new(u32 rows, u32 warps) {
    Far *far = malloc(sizeof *far + rows * far_row(warps) * sizeof *far->at);
    far->users = 1, far->count = 0;
    return far;
}
static void far_drop(Far *far) {
    if (far && !--far->users) free(far);
}
static Far *far_shared(Far *far) {
    if (far) far->users++;
    return far;
}
static u32 *far_append(Far *far, const u32 *row, u32 warps) {
    u32 *at = far->at + far->count++ * far_row(warps);
    memcpy(at, row, far_row(warps) * sizeof *row);
    return at;
}
static const u32 *far_find(const Far *far, u32 cluster, u32 warps) {
    u32 low = 0, high = far ? far->count : 0;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (far->at[middle * far_row(warps)] < cluster) low = middle + 1; else high = middle;
    }
    const u32 *row = far && low < far->count ? far->at + low * far_row(warps) : NULL;
    return row && *row == cluster ? row + 1 : NULL;
}
static int far_covers(const Far *far, const Far *other, u32 warps) {
    for (u32 k = 0; k < other->count; k++) {
        const u32 *row = other->at + k * far_row(warps), *known = far_find(far, *row, warps);
        if (!known) return 0;
        for (u32 j = 0; j < warps; j++) if (known[j] < row[1 + j]) return 0;
    }
    return 1;
}
/* Replaces *into by what both know. */
static void far_join(Far **into, Far *from, u32 warps) {
    Far *old = *into;
    if (!from || from == old || (old && far_covers(old, from, warps))) return;
    if (!old || far_covers(from, old, warps)) {
        *into = far_shared(from), far_drop(old);
        return;
    }
    Far *both = far_new(old->count + from->count, warps);
    u32 size = far_row(warps);
    for (u32 a = 0, b = 0; a < old->count || b < from->count;) {
        const u32 *x = a < old->count ? old->at + a * size : NULL, *y = b < from->count ? from->at + b * size : NULL;
        if (!y || (x && *x < *y)) { far_append(both, x, warps), a++; continue; }
        u32 *row = far_append(both, y, warps);
        b++;
        if (!x || *x != *y) continue;
        a++;
        for (u32 j = 1; j < size; j++) row[j] = x[j] > row[j] ? x[j] : row[j];
    }
    *into = both, far_drop(old);
}
/* Adds what a warp knows, of its own cluster too. */
static void far_tell(Far **into, const Clock *clock, const Cluster *c) {
    Far *own = far_new(1, c->warp_count);
    own->count = 1, own->at[0] = c->id;
    memcpy(own->at + 1, clock->at, c->warp_count * sizeof *clock->at);
    far_join(&own, clock->far, c->warp_count); /* its own row may be an old one there */
    far_join(into, own, c->warp_count);
    far_drop(own);
}

static void join(Clock *into, const Clock *from, u32 warps) {
    for (u32 k = 0; k < warps; k++) into->at[k] = from->at[k] > into->at[k] ? from->at[k] : into->at[k];
    far_join(&into->far, from->far, warps);
}
static void hear_far(Warp *w, Far *far) {
    const Cluster *c = w->cta->cluster;
    const u32 *own = far_find(far, c->id, c->warp_count);
    for (u32 k = 0; own && k < c->warp_count; k++) w->clock->at[k] = own[k] > w->clock->at[k] ? own[k] : w->clock->at[k];
    far_join(&w->clock->far, far, c->warp_count);
}

void order_start(Warp *w) {
    Cluster *c = w->cta->cluster;
    w->place = w->cta->rank * w->cta->warps + w->index;
    w->serial = w->cta->first + w->index;
    c->warps[w->place] = w;
    w->clock = new_clock(c);
    w->clock->at[w->place] = 1;
}
void order_forget(Warp *w) { far_drop(w->fenced_far), far_drop(w->seen_far); }
void order_free(Cluster *c) {
    for (Clock *clock = c->clocks, *next; clock; clock = next) next = clock->next, far_drop(clock->far), free(clock);
    free(c->warps);
}

/* ---- words of global memory */

struct Flag { u64 address; Far *far; }; /* of 4 bytes; free: no far */

static struct Flag *flag_place(struct Flag *table, u32 room, u64 address) {
    u32 k = (u32)((address >> 2) * 0x9e3779b97f4a7c15ull >> 32) & (room - 1);
    while (table[k].far && table[k].address != address) k = (k + 1) & (room - 1);
    return &table[k];
}
static void tell_flag(Machine *m, u64 address, Far *far, u32 warps) {
    if (2 * (m->flag_count + 1) > m->flag_room) {
        u32 room = m->flag_room ? 2 * m->flag_room : 64;
        struct Flag *larger = calloc(room, sizeof *larger);
        for (u32 k = 0; k < m->flag_room; k++)
            if (m->flag_table[k].far) *flag_place(larger, room, m->flag_table[k].address) = m->flag_table[k];
        free(m->flag_table);
        m->flag_table = larger, m->flag_room = room;
    }
    struct Flag *flag = flag_place(m->flag_table, m->flag_room, address);
    if (!flag->far) m->flag_count++, flag->address = address;
    far_join(&flag->far, far, warps);
}
void order_end(Machine *m) {
    for (u32 k = 0; k < m->flag_room; k++) far_drop(m->flag_table[k].far);
    far_drop(m->fences);
    free(m->flag_table);
}
static int is_global(int space, u64 address) {
    u64 window = address & WINDOW_MASK;
    return space == SPACE_GLOBAL || (space == SPACE_GENERIC && window != SHARED_WINDOW && window != LOCAL_WINDOW);
}
/* The words of global memory that lanes touch, each once where lanes in a row have the same. All words of an access count:
   a vector stands for accesses of its elements (8.2.2). That two accesses must overlap completely (8.7) is not looked at.
   `bytes` gives their number, not the last byte: a load comes here before its address is known to be aligned. */
enum { MOST_WORDS = 16 }; /* of a lane: eight elements of 64 bits, more than PTX has */
static u32 global_words(u32 mask, int space, const u64 *address, u32 bytes, u64 *words) {
    u32 count = 0, each = (bytes + 3) / 4;
    for (u32 left = mask; left; left &= left - 1) {
        u64 word = address[first_lane(left)] & ~3ull;
        if (!is_global(space, word) || (count && words[count - each] == word)) continue;
        for (u32 k = 0; k < each; k++) words[count++] = word + 4 * k;
    }
    return count;
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
        if (!load->after) load->after = w->clock->at[w->place];
    }
}
void order_release(Machine *m, Warp *w, const Ins *i, Clock **object) {
    signalled(m, w, i);
    order_complete(w, object);
    w->clock->at[w->place]++;
}
void order_complete(Warp *w, Clock **object) {
    Cluster *c = w->cta->cluster;
    published(w);
    if (!*object) *object = new_clock(c);
    join(*object, w->clock, c->warp_count);
}
void order_signal(Machine *m, Warp *w, const Ins *i, Clock **object) {
    Cluster *c = w->cta->cluster;
    signalled(m, w, i);
    if (!w->fenced) return;
    if (!*object) *object = new_clock(c);
    join(*object, w->fenced, c->warp_count);
}
void order_acquire(Warp *w, const Clock *object) {
    if (object) join(w->clock, object, w->cta->cluster->warp_count);
}
void order_pass(Cluster *c, Clock **done, const Clock *object) {
    if (!*done) *done = new_clock(c);
    join(*done, object, c->warp_count);
}
void order_see(Warp *w, const Clock *object) {
    if (!object) return;
    if (!w->seen) w->seen = new_clock(w->cta->cluster);
    join(w->seen, object, w->cta->cluster->warp_count);
}
void order_read(Machine *m, Warp *w, u32 mask, int space, const u64 *address, u32 bytes, u32 how) {
    u32 warps = w->cta->cluster->warp_count;
    if (how & ACQUIRES) order_acquire(w, w->cta->cluster->flag_clock);
    else order_see(w, w->cta->cluster->flag_clock);
    if (!(how & WIDE) || !m->flag_count) return;
    u64 words[LANES * MOST_WORDS];
    for (u32 k = global_words(mask, space, address, bytes, words); k--;) {
        Far *far = flag_place(m->flag_table, m->flag_room, words[k])->far;
        if (how & ACQUIRES) hear_far(w, far);
        else far_join(&w->seen_far, far, warps);
    }
}
void order_write(Machine *m, Warp *w, const Ins *i, u32 mask, int space, const u64 *address, u32 bytes, u32 how) {
    Cluster *c = w->cta->cluster;
    Far *told = NULL;
    if (how & WIDE && how & RELEASES) far_tell(&told, w->clock, c);
    else if (how & WIDE) told = far_shared(w->fenced_far);
    u64 words[LANES * MOST_WORDS];
    for (u32 k = told ? global_words(mask, space, address, bytes, words) : 0; k--;) tell_flag(m, words[k], told, c->warp_count);
    far_drop(told);
    if (how & RELEASES) order_release(m, w, i, &c->flag_clock);
    else order_signal(m, w, i, &c->flag_clock);
}
void order_fence(Machine *m, Warp *w, u32 how) {
    Cluster *c = w->cta->cluster;
    loads_performed(m, w);
    if (w->seen) join(w->clock, w->seen, c->warp_count);
    if (how & WIDE) hear_far(w, w->seen_far);
    if (how & FENCE_SC) { /* in the order in which they are executed, 8.9.3 */
        order_acquire(w, c->flag_clock);
        order_complete(w, &c->flag_clock);
        if (how & WIDE) hear_far(w, m->fences), far_tell(&m->fences, w->clock, c);
    }
    if (how & WIDE) far_tell(&w->fenced_far, w->clock, c);
    published(w);
    if (!w->fenced) w->fenced = new_clock(c);
    join(w->fenced, w->clock, c->warp_count);
    w->clock->at[w->place]++;
}
/* Barriers no longer wait for a warp that has exited: it counts as having arrived at all of them. */
void order_exit(Warp *w) {
    Cluster *c = w->cta->cluster;
    if (w->loads) w->loads->taken = w->loads->pending = 0;
    order_complete(w, &c->barrier_clock);
    for (u32 k = 0; k < NAMED_BARRIERS; k++) if (w->cta->named[k].clock) order_complete(w, &w->cta->named[k].clock);
}

/* ---- stores of other CTAs */

void check_order(Machine *m, Warp *w, const Ins *i, int lane, u64 address, const Region *r, u64 offset, u32 bytes, u32 how) {
    const Cluster *c = w->cta->cluster;
    for (u64 k = offset >> 2; k <= (offset + bytes - 1) >> 2; k++) {
        u32 stamp = r->stamp[k], writer = r->writer[k], place = writer % c->warp_count;
        if (!r->epoch[k] || !stamp || stamp == SHARED_STAMP || of_own_cta(w, writer)) continue;
        if (how & STRONG && stamp & STRONG_STAMP) continue;
        const u32 *known = writer / c->warp_count == c->id ? w->clock->at : far_find(w->clock->far, writer / c->warp_count, c->warp_count);
        if (known && known[place] >= (stamp & ~STRONG_STAMP)) continue;
        note(m, w, i, UNORDERED_READ, 1u << lane, address, writer);
        return;
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
            int ordered = reader == w ? load->used : load->used && load->after && w->clock->at[place] >= load->after;
            if (!ordered && !load->hit) load->hit = 1, load->hit_pc = pc;
            if (!ordered && load->used) blame_copy(m, reader, load);
            if (load->used) forget(s, k);
        }
    }
}
