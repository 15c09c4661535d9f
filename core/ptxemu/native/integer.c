/* Integer, logic, shift and comparison instructions. Section numbers are those of the PTX ISA 8.8. */
#include "ptxemu.h"

typedef unsigned __int128 u128;
typedef __int128 s128;

/* A row is: name, unsigned type that holds the destination, type of the operands, value of one lane. */
#define UNARY(name, D, T, value) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1); D r[LANES]; \
        EACH_LANE { T a = A[l]; r[l] = (D)(value); } \
        put_##D(DST(D, 0), mask, r); return NEXT; \
    }
#define BINARY(name, D, T, value) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1), *B = SRC(T, 2); D r[LANES]; \
        EACH_LANE { T a = A[l], b = B[l]; r[l] = (D)(value); } \
        put_##D(DST(D, 0), mask, r); return NEXT; \
    }
#define TERNARY(name, D, T, value) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1), *B = SRC(T, 2), *C = SRC(T, 3); D r[LANES]; \
        EACH_LANE { T a = A[l], b = B[l], c = C[l]; r[l] = (D)(value); } \
        put_##D(DST(D, 0), mask, r); return NEXT; \
    }
/* The addend, or a shift count, has another width than the factors. */
#define MIXED2(name, D, T, U, value) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1); const U *B = SRC(U, 2); D r[LANES]; \
        EACH_LANE { T a = A[l]; U b = B[l]; r[l] = (D)(value); } \
        put_##D(DST(D, 0), mask, r); return NEXT; \
    }
#define MIXED3(name, D, T, U, value) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1), *B = SRC(T, 2); const U *C = SRC(U, 3); D r[LANES]; \
        EACH_LANE { T a = A[l], b = B[l]; U c = C[l]; r[l] = (D)(value); } \
        put_##D(DST(D, 0), mask, r); return NEXT; \
    }

static inline s32 sat_s32(s64 x) { return x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : (s32)x; }
static inline u32 bfe_u32(u32 a, u32 pos, u32 len) {
    return pos > 31 || !len ? 0 : (a >> pos) & (len > 31 ? ~0u : (1u << len) - 1);
}
static inline u64 bfe_u64(u64 a, u32 pos, u32 len) {
    return pos > 63 || !len ? 0 : (a >> pos) & (len > 63 ? ~0ull : (1ull << len) - 1);
}
static inline u64 bfe_signed(u64 a, u32 position, u32 length, u32 bits) {
    u64 pos = position, len = length, value = 0, sign = !len ? 0 : a >> (pos + len - 1 > bits - 1 ? bits - 1 : pos + len - 1) & 1;
    for (u32 k = 0; k < bits; k++) value |= (k < len && pos + k < bits ? a >> (pos + k) & 1 : sign) << k;
    return value;
}
static inline u64 bfi(u64 a, u64 b, u64 pos, u32 len, u32 bits) {
    for (u32 k = 0; k < len && pos + k < bits; k++) b = (b & ~(1ull << (pos + k))) | (a >> k & 1) << (pos + k);
    return b;
}
static inline u32 prmt(u32 a, u32 b, u32 selector) {
    u64 bytes = (u64)b << 32 | a; u32 r = 0;
    for (int k = 0; k < 4; k++) {
        u32 s = selector >> 4 * k & 15; u32 byte = (u32)(bytes >> 8 * (s & 7)) & 255;
        r |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * k;
    }
    return r;
}
/* prmt with a mode: which bytes the two lowest bits of c choose. */
static inline u32 prmt_mode(u32 a, u32 b, u32 c, u32 mode) {
    static const u16 table[6][4] = {
        {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123}, {0x0000, 0x1111, 0x2222, 0x3333},
        {0x3210, 0x3211, 0x3222, 0x3333}, {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
    return prmt(a, b, table[mode][c & 3]);
}
static inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (u32 k = 0; k < 8; k++) if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return r;
}
static inline u32 reverse(u32 x) {
    x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1; x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
    x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4; return __builtin_bswap32(x);
}
static inline u32 find_bit(u64 x, int shift_amount, u32 bits) {
    return !x ? ~0u : shift_amount ? (u32)__builtin_clzll(x) - (64 - bits) : 63u - (u32)__builtin_clzll(x);
}
static inline u32 dot(u32 a, u32 b, u32 c, u32 form) { /* form: 1 a signed, 2 b signed, 4 dp2a, 8 high half of b */
    for (u32 k = 0; k < (form & 4 ? 2u : 4u); k++) {
        u32 x = form & 4 ? a >> 16 * k & 0xffff : a >> 8 * k & 255;
        u32 y = b >> 8 * (k + (form & 8 ? 2 : 0)) & 255;
        s32 p = form & 1 ? (form & 4 ? (s16)x : (s8)x) : (s32)x, q = form & 2 ? (s8)y : (s32)y;
        c += (u32)p * (u32)q;
    }
    return c;
}
static inline u32 find_nth_set(u32 bits, u32 base, s32 offset) {
    if (!offset) return bits >> (base & 31) & 1 ? base : ~0u;
    s32 step = offset > 0 ? 1 : -1, left = offset > 0 ? offset : -offset;
    for (s32 k = (s32)base; k >= 0 && k < 32; k += step) if (bits >> k & 1 && !--left) return (u32)k;
    return ~0u;
}
#define PACKED(low, high) ((u32)(u16)(low) | (u32)(u16)(high) << 16)
#define LOW(T, x) ((T)(x))
#define HIGH(T, x) ((T)((x) >> 16))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* 9.7.1 integer arithmetic */
#define UNARY_OPS(X) \
    X(neg_b16, u16, u16, -a) X(neg_b32, u32, u32, -a) X(neg_b64, u64, u64, -a) \
    X(abs_s16, u16, s16, a < 0 ? -a : a) X(abs_s32, u32, s32, a < 0 ? -(u32)a : (u32)a) \
    X(abs_s64, u64, s64, a < 0 ? -(u64)a : (u64)a) \
    X(popc_b32, u32, u32, __builtin_popcount(a)) X(popc_b64, u32, u64, __builtin_popcountll(a)) \
    X(clz_b32, u32, u32, a ? __builtin_clz(a) : 32) X(clz_b64, u32, u64, a ? __builtin_clzll(a) : 64) \
    X(bfind_u32, u32, u32, find_bit(a, (int)i->aux, 32)) X(bfind_u64, u32, u64, find_bit(a, (int)i->aux, 64)) \
    X(bfind_s32, u32, s32, find_bit((u32)(a < 0 ? ~a : a), (int)i->aux, 32)) \
    X(bfind_s64, u32, s64, find_bit((u64)(a < 0 ? ~a : a), (int)i->aux, 64)) \
    X(brev_b32, u32, u32, reverse(a)) \
    X(brev_b64, u64, u64, (u64)reverse((u32)a) << 32 | reverse((u32)(a >> 32))) \
    X(not_b16, u16, u16, ~a) X(not_b32, u32, u32, ~a) X(not_b64, u64, u64, ~a) \
    X(cnot_b16, u16, u16, !a) X(cnot_b32, u32, u32, !a) X(cnot_b64, u64, u64, !a) \
    X(mov_b16, u16, u16, a) X(mov_b32, u32, u32, a) X(mov_b64, u64, u64, a)
#define BINARY_OPS(X) \
    X(add_b16, u16, u16, a + b) X(add_b32, u32, u32, a + b) X(add_b64, u64, u64, a + b) \
    X(add_sat_s32, u32, s32, sat_s32((s64)a + b)) X(sub_sat_s32, u32, s32, sat_s32((s64)a - b)) \
    X(add_b16x2, u32, u32, PACKED(LOW(u16, a) + LOW(u16, b), HIGH(u16, a) + HIGH(u16, b))) \
    X(sub_b16, u16, u16, a - b) X(sub_b32, u32, u32, a - b) X(sub_b64, u64, u64, a - b) \
    X(mul_lo_b16, u16, u16, (u32)a * b) X(mul_lo_b32, u32, u32, a * b) X(mul_lo_b64, u64, u64, a * b) \
    X(mul_hi_u16, u16, u16, (u32)a * b >> 16) X(mul_hi_s16, u16, s16, (s32)a * b >> 16) \
    X(mul_hi_u32, u32, u32, (u64)a * b >> 32) X(mul_hi_s32, u32, s32, (s64)a * b >> 32) \
    X(mul_hi_u64, u64, u64, (u128)a * b >> 64) X(mul_hi_s64, u64, s64, (s128)a * b >> 64) \
    X(mul_wide_u16, u32, u16, (u32)a * b) X(mul_wide_s16, u32, s16, (s32)a * b) \
    X(mul_wide_u32, u64, u32, (u64)a * b) X(mul_wide_s32, u64, s32, (s64)a * b) \
    X(mul24_lo_u32, u32, u32, (a & 0xffffff) * (b & 0xffffff)) \
    X(mul24_lo_s32, u32, u32, (u32)((s32)(a << 8) >> 8) * (u32)((s32)(b << 8) >> 8)) \
    X(mul24_hi_u32, u32, u32, (u64)(a & 0xffffff) * (b & 0xffffff) >> 16) \
    X(mul24_hi_s32, u32, u32, (s64)((s32)(a << 8) >> 8) * ((s32)(b << 8) >> 8) >> 16) \
    X(div_u16, u16, u16, b ? a / b : 0xffff) X(div_u32, u32, u32, b ? a / b : ~0u) X(div_u64, u64, u64, b ? a / b : ~0ull) \
    X(div_s16, u16, s16, b ? a / b : -1) X(div_s32, u32, s32, !b ? -1 : b == -1 ? (s32)-(u32)a : a / b) \
    X(div_s64, u64, s64, !b ? -1 : b == -1 ? (s64)-(u64)a : a / b) \
    X(rem_u16, u16, u16, b ? a % b : a) X(rem_u32, u32, u32, b ? a % b : a) X(rem_u64, u64, u64, b ? a % b : a) \
    X(rem_s16, u16, s16, b ? a % b : a) X(rem_s32, u32, s32, !b ? a : b == -1 ? 0 : a % b) \
    X(rem_s64, u64, s64, !b ? a : b == -1 ? 0 : a % b) \
    X(min_u16, u16, u16, MIN(a, b)) X(min_s16, u16, s16, MIN(a, b)) X(max_u16, u16, u16, MAX(a, b)) X(max_s16, u16, s16, MAX(a, b)) \
    X(min_u32, u32, u32, MIN(a, b)) X(min_s32, u32, s32, MIN(a, b)) X(max_u32, u32, u32, MAX(a, b)) X(max_s32, u32, s32, MAX(a, b)) \
    X(min_u64, u64, u64, MIN(a, b)) X(min_s64, u64, s64, MIN(a, b)) X(max_u64, u64, u64, MAX(a, b)) X(max_s64, u64, s64, MAX(a, b)) \
    X(min_relu_s32, u32, s32, MAX(MIN(a, b), 0)) X(max_relu_s32, u32, s32, MAX(MAX(a, b), 0)) \
    X(min_u16x2, u32, u32, PACKED(MIN(LOW(u16, a), LOW(u16, b)), MIN(HIGH(u16, a), HIGH(u16, b)))) \
    X(max_u16x2, u32, u32, PACKED(MAX(LOW(u16, a), LOW(u16, b)), MAX(HIGH(u16, a), HIGH(u16, b)))) \
    X(min_s16x2, u32, u32, PACKED(MIN(LOW(s16, a), LOW(s16, b)), MIN(HIGH(s16, a), HIGH(s16, b)))) \
    X(max_s16x2, u32, u32, PACKED(MAX(LOW(s16, a), LOW(s16, b)), MAX(HIGH(s16, a), HIGH(s16, b)))) \
    X(min_relu_s16x2, u32, u32, PACKED(MAX(MIN(LOW(s16, a), LOW(s16, b)), 0), MAX(MIN(HIGH(s16, a), HIGH(s16, b)), 0))) \
    X(max_relu_s16x2, u32, u32, PACKED(MAX(MAX(LOW(s16, a), LOW(s16, b)), 0), MAX(MAX(HIGH(s16, a), HIGH(s16, b)), 0))) \
    X(and_b16, u16, u16, a & b) X(and_b32, u32, u32, a & b) X(and_b64, u64, u64, a & b) \
    X(or_b16, u16, u16, a | b) X(or_b32, u32, u32, a | b) X(or_b64, u64, u64, a | b) \
    X(xor_b16, u16, u16, a ^ b) X(xor_b32, u32, u32, a ^ b) X(xor_b64, u64, u64, a ^ b) \
    X(pack_b32, u32, u16, (u32)a | (u32)b << 16) X(pack_b64, u64, u32, (u64)a | (u64)b << 32) \
    X(bmsk_clamp_b32, u32, u32, a > 31 || !b ? 0 : (b > 31 ? ~0u : (1u << b) - 1) << a) \
    X(bmsk_wrap_b32, u32, u32, ((1u << (b & 31)) - 1) << (a & 31)) \
    X(szext_clamp_u32, u32, u32, b > 31 ? a : bfe_u32(a, 0, b)) X(szext_wrap_u32, u32, u32, bfe_u32(a, 0, b & 31)) \
    X(szext_clamp_s32, u32, u32, b > 31 ? a : (u32)bfe_signed(a, 0, b, 32)) \
    X(szext_wrap_s32, u32, u32, (u32)bfe_signed(a, 0, b & 31, 32))
#define TERNARY_OPS(X) \
    X(mad_lo_b16, u16, u16, (u32)a * b + c) X(mad_lo_b32, u32, u32, a * b + c) X(mad_lo_b64, u64, u64, a * b + c) \
    X(mad_hi_u32, u32, u32, ((u64)a * b >> 32) + c) X(mad_hi_s32, u32, s32, (u32)((s64)a * b >> 32) + (u32)c) \
    X(mad_hi_u16, u16, u16, ((u32)a * b >> 16) + c) X(mad_hi_s16, u16, s16, ((s32)a * b >> 16) + c) \
    X(mad_hi_u64, u64, u64, ((u128)a * b >> 64) + c) X(mad_hi_s64, u64, s64, (u64)((s128)a * b >> 64) + (u64)c) \
    X(mad_hi_sat_s32, u32, s32, sat_s32(((s64)a * b >> 32) + c)) \
    X(mad24_lo_u32, u32, u32, (a & 0xffffff) * (b & 0xffffff) + c) \
    X(mad24_lo_s32, u32, u32, (u32)((s32)(a << 8) >> 8) * (u32)((s32)(b << 8) >> 8) + c) \
    X(sad_u32, u32, u32, c + (a < b ? b - a : a - b)) X(sad_s32, u32, s32, (u32)c + (a < b ? (u32)b - (u32)a : (u32)a - (u32)b)) \
    X(sad_u16, u16, u16, c + (a < b ? b - a : a - b)) X(sad_s16, u16, s16, c + (a < b ? b - a : a - b)) \
    X(sad_u64, u64, u64, c + (a < b ? b - a : a - b)) X(sad_s64, u64, s64, (u64)c + (a < b ? (u64)b - (u64)a : (u64)a - (u64)b)) \
    X(min3_u32, u32, u32, MIN(MIN(a, b), c)) X(min3_s32, u32, s32, MIN(MIN(a, b), c)) \
    X(max3_u32, u32, u32, MAX(MAX(a, b), c)) X(max3_s32, u32, s32, MAX(MAX(a, b), c)) \
    X(lop3_b32, u32, u32, lop3(a, b, c, i->aux)) X(prmt_b32, u32, u32, prmt(a, b, c)) \
    X(prmt_mode_b32, u32, u32, prmt_mode(a, b, c, i->aux)) X(dot_b32, u32, u32, dot(a, b, c, i->aux)) \
    X(bfe_u32, u32, u32, bfe_u32(a, b & 255, c & 255)) X(bfe_s32, u32, u32, bfe_signed(a, b & 255, c & 255, 32)) \
    X(shf_l_wrap_b32, u32, u32, (u32)(((u64)b << 32 | a) << (c & 31) >> 32)) \
    X(shf_r_wrap_b32, u32, u32, (u32)(((u64)b << 32 | a) >> (c & 31))) \
    X(shf_l_clamp_b32, u32, u32, c > 31 ? a : (u32)(((u64)b << 32 | a) << c >> 32)) \
    X(shf_r_clamp_b32, u32, u32, c > 31 ? b : (u32)(((u64)b << 32 | a) >> c)) \
    X(fns_b32, u32, u32, find_nth_set(a, b, (s32)c))
#define MIXED2_OPS(X) \
    X(shl_b16, u16, u16, u32, b > 15 ? 0 : a << b) X(shl_b32, u32, u32, u32, b > 31 ? 0 : a << b) \
    X(shl_b64, u64, u64, u32, b > 63 ? 0 : a << b) \
    X(shr_u16, u16, u16, u32, b > 15 ? 0 : a >> b) X(shr_u32, u32, u32, u32, b > 31 ? 0 : a >> b) \
    X(shr_u64, u64, u64, u32, b > 63 ? 0 : a >> b) \
    X(shr_s16, u16, s16, u32, a >> (b > 15 ? 15 : b)) X(shr_s32, u32, s32, u32, a >> (b > 31 ? 31 : b)) \
    X(shr_s64, u64, s64, u32, a >> (b > 63 ? 63 : b))
#define MIXED3_OPS(X) \
    X(mad_wide_u16, u32, u16, u32, (u32)a * b + c) X(mad_wide_s16, u32, s16, u32, (u32)((s32)a * b) + c) \
    X(mad_wide_u32, u64, u32, u64, (u64)a * b + c) X(mad_wide_s32, u64, s32, u64, (u64)((s64)a * b) + c)

UNARY_OPS(UNARY)
BINARY_OPS(BINARY)
TERNARY_OPS(TERNARY)
MIXED2_OPS(MIXED2)
MIXED3_OPS(MIXED3)

/* bfe.u64, bfe.s64 9.7.1.20, bfi 9.7.1.21: the position and length are 32 bits wide whatever the type. Of 32-bit fields
   the low 8 bits of both count; of 64-bit ones all do, and what the ISA does not define is as on an H200. */
#define FIELD(name, T, value) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1); const u32 *B = SRC(u32, 2), *C = SRC(u32, 3); T r[LANES]; \
        EACH_LANE { T a = A[l]; u32 b = B[l], c = C[l]; r[l] = (T)(value); } \
        put_##T(DST(T, 0), mask, r); return NEXT; \
    }
FIELD(bfe_u64, u64, bfe_u64(a, b, c))
FIELD(bfe_s64, u64, bfe_signed(a, b, c, 64))
#define INSERT(name, T, bits) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1), *B = SRC(T, 2); const u32 *C = SRC(u32, 3), *E = SRC(u32, 4); T r[LANES]; \
        EACH_LANE r[l] = (T)bfi(A[l], B[l], C[l] & (bits == 32 ? 255 : ~0u), E[l] & (bits == 32 ? 255 : ~0u), bits); \
        put_##T(DST(T, 0), mask, r); return NEXT; \
    }
INSERT(bfi_b32, u32, 32)
INSERT(bfi_b64, u64, 64)

/* 9.7.2 extended precision: aux 1 takes the carry in, 2 leaves the carry out. */
#define CARRY(name, T, sum, out) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1), *B = SRC(T, 2); T r[LANES]; u32 carry = 0; \
        EACH_LANE { T a = A[l], b = B[l], c = i->aux & 1 ? w->carry >> l & 1 : 0; T s = (T)(sum); r[l] = s; carry |= (u32)(out) << l; } \
        put_##T(DST(T, 0), mask, r); if (i->aux & 2) put_mask(&w->carry, mask, carry); return NEXT; \
    }
CARRY(addc_b32, u32, a + b + c, (u64)a + b + c > UINT32_MAX)
CARRY(addc_b64, u64, a + b + c, (u128)a + b + c > UINT64_MAX)
CARRY(subc_b32, u32, a - b - c, (u64)a < (u64)b + c)
CARRY(subc_b64, u64, a - b - c, (u128)a < (u128)b + c)

/* Multiply with carry (madc, mad.cc) for 32 bits: aux 4 takes the high half of the product. */
static Outcome op_madc_u32(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    const u32 *A = SRC(u32, 1), *B = SRC(u32, 2), *C = SRC(u32, 3);
    u32 r[LANES], carry = 0;
    EACH_LANE {
        u64 p = (u64)A[l] * B[l], s = (i->aux & 4 ? p >> 32 : (u32)p) + (u64)C[l] + (i->aux & 1 ? w->carry >> l & 1 : 0);
        r[l] = (u32)s;
        carry |= (u32)(s >> 32 != 0) << l;
    }
    put_u32(DST(u32, 0), mask, r);
    if (i->aux & 2) put_mask(&w->carry, mask, carry);
    return NEXT;
}

/* 9.7.7 and, or, xor, not of predicates, one bit a lane. */
#define PREDICATE(name, value) \
    static Outcome op_##name(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); u32 a = *SRC(u32, 1), b = i->count > 2 ? *SRC(u32, 2) : 0; UNUSED(b); put_mask(DST(u32, 0), mask, value); return NEXT; \
    }
PREDICATE(and_pred, a & b)
PREDICATE(or_pred, a | b)
PREDICATE(xor_pred, a ^ b)
PREDICATE(not_pred, ~a)
PREDICATE(mov_pred, a)

/* selp 9.7.6.4; aux negates the predicate. slct 9.7.6.5 chooses by the sign of c. */
#define SELECT(T) \
    static Outcome op_selp_##T(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1), *B = SRC(T, 2); u32 p = *SRC(u32, 3) ^ (i->aux ? ~0u : 0); T r[LANES]; \
        EACH_LANE r[l] = p >> l & 1 ? A[l] : B[l]; \
        put_##T(DST(T, 0), mask, r); return NEXT; \
    } \
    static Outcome op_slct_##T(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); const T *A = SRC(T, 1), *B = SRC(T, 2); const u32 *C = SRC(u32, 3); T r[LANES]; \
        EACH_LANE r[l] = (i->aux ? as_f32(C[l]) >= 0 : (s32)C[l] >= 0) ? A[l] : B[l]; \
        put_##T(DST(T, 0), mask, r); return NEXT; \
    }
SELECT(u16)
SELECT(u32)
SELECT(u64)

/* mov.b64 {a, b}, c and its like, 9.7.9.4: the parts of a wider register. aux: bytes of a part. */
static Outcome op_unpack(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 part = i->aux & 15, width = part * (i->count - 1u), sink = i->aux >> 8;
    const u8 *from = SRC(u8, i->count - 1);
    for (u32 k = 0; k + 1 < i->count; k++) {
        if (sink >> k & 1) continue;
        u8 *to = DST(u8, k);
        u32 room = part == 1 ? 2 : part; /* an 8-bit register takes the room of 16 bits */
        EACH_LANE if (mask >> l & 1) {
            if (part == 1) to[l * 2 + 1] = 0;
            memcpy(to + (u32)l * room, from + (u32)l * width + k * part, part);
        }
    }
    return NEXT;
}
/* Both halves of a 128-bit register, which lie one after the other. */
static Outcome op_mov_two_b64(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u64 low[LANES], high[LANES];
    memcpy(low, SRC(u64, 2), sizeof low), memcpy(high, SRC(u64, 3), sizeof high);
    put_u64(DST(u64, 0), mask, low), put_u64(DST(u64, 1), mask, high);
    return NEXT;
}
/* The way back: mov.b32 d, {a, b, ...}. */
static Outcome op_pack(Machine *m, Warp *w, const Ins *i, u32 mask) {
    UNUSED(m);
    u32 part = i->aux & 15, width = part * (i->count - 1u), room = part == 1 ? 2 : part;
    u8 r[LANES * 8];
    for (u32 k = 0; k + 1 < i->count; k++) EACH_LANE memcpy(r + (u32)l * width + k * part, SRC(u8, k + 1) + (u32)l * room, part);
    u8 *to = DST(u8, 0);
    EACH_LANE if (mask >> l & 1) memcpy(to + (u32)l * width, r + (u32)l * width, width);
    return NEXT;
}

#define ENTRY(name, ...) {#name, op_##name},
const Op integer_ops[] = {
    UNARY_OPS(ENTRY) BINARY_OPS(ENTRY) TERNARY_OPS(ENTRY) MIXED2_OPS(ENTRY) MIXED3_OPS(ENTRY)
    ENTRY(bfe_u64) ENTRY(bfe_s64) ENTRY(bfi_b32) ENTRY(bfi_b64)
    ENTRY(addc_b32) ENTRY(addc_b64) ENTRY(subc_b32) ENTRY(subc_b64) ENTRY(madc_u32)
    ENTRY(and_pred) ENTRY(or_pred) ENTRY(xor_pred) ENTRY(not_pred) ENTRY(mov_pred)
    ENTRY(selp_u16) ENTRY(selp_u32) ENTRY(selp_u64) ENTRY(slct_u16) ENTRY(slct_u32) ENTRY(slct_u64)
    ENTRY(unpack) ENTRY(pack) ENTRY(mov_two_b64)
    {0, 0}};
