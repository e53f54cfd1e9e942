/* NEON on any processor: SIMDe's portable versions, and those of the kernels' instructions that SIMDe lacks or rounds
 * otherwise. emulated_simd.h is the same for AVX2 and AVX-512; REFQ4_CPU_EMULATE in backends/cpu/README.md says what for.
 *
 * Results have the bits that the processor would give. bfdot and bfmmla are those of a processor without "extended BF16"
 * (FPCR.EBF = 0): subnormals are read and written as zero, and every addition rounds to odd.
 *
 *     round to odd     towards zero, and the last bit is set if anything was cut off
 *
 * cc -DREFQ4_EMULATED -DREFQ4_NEON -fsyntax-only emulated_neon.h
 */
#ifndef EMULATED_NEON_H
#define EMULATED_NEON_H
#define SIMDE_NO_NATIVE             /* its plain C, also where the processor has the instruction */
#define SIMDE_ENABLE_NATIVE_ALIASES /* under the names of <arm_neon.h> */
#include <simde/arm/neon.h>
#include "refq4.h"

/* SIMDe rounds the product before it adds; a fused multiply-add rounds once. */
#undef vfmaq_f32
#define vfmaq_f32(a, b, c) emulated_fmaq(a, b, c)
static inline float32x4_t emulated_fmaq(float32x4_t a, float32x4_t b, float32x4_t c) {
    float lanes[3][4];
    memcpy(lanes[0], &a, sizeof a), memcpy(lanes[1], &b, sizeof b), memcpy(lanes[2], &c, sizeof c);
    for (int i = 0; i < 4; i++) lanes[0][i] = fmaf(lanes[1][i], lanes[2][i], lanes[0][i]);
    memcpy(&a, lanes[0], sizeof a);
    return a;
}

/* SIMDe 0.7.4 has no bf16. */
#ifndef vbfdotq_f32
typedef uint16x8_t bfloat16x8_t;
#define vreinterpretq_bf16_u16(a) (a)

static inline float emulated_flush(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0, value) : value; }

/* a + b in fp32, rounded to odd; a and b are products of bf16 or sums of such, exact in double. */
static inline float emulated_add_to_odd(double a, double b) {
    double sum = a + b, larger = fabs(a) > fabs(b) ? a : b, lost = (larger == a ? b : a) - (sum - larger);
    float near = (float)sum;
    if (!isfinite(sum) || fabs(sum) >= 0x1p128) return near;
    double above = (double)near - sum - lost; /* how far the nearest number is above the exact one */
    if (above != 0) near = float_of((bits_of(near) - (signbit(near) ? above < 0 : above > 0)) | 1);
    return emulated_flush(near);
}

static inline double emulated_bf16(uint16_t half) { return emulated_flush(bf16_to_fp32(half)); }

/* sum + (a[0] * b[0] + a[1] * b[1]) */
static inline float emulated_add_pair(float sum, const uint16_t *a, const uint16_t *b) {
    float products[2];
    for (int i = 0; i < 2; i++) products[i] = emulated_add_to_odd(emulated_bf16(a[i]) * emulated_bf16(b[i]), 0);
    return emulated_add_to_odd(emulated_flush(sum), emulated_add_to_odd(products[0], products[1]));
}

#define vbfdotq_f32(sum, a, b) emulated_bfdotq(sum, a, b)
static inline float32x4_t emulated_bfdotq(float32x4_t sum, bfloat16x8_t a, bfloat16x8_t b) {
    float lane[4];
    uint16_t x[8], y[8];
    memcpy(lane, &sum, sizeof sum), memcpy(x, &a, sizeof a), memcpy(y, &b, sizeof b);
    for (int i = 0; i < 4; i++) lane[i] = emulated_add_pair(lane[i], x + 2 * i, y + 2 * i);
    memcpy(&sum, lane, sizeof sum);
    return sum;
}

#define vbfmmlaq_f32(sum, a, b) emulated_bfmmlaq(sum, a, b)
static inline float32x4_t emulated_bfmmlaq(float32x4_t sum, bfloat16x8_t a, bfloat16x8_t b) {
    float lane[4];
    uint16_t x[8], y[8];
    memcpy(lane, &sum, sizeof sum), memcpy(x, &a, sizeof a), memcpy(y, &b, sizeof b);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k += 2) lane[i] = emulated_add_pair(lane[i], x + i / 2 * 4 + k, y + i % 2 * 4 + k);
    memcpy(&sum, lane, sizeof sum);
    return sum;
}
#endif

/* SIMDe 0.7.4 has no FHM: products of fp16 are exact in fp32, and each is added with one rounding. */
#ifndef vfmlalq_low_f16
#define vfmlalq_low_f16(sum, a, b) emulated_fmlalq(sum, a, b, 0)
#define vfmlalq_high_f16(sum, a, b) emulated_fmlalq(sum, a, b, 4)
static inline float32x4_t emulated_fmlalq(float32x4_t sum, float16x8_t a, float16x8_t b, int first) {
    float lane[4];
    uint16_t x[8], y[8];
    memcpy(lane, &sum, sizeof sum), memcpy(x, &a, sizeof a), memcpy(y, &b, sizeof b);
    for (int i = 0; i < 4; i++) lane[i] = fmaf(fp16_to_fp32(x[first + i]), fp16_to_fp32(y[first + i]), lane[i]);
    memcpy(&sum, lane, sizeof sum);
    return sum;
}
#endif
#endif
