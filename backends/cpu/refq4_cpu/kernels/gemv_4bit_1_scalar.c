/* GEMV, rung 1: the definition as a loop. One token, one row at a time, one element at a time.
 *
 * Nothing is faster to understand and little is slower to run: a shift, a look-up and two multiplications per element,
 * each waiting for the one before. The figures in docs/cpu-kernels.md start here.
 *
 * cc -O3 -fsyntax-only gemv_4bit_1_scalar.c
 */
#include "threads.c"

static void gemv_scalar_row(void *context, int64_t n, int thread) {
    (void)thread;
    const Product *p = context;
    const Weight *w = &p->weight;
    for (int64_t m = 0; m < p->M; m++) {
        double sum = 0; /* one long chain: in fp32 it would round thousands of times at the size of the whole sum */
        for (int64_t k = 0; k < p->K; k++) {
            int64_t i = n * p->K + k;
            float value = w->code[nibble(w->packed, i)] * block_scale(w, i / w->blocksize);
            sum += (double)value * load_as_fp32(p->x, p->dtype, m * p->K + k);
        }
        if (p->bias) sum += load_as_fp32(p->bias, p->dtype, n);
        store_from_fp32(p->y, p->dtype, m * p->N + n, (float)sum);
    }
}

static int gemv_4bit_1_scalar(const Product *p) {
    run_parallel(gemv_scalar_row, (void *)p, p->N, p->threads);
    return 1;
}
