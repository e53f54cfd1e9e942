/* Dequantising 4 bits, rung 2 for NEON: a block can hold sixteen different numbers only, so multiply and round those
 * sixteen once and look the finished results up, byte by byte.
 *
 *     16 bytes   -> codes of the high nibbles, of the low nibbles -> vzip: 32 codes in memory order
 *     16-bit     the sixteen results as two planes of bytes (vld2q takes them apart); two look-ups, and vst2q weaves
 *                the sixteen lower and sixteen upper bytes into sixteen results
 *     fp32       the same with four planes: vld4q, vst4q
 *
 * cc -O3 -DREFQ4_NEON -fsyntax-only dequantize_2_neon.c
 */
#include "simd.h"
#include "dequantize_1_scalar.c"

/* Sixteen bytes -> 32 codes in order, as two registers. */
static inline __attribute__((always_inline)) void codes_in_order(const uint8_t *in, uint8x16_t codes[2]) {
    uint8x16_t bytes = vld1q_u8(in), high = vshrq_n_u8(bytes, 4), low = vandq_u8(bytes, vdupq_n_u8(15));
    codes[0] = vzip1q_u8(high, low);
    codes[1] = vzip2q_u8(high, low);
}

static void neon_block_fp32(const Dequantize *d, int64_t block, int stream) {
    (void)stream;
    int64_t bs = d->weight.blocksize;
    const uint8_t *in = d->weight.packed + block * (bs / 2);
    uint8_t *out = (uint8_t *)((float *)d->out + block * bs);
    float values[16], scale = block_scale(&d->weight, block);
    for (int i = 0; i < 16; i++) values[i] = d->weight.code[i] * scale;
    const uint8x16x4_t t = vld4q_u8((const uint8_t *)values);
    for (int64_t i = 0; i < bs / 2; i += 16, out += 128) {
        uint8x16_t codes[2];
        codes_in_order(in + i, codes);
        UNROLL for (int half = 0; half < 2; half++) {
            uint8x16x4_t planes;
            UNROLL for (int j = 0; j < 4; j++) planes.val[j] = vqtbl1q_u8(t.val[j], codes[half]);
            vst4q_u8(out + 64 * half, planes);
        }
    }
}

static void neon_block_16_bits(const Dequantize *d, int64_t block, int stream) {
    (void)stream;
    int64_t bs = d->weight.blocksize;
    const uint8_t *in = d->weight.packed + block * (bs / 2);
    uint8_t *out = (uint8_t *)((uint16_t *)d->out + block * bs);
    uint16_t values[16];
    float scale = block_scale(&d->weight, block);
    for (int i = 0; i < 16; i++) store_from_fp32(values, d->dtype, i, d->weight.code[i] * scale);
    const uint8x16x2_t t = vld2q_u8((const uint8_t *)values);
    for (int64_t i = 0; i < bs / 2; i += 16, out += 64) {
        uint8x16_t codes[2];
        codes_in_order(in + i, codes);
        UNROLL for (int half = 0; half < 2; half++) {
            uint8x16x2_t planes;
            UNROLL for (int j = 0; j < 2; j++) planes.val[j] = vqtbl1q_u8(t.val[j], codes[half]);
            vst2q_u8(out + 32 * half, planes);
        }
    }
}

static DequantizeBlock neon_whole_block(const Dequantize *d) {
    if (d->bits != 4 || d->weight.blocksize % 32) return scalar_whole_block;
    return d->dtype == FP32 ? neon_block_fp32 : neon_block_16_bits;
}

static void neon_dequantize_item(void *context, int64_t item, int thread) {
    (void)thread;
    dequantize_item(context, item, neon_whole_block(context), 0);
}

static void dequantize_2_neon(const Dequantize *d) { dequantize_in_items(d, neon_dequantize_item); }
