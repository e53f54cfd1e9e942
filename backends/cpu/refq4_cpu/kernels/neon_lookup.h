/* The look-up that all NEON kernels share: sixteen codes to sixteen weights.
 *
 * vqtbl1q_u8 looks up sixteen bytes in a table of sixteen, with one instruction. An fp32 value is four bytes, so the code
 * table is four tables, one for each byte of the values (planes), and weights are put together from what they give:
 *
 *     planes                  3       2       1       0       of sixteen fp32 values; the upper two are those of bf16
 *     codes       i0 .. i15
 *     vqtbl1q    ->          u0..    v0..    w0..    x0..     sixteen bytes each
 *     vzip1q_u8 (2, 3)       | v0 u0 | v1 u1 | ... | v7 u7 |  upper halves of weights 0 .. 7: words, bf16
 *     vzip1q_u16 (low, high) | x0 w0 v0 u0 | ... | x3 .. u3 | weights 0 .. 3: fp32
 *
 * A table that was rounded to bf16 has zeros in planes 0 and 1. Then two look-ups do, and the lower halves are zero.
 *
 * cc -O3 -DREFQ4_NEON -fsyntax-only neon_lookup.h
 */
#ifndef NEON_LOOKUP_H
#define NEON_LOOKUP_H
#include "bf16_table.h"
#include "simd.h"

/* Sixteen fp32 values, a plane for each byte, the lowest first. */
static inline uint8x16x4_t table_planes(const void *table) { return vld4q_u8(table); }

/* Eight codes of each of two rows, or sixteen of one: those in the high nibbles of sixteen bytes, or in the low ones. */
static inline __attribute__((always_inline)) uint8x16_t nibbles(uint8x16_t bytes, const int low) {
    return low ? vandq_u8(bytes, vdupq_n_u8(15)) : vshrq_n_u8(bytes, 4);
}

/* Sixteen codes -> the bytes of planes `first` and `first + 1`, as words: w[0] of codes 0 .. 7, w[1] of 8 .. 15. */
static inline __attribute__((always_inline)) void lookup_words(uint8x16_t index, const uint8x16x4_t *t, const int first,
                                                               uint16x8_t w[2]) {
    uint8x16_t lower = vqtbl1q_u8(t->val[first], index), upper = vqtbl1q_u8(t->val[first + 1], index);
    w[0] = vreinterpretq_u16_u8(vzip1q_u8(lower, upper));
    w[1] = vreinterpretq_u16_u8(vzip2q_u8(lower, upper));
}

/* Sixteen codes -> sixteen fp32 weights, in order; `planes`: 4, or 2 for a table of bf16. */
static inline __attribute__((always_inline)) void lookup_fp32(uint8x16_t index, const uint8x16x4_t *t, const int planes,
                                                              float32x4_t w[4]) {
    uint16x8_t high[2], low[2] = {vdupq_n_u16(0), vdupq_n_u16(0)};
    lookup_words(index, t, 2, high);
    if (planes == 4) lookup_words(index, t, 0, low);
    UNROLL for (int i = 0; i < 2; i++) {
        w[2 * i] = vreinterpretq_f32_u16(vzip1q_u16(low[i], high[i]));
        w[2 * i + 1] = vreinterpretq_f32_u16(vzip2q_u16(low[i], high[i]));
    }
}

/* The four sums of four registers, in their order. */
static inline float32x4_t sums_of_lanes(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}

/* The table as it is, and rounded to bf16 under the factor that bf16_table.h chooses: sixteen fp32 values each. Both
 * return what sums are to be multiplied by. */
static float exact_table(const float *code, void *table) {
    memcpy(table, code, 64);
    return 1;
}

static float rounded_table(const float *code, void *table) {
    float c = table_factor(code), *t = table;
    for (int i = 0; i < 16; i++) t[i] = bf16_to_fp32(fp32_to_bf16(code[i] * c));
    return 1 / c;
}

/* Rounded to fp16, in planes 2 and 3, where lookup_words finds it: times a power of two that brings the largest value
 * to 1 .. 2, for a code may hold what fp16 can't. */
static inline float half_table(const float *code, void *table) {
    uint32_t *t = table;
    uint32_t most = 0;
    for (int i = 0; i < 16; i++) most = (bits_of(code[i]) & 0x7FFFFFFF) > most ? bits_of(code[i]) & 0x7FFFFFFF : most;
    int64_t exponent = 254 - (most >> 23);
    float c = float_of((uint32_t)(exponent > 253 ? 253 : exponent < 1 ? 1 : exponent) << 23); /* so 1 / c is normal */
    for (int i = 0; i < 16; i++) t[i] = (uint32_t)fp32_to_fp16(code[i] * c) << 16;
    return 1 / c;
}
#endif
