/* How far a decoded weight is from what it was made from: |W - W4|² and |W|², in one pass and without W4 in memory.
 *
 *     per stretch    whole blocks, decoded by this tier's rung into a room that stays in the first cache
 *     per element    w and w4 in fp32: (w - w4)² and w² into one of sixteen lanes, so that a compiler can vectorise
 *     per item       lanes into two doubles; items are added in their order, whichever thread had them
 *
 * cc -O3 -DREFQ4_TIER=0 -fsyntax-only squared_error.c
 */
#include "dequantize_1_scalar.c"

#ifndef WHOLE_BLOCK /* library.c names its tier's rung */
#define WHOLE_BLOCK(d) ((void)(d), scalar_whole_block)
#endif

enum { ROOM_ELEMENTS = 4096, SUM_LANES = 16 };

typedef struct {
    Dequantize decode; /* out: set for each stretch */
    const void *exact;
    double *sums;      /* two for each item */
} SquaredError;

static inline __attribute__((always_inline)) void add_squares(const void *exact, const void *decoded, int64_t first,
                                                              int64_t count, const enum dtype dtype, double *sums) {
    float error[SUM_LANES] = {0}, norm[SUM_LANES] = {0};
    int64_t whole = count / SUM_LANES * SUM_LANES;
    for (int64_t i = 0; i < whole; i += SUM_LANES) {
        for (int lane = 0; lane < SUM_LANES; lane++) {
            float w = load_as_fp32(exact, dtype, first + i + lane), off = load_as_fp32(decoded, dtype, i + lane) - w;
            error[lane] += off * off;
            norm[lane] += w * w;
        }
    }
    for (int64_t i = whole; i < count; i++) {
        float w = load_as_fp32(exact, dtype, first + i), off = load_as_fp32(decoded, dtype, i) - w;
        error[i - whole] += off * off;
        norm[i - whole] += w * w;
    }
    for (int lane = 0; lane < SUM_LANES; lane++) {
        sums[0] += error[lane];
        sums[1] += norm[lane];
    }
}

static void squared_error_item(void *context, int64_t item, int thread) {
    (void)thread;
    const SquaredError *s = context;
    Dequantize d = s->decode;
    _Alignas(64) float room[ROOM_ELEMENTS];
    DequantizeBlock whole_block = WHOLE_BLOCK(&d);
    int64_t bs = d.weight.blocksize, per = ROOM_ELEMENTS / bs, last = ceil_div(d.numel, bs);
    int64_t items_blocks = ceil_div(DEQUANTIZE_ITEM, bs), end = min64((item + 1) * items_blocks, last);
    double *sums = s->sums + 2 * item;
    sums[0] = sums[1] = 0;
    for (int64_t from = item * items_blocks; from < end; from += per) {
        int64_t to = min64(from + per, end), first = from * bs, count = min64(to * bs, d.numel) - first;
        d.out = (void *)((uintptr_t)room - (uintptr_t)first * (d.dtype == FP32 ? 4 : 2)); /* element `first` at its start */
        dequantize_blocks(&d, from, to, whole_block, 0);
        if (d.dtype == FP32) add_squares(s->exact, room, first, count, FP32, sums);
        else if (d.dtype == BF16) add_squares(s->exact, room, first, count, BF16, sums);
        else add_squares(s->exact, room, first, count, FP16, sums);
    }
}

/* Blocks of at most ROOM_ELEMENTS elements. */
static int squared_error(const Dequantize *decode, const void *exact, double *error_and_norm) {
    int64_t items = ceil_div(decode->numel, ceil_div(DEQUANTIZE_ITEM, decode->weight.blocksize) * decode->weight.blocksize);
    SquaredError s = {*decode, exact, malloc((size_t)items * 2 * sizeof(double) + 1)};
    if (!s.sums) return 0;
    run_parallel(squared_error_item, &s, items, decode->threads);
    error_and_norm[0] = error_and_norm[1] = 0;
    for (int64_t i = 0; i < 2 * items; i++) error_and_norm[i & 1] += s.sums[i];
    free(s.sums);
    return 1;
}
