/* One tier as a library: includes what this tier's flags can compile, and exports what Python calls.
 *
 * A tier is a set of features (refq4_cpu/features.py), and each of them is a macro. None of them: plain C.
 *
 *     REFQ4_AVX2    REFQ4_AVX512    REFQ4_AVX512_BF16
 *     REFQ4_NEON    REFQ4_NEON_FHM    REFQ4_NEON_BF16
 *
 * Python asks for each product kernel by name, once, when it has loaded the library (refq4_cpu/kernels.py, which says
 * what each one takes). The name is the one of its file and of its function.
 *
 * cc -std=gnu11 -O3 -ffp-contract=off -fno-strict-aliasing -mavx2 -mfma -mf16c -DREFQ4_AVX2 -S library.c
 */
#include "driver.h"
#include "gemv_4bit_1_scalar.c"
#include "gemm_4bit_1_scalar.c"
#include "grad_input_4bit_1_blocked.c"
#ifdef REFQ4_AVX2
#include "gemm_4bit_2_avx2.c"
#include "gemm_4bit_3_avx2_bytes.c"
#include "gemm_4bit_4_avx2_blocked.c"
#include "gemv_4bit_2_avx2.c"
#endif
#ifdef REFQ4_AVX512
#include "gemm_4bit_3_avx512.c"
#include "gemv_4bit_2_avx512.c"
#include "gemm_4bit_5_avx512_rows.c"
#include "quantize_2_avx512.c"
#include "dequantize_2_avx512.c"
#define QUANTIZE quantize_2_avx512
#define DEQUANTIZE dequantize_2_avx512
#elif defined REFQ4_AVX2
#include "quantize_2_avx2.c"
#include "dequantize_2_avx2.c"
#define QUANTIZE quantize_2_avx2
#define DEQUANTIZE dequantize_2_avx2
#elif defined REFQ4_NEON
#include "gemm_4bit_2_neon.c"
#include "gemv_4bit_2_neon.c"
#include "quantize_2_neon.c"
#include "dequantize_2_neon.c"
#define QUANTIZE quantize_2_neon
#define DEQUANTIZE dequantize_2_neon
#else
#include "quantize_1_scalar.c"
#include "dequantize_1_scalar.c"
#define QUANTIZE quantize_1_scalar
#define DEQUANTIZE dequantize_1_scalar
#endif
#ifdef REFQ4_AVX512_BF16
#include "gemm_4bit_4_avx512_bf16.c"
#include "gemv_4bit_3_avx512_bf16.c"
#include "gemm_4bit_5_avx512_bf16_rows.c"
#include "gemm_4bit_5_avx512_bf16_blocked.c"
#include "grad_input_4bit_2_avx512_bf16.c"
#endif
#ifdef REFQ4_NEON_FHM
#include "gemm_4bit_3_neon_fhm.c"
#include "gemv_4bit_3_neon_fhm.c"
#endif
#ifdef REFQ4_NEON_BF16
#include "gemm_4bit_3_neon_bf16.c"
#include "gemv_4bit_3_neon_bf16.c"
#endif

#include "limits.c"

#define EXPORT __attribute__((visibility("default")))

enum { OK = 0, OUT_OF_MEMORY = -1, NO_KERNEL = -2 };

EXPORT void refq4_use_torch_threads(void *gomp_parallel) {
    if (pool.forked) return; /* its helpers stayed behind in the parent */
    pool.torch_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))gomp_parallel;
}

EXPORT void refq4_ask_for_large_pages(void *at, int64_t bytes) { ask_for_large_pages(at, bytes); }

EXPORT double refq4_limit(int what, const uint8_t *buffer, int64_t bytes, int threads) {
    return measure_limit(what, buffer, bytes, threads);
}

typedef int (*ProductFn)(const Product *);
#define NAMED(function) {#function, function}
static const struct {
    const char *name;
    ProductFn run;
} product_kernels[] = {
    NAMED(gemv_4bit_1_scalar),
    NAMED(gemm_4bit_1_scalar),
    NAMED(grad_input_4bit_1_blocked),
#ifdef REFQ4_AVX2
    NAMED(gemm_4bit_2_avx2),
    NAMED(gemm_4bit_3_avx2_bytes),
    NAMED(gemm_4bit_4_avx2_blocked),
    NAMED(gemv_4bit_2_avx2),
#endif
#ifdef REFQ4_AVX512
    NAMED(gemm_4bit_3_avx512),
    NAMED(gemv_4bit_2_avx512),
    NAMED(gemm_4bit_5_avx512_rows),
#endif
#ifdef REFQ4_AVX512_BF16
    NAMED(gemm_4bit_4_avx512_bf16),
    NAMED(gemv_4bit_3_avx512_bf16),
    NAMED(gemm_4bit_5_avx512_bf16_rows),
    NAMED(gemm_4bit_5_avx512_bf16_blocked),
    NAMED(grad_input_4bit_2_avx512_bf16),
#endif
#ifdef REFQ4_NEON
    NAMED(gemm_4bit_2_neon),
    NAMED(gemv_4bit_2_neon),
#endif
#ifdef REFQ4_NEON_FHM
    NAMED(gemm_4bit_3_neon_fhm),
    NAMED(gemv_4bit_3_neon_fhm),
#endif
#ifdef REFQ4_NEON_BF16
    NAMED(gemm_4bit_3_neon_bf16),
    NAMED(gemv_4bit_3_neon_bf16),
#endif
};

/* The kernel of that name, for refq4_product; NULL if this tier has none. */
EXPORT ProductFn refq4_kernel(const char *name) {
    for (size_t i = 0; i < sizeof product_kernels / sizeof *product_kernels; i++)
        if (strcmp(product_kernels[i].name, name) == 0) return product_kernels[i].run;
    return NULL;
}

/* A product, one chunk of tokens after the other. Kernels copy x in an order of their own, and read the copy again for
 * every few outputs. If a long input's copy came from memory each time, 2048 tokens would take up to twice as long. So a
 * chunk's copy has 8 MB: in fp32, or in bf16 for each of two threads. Each chunk decodes the weight again, which costs
 * little from 128 tokens on. */
enum { CHUNK_BYTES = 8 << 20, SMALLEST_CHUNK = 128 };

static int multiply(ProductFn kernel, const Product *p) {
    int64_t most = max64(CHUNK_BYTES / 4 / max64(p->K, 1), SMALLEST_CHUNK), chunks = max64(ceil_div(p->M, most), 1);
    int64_t size = p->dtype == FP32 ? 4 : 2;
    int ok = 1;
    for (int64_t i = 0; ok && i < chunks; i++) {
        int64_t first = p->M * i / chunks;
        Product chunk = *p;
        chunk.M = p->M * (i + 1) / chunks - first;
        chunk.x = (const char *)p->x + first * p->K * size;
        chunk.y = (char *)p->y + first * p->N * size;
        ok = kernel(&chunk);
    }
    return ok;
}

EXPORT int refq4_product(ProductFn kernel, const void *x, const void *bias, void *y, int dtype, int64_t M, int64_t N,
                         int64_t K, const uint8_t *tiles, const Weight *weight, int threads) {
    Product p = {x, bias, y, (enum dtype)dtype, M, N, K, *weight, tiles, threads, NULL};
    return multiply(kernel, &p) ? OK : OUT_OF_MEMORY;
}

/* The rows of one expert, and the kernel that serves so many. */
typedef struct {
    ProductFn kernel;
    int64_t expert, first, rows;
} Group;

/* `weight` of all experts -> that of one: `numel` elements each, of whole blocks and whole nested blocks. */
static Weight weight_of(const Weight *weight, int64_t expert, int64_t numel) {
    Weight w = *weight;
    int64_t blocks = numel / w.blocksize;
    if (w.packed) w.packed += expert * (numel / 2);
    if (w.absmax) w.absmax += expert * blocks;
    if (w.q) {
        w.q += expert * blocks;
        w.nested_absmax += expert * (blocks / w.nested_blocksize);
    }
    return w;
}

typedef struct {
    const Group *groups;
    const char *x, *bias; /* of all groups */
    char *y;
    enum dtype dtype;
    int64_t N, K, stride; /* stride: bytes of an expert's tiles */
    const uint8_t *tiles;
    const Weight *weight;
    int64_t count;
    int threads, at_once; /* of one group; groups that are multiplied side by side */
    atomic_int failed;
} Grouped;

static void multiply_group(void *context, int64_t i, int thread) {
    (void)thread;
    Grouped *all = context;
    const Group *g = all->groups + i, *next = i + all->at_once < all->count ? g + all->at_once : NULL;
    int64_t size = all->dtype == FP32 ? 4 : 2, N = all->N, K = all->K;
    Product p = {all->x + g->first * K * size, all->bias ? all->bias + g->expert * N * size : NULL,
                 all->y + g->first * N * size, all->dtype, g->rows, N, K, weight_of(all->weight, g->expert, N * K),
                 all->tiles ? all->tiles + g->expert * all->stride : NULL, all->threads,
                 all->tiles && next ? all->tiles + next->expert * all->stride : NULL};
    if (!multiply(g->kernel, &p)) atomic_store(&all->failed, 1);
}

/* A product for each expert that has rows.
 *
 *     offsets   0 3 3 4 9     groups   (kernel for 3 rows, expert 0, first row 0, 3 rows)
 *     experts    0 1 2 3               (kernel for 1 row,  expert 2, first row 3, 1 row)
 *                                      (kernel for 5 rows, expert 3, first row 4, 5 rows)
 *
 * kernels: for 0, 1, 2 ... `most` rows, and the last one for all numbers above; NULL where none can serve.
 * tiles: of [E * N, K], N whole panels. Where there are groups enough, each thread takes whole ones: no thread then
 * waits for another before the end. Else all threads share one group after the other. */
EXPORT int refq4_grouped(const ProductFn *kernels, int64_t most, const int64_t *offsets, int64_t experts, const char *x,
                         const char *bias, char *y, int dtype, int64_t N, int64_t K, const uint8_t *tiles,
                         const Weight *weight, int threads) {
    int64_t stride = tiles ? N / PANEL * panel_bytes(K, weight->blocksize) : 0, count = 0;
    Group *groups = scratch((size_t)experts * sizeof(Group));
    if (!groups) return OUT_OF_MEMORY;
    int status = OK;
    for (int64_t e = 0; e < experts; e++) {
        int64_t rows = offsets[e + 1] - offsets[e];
        if (rows == 0) continue;
        groups[count] = (Group){kernels[min64(rows, most)], e, offsets[e], rows};
        if (!groups[count++].kernel) status = NO_KERNEL;
    }
    if (status == OK) {
        int apart = count >= 2 * threads, at_once = apart ? threads : 1;
        Grouped all = {groups, x, bias, y, (enum dtype)dtype, N, K, stride, tiles, weight, count, threads / at_once,
                       at_once, 0};
        run_parallel(multiply_group, &all, count, at_once);
        if (atomic_load(&all.failed)) status = OUT_OF_MEMORY;
    }
    free(groups);
    return status;
}

EXPORT void refq4_quantize(const void *x, int dtype, int64_t numel, int64_t blocksize, const float *thresholds,
                           const uint8_t *order, int code_length, int pad_code, const float *given, float *absmax,
                           uint8_t *out, int pack, int threads) {
    Quantize q = {x, (enum dtype)dtype, numel, blocksize, thresholds, order, code_length, pad_code, given, absmax, out, pack,
                  threads};
    QUANTIZE(&q);
}

EXPORT void refq4_dequantize(const Weight *weight, int bits, int64_t numel, void *out, int dtype, int threads) {
    Dequantize d = {*weight, numel, (enum dtype)dtype, out, bits, threads};
    ask_for_large_pages(out, numel * (dtype == FP32 ? 4 : 2));
    DEQUANTIZE(&d);
}

typedef struct {
    const Weight *weight;
    int64_t N, K;
    uint8_t *tiles, *packed;
    float *absmax;
} Rearrange;

static void tile_item(void *context, int64_t panel, int thread) {
    (void)thread;
    const Rearrange *r = context;
    MAKE_TILES(r->weight, r->N, r->K, panel, r->tiles + panel * panel_bytes(r->K, r->weight->blocksize));
}

static void untile_item(void *context, int64_t panel, int thread) {
    (void)thread;
    const Rearrange *r = context;
    untile_panel(r->tiles, r->N, r->K, r->weight->blocksize, panel, r->packed, r->absmax);
}

EXPORT void refq4_tile(const Weight *weight, int64_t N, int64_t K, uint8_t *tiles, int threads) {
    Rearrange r = {weight, N, K, tiles, NULL, NULL};
    ask_for_large_pages(tiles, ceil_div(N, PANEL) * panel_bytes(K, weight->blocksize));
    run_parallel(tile_item, &r, ceil_div(N, PANEL), threads);
}

EXPORT void refq4_untile(const uint8_t *tiles, int64_t N, int64_t K, int64_t blocksize, uint8_t *packed, float *absmax,
                         int threads) {
    Weight w = {.blocksize = blocksize};
    Rearrange r = {&w, N, K, (uint8_t *)tiles, packed, absmax};
    run_parallel(untile_item, &r, ceil_div(N, PANEL), threads);
}
