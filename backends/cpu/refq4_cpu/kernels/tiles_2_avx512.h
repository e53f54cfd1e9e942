/* Making tiles, the fast way: transposing 16 x 16 dwords in registers. Without it, multiplying a canonical weight by a
 * few tokens spends as long on the rearranging as on the product.
 *
 *     16 rows, 64 bytes each            step 1, 2: within 128-bit lanes        step 3: lanes between registers
 *     row 0   | g0 g1 g2 ... g15 |      column j of four rows side by side     group 0   | row 0 ... row 15 |
 *     ...                          ->                                     ->   ...
 *     row 15  | g0 g1 g2 ... g15 |                                             group 15  | row 0 ... row 15 |
 *
 * cc -O3 -mfma -mf16c -mavx512bw -mavx512dq -mavx512vl -DREFQ4_AVX512 -fsyntax-only tiles_2_avx512.h
 */
#ifndef TILES_2_AVX512_H
#define TILES_2_AVX512_H
#include "simd.h"
#include "tiles.h"

_Static_assert(sizeof(__m512i) == GROUP_BYTES, "sixteen rows, a whole group");

static inline __attribute__((always_inline)) void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) { /* pairs of rows */
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* fours: r[i + j] lane L holds column 4L + j of rows i .. i+3 */
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) { /* a 4 x 4 transposition of lanes for each j: 0x88 takes even lanes, 0xDD odd ones */
        __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
        __m512i even2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
        t[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xDD);
        t[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xDD);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

/* tile_panel of tiles.h, for whole panels of rows that are multiples of 128 elements. */
static void tile_panel_avx512(const Weight *w, int64_t N, int64_t K, int64_t panel, uint8_t *out) {
    if (K % 128 || (panel + 1) * PANEL > N) {
        tile_panel(w, N, K, panel, out);
        return;
    }
    int64_t blocks = K / w->blocksize, groups = w->blocksize / 8, record = record_bytes(w->blocksize);
    int shift = __builtin_ctzll((unsigned long long)groups); /* groups is a power of two, and division is slow */
    const uint8_t *bytes = w->packed + panel * PANEL * (K / 2);
    for (int64_t b = 0; b < blocks; b++)
        for (int r = 0; r < PANEL; r++)
            ((float *)(out + b * record))[r] = block_scale(w, (panel * PANEL + r) * blocks + b);
    for (int64_t g = 0; g < K / 8; g += 16) {
        __m512i rows[PANEL];
        UNROLL for (int r = 0; r < PANEL; r++)
            rows[r] = _mm512_loadu_si512(bytes + r * (K / 2) + 4 * g);
        transpose16(rows);
        UNROLL for (int i = 0; i < 16; i++)
            _mm512_storeu_si512(out + ((g + i) >> shift) * record + 64 + ((g + i) & (groups - 1)) * 64, rows[i]);
    }
}
#endif
