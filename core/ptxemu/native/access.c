/* Memory for operations that Python executes: rows of bytes at arrays of addresses in one region. */
#include "ptxemu.h"

enum { BAD = 1, OUTSIDE = 2, CONFLICT = 1 };

static int outside(u64 base, u64 size, const s64 *addresses, u64 count, u32 width) {
    if (size < width) return 1;
    u64 beyond = 0;
    for (u64 k = 0; k < count; k++) beyond |= (u64)addresses[k] - base > size - width;
    return beyond != 0;
}

/* Copies `width` bytes from each address. OUTSIDE: nothing is copied, as some lie outside. BAD: flags of some are not
   those of readable bytes. *newest: the latest proxy epoch of a write by a thread among the words touched. */
u32 emu_gather(const u8 *data, const u8 *flags, const u32 *epoch, u64 base, u64 size, const s64 *addresses, u64 count, u32 width, u8 *out, u32 *newest) {
    if (outside(base, size, addresses, count, width)) return OUTSIDE;
    u32 latest = 0;
    u64 seen = 0;
    for (u64 k = 0; k < count; k++) {
        u64 at = (u64)addresses[k] - base;
        u32 b = 0;
        memcpy(out + k * width, data + at, width);
        for (; b + 8 <= width; b += 8) {
            u64 f;
            memcpy(&f, flags + at + b, 8);
            seen |= (f ^ 0x0101010101010101ull * INIT) & ~(0x0101010101010101ull * IN_FLIGHT_READ);
        }
        for (; b < width; b++) seen |= (flags[at + b] ^ INIT) & ~IN_FLIGHT_READ & 255;
        for (u64 word = at >> 2; word <= (at + width - 1) >> 2; word++) if (epoch[word] > latest) latest = epoch[word];
    }
    *newest = latest;
    return seen ? BAD : 0;
}
/* Copies rows of `width` bytes to each address and marks them as written; *before: all flags that were there. */
u32 emu_scatter(u8 *data, u8 *flags, u32 *epoch, u32 *writer, u32 *stamp, u64 base, u64 size, const s64 *addresses, u64 count, u32 width, const u8 *rows, u32 now, u32 warp, u32 *before) {
    if (outside(base, size, addresses, count, width)) return OUTSIDE;
    u32 found = 0;
    for (u64 k = 0; k < count; k++) {
        u64 at = (u64)addresses[k] - base;
        memcpy(data + at, rows + k * width, width);
        for (u32 b = 0; b < width; b++) found |= flags[at + b], flags[at + b] |= INIT;
        for (u64 word = at >> 2; word <= (at + width - 1) >> 2; word++) epoch[word] = now, writer[word] = warp;
        if (stamp) for (u64 word = at >> 2; word <= (at + width - 1) >> 2; word++) stamp[word] = 0;
    }
    *before = found;
    return 0;
}
/* Marks bytes as in flight. readers: NULL for a write; else how many operations read each byte, counted up.
   *conflict: an address in flight against what is started, or left alone. */
u32 emu_hold(u8 *flags, u16 *readers, u64 base, u64 size, const s64 *addresses, u64 count, u32 width, s64 *conflict) {
    if (outside(base, size, addresses, count, width)) return OUTSIDE;
    u8 against = readers ? IN_FLIGHT_WRITE : IN_FLIGHT_WRITE | IN_FLIGHT_READ;
    u32 found = 0;
    for (u64 k = 0; k < count && !found; k++)
        for (u32 b = 0; b < width && !found; b++)
            if (flags[(u64)addresses[k] - base + b] & against) *conflict = addresses[k] + b, found = CONFLICT;
    for (u64 k = 0; k < count; k++) {
        u64 at = (u64)addresses[k] - base;
        for (u32 b = 0; b < width; b++) flags[at + b] |= readers ? IN_FLIGHT_READ : IN_FLIGHT_WRITE;
        if (readers) for (u32 b = 0; b < width; b++) readers[at + b]++;
    }
    return found;
}
/* Takes back what emu_hold marked. */
void emu_release(u8 *flags, u16 *readers, u64 base, const s64 *addresses, u64 count, u32 width) {
    for (u64 k = 0; k < count; k++) {
        u64 at = (u64)addresses[k] - base;
        if (readers) {
            for (u32 b = 0; b < width; b++) if (!--readers[at + b]) flags[at + b] &= (u8)~IN_FLIGHT_READ;
        } else for (u32 b = 0; b < width; b++) flags[at + b] &= (u8)~IN_FLIGHT_WRITE;
    }
}
