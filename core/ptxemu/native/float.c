/* f32 and f64 arithmetic, PTX ISA 9.7.3, and packed f32x2. The plain form of an instruction is one vector loop; any
   modifier (rounding, ftz, sat) goes through the general loop. Compiled with -frounding-math -ffp-contract=off. */
#include "real.h"

static inline f32 finish(f32 x, u32 aux) {
    x = canonical(x);
    if (aux & FTZ) x = flush(x);
    return aux & SAT ? saturate(x) : x;
}
static inline f32 take(f32 x, u32 aux) { return aux & FTZ ? flush(x) : x; }

/* Rows: name, value of one lane in terms of a, b, c. volatile keeps the compiler from moving arithmetic past fesetround. */
#define F32_OP(name, operands, value, ...) \
    static Outcome op_##name##_f32(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const f32 *A = SRC(f32, 1), *B = SRC(f32, operands > 1 ? 2 : 1), *C = SRC(f32, operands > 2 ? 3 : 1); \
        f32 r[LANES]; u32 bits[LANES]; \
        if (!i->aux) { \
            EACH_LANE { f32 a = A[l], b = B[l], c = C[l]; UNUSED(b); UNUSED(c); r[l] = canonical(value); } \
        } else { \
            fesetround(host_rounding(i->aux)); \
            EACH_LANE { \
                volatile f32 a = take(A[l], i->aux), b = take(B[l], i->aux), c = take(C[l], i->aux); UNUSED(b); UNUSED(c); \
                volatile f32 v = value; r[l] = finish(v, i->aux); \
            } \
            fesetround(FE_TONEAREST); \
        } \
        memcpy(bits, r, sizeof r); put_u32(DST(u32, 0), mask, bits); return NEXT; \
    }
/* f64 keeps the payload of a NaN among its operands, made quiet; of several, the first of x, y, z. */
static inline u64 quiet(f64 x) { return bits_f64(x) | 1ull << 51; }
static u64 nan_f64(f64 x, f64 y, f64 z) { return x != x ? quiet(x) : y != y ? quiet(y) : z != z ? quiet(z) : 0xfff8000000000000ull; }
#define F64_OP(name, operands, value, nan) \
    static Outcome op_##name##_f64(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const f64 *A = SRC(f64, 1), *B = SRC(f64, operands > 1 ? 2 : 1), *C = SRC(f64, operands > 2 ? 3 : 1); \
        u64 r[LANES]; fesetround(host_rounding(i->aux)); \
        EACH_LANE { \
            volatile f64 a = A[l], b = B[l], c = C[l]; UNUSED(b); UNUSED(c); volatile f64 v = value; \
            r[l] = v == v ? bits_f64(v) : nan; \
        } \
        fesetround(FE_TONEAREST); put_u64(DST(u64, 0), mask, r); return NEXT; \
    }
/* Two f32 in a 64-bit register; the operands are a, b and, for fma, c. */
#define F32X2_OP(name, operands, value) \
    static Outcome op_##name##_f32x2(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const f32 *A = SRC(f32, 1), *B = SRC(f32, 2), *C = SRC(f32, operands > 2 ? 3 : 1); \
        f32 r[2 * LANES]; u64 bits[LANES]; fesetround(host_rounding(i->aux)); \
        for (int l = 0; l < 2 * LANES; l++) { \
            volatile f32 a = take(A[l], i->aux), b = take(B[l], i->aux), c = take(C[l], i->aux); UNUSED(c); \
            volatile f32 v = value; r[l] = finish(v, i->aux); \
        } \
        fesetround(FE_TONEAREST); memcpy(bits, r, sizeof r); put_u64(DST(u64, 0), mask, bits); return NEXT; \
    }

/* 9.7.3.3 add, 9.7.3.4 sub, 9.7.3.5 mul, 9.7.3.6 fma, 9.7.3.8 div.rn, 9.7.3.13 rcp.rn, 9.7.3.15 sqrt.rn */
#define ARITHMETIC_OPS(X) \
    X(add, 2, a + b, nan_f64(b, a, a)) X(sub, 2, a - b, nan_f64(b, a, a)) X(mul, 2, a * b, nan_f64(b, a, a)) \
    X(div, 2, a / b, nan_f64(a, b, b)) X(rcp, 1, 1 / a, nan_f64(a, a, a))
ARITHMETIC_OPS(F32_OP)
ARITHMETIC_OPS(F64_OP)
F32_OP(fma, 3, fmaf(a, b, c), 0)
F64_OP(fma, 3, fma(a, b, c), nan_f64(b, a, c))
F32_OP(sqrt, 1, sqrtf(a), 0)
F64_OP(sqrt, 1, sqrt(a), nan_f64(a, a, a))
F32X2_OP(add, 2, a + b)
F32X2_OP(sub, 2, a - b)
F32X2_OP(mul, 2, a * b)
F32X2_OP(fma, 3, fmaf(a, b, c))

/* The approximate ones, within their bounds but not bit for bit: in double, rounded once.
   9.7.3.14 rcp.approx, 9.7.3.17 rsqrt, 9.7.3.18 sin, 9.7.3.19 cos, 9.7.3.20 lg2, 9.7.3.21 ex2, 9.7.3.22 tanh, 9.7.3.8 div.full */
#define APPROXIMATE(name, value) \
    static Outcome op_##name##_approx_f32(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const f32 *A = SRC(f32, 1); u32 r[LANES]; \
        EACH_LANE { f64 a = take(A[l], i->aux); r[l] = bits_f32(finish((f32)(value), i->aux)); } \
        put_u32(DST(u32, 0), mask, r); return NEXT; \
    }
APPROXIMATE(rcp, 1 / a)
APPROXIMATE(sqrt, sqrt(a))
APPROXIMATE(rsqrt, 1 / sqrt(a))
APPROXIMATE(sin, sin(a))
APPROXIMATE(cos, cos(a))
APPROXIMATE(lg2, log2(a))
APPROXIMATE(ex2, exp2(a))
APPROXIMATE(tanh, tanh(a))
static Outcome op_rsqrt_approx_f64(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    const f64 *A = SRC(f64, 1);
    u64 r[LANES];
    EACH_LANE { f64 v = 1 / sqrt(A[l]); r[l] = v == v ? bits_f64(v) : nan_f64(A[l], A[l], A[l]); }
    put_u64(DST(u64, 0), mask, r);
    return NEXT;
}
/* rcp.approx.ftz.f64, rsqrt.approx.ftz.f64 9.7.3.14, 9.7.3.18: only the upper 32 bits of the operand count, and only those of
   the result are set. */
static inline f64 flush_f64(f64 x) { return fabs(x) < 0x1p-1022 ? copysign(0, x) : x; }
#define GROSS(name, value) \
    static Outcome op_##name##_gross_f64(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const u64 *A = SRC(u64, 1); u64 r[LANES]; \
        EACH_LANE { \
            f64 a = flush_f64(as_f64(A[l] & ~0xffffffffull)), v = flush_f64(value); \
            r[l] = v == v ? bits_f64(v) & ~0xffffffffull : 0x7fffffff00000000ull; \
        } \
        put_u64(DST(u64, 0), mask, r); return NEXT; \
    }
GROSS(rcp, 1 / a)
GROSS(rsqrt, 1 / sqrt(a))

/* 9.7.3.11 min, 9.7.3.12 max: a NaN loses unless .NaN is given; -0 is less than +0. */
static inline f32 lesser(f32 a, f32 b, u32 aux) {
    if (a != a || b != b) return aux & PROPAGATE_NAN || (a != a && b != b) ? nan_f32() : a != a ? b : a;
    return a < b || (a == b && signbit(a)) ? a : b;
}
static inline f32 greater(f32 a, f32 b, u32 aux) {
    if (a != a || b != b) return aux & PROPAGATE_NAN || (a != a && b != b) ? nan_f32() : a != a ? b : a;
    return a > b || (a == b && !signbit(a)) ? a : b;
}
static inline f32 chosen(f32 a, f32 b, u32 aux, int most) {
    a = take(a, aux), b = take(b, aux);
    u32 sign = aux & XORSIGN ? (bits_f32(a) ^ bits_f32(b)) & 0x80000000 : 0;
    if (aux & (ABS | XORSIGN)) a = fabsf(a), b = fabsf(b);
    f32 r = most ? greater(a, b, aux) : lesser(a, b, aux);
    return aux & XORSIGN && r == r ? as_f32((bits_f32(r) & 0x7fffffff) | sign) : r;
}
#define EXTREME(name, most) \
    static Outcome op_##name##_f32(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const f32 *A = SRC(f32, 1), *B = SRC(f32, 2); u32 r[LANES]; \
        EACH_LANE r[l] = bits_f32(chosen(A[l], B[l], i->aux, most)); \
        if (i->count > 3) { const f32 *C = SRC(f32, 3); EACH_LANE r[l] = bits_f32(chosen(as_f32(r[l]), C[l], i->aux, most)); } \
        put_u32(DST(u32, 0), mask, r); return NEXT; \
    } \
    static Outcome op_##name##_f64(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const f64 *A = SRC(f64, 1), *B = SRC(f64, 2); u64 r[LANES]; \
        EACH_LANE { \
            f64 a = A[l], b = B[l]; int first = most ? a > b || (a == b && !signbit(a)) : a < b || (a == b && signbit(a)); \
            r[l] = bits_f64(a != a ? b : b != b ? a : first ? a : b); \
        } \
        put_u64(DST(u64, 0), mask, r); return NEXT; \
    }
EXTREME(min, 0)
EXTREME(max, 1)

/* 9.7.3.9 abs, 9.7.3.10 neg, 9.7.3.2 copysign, 9.7.3.1 testp work on the bits; ptxas makes additions of abs and neg, so NaNs
   come out as those do. */
#define NAN32(a, x) (((a) & 0x7fffffff) > 0x7f800000 ? 0x7fffffff : FLUSHED(x))
#define NAN64(a, x) (((a) & ~(1ull << 63)) > 0x7ffull << 52 ? (a) | 1ull << 51 : (x))
#define SIGN_OP(name, T, value) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1), *B = SRC(T, i->count > 2 ? 2 : 1); T r[LANES]; \
        EACH_LANE { T a = A[l], b = B[l]; UNUSED(b); r[l] = value; } \
        put_##T(DST(T, 0), mask, r); return NEXT; \
    }
#define FLUSHED(x) (i->aux & FTZ ? bits_f32(flush(as_f32(x))) : (x))
#define SIGN_OPS(X) \
    X(abs_f32, u32, NAN32(a, a & 0x7fffffff)) X(neg_f32, u32, NAN32(a, a ^ 0x80000000)) \
    X(abs_f64, u64, NAN64(a, a & ~(1ull << 63))) X(neg_f64, u64, NAN64(a, a ^ 1ull << 63)) \
    X(copysign_f32, u32, (a & 0x80000000) | (b & 0x7fffffff)) X(copysign_f64, u64, (a & 1ull << 63) | (b & ~(1ull << 63)))
SIGN_OPS(SIGN_OP)

enum { TEST_FINITE, TEST_INFINITE, TEST_NUMBER, TEST_NOT_A_NUMBER, TEST_NORMAL, TEST_SUBNORMAL };
static Outcome op_testp(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 bits = 0, test = i->aux & 7;
    EACH_LANE {
        int class = i->aux & 8 ? fpclassify(SRC(f64, 1)[l]) : fpclassify(SRC(f32, 1)[l]);
        int r = test == TEST_FINITE ? class != FP_NAN && class != FP_INFINITE : test == TEST_INFINITE ? class == FP_INFINITE
              : test == TEST_NUMBER ? class != FP_NAN : test == TEST_NOT_A_NUMBER ? class == FP_NAN
              : test == TEST_NORMAL ? class == FP_NORMAL || class == FP_ZERO : class == FP_SUBNORMAL;
        bits |= (u32)r << l;
    }
    put_mask(DST(u32, 0), mask, bits);
    return NEXT;
}

#define F32_ENTRY(name, ...) {#name "_f32", op_##name##_f32},
#define F64_ENTRY(name, ...) {#name "_f64", op_##name##_f64},
#define F32X2_ENTRY(name) {#name "_f32x2", op_##name##_f32x2},
#define APPROX_ENTRY(name) {#name "_approx_f32", op_##name##_approx_f32},
#define ENTRY(name, ...) {#name, op_##name},
const Op float_ops[] = {
    ARITHMETIC_OPS(F32_ENTRY) ARITHMETIC_OPS(F64_ENTRY) SIGN_OPS(ENTRY)
    F32_ENTRY(fma) F64_ENTRY(fma) F32_ENTRY(sqrt) F64_ENTRY(sqrt) F32_ENTRY(min) F64_ENTRY(min) F32_ENTRY(max) F64_ENTRY(max)
    F32X2_ENTRY(add) F32X2_ENTRY(sub) F32X2_ENTRY(mul) F32X2_ENTRY(fma)
    APPROX_ENTRY(rcp) APPROX_ENTRY(sqrt) APPROX_ENTRY(rsqrt) APPROX_ENTRY(sin) APPROX_ENTRY(cos) APPROX_ENTRY(lg2) APPROX_ENTRY(ex2)
    APPROX_ENTRY(tanh) ENTRY(rsqrt_approx_f64) ENTRY(rcp_gross_f64) ENTRY(rsqrt_gross_f64) ENTRY(testp)
    {0, 0}};
