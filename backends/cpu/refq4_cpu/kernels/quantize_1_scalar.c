/* Quantising, rung 1: the rule, one element at a time, for codes of any length up to 256.
 *
 *     absmax    largest magnitude of the block; a NaN in the block makes it NaN; or the one that is given
 *     scaled    clamp(x * (1/absmax), -1, 1) in fp32; where 1/absmax is no finite number, x * 0
 *     rank      how many thresholds lie below it: a binary search, true comparisons go up, so a NaN has rank 0
 *     code      order[rank]
 *
 * cc -O3 -fsyntax-only quantize_1_scalar.c
 */
#ifndef QUANTIZE_SCALAR
#define QUANTIZE_SCALAR
#include "threads.c"

typedef struct {
    const void *x;
    enum dtype dtype;
    int64_t numel, blocksize;
    const float *thresholds; /* [code_length - 1], ascending */
    const uint8_t *order;    /* [code_length] */
    int code_length, pad_code;
    const float *given;      /* scales to take, or NULL: the largest magnitudes */
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

enum { STRETCH = 64 };

/* More comparisons than a search, but in a loop that a compiler turns into vector instructions: for short codes. */
static void ranks_by_counting(const Quantize *q, const float *scaled, int *rank) {
    for (int t = 0; t < q->code_length - 1; t++) {
        float threshold = q->thresholds[t];
        for (int i = 0; i < STRETCH; i++) rank[i] += scaled[i] > threshold;
    }
}

/* A binary search for all elements at once, step by step: each waits for its own last answer, not for its neighbours'.
 * Going up by `step` is right if the threshold just below that rank is. */
static void ranks_by_search(const Quantize *q, const float *scaled, int *rank) {
    for (int step = 128; step > 0; step /= 2) {
        for (int i = 0; i < STRETCH; i++) {
            int next = rank[i] + step, at = next < q->code_length ? next : q->code_length - 1;
            int up = (next == at) & (scaled[i] > q->thresholds[at - 1]);
            rank[i] += up * step;
        }
    }
}

static void stretch_codes(const Quantize *q, int64_t first, int64_t count, float inverse, uint8_t *codes) {
    float scaled[STRETCH] = {0};
    int rank[STRETCH] = {0};
    for (int64_t i = 0; i < count; i++) scaled[i] = load_as_fp32(q->x, q->dtype, first + i) * inverse;
    for (int i = 0; i < STRETCH; i++) scaled[i] = scaled[i] < -1 ? -1 : scaled[i] > 1 ? 1 : scaled[i];
    if (q->code_length <= 16) ranks_by_counting(q, scaled, rank);
    else ranks_by_search(q, scaled, rank);
    for (int i = 0; i < STRETCH; i++) codes[i] = q->order[rank[i]];
}

/* Blocks of even length begin at a whole byte; for the others the caller keeps to one thread. */
static void scalar_quantize_block(const Quantize *q, int64_t block) {
    int64_t first = block * q->blocksize, count = min64(q->blocksize, q->numel - first);
    float absmax = q->given ? q->given[block] : scalar_absmax(q, first, count), inverse = finite_inverse(absmax);
    q->absmax[block] = absmax;
    uint8_t codes[STRETCH];
    for (int64_t i = first; i < first + count; i++) {
        int64_t at = (i - first) % STRETCH;
        if (at == 0) stretch_codes(q, i, min64(STRETCH, first + count - i), inverse, codes);
        unsigned code = codes[at];
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
