/* Products of matrices as Hopper's tensor cores sum them, measured on an H200 (tests/ptxemu/truth):

   The exponent of a product is the sum of its factors' exponents; the largest of these, and of the accumulator's, is M.
   Every product, exact, and the accumulator are cut towards zero to multiples of 2^(M - fraction), and these are added
   exactly. The sum is cut towards zero to `kept` bits behind the leading one, or rounded to the nearest f16. */
#include "real.h"

enum { MOST_COLUMNS = 256, WARPS = 4, WARP_ROWS = 16, LOWEST = -400 };

typedef f64 V __attribute__((vector_size(32)));
typedef s32 VI __attribute__((vector_size(16)));
typedef f64 Anywhere __attribute__((vector_size(32), aligned(8), may_alias));
#define AT(x) (*(const Anywhere *)(x))
/* Numbers below 2^31 cut towards zero. Macros, as functions of vectors depend on the processor. */
#ifdef __AVX__
#define WHOLE_PART(x) __builtin_ia32_roundpd256(x, 3)
#else
#define WHOLE_PART(x) __builtin_convertvector(__builtin_convertvector(x, VI), V)
#endif

/* Exponent of a number, of the smallest normal one for subnormals, LOWEST for zero. */
static inline s32 exponent_of(f32 x, s32 smallest) {
    u32 bits = bits_f32(x) & 0x7fffffff;
    s32 e = (s32)(bits >> 23) - 127;
    return !bits ? LOWEST : e < smallest ? smallest : e;
}
static inline f64 power(s32 e) { return as_f64((u64)(1023 + e) << 52); }

/* One row: sums of products with every column, in units of 2^unit[j]. b: (depth, n); n is a multiple of 8. */
static void row(const f32 *a, const f64 *b, const s16 *a_exponents, const s16 *b_exponents, const f32 *c, u32 n, u32 depth, s32 fraction, f64 *sum, s32 *unit) {
    s16 largest[MOST_COLUMNS];
    for (u32 j = 0; j < n; j++) largest[j] = (s16)exponent_of(c[j], -126);
    for (u32 k = 0; k < depth; k++) {
        const s16 *eb = b_exponents + k * n, ea = a_exponents[k];
        for (u32 j = 0; j < n; j++) {
            s16 both = (s16)(ea + eb[j]);
            largest[j] = both > largest[j] ? both : largest[j];
        }
    }
    f64 scale[MOST_COLUMNS];
    for (u32 j = 0; j < n; j++) {
        unit[j] = (largest[j] < LOWEST ? LOWEST : largest[j]) - fraction;
        scale[j] = power(-unit[j]);
        sum[j] = (f64)(s32)((f64)c[j] * scale[j]);
    }
    for (u32 j = 0; j < n; j += 8) {
        V s = AT(scale + j), t = AT(sum + j), s_high = AT(scale + j + 4), t_high = AT(sum + j + 4);
        for (u32 k = 0; k < depth; k++) {
            const f64 *y = b + k * n + j, x = a[k];
            t += WHOLE_PART(AT(y) * x * s);
            t_high += WHOLE_PART(AT(y + 4) * x * s_high);
        }
        memcpy(sum + j, &t, sizeof t);
        memcpy(sum + j + 4, &t_high, sizeof t);
    }
}

typedef struct {
    s16 a[64 * 64], b[64 * MOST_COLUMNS]; /* exponents */
    f64 wide[64 * MOST_COLUMNS];          /* B */
} Factors;

static void factors(const Product *p, u32 rows, Factors *e) {
    for (u32 k = 0; k < rows * p->depth; k++) e->a[k] = (s16)exponent_of(p->a[k], p->smallest_a);
    for (u32 k = 0; k < p->depth * p->n; k++) e->b[k] = (s16)exponent_of(p->bt[k], p->smallest_b), e->wide[k] = p->bt[k];
}
/* Codes of sums in the type of D: f32 holds what is cut towards zero to `kept` bits behind the leading one. */
static void codes_of(const Product *p, const f64 *sum, const s32 *unit, u32 *codes) {
    u64 mask = ~0ull << (52 - p->kept);
    u32 small = 0;
    for (u32 j = 0; j < p->n; j++) {
        u64 bits = bits_f64(sum[j] * power(unit[j]));
        f64 x = as_f64(bits & mask);
        codes[j] = bits_f32((f32)x);
        small |= (bits << 1) - 1 < (u64)(1023 - 126) << 53; /* subnormal in f32 */
    }
    for (u32 j = 0; j < p->n && (small || p->to == TO_F16); j++) {
        f64 x = sum[j] * power(unit[j]);
        if (p->to == TO_F16) codes[j] = encode(&F16, x, 0);
        else if (fabs(x) < 0x1p-126) codes[j] = bits_f32((f32)copysign((f64)(s64)(x * 0x1p149) * 0x1p-149, x));
    }
}
static void sums(const Product *p, const Factors *e, u32 i, const f32 *c, u32 *codes) {
    f64 sum[MOST_COLUMNS];
    s32 unit[MOST_COLUMNS];
    f32 finite[MOST_COLUMNS];
    u32 special = 0;
    for (u32 j = 0; j < p->n; j++) {
        u32 bits = bits_f32(c[j]), bad = (bits & 0x7f800000) == 0x7f800000;
        finite[j] = as_f32(bad ? 0 : bits);
        special |= bad;
    }
    row(p->a + i * p->depth, e->wide, e->a + i * p->depth, e->b, finite, p->n, p->depth, p->fraction, sum, unit);
    codes_of(p, sum, unit, codes);
    for (u32 j = 0; special && j < p->n; j++) /* an accumulator that is an infinity or a NaN stays one */
        if (!isfinite(c[j])) codes[j] = p->to == TO_F16 ? encode(&F16, c[j], 0) : bits_f32(canonical(c[j]));
}
/* Integers are added exactly; they wrap around or saturate. */
static void integer_sums(const Product *p, u32 i, const s32 *c, u32 *codes) {
    f64 sum[MOST_COLUMNS];
    for (u32 j = 0; j < p->n; j++) sum[j] = c[j];
    for (u32 k = 0; k < p->depth; k++) {
        f64 x = (f64)p->a[i * p->depth + k];
        for (u32 j = 0; j < p->n; j++) sum[j] += x * (f64)p->bt[k * p->n + j];
    }
    for (u32 j = 0; j < p->n; j++) {
        s64 x = (s64)sum[j];
        if (p->to == TO_S32_SATURATED) x = x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : x;
        codes[j] = (u32)x;
    }
}

/* D = A B + C of whole matrices: c (rows, n) and codes of f32 or f16. At most 64 rows, 64 deep, 256 columns. */
void emu_product(const Product *p, u32 rows, const f32 *c, u32 *out) {
    static _Thread_local Factors e;
    factors(p, rows, &e);
    for (u32 i = 0; i < rows; i++) sums(p, &e, i, c + i * p->n, out + i * p->n);
}

/* D = A B + D of a wgmma on the registers of its warps, PTX ISA 9.7.15.5.1.1. files: registers of each warp; places: where
   in them each register of D starts, in words; keep: D is added. */
void emu_wgmma(const Product *p, u32 *const *files, const s64 *places, const u8 *keep) {
    static _Thread_local Factors e;
    u32 halves = p->to == TO_F16, whole = p->to >= TO_S32, codes[MOST_COLUMNS];
    s32 ints[MOST_COLUMNS];
    f32 reals[MOST_COLUMNS];
    if (!whole) factors(p, WARPS * WARP_ROWS, &e);
    for (u32 i = 0; i < WARPS * WARP_ROWS; i++) {
        u32 r = i % WARP_ROWS, *file = files[i / WARP_ROWS] + r % 8 * 4, added = keep[i / WARP_ROWS];
        /* Column 8 g + 2 l + h is in lane l of those that hold the row: in a register of its own, or packed with its pair. */
        for (u32 g = 0; g < p->n / 8; g++)
            for (u32 l = 0; l < 4; l++) {
                const s64 *at = places + (halves ? g * 2 + r / 8 : g * 4 + r / 8 * 2);
                u32 low = added ? file[at[0] + l] : 0, high = halves ? low >> 16 : added ? file[at[1] + l] : 0, j = 8 * g + 2 * l;
                ints[j] = (s32)low, ints[j + 1] = (s32)high;
                reals[j] = halves ? half_to_f32((u16)low) : as_f32(low);
                reals[j + 1] = halves ? half_to_f32((u16)high) : as_f32(high);
            }
        if (whole) integer_sums(p, i, ints, codes);
        else sums(p, &e, i, reals, codes);
        for (u32 g = 0; g < p->n / 8; g++)
            for (u32 l = 0; l < 4; l++) {
                const s64 *at = places + (halves ? g * 2 + r / 8 : g * 4 + r / 8 * 2);
                u32 low = codes[8 * g + 2 * l], high = codes[8 * g + 2 * l + 1];
                file[at[0] + l] = halves ? low | high << 16 : low;
                if (!halves) file[at[1] + l] = high;
            }
    }
}
f64 emu_fma(f64 x, f64 y, f64 z) { return fma(x, y, z); }
