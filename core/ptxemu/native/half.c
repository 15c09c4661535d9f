/* f16, bf16 and their packed pairs, PTX ISA 9.7.4 and 9.7.5. Each lane is computed in double, exactly or rounded to odd, and
   rounded once. Ins.aux as in real.h; BF in it says bf16, and PAIR that a register holds two. */
#include "compare.h"

enum { BF = 1 << 16, PAIR = 1 << 17 };

static inline f64 read_half(u16 h, u32 aux) {
    f64 x = aux & BF ? bf16_to_f32(h) : half_to_f32(h);
    return aux & FTZ && fabs(x) < 0x1p-14 ? copysign(0, x) : x; /* ftz exists for f16 only */
}
static u16 write_half(f64 x, u32 aux) {
    if (x != x) return aux & SAT ? 0 : 0x7fff;
    if (aux & SAT) x = x > 0 ? (x < 1 ? x : 1) : 0;
    if (aux & RELU && signbit(x)) x = 0;
    u16 h = (u16)encode(aux & BF ? &BF16 : &F16, x, 0);
    return aux & FTZ && !(h & 0x7c00) ? h & 0x8000 : h;
}
static inline f64 add_half(f64 a, f64 b) { return add_to_odd(a, b); }
/* different: the signs differ, those of NaNs too, which a double does not keep. */
static f64 extreme(f64 a, f64 b, u32 aux, int most, u32 different) {
    if (aux & (ABS | XORSIGN)) a = fabs(a), b = fabs(b);
    f64 r;
    if (a != a || b != b) r = aux & PROPAGATE_NAN ? NAN : a != a ? b : a;
    else if (most) r = a > b || (a == b && !signbit(a)) ? a : b;
    else r = a < b || (a == b && signbit(a)) ? a : b;
    return aux & XORSIGN && r == r ? copysign(r, different ? -1 : 1) : r;
}

#define HALF(name, operands, value) \
    static inline u16 lane_##name(u16 x, u16 y, u16 z, u32 aux) { \
        f64 a = read_half(x, aux), b = read_half(y, aux), c = read_half(z, aux); UNUSED(b); UNUSED(c); \
        return write_half(value, aux); \
    } \
    static Outcome op_##name##_half(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); \
        if (i->aux & PAIR) { \
            const u32 *A = SRC(u32, 1), *B = SRC(u32, operands > 1 ? 2 : 1), *C = SRC(u32, operands > 2 ? 3 : 1); u32 r[LANES]; \
            EACH_LANE r[l] = lane_##name((u16)A[l], (u16)B[l], (u16)C[l], i->aux) \
                             | (u32)lane_##name((u16)(A[l] >> 16), (u16)(B[l] >> 16), (u16)(C[l] >> 16), i->aux) << 16; \
            put_u32(DST(u32, 0), mask, r); \
        } else { \
            const u16 *A = SRC(u16, 1), *B = SRC(u16, operands > 1 ? 2 : 1), *C = SRC(u16, operands > 2 ? 3 : 1); u16 r[LANES]; \
            EACH_LANE r[l] = lane_##name(A[l], B[l], C[l], i->aux); \
            put_u16(DST(u16, 0), mask, r); \
        } \
        return NEXT; \
    }
#define HALF_OPS(X) \
    X(add, 2, add_half(a, b)) X(sub, 2, add_half(a, -b)) X(mul, 2, a * b) X(fma, 3, add_half(a * b, c)) \
    X(min, 2, extreme(a, b, aux, 0, (x ^ y) & 0x8000)) X(max, 2, extreme(a, b, aux, 1, (x ^ y) & 0x8000)) \
    X(min3, 3, extreme(extreme(a, b, aux, 0, 0), c, aux, 0, 0)) X(max3, 3, extreme(extreme(a, b, aux, 1, 0), c, aux, 1, 0)) \
    X(tanh, 1, tanh(a)) X(ex2, 1, exp2(a))
HALF_OPS(HALF)

/* Mixed precision 9.7.5: add, sub and fma of f32 with halves as the first operands. */
#define MIXED(name, halves, value) \
    static Outcome op_##name##_mixed(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const u16 *A = SRC(u16, 1), *B = SRC(u16, halves); const f32 *C = SRC(f32, halves + 1); \
        u32 r[LANES]; fesetround(host_rounding(i->aux)); \
        EACH_LANE { \
            volatile f32 a = (f32)read_half(A[l], i->aux & BF), b = (f32)read_half(B[l], i->aux & BF), c = C[l]; UNUSED(b); \
            volatile f32 v = value; f32 x = canonical(v); r[l] = bits_f32(i->aux & SAT ? saturate(x) : x); \
        } \
        fesetround(FE_TONEAREST); put_u32(DST(u32, 0), mask, r); return NEXT; \
    }
MIXED(add, 1, a + c)
MIXED(sub, 1, a - c)
MIXED(fma, 2, fmaf(a, b, c))

/* 9.7.4.5 neg, 9.7.4.6 abs: on the bits, but of a NaN they make the canonical one. */
static inline u16 sign_half(u16 h, u32 aux, u16 result) {
    return (h & 0x7fff) > (aux & BF ? 0x7f80 : 0x7c00) ? 0x7fff : result;
}
#define SIGN(name, value) \
    static Outcome op_##name##_half(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); \
        if (i->aux & PAIR) { \
            const u32 *A = SRC(u32, 1); u32 r[LANES]; \
            EACH_LANE { \
                u16 a = (u16)A[l], low = sign_half(a, i->aux, (u16)(value)); a = (u16)(A[l] >> 16); \
                r[l] = low | (u32)sign_half(a, i->aux, (u16)(value)) << 16; \
            } \
            put_u32(DST(u32, 0), mask, r); \
        } else { \
            const u16 *A = SRC(u16, 1); u16 r[LANES]; EACH_LANE { u16 a = A[l]; r[l] = sign_half(a, i->aux, (u16)(value)); } put_u16(DST(u16, 0), mask, r); \
        } \
        return NEXT; \
    }
SIGN(neg, a ^ 0x8000)
SIGN(abs, a & 0x7fff)

static u32 compare_half(const Warp *w, const Ins *i, int k, u32 aux, int shift) {
    u32 r = 0;
    EACH_LANE {
        u16 x = aux & PAIR ? (u16)(SRC(u32, k)[l] >> shift) : SRC(u16, k)[l];
        u16 y = aux & PAIR ? (u16)(SRC(u32, k + 1)[l] >> shift) : SRC(u16, k + 1)[l];
        u32 half = (aux & BF) | (aux & COMPARE_FTZ ? FTZ : 0);
        r |= (u32)compare_reals(read_half(x, half), read_half(y, half), aux & COMPARISON) << l;
    }
    return r;
}
/* setp of a pair writes p for the low half and q for the high one. */
static Outcome op_setp_half(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 low = compare_half(w, i, 2, i->aux, 0);
    if (!(i->aux & PAIR)) return set_predicates(w, i, mask, low);
    put_mask(DST(u32, 0), mask, combine(w, i, low, 4));
    put_mask(DST(u32, 1), mask, combine(w, i, compare_half(w, i, 2, i->aux, 16), 4));
    return NEXT;
}

#define ENTRY(name, ...) {#name "_half", op_##name##_half},
const Op half_ops[] = {HALF_OPS(ENTRY) ENTRY(neg) ENTRY(abs) ENTRY(setp)
    {"add_mixed", op_add_mixed}, {"sub_mixed", op_sub_mixed}, {"fma_mixed", op_fma_mixed}, {0, 0}};
