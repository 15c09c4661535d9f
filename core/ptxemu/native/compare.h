/* Comparison codes and what is done with their results; aux of setp and set, the same numbers as in isa.py. */
#ifndef PTXEMU_COMPARE_H
#define PTXEMU_COMPARE_H

#include "real.h"

enum { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_, COMPARISON = 15 };
enum { COMPARE_FTZ = 16, COMBINE_AND = 32, COMBINE_OR = 64, COMBINE_XOR = 96, COMBINE = 96, COMBINE_NEGATED = 128, SET_FLOAT = 256 };

static inline int compare_reals(f64 a, f64 b, u32 how) {
    switch (how) {
    case EQ: return a == b;
    case NE: return a < b || a > b;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case EQU: return !(a < b || a > b);
    case NEU: return a != b;
    case LTU: return !(a >= b);
    case LEU: return !(a > b);
    case GTU: return !(a <= b);
    case GEU: return !(a < b);
    case NUM: return a == a && b == b;
    default: return a != a || b != b;
    }
}

static inline u32 combine(const Warp *w, const Ins *i, u32 bits, int k) {
    if (!(i->aux & COMBINE)) return bits;
    u32 c = *SRC(u32, k) ^ (i->aux & COMBINE_NEGATED ? ~0u : 0);
    return (i->aux & COMBINE) == COMBINE_AND ? bits & c : (i->aux & COMBINE) == COMBINE_OR ? bits | c : bits ^ c;
}
/* Operands: p, q (often a sink), a, b, c. q gets the negated comparison, combined with c too. */
static inline Outcome set_predicates(Warp *w, const Ins *i, u32 mask, u32 bits) {
    u32 p = combine(w, i, bits, 4), q = combine(w, i, ~bits, 4);
    put_mask(DST(u32, 0), mask, p);
    put_mask(DST(u32, 1), mask, q);
    return NEXT;
}
/* Operands: d, a, b, c. */
static inline Outcome set_words(Warp *w, const Ins *i, u32 mask, u32 bits) {
    bits = combine(w, i, bits, 3);
    u32 *d = DST(u32, 0), one = i->aux & SET_FLOAT ? 0x3f800000 : ~0u;
    EACH_LANE if (mask >> l & 1) d[l] = bits >> l & 1 ? one : 0;
    return NEXT;
}

#endif
