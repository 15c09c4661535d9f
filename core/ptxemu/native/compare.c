/* setp and set, PTX ISA 9.7.6.1 to 9.7.6.3, of integers and of f32 and f64; those of f16 and bf16 are in half.c. */
#include "compare.h"

#define INTEGER(T) \
    static inline u32 compare_##T(const T *A, const T *B, u32 how) { \
        u32 r = 0; \
        switch (how) { \
        case EQ: EACH_LANE r |= (u32)(A[l] == B[l]) << l; break; \
        case NE: EACH_LANE r |= (u32)(A[l] != B[l]) << l; break; \
        case LT: EACH_LANE r |= (u32)(A[l] < B[l]) << l; break; \
        case LE: EACH_LANE r |= (u32)(A[l] <= B[l]) << l; break; \
        case GT: EACH_LANE r |= (u32)(A[l] > B[l]) << l; break; \
        default: EACH_LANE r |= (u32)(A[l] >= B[l]) << l; break; \
        } \
        return r; \
    } \
    static Outcome op_setp_##T(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); return set_predicates(w, i, mask, compare_##T(SRC(T, 2), SRC(T, 3), i->aux & COMPARISON)); \
    } \
    static Outcome op_set_##T(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); return set_words(w, i, mask, compare_##T(SRC(T, 1), SRC(T, 2), i->aux & COMPARISON)); \
    }
INTEGER(u16)
INTEGER(s16)
INTEGER(u32)
INTEGER(s32)
INTEGER(u64)
INTEGER(s64)

#define REAL(T, read) \
    static inline u32 compare_##T(const T *A, const T *B, u32 aux) { \
        u32 r = 0; int ftz = !!(aux & COMPARE_FTZ); \
        EACH_LANE { f64 a = read(A[l], ftz), b = read(B[l], ftz); r |= (u32)compare_reals(a, b, aux & COMPARISON) << l; } \
        return r; \
    } \
    static Outcome op_setp_##T(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); return set_predicates(w, i, mask, compare_##T(SRC(T, 2), SRC(T, 3), i->aux)); \
    } \
    static Outcome op_set_##T(Machine *m, Warp *w, const Ins *i, u32 mask) { \
        UNUSED(m); return set_words(w, i, mask, compare_##T(SRC(T, 1), SRC(T, 2), i->aux)); \
    }
static inline f64 read_f32(f32 x, int ftz) { return ftz ? flush(x) : x; }
static inline f64 read_f64(f64 x, int ftz) { UNUSED(ftz); return x; }
REAL(f32, read_f32)
REAL(f64, read_f64)

#define ENTRY(T) {"setp_" #T, op_setp_##T}, {"set_" #T, op_set_##T},
const Op compare_ops[] = {ENTRY(u16) ENTRY(s16) ENTRY(u32) ENTRY(s32) ENTRY(u64) ENTRY(s64) ENTRY(f32) ENTRY(f64) {0, 0}};
