/* A tile of x in the order of the micro-kernels, the fast way: sixteen dwords of each token, transposed in registers.
 *
 *     token 0   | d0 d1 d2 ... d15 |            d0    | token 0 ... token MT-1 |
 *     ...                               ->      ...                                 each store of MT dwords
 *     token 7   | d0 d1 d2 ... d15 |            d15   | token 0 ... token MT-1 |
 *
 * What the dwords are, and why in this order: pack_tile in driver.h. One thread packs while the others have nothing to do:
 * dword by dword it took 8 us for eight tokens of 4096, and reading the whole weight takes 150.
 *
 * cc -O3 -mfma -mf16c -mavx512bw -mavx512dq -mavx512vl -DREFQ4_AVX512 -fsyntax-only pack_2_avx512.h
 */
#ifndef PACK_2_AVX512_H
#define PACK_2_AVX512_H
#include "simd.h"
#include "tiles_2_avx512.h" /* transpose16 */

/* 32 elements from k = 8g on as the pairs (k + {1 0 3 2}[s], that + 4). */
static inline __m512i bf16_pairs(const uint16_t *x) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13));
    return _mm512_shuffle_epi8(_mm512_loadu_si512(x), order);
}

/* Sixteen elements from `at` on as fp32, neighbours exchanged: k = 1 0 3 2 ... */
static inline __m512i fp32_exchanged(const void *x, enum dtype dtype, int64_t at) {
    __m512i v;
    if (dtype == FP32) {
        v = _mm512_loadu_si512((const float *)x + at);
    } else {
        __m256i halves = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + at));
        v = dtype == FP16 ? _mm512_castps_si512(_mm512_cvtph_ps(halves))
                          : _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
    }
    return _mm512_rol_epi64(v, 32);
}

/* mt <= 8 tokens from `first` on. K is a multiple of 32, so no row has an end of part of a register. */
static void pack_tokens(const Product *p, int64_t first, int64_t mt, int pairs, uint32_t *out) {
    __mmask16 tokens = (__mmask16)((1 << mt) - 1);
    for (int64_t k = 0; k < p->K; k += pairs ? 32 : 16) {
        __m512i row[16];
        UNROLL for (int m = 0; m < 16; m++) row[m] = _mm512_setzero_si512();
        UNROLL for (int m = 0; m < 8; m++) {
            int64_t at = (first + m) * p->K + k;
            if (m < mt) row[m] = pairs ? bf16_pairs((const uint16_t *)p->x + at) : fp32_exchanged(p->x, p->dtype, at);
        }
        transpose16(row);
        UNROLL for (int i = 0; i < 16; i++, out += mt) _mm512_mask_storeu_epi32(out, tokens, row[i]);
    }
}
#endif
