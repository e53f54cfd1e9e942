/* Dequantising, rung 1: look up, multiply in fp32, round once. 4-bit codes two a byte, 8-bit codes one a byte.
 *
 * cc -O3 -fsyntax-only dequantize_1_scalar.c
 */
#ifndef DEQUANTIZE_SCALAR
#define DEQUANTIZE_SCALAR
#include "threads.c"

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

/* --- what every rung shares: items of whole blocks -------------------------------------------------------------- */

enum { DEQUANTIZE_ITEM = 1 << 15 };

/* From here on a result would push everything else out of the caches: it goes past them, in stores as wide as `align`. */
enum { STREAM_BYTES = 4 << 20 };

static inline int streams(const Dequantize *d, uintptr_t align) {
    return d->numel * (d->dtype == FP32 ? 4 : 2) >= STREAM_BYTES && (uintptr_t)d->out % align == 0;
}

/* One whole block; stream: past the caches. */
typedef void (*DequantizeBlock)(const Dequantize *d, int64_t block, int stream);

/* Blocks `from` to `to`: `whole_block` for each that is whole, this rung for a short last one. */
static inline void dequantize_blocks(const Dequantize *d, int64_t from, int64_t to, DequantizeBlock whole_block,
                                     int stream) {
    int64_t whole = d->numel / d->weight.blocksize;
    for (int64_t b = from; b < to; b++) {
        if (b < whole) whole_block(d, b, stream);
        else scalar_dequantize_block(d, b);
    }
}

static inline void dequantize_item(const Dequantize *d, int64_t item, DequantizeBlock whole_block, int stream) {
    int64_t per = ceil_div(DEQUANTIZE_ITEM, d->weight.blocksize), last = ceil_div(d->numel, d->weight.blocksize);
    dequantize_blocks(d, item * per, min64((item + 1) * per, last), whole_block, stream);
}

static inline void dequantize_in_items(const Dequantize *d, WorkFn item) {
    int64_t per = ceil_div(DEQUANTIZE_ITEM, d->weight.blocksize) * d->weight.blocksize;
    run_parallel(item, (void *)d, ceil_div(d->numel, per), d->threads);
}

/* --- this rung -------------------------------------------------------------------------------------------------- */

static void scalar_whole_block(const Dequantize *d, int64_t block, int stream) {
    (void)stream;
    scalar_dequantize_block(d, block);
}

static void scalar_dequantize_item(void *context, int64_t item, int thread) {
    (void)thread;
    dequantize_item(context, item, scalar_whole_block, 0);
}

static inline void dequantize_1_scalar(const Dequantize *d) { dequantize_in_items(d, scalar_dequantize_item); }
#endif
