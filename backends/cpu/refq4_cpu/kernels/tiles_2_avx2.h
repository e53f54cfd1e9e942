/* Making tiles with AVX2: transposing 8 x 8 dwords in registers, for eight of a panel's sixteen rows at a time.
 *
 *     8 rows, 32 bytes each               step 1, 2: within 128-bit lanes         step 3: lanes between registers
 *     row 0   | g0 g1 g2 ... g7 |         column j of four rows side by side      group 0   | row 0 ... row 7 |
 *     ...                            ->                                      ->   ...
 *     row 7   | g0 g1 g2 ... g7 |                                                 group 7   | row 0 ... row 7 |
 *
 * cc -O3 -mavx2 -mfma -mf16c -DREFQ4_AVX2 -fsyntax-only tiles_2_avx2.h
 */
#ifndef TILES_2_AVX2_H
#define TILES_2_AVX2_H
#include "simd.h"
#include "tiles.h"

_Static_assert(8 * sizeof(uint32_t) == sizeof(__m256i) && 2 * sizeof(__m256i) == GROUP_BYTES, "half a group");

static inline __attribute__((always_inline)) void transpose8(__m256i r[8]) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) { /* pairs of rows */
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) { /* fours: r[i + j] lane L holds column 4L + j of rows i .. i+3 */
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x20);
        t[4 + j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x31);
    }
    for (int i = 0; i < 8; i++) r[i] = t[i];
}

/* tile_panel of tiles.h, for whole panels of rows that are multiples of 64 elements. */
static void tile_panel_avx2(const Weight *w, int64_t N, int64_t K, int64_t panel, uint8_t *out) {
    if (K % 64 || (panel + 1) * PANEL > N) {
        tile_panel(w, N, K, panel, out);
        return;
    }
    int64_t blocks = K / w->blocksize, groups = w->blocksize / 8, record = record_bytes(w->blocksize);
    int shift = __builtin_ctzll((unsigned long long)groups); /* groups is a power of two, and division is slow */
    const uint8_t *bytes = w->packed + panel * PANEL * (K / 2);
    for (int64_t b = 0; b < blocks; b++)
        for (int r = 0; r < PANEL; r++)
            ((float *)(out + b * record))[r] = block_scale(w, (panel * PANEL + r) * blocks + b);
    for (int64_t g = 0; g < K / 8; g += 8)
        for (int half = 0; half < 2; half++) {
            __m256i rows[8];
            UNROLL for (int r = 0; r < 8; r++)
                rows[r] = _mm256_loadu_si256((const __m256i *)(bytes + (8 * half + r) * (K / 2) + 4 * g));
            transpose8(rows);
            UNROLL for (int i = 0; i < 8; i++) {
                uint8_t *at = out + ((g + i) >> shift) * record + 64 + ((g + i) & (groups - 1)) * 64 + 32 * half;
                _mm256_storeu_si256((__m256i *)at, rows[i]);
            }
        }
}
#endif
