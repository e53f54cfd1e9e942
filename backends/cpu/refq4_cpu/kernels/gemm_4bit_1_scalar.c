/* GEMM, rung 1: plain C. Decode a row of the weight once, then take its dot product with every token.
 *
 *     for each row n:   w[0..K) = code * absmax         (fp32, in cache)
 *                       y[m][n] = sum over k of w[k] * x[m][k]      for all m
 *
 * It reads the canonical layout element by element, so it takes any shape: blocks that straddle rows, odd K (rows that
 * begin in the middle of a byte), any blocksize. The faster rungs hand such shapes to it.
 *
 * cc -O3 -fsyntax-only gemm_4bit_1_scalar.c
 */
#include "threads.c"

enum { LANES = 16 }; /* independent sums: what a compiler needs to use vector registers without reordering a sum */

typedef struct {
    const Product *p;
    const float *x; /* [M, K] as fp32 */
    float *rows;    /* one row of fp32 weights per thread */
} ScalarPlan;

static void decode_row(const Weight *w, int64_t first, int64_t count, float *out) {
    for (int64_t i = 0; i < count;) {
        int64_t block = (first + i) / w->blocksize, end = min64((block + 1) * w->blocksize - first, count);
        float scale = block_scale(w, block);
        for (; i < end; i++) out[i] = w->code[nibble(w->packed, first + i)] * scale;
    }
}

static float dot(const float *a, const float *b, int64_t count) {
    float total[LANES] = {0};
    for (int64_t i = 0; i < count;) {
        float lane[LANES] = {0}; /* a subtotal */
        int64_t end = min64(i + SUBTOTAL_ELEMENTS, count);
        for (; i + LANES <= end; i += LANES)
            for (int j = 0; j < LANES; j++) lane[j] += a[i + j] * b[i + j];
        for (; i < end; i++) lane[i % LANES] += a[i] * b[i];
        for (int j = 0; j < LANES; j++) total[j] += lane[j];
    }
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) total[j] += total[j + half];
    return total[0];
}

static void scalar_row(void *context, int64_t n, int thread) {
    const ScalarPlan *plan = context;
    const Product *p = plan->p;
    float *row = plan->rows + thread * p->K, bias = p->bias ? load_as_fp32(p->bias, p->dtype, n) : 0;
    decode_row(&p->weight, n * p->K, p->K, row);
    for (int64_t m = 0; m < p->M; m++)
        store_from_fp32(p->y, p->dtype, m * p->N + n, dot(row, plan->x + m * p->K, p->K) + bias);
}

static int gemm_4bit_1_scalar(const Product *p) {
    float *x = scratch((size_t)(p->M * p->K) * 4), *rows = scratch((size_t)(p->threads * p->K) * 4);
    int ok = x && rows;
    if (ok) {
        for (int64_t i = 0; i < p->M * p->K; i++) x[i] = load_as_fp32(p->x, p->dtype, i);
        ScalarPlan plan = {p, x, rows};
        run_parallel(scalar_row, &plan, p->N, p->M * p->N * p->K > 1 << 17 ? p->threads : 1);
    }
    free(x);
    free(rows);
    return ok;
}
