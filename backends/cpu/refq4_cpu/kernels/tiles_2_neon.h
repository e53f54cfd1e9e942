/* Making tiles with NEON: transposing 4 x 4 dwords in registers, for four of a panel's sixteen rows at a time.
 *
 *     4 rows, 16 bytes each          trn1, trn2 of dwords, then of pairs of them
 *     row 0   | g0 g1 g2 g3 |        group 0   | row 0 1 2 3 |
 *     ...                       ->   ...
 *     row 3   | g0 g1 g2 g3 |        group 3   | row 0 1 2 3 |
 *
 * cc -O3 -DREFQ4_NEON -fsyntax-only tiles_2_neon.h
 */
#ifndef TILES_2_NEON_H
#define TILES_2_NEON_H
#include "simd.h"
#include "tiles.h"

_Static_assert(4 * sizeof(uint32_t) == sizeof(uint32x4_t) && 4 * sizeof(uint32x4_t) == GROUP_BYTES, "a quarter of a group");

static inline uint64x2_t as_pairs(uint32x4_t dwords) { return vreinterpretq_u64_u32(dwords); }

static inline __attribute__((always_inline)) void transpose4(const uint32x4_t r[4], uint32x4_t t[4]) {
    uint64x2_t even01 = as_pairs(vtrn1q_u32(r[0], r[1])), odd01 = as_pairs(vtrn2q_u32(r[0], r[1]));
    uint64x2_t even23 = as_pairs(vtrn1q_u32(r[2], r[3])), odd23 = as_pairs(vtrn2q_u32(r[2], r[3]));
    t[0] = vreinterpretq_u32_u64(vtrn1q_u64(even01, even23));
    t[1] = vreinterpretq_u32_u64(vtrn1q_u64(odd01, odd23));
    t[2] = vreinterpretq_u32_u64(vtrn2q_u64(even01, even23));
    t[3] = vreinterpretq_u32_u64(vtrn2q_u64(odd01, odd23));
}

/* tile_panel of tiles.h, for whole panels: rows are multiples of 32 elements, four groups. */
static void tile_panel_neon(const Weight *w, int64_t N, int64_t K, int64_t panel, uint8_t *out) {
    if ((panel + 1) * PANEL > N) {
        tile_panel(w, N, K, panel, out);
        return;
    }
    int64_t blocks = K / w->blocksize, groups = w->blocksize / 8;
    const uint8_t *bytes = w->packed + panel * PANEL * (K / 2);
    for (int64_t b = 0; b < blocks; b++) {
        for (int r = 0; r < PANEL; r++) ((float *)out)[r] = block_scale(w, (panel * PANEL + r) * blocks + b);
        out += SCALES_BYTES;
        for (int64_t g = 0; g < groups; g += 4, bytes += 16, out += 4 * GROUP_BYTES)
            for (int quad = 0; quad < PANEL; quad += 4) {
                uint32x4_t rows[4], columns[4];
                UNROLL for (int r = 0; r < 4; r++) rows[r] = vreinterpretq_u32_u8(vld1q_u8(bytes + (quad + r) * (K / 2)));
                transpose4(rows, columns);
                UNROLL for (int i = 0; i < 4; i++)
                    vst1q_u8(out + i * GROUP_BYTES + 4 * quad, vreinterpretq_u8_u32(columns[i]));
            }
    }
}
#endif
