/* Dequantising, rung 1: look up, multiply in fp32, round once. 4-bit codes two a byte, 8-bit codes one a byte. */
#ifndef DEQUANTIZE_SCALAR
#define DEQUANTIZE_SCALAR
#include "refq4.h"

typedef struct {
    Weight weight; /* for 8-bit codes: packed holds one code a byte, code has 256 values */
    int64_t numel;
    enum dtype dtype;
    void *out;
    int bits, threads;
} Dequantize;

static void scalar_dequantize_block(const Dequantize *d, int64_t block) {
    const Weight *w = &d->weight;
    float scale = block_scale(w, block);
    int64_t end = min64((block + 1) * w->blocksize, d->numel);
    for (int64_t i = block * w->blocksize; i < end; i++) {
        unsigned code = d->bits == 4 ? nibble(w->packed, i) : w->packed[i];
        store_from_fp32(d->out, d->dtype, i, w->code[code] * scale);
    }
}

enum { DEQUANTIZE_ITEM = 1 << 15 };

static void scalar_dequantize_item(void *context, int64_t item, int thread) {
    (void)thread;
    const Dequantize *d = context;
    int64_t per = ceil_div(DEQUANTIZE_ITEM, d->weight.blocksize), last = ceil_div(d->numel, d->weight.blocksize);
    for (int64_t b = item * per; b < min64((item + 1) * per, last); b++) scalar_dequantize_block(d, b);
}

static void dequantize_1_scalar(const Dequantize *d) {
    int64_t per = ceil_div(DEQUANTIZE_ITEM, d->weight.blocksize) * d->weight.blocksize;
    run_parallel(scalar_dequantize_item, (void *)d, ceil_div(d->numel, per), d->threads);
}
#endif
