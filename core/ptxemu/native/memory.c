/* Loads and stores, PTX ISA 9.7.9.8 to 9.7.9.12, and the checks that every access by the generic proxy goes through. */
#include "ptxemu.h"

static Note make_note(const Machine *m, const Warp *w, const Ins *i, u32 kind, u32 lanes, u64 address, s64 detail) {
    Note n = {kind, (u32)(i - m->code), w->id, lanes, address, detail};
    return n;
}
void note(Machine *m, const Warp *w, const Ins *i, u32 kind, u32 lanes, u64 address, s64 detail) {
    u32 pc = (u32)(i - m->code);
    if (m->noted[pc] >> kind & 1 || m->note_count == NOTES) return;
    m->noted[pc] |= 1u << kind;
    m->notes[m->note_count++] = make_note(m, w, i, kind, lanes, address, detail);
}
Outcome fault(Machine *m, const Warp *w, const Ins *i, u32 kind, u32 lanes, u64 address, s64 detail) {
    m->fault = make_note(m, w, i, kind, lanes, address, detail);
    return FAULT;
}

void addresses(const Warp *w, const Ins *i, int k, int narrow, u64 *out) {
    if (narrow) {
        const u32 *a = SRC(u32, k);
        EACH_LANE out[l] = (u32)(a[l] + (u32)i->offset);
    } else {
        const u64 *a = SRC(u64, k);
        EACH_LANE out[l] = a[l] + (u64)i->offset;
    }
}

static Region *find_global(Machine *m, u64 address) {
    if (m->last_region < m->region_count) {
        Region *r = &m->regions[m->last_region];
        if (address - r->base < r->size) return r;
    }
    u32 low = 0, high = m->region_count;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (m->regions[middle].base <= address) low = middle + 1; else high = middle;
    }
    if (!low || address - m->regions[low - 1].base >= m->regions[low - 1].size) return NULL;
    m->last_region = low - 1;
    return &m->regions[low - 1];
}
/* Shared memory of a CTA that has exited is gone. */
static Region *find_shared(const Warp *w, u64 address) {
    u64 rank = address >> 24;
    if (rank >= w->cta->cluster->cta_count) return NULL;
    Cta *c = w->cta->cluster->ctas[rank];
    return c->live_warps && address - c->shared.base < c->shared.size ? &c->shared : NULL;
}

#define WORDS(T) \
    static inline int readable_##T(const u8 *f) { \
        T x; memcpy(&x, f, sizeof x); \
        return (x & (T)~((T)0x0101010101010101ull * IN_FLIGHT_READ)) == (T)((T)0x0101010101010101ull * INIT); \
    } \
    static inline int writable_##T(const u8 *f) { \
        T x; memcpy(&x, f, sizeof x); \
        return !(x & (T)((T)0x0101010101010101ull * (IN_FLIGHT_READ | IN_FLIGHT_WRITE | MBARRIER))); \
    }
WORDS(u8)
WORDS(u16)
WORDS(u32)
WORDS(u64)
#define SIZED(what) \
    static inline int what(const u8 *f, u32 bytes) { \
        switch (bytes) { \
        case 1: return what##_u8(f); \
        case 2: return what##_u16(f); \
        case 4: return what##_u32(f); \
        case 8: return what##_u64(f); \
        default: \
            for (u32 k = 0; k < bytes; k += 8) if (!what##_u64(f + k)) return 0; \
            return 1; \
        } \
    }
SIZED(readable)
SIZED(writable)

static void blame(Machine *m, Warp *w, const Ins *i, int lane, u64 address, const u8 *f, u32 bytes, int storing) {
    u32 any = 0, all = 0xff;
    for (u32 k = 0; k < bytes; k++) any |= f[k], all &= f[k];
    if (any & MBARRIER) note(m, w, i, BAD_MBARRIER, 1u << lane, address, 0);
    else if (any & IN_FLIGHT_WRITE || (storing && any & IN_FLIGHT_READ)) note(m, w, i, ASYNC_RACE, 1u << lane, address, any);
    else if (!storing && !(all & INIT)) note(m, w, i, UNINITIALISED, 1u << lane, address, 0);
}

Outcome reach(Machine *m, Warp *w, const Ins *i, u32 mask, int space, const u64 *address, u32 bytes, int access, u32 how, u8 **place) {
    u64 misaligned = 0;
    EACH_LANE if (mask >> l & 1) misaligned |= address[l] & (bytes - 1);
    if (misaligned) {
        EACH_LANE if (mask >> l & 1 && address[l] & (bytes - 1)) return fault(m, w, i, MISALIGNED, 1u << l, address[l], bytes);
    }
    for (u32 left = mask; left;) {
        int lane = first_lane(left), here = space;
        u64 first = address[lane], window = 0;
        if (space == SPACE_GENERIC) {
            window = first & WINDOW_MASK;
            here = window == SHARED_WINDOW ? SPACE_SHARED : window == LOCAL_WINDOW ? SPACE_LOCAL : SPACE_GLOBAL;
            if (here == SPACE_GLOBAL) window = 0;
        }
        Region *r = here == SPACE_SHARED ? find_shared(w, first - window) : here == SPACE_LOCAL ? &w->local : find_global(m, first);
        if (!r || r->size < bytes || first - window - r->base > r->size - bytes)
            return fault(m, w, i, OUT_OF_BOUNDS, 1u << lane, first, bytes);
        if (r->read_only && access != ACCESS_LOAD) return fault(m, w, i, READ_ONLY, 1u << lane, first, bytes);
        u64 stride = here == SPACE_LOCAL ? r->size : 0, base = r->base + window, room = r->size - bytes;
        u32 group = 0, *stamp = r->stamp, crossed = 0, now = 0;
        if (stamp) {
            crossed = access == ACCESS_LOAD && r->author && r->author != w->cta->author;
            if (access != ACCESS_LOAD) {
                now = w->clock->at[w->place] | (how & STRONG ? STRONG_STAMP : 0);
                if (r->author != w->cta->author) r->author = r->author ? MANY_AUTHORS : w->cta->author;
            }
        }
        for (u32 rest = left; rest; rest &= rest - 1) {
            int l = first_lane(rest);
            u64 offset = address[l] - base;
            if (offset > room) continue;
            group |= 1u << l;
            offset += (u64)l * stride;
            place[l] = r->data + offset;
            u8 *f = r->flags + offset;
            if (access != ACCESS_STORE && !readable(f, bytes)) blame(m, w, i, l, address[l], f, bytes, 0);
            if (crossed) check_order(m, w, i, l, address[l], r, offset, bytes, how);
            if (access != ACCESS_LOAD) {
                if (!writable(f, bytes)) blame(m, w, i, l, address[l], f, bytes, 1);
                for (u32 k = 0; k < bytes; k++) f[k] |= INIT;
                if (r->epoch) for (u64 k = offset >> 2; k <= (offset + bytes - 1) >> 2; k++) {
                    if (stamp) stamp[k] = bytes < 4 ? stamp_of_part(w, r, k, now) : now;
                    r->epoch[k] = m->epoch, r->writer[k] = w->serial;
                }
            }
        }
        left &= ~group;
    }
    return NEXT;
}

/* aux of ld and st; the same numbers as in isa_memory.py. */
enum { ELEMENT = 15, ROOM_SHIFT = 4, SIGNED = 1 << 8, SPACE_SHIFT = 9, NARROW = 1 << 11, SINK_SHIFT = 16, SPINS = 16 };

static Outcome op_ld(Machine *m, Warp *w, const Ins *i, u32 mask) {
    u64 address[LANES];
    u8 *place[LANES];
    u32 n = i->count - 1u, element = i->aux & ELEMENT, room = i->aux >> ROOM_SHIFT & 15;
    addresses(w, i, (int)n, !!(i->aux & NARROW), address);
    int space = (int)(i->aux >> SPACE_SHIFT & 3);
    if (i->aux & STRONG) order_read(m, w, mask, space, address, element * n, i->aux);
    Outcome r = reach(m, w, i, mask, space, address, element * n, ACCESS_LOAD, i->aux, place);
    if (r != NEXT) return r;
    if (m->touch_start && (space == SPACE_SHARED || (space == SPACE_GENERIC && (address[first_lane(mask)] & WINDOW_MASK) == SHARED_WINDOW))) {
        u32 targets[MOST_TARGETS], count = 0;
        for (u32 k = 0; k < n; k++) if (!(i->aux >> SINK_SHIFT >> k & 1)) targets[count++] = i->o[k] >> 2;
        load_issued(m, w, (u32)(i - m->code), mask, address, element * n, targets, count);
    }
    for (u32 k = 0; k < n; k++) {
        if (i->aux >> SINK_SHIFT >> k & 1) continue;
        u8 *d = DST(u8, k);
        if (element == 4 && room == 4) {
            EACH_LANE if (mask >> l & 1) memcpy(d + 4 * l, place[l] + 4 * k, 4);
        } else EACH_LANE if (mask >> l & 1) {
            u64 x = 0;
            memcpy(&x, place[l] + element * k, element);
            if (i->aux & SIGNED) { u32 shift = 64 - 8 * element; x = (u64)((s64)(x << shift) >> shift); }
            memcpy(d + (u32)l * room, &x, room);
        }
    }
    return NEXT;
}
/* A load that is not weak may poll: when the warp does nothing else, others are to run. */
static Outcome op_ld_strong(Machine *m, Warp *w, const Ins *i, u32 mask) {
    u32 pc = (u32)(i - m->code);
    Outcome r = op_ld(m, w, i, mask);
    w->spin_count = w->spin_pc == pc ? w->spin_count + 1 : 0;
    w->spin_pc = pc;
    return r == NEXT && w->spin_count > SPINS ? YIELD : r;
}
static Outcome op_st(Machine *m, Warp *w, const Ins *i, u32 mask) {
    u64 address[LANES];
    u8 *place[LANES];
    u32 n = i->count - 1u, element = i->aux & ELEMENT, room = i->aux >> ROOM_SHIFT & 15;
    addresses(w, i, 0, !!(i->aux & NARROW), address);
    w->spin_count = 0;
    int space = (int)(i->aux >> SPACE_SHIFT & 3);
    Outcome r = reach(m, w, i, mask, space, address, element * n, ACCESS_STORE, i->aux, place);
    if (r != NEXT) return r;
    if (i->aux & STRONG) order_write(m, w, i, mask, space, address, element * n, i->aux);
    for (u32 k = 0; k < n; k++) {
        const u8 *s = SRC(u8, k + 1);
        EACH_LANE if (mask >> l & 1) memcpy(place[l] + element * k, s + (u32)l * room, element);
    }
    return NEXT;
}
/* ld.param 9.7.9.8: the same for all lanes; the offset was checked when the kernel was loaded. */
static Outcome op_ld_param(Machine *m, Warp *w, const Ins *i, u32 mask) {
    u32 element = i->aux & ELEMENT, room = i->aux >> ROOM_SHIFT & 15;
    for (u32 k = 0; k < i->count; k++) {
        if (i->aux >> SINK_SHIFT >> k & 1) continue;
        u64 x = 0;
        memcpy(&x, m->params + i->offset + element * k, element);
        if (i->aux & SIGNED) { u32 shift = 64 - 8 * element; x = (u64)((s64)(x << shift) >> shift); }
        u8 *d = DST(u8, k);
        EACH_LANE if (mask >> l & 1) memcpy(d + (u32)l * room, &x, room);
    }
    return NEXT;
}

/* cvta 9.7.9.20: aux 0 shared to generic, 1 generic to shared, 2 local to generic, 3 generic to local. */
static Outcome op_cvta(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    const u64 *a = SRC(u64, 1);
    u64 r[LANES], window = i->aux >> 1 ? LOCAL_WINDOW : SHARED_WINDOW;
    EACH_LANE r[l] = i->aux & 1 ? a[l] & ~WINDOW_MASK : a[l] | window;
    put_u64(DST(u64, 0), mask, r);
    return NEXT;
}
/* isspacep 9.7.9.19: aux 0 global, 1 shared::cluster, 2 local, 3 shared::cta. */
static Outcome op_isspacep(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 r = 0;
    EACH_LANE {
        u64 a = SRC(u64, 1)[l], window = a & WINDOW_MASK;
        int shared = window == SHARED_WINDOW;
        int is = i->aux == 0 ? !shared && window != LOCAL_WINDOW : i->aux == 1 ? shared : i->aux == 2 ? window == LOCAL_WINDOW
               : shared && (u32)a >> 24 == w->cta->rank;
        r |= (u32)is << l;
    }
    put_mask(DST(u32, 0), mask, r);
    return NEXT;
}
/* mapa 9.7.9.23: the address of the same variable in another CTA of the cluster; aux: 64-bit addresses. */
static Outcome op_mapa(Machine *m, Warp *w, const Ins *i, u32 mask) {
    const u32 *rank = SRC(u32, 2);
    EACH_LANE if (mask >> l & 1 && rank[l] >= w->cta->cluster->cta_count) return fault(m, w, i, OUT_OF_BOUNDS, 1u << l, rank[l], 0);
    if (i->aux) {
        u64 r[LANES];
        EACH_LANE r[l] = (SRC(u64, 1)[l] & ~0xff000000ull) | (u64)rank[l] << 24;
        put_u64(DST(u64, 0), mask, r);
    } else {
        u32 r[LANES];
        EACH_LANE r[l] = (SRC(u32, 1)[l] & 0xffffff) | rank[l] << 24;
        put_u32(DST(u32, 0), mask, r);
    }
    return NEXT;
}
/* getctarank 9.7.9.24. */
static Outcome op_getctarank(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 r[LANES];
    EACH_LANE r[l] = (i->aux ? (u32)SRC(u64, 1)[l] : SRC(u32, 1)[l]) >> 24;
    put_u32(DST(u32, 0), mask, r);
    return NEXT;
}

#define ENTRY(name) {#name, op_##name},
const Op memory_ops[] = {ENTRY(ld) ENTRY(ld_strong) ENTRY(st) ENTRY(ld_param) ENTRY(cvta) ENTRY(isspacep) ENTRY(mapa) ENTRY(getctarank) {0, 0}};
