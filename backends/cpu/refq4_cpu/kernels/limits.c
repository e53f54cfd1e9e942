/* What the machine can do at best, measured the way the kernels use it: the roof of every roofline in the docs.
 *
 *     READ    bytes of main memory read, in GB/s           (a buffer much larger than the last-level cache)
 *     FMA     fp32 multiply-adds, in GFLOP/s               (16 different sums: equal ones would be merged)
 *     DOT     bf16 pairs with vdpbf16ps, in GFLOP/s
 *
 * Each thread takes pieces of the work like any product's; 0 where the tier has no such instruction.
 *
 * cc -O3 -DREFQ4_TIER=0 -fsyntax-only limits.c
 */
#if REFQ4_TIER >= 1
#include "simd.h"
#endif
#include "threads.c"

enum { READ = 0, FMA = 1, DOT = 2, SUMS = 16, PIECES = 64, STEPS = 100000 };

typedef struct {
    const uint8_t *buffer;
    int64_t bytes;
    atomic_ullong sink; /* results go here, so that no compiler drops the work */
} Limit;

static void read_piece(void *context, int64_t item, int thread) {
    (void)thread;
    Limit *l = context;
    const uint64_t *p = (const uint64_t *)(l->buffer + l->bytes / PIECES * item);
    uint64_t sum[8] = {0};
    for (int64_t i = 0; i + 8 <= l->bytes / PIECES / 8; i += 8)
        for (int j = 0; j < 8; j++) sum[j] ^= p[i + j];
    for (int j = 1; j < 8; j++) sum[0] ^= sum[j];
    atomic_fetch_add(&l->sink, sum[0]);
}

#if REFQ4_TIER >= 2
#define VECTOR __m512
#define SET1 _mm512_set1_ps
#define MULTIPLY_ADD _mm512_fmadd_ps
#elif REFQ4_TIER >= 1
#define VECTOR __m256
#define SET1 _mm256_set1_ps
#define MULTIPLY_ADD _mm256_fmadd_ps
#endif

#ifdef VECTOR
static void fma_piece(void *context, int64_t item, int thread) {
    (void)thread;
    Limit *l = context;
    VECTOR sum[SUMS], a = SET1(1), b = SET1(1e-9f);
    KEEP_IN_REGISTERS("+v"(a), "+v"(b)); /* or the loop is computed beforehand */
    UNROLL for (int j = 0; j < SUMS; j++) sum[j] = SET1((float)(item + j));
    for (int i = 0; i < STEPS; i++)
        UNROLL for (int j = 0; j < SUMS; j++) sum[j] = MULTIPLY_ADD(a, b, sum[j]);
    UNROLL for (int j = 1; j < SUMS; j++) sum[0] += sum[j];
    atomic_fetch_add(&l->sink, bits_of(sum[0][0]));
}
#endif

#if REFQ4_TIER >= 3
static void dot_piece(void *context, int64_t item, int thread) {
    (void)thread;
    Limit *l = context;
    __m512 sum[SUMS];
    __m512i a = _mm512_set1_epi16(0x3F80), b = _mm512_set1_epi16(0x3C00);
    KEEP_IN_REGISTERS("+v"(a), "+v"(b)); /* or the loop is computed beforehand */
    UNROLL for (int j = 0; j < SUMS; j++) sum[j] = _mm512_set1_ps((float)(item + j));
    for (int i = 0; i < STEPS; i++)
        UNROLL for (int j = 0; j < SUMS; j++)
            sum[j] = _mm512_dpbf16_ps(sum[j], (__m512bh)a, (__m512bh)b);
    UNROLL for (int j = 1; j < SUMS; j++) sum[0] += sum[j];
    atomic_fetch_add(&l->sink, bits_of(sum[0][0]));
}
#endif

static double measure_limit(int what, const uint8_t *buffer, int64_t bytes, int threads) {
    Limit l = {buffer, bytes, 0};
    WorkFn piece = what == READ ? read_piece : NULL;
    double work = what == READ ? (double)bytes : 0;
#ifdef VECTOR
    if (what == FMA) piece = fma_piece, work = 2.0 * sizeof(VECTOR) / 4 * SUMS * STEPS * PIECES;
#endif
#if REFQ4_TIER >= 3
    if (what == DOT) piece = dot_piece, work = 4.0 * 16 * SUMS * STEPS * PIECES;
#endif
    if (!piece) return 0;
    int64_t start = nanoseconds();
    run_parallel(piece, &l, PIECES, threads);
    return work / (double)(nanoseconds() - start); /* per nanosecond: giga per second */
}
