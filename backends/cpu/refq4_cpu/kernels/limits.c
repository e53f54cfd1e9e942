/* What the machine can do at best, measured the way the kernels use it: the roof of every roofline in the docs.
 *
 *     READ    bytes of main memory read, in GB/s           (a buffer much larger than the last-level cache)
 *     FMA     fp32 multiply-adds, in GFLOP/s               (different sums: equal ones would be merged)
 *     DOT     bf16 with vdpbf16ps or bfmmla, in GFLOP/s
 *
 * Each thread takes pieces of the work like any product's; 0 where the tier has no such instruction.
 *
 * cc -O3 -fsyntax-only limits.c
 */
#if defined REFQ4_AVX2 || defined REFQ4_NEON
#include "simd.h"
#endif
#include "threads.c"

#if defined REFQ4_AVX2 && !defined REFQ4_AVX512
enum { SUMS = 12 }; /* sixteen registers hold no more */
#else
enum { SUMS = 16 }; /* a latency of six, two a cycle: twelve are just too few */
#endif
enum { READ = 0, FMA = 1, DOT = 2, PIECES = 64, STEPS = 100000 };

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

#ifdef REFQ4_AVX512
#define VECTOR __m512
#define SET1 _mm512_set1_ps
#define MULTIPLY_ADD _mm512_fmadd_ps
#elif defined REFQ4_AVX2
#define VECTOR __m256
#define SET1 _mm256_set1_ps
#define MULTIPLY_ADD _mm256_fmadd_ps
#elif defined REFQ4_NEON
#define VECTOR float32x4_t
#define SET1 vdupq_n_f32
#define MULTIPLY_ADD(a, b, sum) vfmaq_f32(sum, a, b)
#endif

#ifdef REFQ4_NEON
#define IN_REGISTER "+w"
#else
#define IN_REGISTER "+v"
#endif

#ifdef VECTOR
static void fma_piece(void *context, int64_t item, int thread) {
    (void)thread;
    Limit *l = context;
    VECTOR sum[SUMS], a = SET1(1), b = SET1(1e-9f);
    KEEP_IN_REGISTERS(IN_REGISTER(a), IN_REGISTER(b)); /* or the loop is computed beforehand */
    UNROLL for (int j = 0; j < SUMS; j++) sum[j] = SET1((float)(item + j));
    for (int i = 0; i < STEPS; i++)
        UNROLL for (int j = 0; j < SUMS; j++) sum[j] = MULTIPLY_ADD(a, b, sum[j]);
    UNROLL for (int j = 1; j < SUMS; j++) sum[0] += sum[j];
    atomic_fetch_add(&l->sink, bits_of(sum[0][0]));
}
#endif

#ifdef REFQ4_AVX512_BF16
#define BF16_VECTOR __m512i
#define BF16_SET1(bits) _mm512_set1_epi16(bits)
#define DOT_PRODUCT(a, b, sum) _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b)
enum { DOT_FLOPS = 4 * 16 }; /* two multiply-adds for each of sixteen sums */
#elif defined REFQ4_NEON_BF16
#define BF16_VECTOR uint16x8_t
#define BF16_SET1(bits) vdupq_n_u16(bits)
#define DOT_PRODUCT(a, b, sum) vbfmmlaq_f32(sum, vreinterpretq_bf16_u16(a), vreinterpretq_bf16_u16(b))
enum { DOT_FLOPS = 8 * 4 }; /* four multiply-adds for each of four sums */
#endif

#ifdef DOT_PRODUCT
static void dot_piece(void *context, int64_t item, int thread) {
    (void)thread;
    Limit *l = context;
    VECTOR sum[SUMS];
    BF16_VECTOR a = BF16_SET1(0x3F80), b = BF16_SET1(0x3C00);
    KEEP_IN_REGISTERS(IN_REGISTER(a), IN_REGISTER(b)); /* or the loop is computed beforehand */
    UNROLL for (int j = 0; j < SUMS; j++) sum[j] = SET1((float)(item + j));
    for (int i = 0; i < STEPS; i++)
        UNROLL for (int j = 0; j < SUMS; j++) sum[j] = DOT_PRODUCT(a, b, sum[j]);
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
#ifdef DOT_PRODUCT
    if (what == DOT) piece = dot_piece, work = 1.0 * DOT_FLOPS * SUMS * STEPS * PIECES;
#endif
    if (!piece) return 0;
    int64_t start = nanoseconds();
    run_parallel(piece, &l, PIECES, threads);
    return work / (double)(nanoseconds() - start); /* per nanosecond: giga per second */
}
