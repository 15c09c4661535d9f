/* atom and red, PTX ISA 9.7.13.5 and 9.7.13.7: lane after lane. */
#include "real.h"

/* aux; the same numbers as in isa_memory.py. */
enum { A_AND, A_OR, A_XOR, A_ADD, A_INC, A_DEC, A_MIN, A_MAX, A_EXCH, A_CAS };
enum { T_B16, T_B32, T_S32, T_B64, T_S64, T_F32, T_F64, T_F16, T_BF16, T_F16X2, T_BF16X2 };
enum { TYPE_SHIFT = 4, SPACE_SHIFT = 8, NARROW = 1 << 10, RETURNS = 1 << 11, SINK_SHIFT = 16 };
static const u8 sizes[] = {2, 4, 4, 8, 8, 4, 8, 2, 2, 4, 4};

static u64 integer(u32 op, u64 old, u64 b, u64 c, u32 bits, int is_signed) {
    u64 keep = bits == 64 ? ~0ull : (1ull << bits) - 1;
    s64 x = is_signed ? (s64)(old << (64 - bits)) : 0, y = is_signed ? (s64)(b << (64 - bits)) : 0;
    old &= keep, b &= keep, c &= keep;
    switch (op) {
    case A_AND: return old & b;
    case A_OR: return old | b;
    case A_XOR: return old ^ b;
    case A_ADD: return (old + b) & keep;
    case A_INC: return old >= b ? 0 : old + 1;
    case A_DEC: return !old || old > b ? b : old - 1;
    case A_MIN: return is_signed ? (x < y ? old : b) : old < b ? old : b;
    case A_MAX: return is_signed ? (x > y ? old : b) : old > b ? old : b;
    case A_EXCH: return b;
    default: return old == b ? c : old;
    }
}
static u16 half(u32 op, u16 old, u16 b, const Format *format) {
    f64 x = decode(format, old), y = decode(format, b);
    if (op == A_ADD) return (u16)encode(format, add_to_odd(x, y), RN);
    if (x != x || y != y) return x == x ? old : y == y ? b : 0x7fff;
    int first = op == A_MIN ? x < y || (x == y && signbit(x)) : x > y || (x == y && !signbit(x));
    return first ? old : b;
}
static int is_nan(u64 x) { return (x & ~(1ull << 63)) > 0x7ffull << 52; }
/* Of NaNs, global memory takes what is added first, as it is; shared memory keeps its own first, made quiet. */
static u64 add_f64(u64 old, u64 b, int global) {
    if (is_nan(old) || is_nan(b)) return global ? (is_nan(b) ? b : old) : (is_nan(old) ? old : b) | 1ull << 51;
    f64 sum = as_f64(old) + as_f64(b);
    return sum == sum ? bits_f64(sum) : 0xfff8000000000000ull;
}
/* Only additions to global memory flush f32. */
static u64 combine(u32 op, u32 type, u64 old, u64 b, u64 c, int global) {
    const Format *format = type == T_F16 || type == T_F16X2 ? &F16 : &BF16;
    if (op == A_EXCH) return b;
    switch (type) {
    case T_F32: {
        f32 x = as_f32((u32)old), y = as_f32((u32)b);
        return bits_f32(global ? flush(canonical(flush(x) + flush(y))) : canonical(x + y));
    }
    case T_F64: return add_f64(old, b, global);
    case T_F16: case T_BF16: return half(op, (u16)old, (u16)b, format);
    case T_F16X2: case T_BF16X2:
        return (u64)half(op, (u16)(old >> 16), (u16)(b >> 16), format) << 16 | half(op, (u16)old, (u16)b, format);
    default: return integer(op, old, b, c, 8u * sizes[type], type == T_S32 || type == T_S64);
    }
}

/* Operands: the destinations (for atom), the address, the values, and for cas the new value. */
static Outcome op_atom(Machine *m, Warp *w, const Ins *i, u32 mask) {
    u32 op = i->aux & 15, type = i->aux >> TYPE_SHIFT & 15, size = sizes[type];
    u32 returns = i->aux & RETURNS ? 1 : 0, sources = op == A_CAS ? 2 : 1;
    u32 n = (i->count - 1u) / (returns + sources), at = returns * n;
    u64 address[LANES];
    u8 *place[LANES];
    addresses(w, i, (int)at, !!(i->aux & NARROW), address);
    int space = (int)(i->aux >> SPACE_SHIFT & 3), shared = space == SPACE_SHARED;
    Outcome r = reach(m, w, i, mask, space, address, size * n, ACCESS_UPDATE, STRONG, place);
    if (r != NEXT) return r;
    order_read(m, w, mask, space, address, size * n, i->aux);
    order_write(m, w, i, mask, space, address, size * n, i->aux);
    EACH_LANE if (mask >> l & 1) for (u32 k = 0; k < n; k++) {
        u64 old = 0, b = 0, c = 0;
        memcpy(&old, place[l] + size * k, size);
        memcpy(&b, SRC(u8, at + 1 + k) + (u32)l * size, size);
        if (op == A_CAS) memcpy(&c, SRC(u8, at + 2) + (u32)l * size, size);
        u64 new = combine(op, type, old, b, c, !shared && (address[l] & WINDOW_MASK) != SHARED_WINDOW);
        memcpy(place[l] + size * k, &new, size);
        if (returns && !(i->aux >> SINK_SHIFT >> k & 1)) memcpy(DST(u8, k) + (u32)l * size, &old, size);
    }
    return NEXT;
}

const Op atomic_ops[] = {{"atom", op_atom}, {0, 0}};
