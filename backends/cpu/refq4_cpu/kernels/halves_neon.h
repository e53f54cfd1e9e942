/* bf16 activations as fp16, for kernels that multiply fp16 (fmlal): multiplied by a power of two.
 *
 *     bf16    8 bits of precision, exponents -126 .. 127
 *     fp16   11 bits of precision, exponents  -14 .. 15     and 8 bits down to 2**-17, in subnormals
 *
 * So a token whose largest |x| becomes 2**14 .. 2**15 fits exactly if nothing in it but zeros is 2**32 times smaller. That
 * is asked of every value, and nothing is ever rounded: a token that does not fit, or holds an infinity or a NaN, is for
 * rung 2. Multiplying by another power of two changes no bit of a result, so tokens may share one.
 *
 * cc -O3 -DREFQ4_NEON -fsyntax-only halves_neon.h
 */
#ifndef HALVES_NEON_H
#define HALVES_NEON_H
#include "refq4.h"

/* The power of two, or 0 if there is none (an infinity or a NaN). */
static inline float half_factor(const uint16_t *x, int64_t count) {
    uint16_t most = 0;
    for (int64_t i = 0; i < count; i++) most = (x[i] & 0x7FFF) > most ? x[i] & 0x7FFF : most;
    if (most >= 0x7F80) return 0;
    int64_t exponent = 127 + 14 - ((most >> 7) - 127);
    return float_of((uint32_t)min64(exponent, 253) << 23); /* 254 has an inverse that is subnormal */
}

/* Whether all of x fits; out[i] = x[i] * factor. */
static inline int to_halves(const uint16_t *x, int64_t count, float factor, uint16_t *out) {
    int fits = 1;
    for (int64_t i = 0; i < count; i++) {
        float value = bf16_to_fp32(x[i]) * factor;
        out[i] = fp32_to_fp16(value);
        fits &= fp16_to_fp32(out[i]) == value;
    }
    return fits;
}

/* A product of bf16 in two ways: `halves` if x fits (it gets x as fp16 and what undoes the factor), `otherwise` if not.
 * Token by token where only some fit: a token's result has the same bits alone and in a batch. */
static int product_in_halves(const Product *p, int (*halves)(const Product *, float undo),
                             int (*otherwise)(const Product *)) {
    uint16_t *x = scratch((size_t)(p->M * p->K) * 2);
    if (!x) return 0;
    float factor = half_factor(p->x, p->M * p->K);
    int ok = 1;
    if (factor != 0 && to_halves(p->x, p->M * p->K, factor, x)) {
        Product q = *p;
        q.x = x;
        ok = halves(&q, 1 / factor);
    } else if (p->M == 1) {
        ok = otherwise(p);
    } else {
        for (int64_t m = 0; m < p->M && ok; m++) {
            Product q = *p;
            q.M = 1, q.x = (const uint16_t *)p->x + m * p->K, q.y = (uint16_t *)p->y + m * p->N;
            ok = product_in_halves(&q, halves, otherwise);
        }
    }
    free(x);
    return ok;
}
#endif
