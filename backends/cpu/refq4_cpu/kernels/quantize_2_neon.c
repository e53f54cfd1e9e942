/* Quantising to 4 bits, rung 2 for NEON: sixteen elements at a time.
 *
 * The rank is how many of the fifteen thresholds lie below: a comparison gives 0 or -1, which is subtracted. A search
 * would need a table of floats indexed by lanes, which NEON has for bytes only; fifteen thresholds just fit registers.
 *
 *     4 x 4 ranks in dwords -> 16 in bytes (vmovn) -> 16 codes by `order` (vqtbl1q)
 *
 *     word       [ second code (high byte) | first code (low byte) ]    byte = first << 4 | second, 8 of them (vmovn)
 *
 * cc -O3 -DREFQ4_NEON -fsyntax-only quantize_2_neon.c
 */
#include "simd.h"
#include "quantize_1_scalar.c"

static inline __attribute__((always_inline)) float32x4_t load4(const void *p, const enum dtype dtype, int64_t i) {
    if (dtype == FP32) return vld1q_f32((const float *)p + i);
    uint16x4_t half = vld1_u16((const uint16_t *)p + i);
    if (dtype == FP16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

/* Four ranks. vmaxq and vminq keep a NaN, and no comparison with one is true: its rank is 0. */
static inline __attribute__((always_inline)) uint32x4_t ranks4(const float32x4_t *threshold, float32x4_t x, float32x4_t inverse) {
    float32x4_t scaled = vminq_f32(vdupq_n_f32(1), vmaxq_f32(vdupq_n_f32(-1), vmulq_f32(x, inverse)));
    uint32x4_t rank = vdupq_n_u32(0);
    UNROLL for (int i = 0; i < 15; i++) rank = vsubq_u32(rank, vcgtq_f32(scaled, threshold[i]));
    return rank;
}

static inline __attribute__((always_inline)) void neon_quantize_block(const Quantize *q, int64_t block,
                                                                      const enum dtype dtype) {
    int64_t first = block * q->blocksize, measured = q->given ? 0 : q->blocksize;
    uint32x4_t most = vdupq_n_u32(0);
    for (int64_t i = 0; i < measured; i += 4) /* as integers, so that a NaN is the largest */
        most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(load4(q->x, dtype, first + i)), vdupq_n_u32(0x7FFFFFFF)));
    float absmax = q->given ? q->given[block] : float_of(vmaxvq_u32(most));
    q->absmax[block] = absmax;
    float32x4_t inverse = vdupq_n_f32(finite_inverse(absmax)), threshold[15];
    UNROLL for (int i = 0; i < 15; i++) threshold[i] = vdupq_n_f32(q->thresholds[i]);
    uint8x16_t order = vld1q_u8(q->order);
    for (int64_t i = first; i < first + q->blocksize; i += 16) {
        uint16x4_t ranks[4];
        UNROLL for (int j = 0; j < 4; j++) ranks[j] = vmovn_u32(ranks4(threshold, load4(q->x, dtype, i + 4 * j), inverse));
        uint8x8_t low = vmovn_u16(vcombine_u16(ranks[0], ranks[1])), high = vmovn_u16(vcombine_u16(ranks[2], ranks[3]));
        uint16x8_t pairs = vreinterpretq_u16_u8(vqtbl1q_u8(order, vcombine_u8(low, high)));
        vst1_u8(q->out + i / 2, vmovn_u16(vorrq_u16(vshlq_n_u16(pairs, 4), vshrq_n_u16(pairs, 8))));
    }
}

static void neon_quantize_item(void *context, int64_t item, int thread) {
    (void)thread;
    const Quantize *q = context;
    int64_t per = ceil_div(ITEM_ELEMENTS, q->blocksize), whole = q->numel / q->blocksize;
    for (int64_t b = item * per; b < min64((item + 1) * per, ceil_div(q->numel, q->blocksize)); b++) {
        if (b >= whole) scalar_quantize_block(q, b); /* the short last block */
        else if (q->dtype == FP32) neon_quantize_block(q, b, FP32);
        else if (q->dtype == BF16) neon_quantize_block(q, b, BF16);
        else neon_quantize_block(q, b, FP16);
    }
}

static void quantize_2_neon(const Quantize *q) {
    if (!q->pack || q->code_length != 16 || q->blocksize % 16) {
        quantize_1_scalar(q);
        return;
    }
    int64_t per = ceil_div(ITEM_ELEMENTS, q->blocksize) * q->blocksize;
    run_parallel(neon_quantize_item, (void *)q, ceil_div(q->numel, per), q->threads);
}
