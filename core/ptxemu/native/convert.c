/* cvt, PTX ISA 9.7.9.21, between all plain and small formats. */
#include "real.h"

const Format F16 = {5, 10, 15, 0x7bff, 0x7c00, 0x7fff}, BF16 = {8, 7, 127, 0x7f7f, 0x7f80, 0x7fff};
const Format E4M3 = {4, 3, 7, 0x7e, 0, 0x7f}, E5M2 = {5, 2, 15, 0x7b, 0x7c, 0x7f};
const Format E2M3 = {2, 3, 1, 0x1f, 0, 0}, E3M2 = {3, 2, 3, 0x1f, 0, 0}, E2M1 = {2, 1, 1, 0x7, 0, 0};
static const Format TF32 = {8, 10, 127, 0x3fbff, 0x3fc00, 0x3ffff}; /* 19 bits; the caller shifts them up by 13 */
static const Format *const small[] = {&E4M3, &E5M2, &E2M3, &E3M2, &E2M1};

f32 decode(const Format *format, u32 code) {
    u32 bits = 1u + format->exponent_bits + format->mantissa_bits, magnitude = code & ((1u << (bits - 1)) - 1);
    f32 sign = code >> (bits - 1) & 1 ? -1.0f : 1.0f;
    if (format->infinity && magnitude == format->infinity) return sign * INFINITY;
    if (magnitude > format->largest) return nan_f32();
    int exponent = (int)(magnitude >> format->mantissa_bits);
    u32 mantissa = magnitude & ((1u << format->mantissa_bits) - 1);
    if (exponent) mantissa |= 1u << format->mantissa_bits; else exponent = 1;
    return sign * ldexpf((f32)mantissa, exponent - format->bias - format->mantissa_bits);
}

/* Kinds of operand, aux bits 16-19 (from) and 20-23 (to); the same numbers as in isa_convert.py. */
enum { U8_, S8_, U16_, S16_, U32_, S32_, U64_, S64_, F16_, BF16_, F32_, F64_ };
enum { TO_INTEGER = 1 << 15 }; /* cvt.rni.f32.f32: round to an integer, stay a float */

typedef struct { int real; f64 f; s64 i; int large; } Value; /* large: i is an u64 above INT64_MAX */

static Value read_value(const u8 *lane, u32 kind, u32 aux) {
    Value v = {0, 0, 0, 0};
    u64 x = 0;
    static const u8 widths[] = {1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8};
    memcpy(&x, lane, widths[kind]);
    switch (kind) {
    case S8_: v.i = (s8)x; break;
    case S16_: v.i = (s16)x; break;
    case S32_: v.i = (s32)x; break;
    case F16_: v.real = 1; v.f = half_to_f32((u16)x); break;
    case BF16_: v.real = 1; v.f = bf16_to_f32((u16)x); break;
    case F32_: v.real = 1; v.f = aux & FTZ ? flush(as_f32((u32)x)) : as_f32((u32)x); break;
    case F64_: v.real = 1; v.f = as_f64(x); break;
    default: v.i = (s64)x; v.large = kind == U64_ && v.i < 0;
    }
    return v;
}
static f64 to_integral(f64 x, u32 aux) {
    switch (aux & ROUNDING) {
    case RN: return nearbyint(x);
    case RZ: return trunc(x);
    case RM: return floor(x);
    default: return ceil(x);
    }
}
/* Float to integer saturates always; a NaN becomes 0, but the top bit where either type has 64 bits. */
static u64 real_to_integer(f64 x, u32 kind, u32 from, u32 aux) {
    static const u8 bits[] = {8, 8, 16, 16, 32, 32, 64, 64};
    static const f64 low[] = {0, -128, 0, -32768, 0, -0x1p31, 0, -0x1p63};
    static const f64 high[] = {255, 127, 65535, 32767, 4294967295.0, 2147483647.0, 0x1p64, 0x1p63};
    if (x != x) return kind >= U64_ || from == F64_ ? 1ull << (bits[kind] - 1) : 0;
    x = to_integral(x, aux);
    if (x <= low[kind]) return (u64)(s64)low[kind];
    if (x >= high[kind]) return kind == U64_ ? ~0ull : kind == S64_ ? (u64)INT64_MAX : (u64)(s64)high[kind];
    return kind == U64_ ? (u64)x : (u64)(s64)x;
}
static u64 integer_to_integer(Value v, u32 kind, u32 aux) {
    static const s64 low[] = {0, -128, 0, -32768, 0, INT32_MIN, 0, INT64_MIN};
    static const s64 high[] = {255, 127, 65535, 32767, UINT32_MAX, INT32_MAX, INT64_MAX, INT64_MAX};
    if (!(aux & SAT)) return (u64)v.i;
    if (v.large) return kind == U64_ ? (u64)v.i : (u64)high[kind];
    return v.i < low[kind] ? (u64)low[kind] : v.i > high[kind] && kind != U64_ ? (u64)high[kind] : (u64)v.i;
}
/* Integer or f64 to f32 or f64 in the rounding asked for, by the host's own conversion. */
static f64 integer_to_real(Value v, int single, u32 aux) {
    fesetround(host_rounding(aux));
    volatile s64 i = v.i;
    volatile u64 n = (u64)v.i;
    volatile f32 s = v.large ? (f32)n : (f32)i;
    volatile f64 d = v.large ? (f64)n : (f64)i;
    fesetround(FE_TONEAREST);
    return single ? (f64)s : d;
}
static f32 narrow(f64 x, u32 aux) {
    fesetround(host_rounding(aux));
    volatile f64 y = x;
    volatile f32 r = (f32)y;
    fesetround(FE_TONEAREST);
    return r;
}
/* An integer rounded to odd in 53 bits, so that encode() rounds it right. */
static f64 integer_to_odd(Value v) {
    u64 n = v.large || v.i >= 0 ? (u64)v.i : 0 - (u64)v.i;
    int shift = n >> 53 ? 11 : 0;
    u64 kept = n >> shift << shift;
    f64 x = (f64)(kept | (u64)(kept != n) << shift);
    return v.large || v.i >= 0 ? x : -x;
}
static u64 write_value(Value v, u32 kind, u32 from, u32 aux) {
    if (kind <= S64_) return v.real ? real_to_integer(v.f, kind, from, aux) : integer_to_integer(v, kind, aux);
    if (kind == F16_ || kind == BF16_) {
        f64 x = v.real ? v.f : integer_to_odd(v);
        if (v.real && aux & TO_INTEGER) x = to_integral(x, aux);
        if (aux & SAT) x = x > 0 ? (x < 1 ? x : 1) : 0;
        return encode(kind == F16_ ? &F16 : &BF16, x, aux);
    }
    f64 x = v.real ? v.f : integer_to_real(v, kind == F32_, aux);
    if (v.real && aux & TO_INTEGER) x = to_integral(x, aux);
    if (aux & SAT) x = x > 0 ? (x < 1 ? x : 1) : 0;
    if (kind == F64_) return x == x ? bits_f64(x) : 0x7fffffffffffffffull;
    f32 s = canonical(narrow(x, aux));
    return bits_f32(aux & FTZ ? flush(s) : s);
}

/* A NaN that is converted to or from f64 keeps the upper bits of its payload and becomes quiet. */
static int nan_through_f64(const u8 *lane, u32 from, u32 to, u64 *out) {
    u64 x = 0;
    memcpy(&x, lane, from == F64_ ? 8 : from == F32_ ? 4 : 2);
    u32 bits = from == F64_ ? 64 : from == F32_ ? 32 : 16, fraction = from == F64_ ? 52 : from == F32_ ? 23 : from == F16_ ? 10 : 7;
    u64 sign = x >> (bits - 1), payload = x & ((1ull << fraction) - 1);
    if ((x << (65 - bits) >> (65 - bits) >> fraction) != (1ull << (bits - 1 - fraction)) - 1 || !payload) return 0;
    if (to == F64_) *out = sign << 63 | 0xfffull << 51 | payload << (52 - fraction);
    else if (from == F64_) *out = sign << 31 | 0x7fc00000 | payload >> 29;
    else return 0;
    return 1;
}

/* Lanes of both operands may be wider than the types: `from` and `to` widths of the registers are in aux2 (Ins.offset). */
static Outcome op_cvt(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 from = i->aux >> 16 & 15, to = i->aux >> 20 & 15, source = (u32)i->offset & 15, room = (u32)i->offset >> 4 & 15;
    int is_signed = to <= S64_ && (to & 1);
    static const u8 widths[] = {1, 1, 2, 2, 4, 4, 8, 8};
    const u8 *A = SRC(u8, 1);
    u8 *d = DST(u8, 0);
    EACH_LANE if (mask >> l & 1) {
        const u8 *lane = A + (u32)l * source;
        u64 r = 0;
        if (!(from >= F16_ && to >= F32_ && !(i->aux & SAT) && nan_through_f64(lane, from, to, &r))) r = write_value(read_value(lane, from, i->aux), to, from, i->aux);
        if (to <= S64_ && widths[to] < 8) { /* extended to a wider register by the sign of the type */
            u32 shift = 64 - 8 * widths[to];
            r = is_signed ? (u64)((s64)(r << shift) >> shift) : r << shift >> shift;
        }
        memcpy(d + (u32)l * room, &r, room);
    }
    return NEXT;
}

/* The frequent integer ones, and bf16 and f16 to f32, without the detour. */
#define DIRECT(name, D, T, value) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1); D r[LANES]; EACH_LANE { T a = A[l]; r[l] = (D)(value); } put_##D(DST(D, 0), mask, r); return NEXT; \
    }
#define DIRECT_OPS(X) \
    X(cvt_u32_u16, u32, u16, a) X(cvt_u16_u32, u16, u32, a) X(cvt_u64_u32, u64, u32, a) X(cvt_u32_u64, u32, u64, a) \
    X(cvt_s64_s32, u64, s32, (s64)a) X(cvt_s32_s16, u32, s16, (s32)a) X(cvt_f32_bf16, u32, u16, (u32)a << 16) \
    X(cvt_f32_f16, u32, u16, bits_f32(half_to_f32(a)))
DIRECT_OPS(DIRECT)

/* Two f32 to f16x2 or bf16x2: d, a (high), b (low). aux bit 16: bf16. */
static Outcome op_cvt_pair_f32(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    const f32 *A = SRC(f32, 1), *B = SRC(f32, 2);
    const Format *format = i->aux >> 16 & 1 ? &BF16 : &F16;
    u32 r[LANES];
    EACH_LANE if (mask >> l & 1) r[l] = encode(format, A[l], i->aux) << 16 | encode(format, B[l], i->aux);
    put_u32(DST(u32, 0), mask, r);
    return NEXT;
}
static Outcome op_cvt_tf32_f32(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    const f32 *A = SRC(f32, 1);
    u32 r[LANES];
    EACH_LANE r[l] = A[l] == A[l] ? encode(&TF32, A[l], i->aux) << 13 : i->aux & RNA ? bits_f32(A[l]) & 0xffffe000 : 0x7fffe000;
    put_u32(DST(u32, 0), mask, r);
    return NEXT;
}
/* Pairs of small formats from two f32, or from one f16x2 or bf16x2 (aux bits 20-21: 1, 2): 16 bits, or 8 for e2m1x2. */
static Outcome op_cvt_small(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 kind = i->aux >> 16 & 15, source = i->aux >> 20 & 3, shift = kind == 4 ? 4 : 8;
    u16 r[LANES];
    EACH_LANE {
        u32 packed = SRC(u32, 1)[l];
        f64 high = source == 0 ? SRC(f32, 1)[l] : source == 1 ? half_to_f32((u16)(packed >> 16)) : bf16_to_f32((u16)(packed >> 16));
        f64 low = source == 0 ? SRC(f32, 2)[l] : source == 1 ? half_to_f32((u16)packed) : bf16_to_f32((u16)packed);
        r[l] = (u16)(encode(small[kind], high, i->aux) << shift | encode(small[kind], low, i->aux));
    }
    put_u16(DST(u16, 0), mask, r);
    return NEXT;
}
/* The way back, to f16x2: exact. */
static Outcome op_cvt_f16x2_small(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 kind = i->aux >> 16 & 15, shift = kind == 4 ? 4 : 8, low_bits = (1u << shift) - 1;
    const u16 *A = SRC(u16, 1);
    u32 r[LANES];
    EACH_LANE {
        u32 high = encode(&F16, decode(small[kind], A[l] >> shift & low_bits), i->aux), low = encode(&F16, decode(small[kind], A[l] & low_bits), i->aux);
        r[l] = high << 16 | low;
    }
    put_u32(DST(u32, 0), mask, r);
    return NEXT;
}
/* ue8m0: a power of two, 255 is NaN. Rounds to zero or up; what is not positive becomes the smallest power. */
static u32 encode_ue8m0(f64 x, u32 aux) {
    if (x != x) return 255;
    if (isinf(x) && !(aux & SATFINITE)) return x > 0 ? 255 : 0;
    if (x <= 0x1p-127) return 0;
    if (isinf(x)) return 254;
    int exponent;
    f64 fraction = frexp(x, &exponent);
    int code = exponent - 1 + 127 + ((aux & ROUNDING) == RP && fraction > 0.5);
    return code > 254 ? (aux & SATFINITE ? 254 : 255) : (u32)code;
}
static Outcome op_cvt_ue8m0x2(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u16 r[LANES];
    int packed = i->aux >> 20 & 1;
    EACH_LANE {
        u32 word = SRC(u32, 1)[l];
        f64 high = packed ? bf16_to_f32((u16)(word >> 16)) : SRC(f32, 1)[l], low = packed ? bf16_to_f32((u16)word) : SRC(f32, 2)[l];
        r[l] = (u16)(encode_ue8m0(high, i->aux) << 8 | encode_ue8m0(low, i->aux));
    }
    put_u16(DST(u16, 0), mask, r);
    return NEXT;
}
static Outcome op_cvt_bf16x2_ue8m0x2(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    const u16 *A = SRC(u16, 1);
    u32 r[LANES];
    EACH_LANE {
        u32 word = 0;
        for (int k = 0; k < 2; k++) {
            u32 code = A[l] >> 8 * k & 255;
            word |= (code == 255 ? 0x7fff : encode(&BF16, ldexp(1, (int)code - 127), 0)) << 16 * k;
        }
        r[l] = word;
    }
    put_u32(DST(u32, 0), mask, r);
    return NEXT;
}

#define ENTRY(name, ...) {#name, op_##name},
const Op convert_ops[] = {
    DIRECT_OPS(ENTRY) ENTRY(cvt) ENTRY(cvt_pair_f32) ENTRY(cvt_tf32_f32) ENTRY(cvt_small) ENTRY(cvt_f16x2_small)
    ENTRY(cvt_ue8m0x2) ENTRY(cvt_bf16x2_ue8m0x2)
    {0, 0}};
