/* What the floating-point instructions share: modifiers, canonical NaNs, rounding, the small formats. */
#ifndef PTXEMU_REAL_H
#define PTXEMU_REAL_H

#include <fenv.h>
#include <math.h>

#include "ptxemu.h"

/* Modifiers in Ins.aux; the same numbers as in isa.py. The rounding is the lowest two bits. */
enum { RN, RZ, RM, RP, ROUNDING = 3, FTZ = 4, SAT = 8, PROPAGATE_NAN = 16, XORSIGN = 32, ABS = 64, RELU = 128, SATFINITE = 256, RNA = 512 };

static inline f32 nan_f32(void) { return as_f32(0x7fffffff); }
/* Every NaN that arithmetic makes is this one, whatever its operands' payloads were. */
static inline f32 canonical(f32 x) { return x == x ? x : as_f32(0x7fffffff); }
static inline f32 flush(f32 x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
static inline f32 saturate(f32 x) { return x > 0 ? (x < 1 ? x : 1) : 0; } /* NaN becomes +0 */

static inline int host_rounding(u32 aux) {
    static const int modes[4] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    return modes[aux & ROUNDING];
}

static inline f32 half_to_f32(u16 h) {
    u32 sign = (u32)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return mantissa ? nan_f32() : as_f32(sign | 0x7f800000);
    if (!exponent) return copysignf((f32)mantissa * 0x1p-24f, as_f32(sign | 0x3f800000));
    return as_f32(sign | (exponent + 112) << 23 | mantissa << 13);
}
static inline f32 bf16_to_f32(u16 h) { return as_f32((u32)h << 16); }

/* A format of few bits. largest: code of the largest finite value; infinity: 0 where there is none; nan: 0 likewise. */
typedef struct {
    u8 exponent_bits, mantissa_bits;
    s16 bias;
    u32 largest, infinity, nan;
} Format;
extern const Format F16, BF16, E4M3, E5M2, E2M3, E3M2, E2M1;

/* The sum of two doubles rounded to odd, so that rounding it again to fewer bits is right. */
static inline f64 add_to_odd(f64 a, f64 b) {
    f64 s = a + b;
    if (!isfinite(s)) return s;
    f64 t = s - a, error = (a - (s - t)) + (b - t);
    u64 bits = bits_f64(s);
    if (error != 0 && !(bits & 1)) bits += (error > 0) == (s > 0) ? 1 : (u64)-1;
    return as_f64(bits);
}
/* Rounds a value to a format and gives its code; aux as Ins.aux. The sign is the format's highest bit. */
static inline u32 encode(const Format *format, f64 value, u32 aux) {
    u64 raw = bits_f64(value), fraction = raw & 0xfffffffffffffull;
    int negative = (int)(raw >> 63), biased = (int)(raw >> 52 & 0x7ff), m = format->mantissa_bits;
    if (biased == 0x7ff && fraction) return format->nan ? format->nan : format->largest; /* without NaN: the largest, positive */
    if (aux & RELU && negative) return 0;
    u32 sign = (u32)negative << (format->exponent_bits + m), code, rounding = aux & ROUNDING;
    if (biased == 0x7ff) {
        code = aux & SATFINITE || !format->infinity ? format->largest : format->infinity;
        return sign | code;
    }
    int exponent = biased ? biased - 1023 : -1022, lowest = 1 - format->bias;
    u64 significand = biased ? fraction | 1ull << 52 : fraction;
    int unit = exponent < lowest ? lowest : exponent; /* the last place is 2^(unit - m) */
    int shift = unit - m - exponent + 52;             /* bits of the significand that are rounded away: at least 1 */
    u64 n = shift < 64 ? significand >> shift : 0;
    u64 rest = shift < 64 ? significand & ((1ull << shift) - 1) : significand, half = shift < 64 ? 1ull << (shift - 1) : ~0ull;
    int up = aux & RNA ? rest >= half : rounding == RN ? rest > half || (rest == half && (n & 1))
           : rest && rounding == (negative ? (u32)RM : (u32)RP);
    n += (u64)up;
    /* n counts last places: added to the exponent's code it carries over where it reached the next binade */
    code = (u32)(n + ((u64)(unit - lowest) << m));
    if (code > format->largest || unit - lowest > 2 << format->exponent_bits) {
        int toward_zero = !(aux & RNA) && (rounding == RZ || rounding == (negative ? (u32)RP : (u32)RM));
        code = aux & SATFINITE || !format->infinity || toward_zero ? format->largest : format->infinity;
    }
    return sign | code;
}
f32 decode(const Format *format, u32 code);

#endif
