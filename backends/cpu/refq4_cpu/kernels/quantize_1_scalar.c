/* Quantising, rung 1: the rule, one element at a time, for codes of any length up to 256.
 *
 *     absmax    largest magnitude of the block; a NaN in the block makes it NaN
 *     scaled    clamp(x * (1/absmax), -1, 1) in fp32; where 1/absmax is no finite number, x * 0
 *     rank      how many thresholds lie below it: a binary search, true comparisons go up, so a NaN has rank 0
 *     code      order[rank]
 */
#ifndef QUANTIZE_SCALAR
#define QUANTIZE_SCALAR
#include "refq4.h"

typedef struct {
    const void *x;
    enum dtype dtype;
    int64_t numel, blocksize;
    const float *thresholds; /* [code_length - 1], ascending */
    const uint8_t *order;    /* [code_length] */
    int code_length, pad_code;
    float *absmax;
    uint8_t *out;
    int pack;                /* two codes a byte (4-bit), or one (8-bit) */
    int threads;
} Quantize;

/* Magnitudes order like their bits, and a NaN's bits are above infinity's: an integer maximum keeps it. */
static float scalar_absmax(const Quantize *q, int64_t first, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t u = bits_of(load_as_fp32(q->x, q->dtype, first + i)) & 0x7FFFFFFFu;
        most = u > most ? u : most;
    }
    return float_of(most);
}

static inline float finite_inverse(float absmax) {
    float inverse = 1.0f / absmax;
    return inverse - inverse == 0 ? inverse : 0;
}

static unsigned scalar_code(const Quantize *q, float x, float inverse) {
    float scaled = x * inverse;
    scaled = scaled < -1 ? -1 : scaled > 1 ? 1 : scaled;
    int rank = 0, left = q->code_length - 1;
    while (left > 0) { /* the first `rank` thresholds are below; `left` are undecided */
        int half = (left + 1) / 2;
        int up = scaled > q->thresholds[rank + half - 1];
        rank += up ? half : 0;
        left = up ? left - half : half - 1;
    }
    return q->order[rank];
}

enum { STRETCH = 64 };

/* The ranks of a stretch, for short codes: compare with every threshold. More comparisons than a binary search, but
 * in loops that a compiler turns into vector instructions. */
static void stretch_codes(const Quantize *q, int64_t first, int64_t count, float inverse, uint8_t *codes) {
    float scaled[STRETCH] = {0};
    int rank[STRETCH] = {0};
    for (int64_t i = 0; i < count; i++) scaled[i] = load_as_fp32(q->x, q->dtype, first + i) * inverse;
    for (int i = 0; i < STRETCH; i++) scaled[i] = scaled[i] < -1 ? -1 : scaled[i] > 1 ? 1 : scaled[i];
    for (int t = 0; t < q->code_length - 1; t++) {
        float threshold = q->thresholds[t];
        for (int i = 0; i < STRETCH; i++) rank[i] += scaled[i] > threshold;
    }
    for (int i = 0; i < STRETCH; i++) codes[i] = q->order[rank[i]];
}

/* Blocks of even length begin at a whole byte; for the others the caller keeps to one thread. */
static void scalar_quantize_block(const Quantize *q, int64_t block) {
    int64_t first = block * q->blocksize, count = min64(q->blocksize, q->numel - first);
    float absmax = scalar_absmax(q, first, count), inverse = finite_inverse(absmax);
    q->absmax[block] = absmax;
    uint8_t codes[STRETCH];
    for (int64_t i = first; i < first + count; i++) {
        unsigned code;
        if (q->code_length <= 16) {
            int64_t at = (i - first) % STRETCH;
            if (at == 0) stretch_codes(q, i, min64(STRETCH, first + count - i), inverse, codes);
            code = codes[at];
        } else {
            code = scalar_code(q, load_as_fp32(q->x, q->dtype, i), inverse);
        }
        if (!q->pack) q->out[i] = (uint8_t)code;
        else if (i & 1) q->out[i >> 1] |= (uint8_t)code;
        else q->out[i >> 1] = (uint8_t)(code << 4 | (i + 1 == q->numel ? q->pad_code : 0));
    }
}

enum { ITEM_ELEMENTS = 1 << 14 }; /* one work item of the flat ops */

static void scalar_quantize_item(void *context, int64_t item, int thread) {
    (void)thread;
    const Quantize *q = context;
    int64_t per = ceil_div(ITEM_ELEMENTS, q->blocksize), last = ceil_div(q->numel, q->blocksize);
    for (int64_t b = item * per; b < min64((item + 1) * per, last); b++) scalar_quantize_block(q, b);
}

static void quantize_1_scalar(const Quantize *q) {
    int64_t per = ceil_div(ITEM_ELEMENTS, q->blocksize) * q->blocksize;
    int alone = q->pack && q->blocksize % 2;
    run_parallel(scalar_quantize_item, (void *)q, ceil_div(q->numel, per), alone ? 1 : q->threads);
}
#endif
