/* The tile layout "tiles16": the weight in the order in which a register full of sixteen outputs wants it.
 *
 * Sixteen rows make a panel, one block of each row makes a record, and a record is read front to back:
 *
 *     panel p = rows 16p .. 16p+15;  record (p, b) = elements b*blocksize .. of those rows, and their scales
 *
 *     record   | 16 absmax, fp32   | group 0          | group 1          | ...  blocksize/8 groups |
 *     bytes      64                  64                 64
 *
 *     group g  | row 0: 4 bytes | row 1: 4 bytes | ... | row 15: 4 bytes |      one zmm register
 *                  \
 *                   the canonical bytes of k = 8g .. 8g+7, untouched:   k0 k1 | k2 k3 | k4 k5 | k6 k7   (hi lo)
 *                   read as a little-endian dword, shift 4*s brings down k = 1 0 3 2 5 4 7 6  for s = 0 .. 7
 *
 *     tiles    | record (0,0) | record (0,1) | ... | record (1,0) | ...     one stream per panel, scales included
 *
 * Only whole dwords move, so the way back is exact. It needs a blocksize that is a power of two from
 * 32 on, and blocks that don't straddle rows (K % blocksize == 0);
 * rows past N are zeros. Scales are fp32 here: double quantisation is undone when the tiles are made.
 *
 * cc -O3 -fsyntax-only tiles.h
 */
#ifndef TILES_H
#define TILES_H
#include "refq4.h"

enum { PANEL = 16, SCALES_BYTES = PANEL * sizeof(float), GROUP_BYTES = PANEL * 8 / 2 };
_Static_assert(SCALES_BYTES == 64 && GROUP_BYTES == 64, "scales and groups are one zmm register each");

static inline int64_t record_bytes(int64_t blocksize) { return SCALES_BYTES + blocksize * (GROUP_BYTES / 8); }
static inline int64_t panel_bytes(int64_t K, int64_t blocksize) { return K / blocksize * record_bytes(blocksize); }

/* Rows 16*panel .. of the canonical weight -> one panel of tiles. Sixteen read streams, one write stream. */
static void tile_panel(const Weight *w, int64_t N, int64_t K, int64_t panel, uint8_t *out) {
    int64_t blocks = K / w->blocksize, groups = w->blocksize / 8, record = record_bytes(w->blocksize);
    int64_t first = panel * PANEL, rows = min64(PANEL, N - first);
    if (rows < PANEL) memset(out, 0, (size_t)panel_bytes(K, w->blocksize));
    for (int64_t b = 0; b < blocks; b++, out += record) {
        for (int64_t r = 0; r < rows; r++) ((float *)out)[r] = block_scale(w, (first + r) * blocks + b);
        const uint8_t *bytes = w->packed + (first * K + b * w->blocksize) / 2;
        uint32_t *dwords = (uint32_t *)(out + 64);
        for (int64_t g = 0; g < groups; g++, bytes += 4, dwords += PANEL) {
            if (rows == PANEL) { /* a constant count unrolls */
                for (int r = 0; r < PANEL; r++) memcpy(dwords + r, bytes + r * (K / 2), 4);
            } else {
                for (int64_t r = 0; r < rows; r++) memcpy(dwords + r, bytes + r * (K / 2), 4);
            }
        }
    }
}

/* One panel of tiles -> its rows of packed bytes and (if absmax is not NULL) scales. */
static void untile_panel(const uint8_t *tiles, int64_t N, int64_t K, int64_t blocksize, int64_t panel, uint8_t *packed,
                         float *absmax) {
    int64_t blocks = K / blocksize, groups = blocksize / 8, record = record_bytes(blocksize);
    int64_t first = panel * PANEL, rows = min64(PANEL, N - first);
    const uint8_t *in = tiles + panel * panel_bytes(K, blocksize);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t b = 0; b < blocks; b++) {
            int64_t block = (first + r) * blocks + b;
            const uint32_t *dwords = (const uint32_t *)(in + b * record + 64);
            if (absmax) memcpy(absmax + block, in + b * record + 4 * r, 4);
            for (int64_t g = 0; g < groups; g++) memcpy(packed + block * (blocksize / 2) + 4 * g, dwords + g * PANEL + r, 4);
        }
    }
}
#endif
