/* The native core: interprets lowered warp instructions over 32 lanes. Python lowers, schedules asynchronous work and reports. */
#ifndef PTXEMU_H
#define PTXEMU_H

#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef double f64;

enum { LANES = 32, FULL = -1, OPERANDS = 12, GROUPS = 32, NAMED_BARRIERS = 16, NOTES = 256 };

/* What lies in the flags of each byte of a region; the same numbers as in memory.py. */
enum { INIT = 1, IN_FLIGHT_WRITE = 2, IN_FLIGHT_READ = 4, MBARRIER = 8 };

/* Findings; the same order as in native.py. Those up to LAST_STOPPING end the launch. */
enum {
    NO_FINDING, OUT_OF_BOUNDS, MISALIGNED, READ_ONLY, BAD_MBARRIER, BAD_BARRIER, DIVERGENCE, TRAP,
    LAST_STOPPING = TRAP, UNINITIALISED, ASYNC_RACE, PENDING_REGISTER, PENDING_LOAD, UNORDERED_READ
};

/* What a handler returns. */
typedef enum {
    NEXT,   /* go on with the next instruction */
    WAIT,   /* not yet: nothing was done */
    YIELD,  /* done, but the warp only polls: let others run */
    FAULT,  /* the launch is over */
    PYTHON, /* a Python operation is to be executed */
    EXITED, /* lanes have exited */
    BRANCH  /* go to the target */
} Outcome;

/* What emu_run returns. */
enum { EVENT_CALLBACK, EVENT_FAULT, EVENT_STUCK, EVENT_CLUSTER_END, EVENT_ROUND, EVENT_BUDGET };

/* An address range. Global memory lies at its real address, shared memory at (rank << 24) + 0x400, local at 0x100. */
typedef struct {
    u64 base, size;
    u8 *data, *flags;
    u32 *epoch;  /* per 4 bytes: proxy epoch of the last generic write, 0 when there is none */
    u32 *writer; /* per 4 bytes: serial of the warp that wrote */
    u32 *stamp;  /* per 4 bytes: its own clock when it did, see order.c; NULL for shared memory outside clusters */
    u32 read_only;
    u32 author;  /* of the only CTA that has stored to it, 0 for none */
} Region;
#define MANY_AUTHORS 0xffffffffu

/* What a warp, or an object, was told: of the warps of its own cluster, and of those of others. */
typedef struct Far Far;
typedef struct Clock {
    struct Clock *next;
    Far *far;
    u32 at[]; /* by place */
} Clock;

typedef struct {
    u32 address, expected, pending, valid;
    s64 tx;
    u64 phase;
    u32 init_warp, init_epoch; /* when mbarrier.init was executed, to see whether a fence followed */
    Clock *clock; /* of all who arrived, see order.c */
} Mbarrier;

typedef struct {
    u32 arrived, needed, reduced; /* needed: 0 for all warps that have not exited */
    u64 phase;
    u32 result; /* of the reduction of the last phase */
    Clock *clock, *done; /* of all who arrived; of the phases that are complete */
} NamedBarrier;

struct Cluster;
typedef struct {
    Region shared;
    Mbarrier *bars; /* one per 8 bytes of shared memory, never moved: operations in flight point to theirs */
    u32 rank, live_warps;
    NamedBarrier named[NAMED_BARRIERS];
    struct Cluster *cluster;
    u32 first, warps, author; /* serial of its first warp, how many it has; first + 1 */
} Cta;

typedef struct Cluster {
    Cta **ctas;
    u32 cta_count, live_warps, id;
    u32 barrier_pending; /* lanes that have yet to arrive */
    u32 live_lanes;
    u64 barrier_phase;
    u32 warp_count;
    struct Warp **warps;          /* by their places */
    Clock *clocks;                /* all clocks of the cluster, to free them */
    Clock *barrier_clock, *flag_clock; /* of its barrier; of strong accesses and atomics */
} Cluster;

/* Lanes that share a program counter. */
typedef struct {
    u32 pc, mask;
    u8 blocked;       /* could not go on when it was last tried */
    u8 arrived;       /* has arrived at the barrier it waits at */
    u64 wait_phase;   /* of that barrier */
    u64 python_epoch; /* machine.progress when a Python operation was blocked */
} Group;

typedef struct Warp {
    u8 *base[4]; /* 0 registers, 1 constants of the kernel, 2 special registers of the warp */
    Cta *cta;
    Group groups[GROUPS];
    u32 group_count, live, exited, index, id;
    u32 running;       /* index of the group that executes */
    u32 carry;         /* condition code of add.cc, one bit a lane */
    u32 spin_pc, spin_count; /* the polling load executed last, and how often without any effect in between */
    u32 fence_epoch;   /* of the last fence.proxy.async */
    u32 init_fence_epoch; /* of the last fence that makes mbarrier.init visible */
    u32 pending_count; /* registers that a Python operation has reserved */
    u8 *pending;       /* one byte a register offset / 4 */
    struct Loads *loads; /* of shared memory whose values nobody has used yet; NULL before the first */
    u64 cluster_phase; /* of the last barrier.cluster.arrive */
    u32 cluster_arrived; /* lanes that arrived in that phase */
    u32 cluster_waiting; /* lanes that have arrived and not yet waited */
    Region local;      /* of lane 0; the others follow, local.size apart */
    u64 executed;
    u32 place, serial; /* in its cluster; in the launch, and no other warp has the same */
    Clock *clock, *fenced, *seen; /* now; at the last fence; of what was waited for without acquire */
    Far *fenced_far, *seen_far;   /* the same between clusters: of fences and accesses of gpu or sys scope */
} Warp;

typedef struct {
    u16 op;
    u8 negated, count;
    u32 guard; /* operand, or NO_GUARD */
    u32 o[OPERANDS];
    s64 offset; /* of an address */
    u32 aux, target;
} Ins;
#define NO_GUARD 0xffffffffu

typedef struct {
    u32 kind, pc, warp, lanes;
    u64 address;
    s64 detail;
} Note;

typedef struct Machine {
    const Ins *code;
    u32 code_count, flags;
    u8 *params;
    Region *regions; /* global memory, by address */
    u32 region_count, last_region;
    Warp **warps; /* NULL where there is none */
    u32 warp_count, warp_room;
    u32 *order;
    u32 cursor, progressed, spinning, idle_spin, random, poll; /* idle_spin: some warp polled in the last round */
    u64 rng, executed, budget, progress;
    u32 epoch; /* counts proxy fences, from 1 */
    u32 block_threads;
    u32 *hits;        /* executions of each instruction */
    u32 *noted;       /* kinds already noted for each instruction */
    Note notes[NOTES];
    u32 note_count;
    Note fault;
    /* event, for Python */
    u32 event_warp, event_group, event_pc, event_mask, event_cluster;
    void (*trace)(u32 warp, u32 pc, u32 mask);
    /* of the random schedule: who is held back, for how many more rounds */
    u32 lag, lag_rounds, lag_warp;
    const Cta *lag_cta;
    /* registers of each instruction, from touch_start[pc] on: first word in the file << 1 | written; reads come first.
       NULL for a kernel in which no load of shared memory is watched. */
    const u32 *touched, *touch_start;
    u32 register_words;
    struct Flag *flag_table; /* words of global memory through which clusters meet, see order.c */
    Far *fences;             /* fence.sc of gpu or sys scope */
    u32 flag_room, flag_count;
} Machine;

/* A matrix product of numbers that f32 holds, see product.c. */
enum { TO_F32, TO_F16, TO_S32, TO_S32_SATURATED };
typedef struct {
    const f32 *a, *bt; /* (rows, depth), (depth, n) */
    u32 n, depth;
    s32 fraction, kept, smallest_a, smallest_b; /* exponents of the smallest normal numbers */
    u32 to;
} Product;

typedef Outcome (*Handler)(Machine *, Warp *, const Ins *, u32 mask);
typedef struct {
    const char *name;
    Handler run;
} Op;

/* Loads of shared memory that are under way, see order.c. */
enum { MOST_LOADS = 64, MOST_TARGETS = 8 };
typedef struct {
    u32 address[LANES], mask, bytes, low, high; /* low up to high: all that it reads */
    u32 pc, signal_pc, hit_pc; /* the load; the first signal while it was pending; the copy that overwrites it */
    u32 target[MOST_TARGETS]; /* registers, as words of the file */
    u8 target_count, unread, signalled, used, hit;
    u32 after; /* the warp's own clock at the first release after the value was used, 0 before that */
} Load;
typedef struct Loads {
    u64 taken, pending; /* one bit a record; pending: the value has not been used */
    u32 victim;
    u8 *loading; /* record + 1 of each word of the register file */
    Load of[MOST_LOADS];
} Loads;

extern const Op integer_ops[], compare_ops[], float_ops[], half_ops[], convert_ops[], memory_ops[], atomic_ops[], warp_ops[], sync_ops[], mbarrier_ops[];

static inline u8 *operand(const Warp *w, u32 o) { return w->base[o >> 30] + (o & 0x3fffffffu); }
#define SRC(T, k) ((const T *)(const void *)operand(w, i->o[k]))
#define DST(T, k) ((T *)(void *)operand(w, i->o[k]))
#define EACH_LANE for (int l = 0; l < LANES; l++)
#define UNUSED(x) (void)(x)

#define PUT(T) \
    static inline void put_##T(T *d, u32 mask, const T *r) { \
        if (mask == (u32)FULL) memcpy(d, r, sizeof(T) * LANES); \
        else EACH_LANE if (mask >> l & 1) d[l] = r[l]; \
    }
PUT(u16)
PUT(u32)
PUT(u64)
#undef PUT
static inline void put_mask(u32 *d, u32 mask, u32 bits) { *d = (*d & ~mask) | (bits & mask); }

static inline f32 as_f32(u32 x) { f32 r; memcpy(&r, &x, 4); return r; }
static inline u32 bits_f32(f32 x) { u32 r; memcpy(&r, &x, 4); return r; }
static inline f64 as_f64(u64 x) { f64 r; memcpy(&r, &x, 8); return r; }
static inline u64 bits_f64(f64 x) { u64 r; memcpy(&r, &x, 8); return r; }
static inline int first_lane(u32 mask) { return __builtin_ctz(mask); }

/* Records what does not stop the launch, once for each instruction and kind. */
void note(Machine *m, const Warp *w, const Ins *i, u32 kind, u32 lanes, u64 address, s64 detail);
/* Records what does, and returns FAULT. */
Outcome fault(Machine *m, const Warp *w, const Ins *i, u32 kind, u32 lanes, u64 address, s64 detail);

/* Finds the bytes of each lane, checks bounds, alignment and shadow state. space: see SPACE_*. NULL in inactive lanes. */
enum { SPACE_GENERIC, SPACE_GLOBAL, SPACE_SHARED, SPACE_LOCAL };
enum { ACCESS_LOAD, ACCESS_STORE, ACCESS_UPDATE };
/* aux of ld, st and atom; the same numbers as in isa_memory.py. PTX ISA 8.4 and 8.5. */
enum { STRONG = 1 << 12, ACQUIRES = 1 << 13, RELEASES = 1 << 14, WIDE = 1 << 15 /* scope gpu or sys */ };
enum { FENCE_SC = 1 }; /* aux of fence, with WIDE */
Outcome reach(Machine *m, Warp *w, const Ins *i, u32 mask, int space, const u64 *address, u32 bytes, int access, u32 how, u8 **place);
/* The addresses of an instruction's address operand: base register plus offset, wrapped to 32 bits if `narrow`. */
void addresses(const Warp *w, const Ins *i, int k, int narrow, u64 *out);
Mbarrier *find_mbarrier(Machine *m, Warp *w, const Ins *i, u32 lane_mask, u64 address, int *bad);
void mbarrier_settle(Mbarrier *b);
void retire_lanes(Machine *m, Warp *w, u32 mask);

/* order.c. A release publishes to an object what the warp has done, an acquire takes over what an object was told. */
#define NO_PC 0xffffffffu
void order_start(Warp *w);
void order_release(Machine *m, Warp *w, const Ins *i, Clock **object);
void order_signal(Machine *m, Warp *w, const Ins *i, Clock **object); /* relaxed: what the last fence covered */
void order_complete(Warp *w, Clock **object); /* something asynchronous that the warp started */
void order_acquire(Warp *w, const Clock *object);
void order_pass(Cluster *c, Clock **done, const Clock *object); /* a phase of a barrier is complete */
void order_see(Warp *w, const Clock *object); /* relaxed: counts from the next fence on */
/* A strong read, a strong write, of so many bytes a lane; `how`: STRONG and so on. */
void order_read(Machine *m, Warp *w, u32 mask, int space, const u64 *address, u32 bytes, u32 how);
void order_write(Machine *m, Warp *w, const Ins *i, u32 mask, int space, const u64 *address, u32 bytes, u32 how);
void order_fence(Machine *m, Warp *w, u32 how);
void order_exit(Warp *w);
void order_free(Cluster *c);
void order_forget(Warp *w);
void order_end(Machine *m);
void check_order(Machine *m, Warp *w, const Ins *i, int lane, u64 address, const Region *r, u64 offset, u32 bytes, u32 how);
/* What a stamp may be besides the writer's clock. */
#define STRONG_STAMP (1u << 31)
#define SHARED_STAMP 0xffffffffu
static inline int of_own_cta(const Warp *w, u32 serial) { return serial - w->cta->first < w->cta->warps; }
/* The stamp of a word of which a warp stores a part. */
static inline u32 stamp_of_part(const Warp *w, const Region *r, u64 word, u32 now) {
    u32 old = r->stamp[word];
    return old && (old == SHARED_STAMP || !of_own_cta(w, r->writer[word])) ? SHARED_STAMP : now;
}
void load_issued(Machine *m, Warp *w, u32 pc, u32 mask, const u64 *address, u32 bytes, const u32 *targets, u32 count);
void loads_touched(Machine *m, Warp *w, u32 pc);
void loads_performed(Machine *m, Warp *w);

/* Generic addresses of shared and local memory; a real address never has these top bytes. */
#define SHARED_WINDOW (0x53ull << 56)
#define LOCAL_WINDOW (0x4cull << 56)
#define WINDOW_MASK (0xffull << 56)

#endif
