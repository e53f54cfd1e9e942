/* GEMV, rung 3: rung 2 with pairs of bf16. Half the instructions: each look-up gives 32 weights, each vdpbf16ps uses 32.
 *
 *     lane i    bytes 4i .. 4i+3    k0 k1 | k2 k3 | k4 k5 | k6 k7   (hi lo), counted from k = 8i
 *     as words  lower: k0..k3, upper: k4..k7;  >> 4*s brings down the pair  8i + {1 0 3 2}[s]  and that + 4
 *
 *     x_order   [K/128 chunks][4 shifts][16 lanes] pairs
 *
 * The table is gemm_4bit_4_avx512_bf16.c's: the sixteen values twice, times a factor that the sums are freed of. The
 * helpers are gemv_4bit_2_avx512.c's; library.c includes both before this file.
 */

static void gemv_bf16_rows(void *context, int64_t item, int thread) {
    const GemvPlan *plan = context;
    const Product *p = plan->p;
    int64_t blocks = p->K / p->weight.blocksize, chunks = ceil_div(p->K, CHUNK), rows = min64(ROWS, p->N - item * ROWS);
    const float *absmax[ROWS];
    const uint8_t *bytes[ROWS];
    for (int r = 0; r < ROWS; r++) {
        int64_t row = item * ROWS + min64(r, rows - 1);
        bytes[r] = p->weight.packed + row * (p->K / 2);
        absmax[r] = row_scales(&p->weight, row, blocks, plan->scales + (thread * ROWS + r) * blocks);
    }
    __m512i table = _mm512_loadu_si512(plan->table);
    __m512 total[ROWS];
    for (int r = 0; r < ROWS; r++) total[r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks; c++) {
        const uint32_t *x = (const uint32_t *)plan->x + c * (CHUNK / 2);
        __mmask64 mask = chunk_mask(p->K, c);
        _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) {
            __m512i codes = _mm512_maskz_loadu_epi8(mask, bytes[r] + c * 64);
            __m512 sum = _mm512_setzero_ps();
            _Pragma("GCC unroll 4") for (int s = 0; s < 4; s++)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * s), table),
                                       (__m512bh)_mm512_load_si512(x + 16 * s));
            total[r] = _mm512_fmadd_ps(sum, lane_scales(absmax[r], c, blocks, p->weight.blocksize), total[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        int64_t n = item * ROWS + r;
        float sum = _mm512_reduce_add_ps(total[r]) * plan->undo_scale;
        store_from_fp32(p->y, p->dtype, n, p->bias ? sum + load_as_fp32(p->bias, p->dtype, n) : sum);
    }
}

static int gemv_3_avx512_bf16(const Product *p) {
    int64_t chunks = ceil_div(p->K, CHUNK);
    uint32_t *order = scratch((size_t)(chunks * CHUNK) * 2);
    if (!order) return 0;
    const uint16_t *x = p->x;
    for (int64_t c = 0; c < chunks; c++)
        for (int s = 0; s < 4; s++)
            for (int lane = 0; lane < 16; lane++) {
                int64_t k = c * CHUNK + 8 * lane + (s ^ 1); /* K is a multiple of 32: k and k + 4 end together */
                order[c * (CHUNK / 2) + 16 * s + lane] = k < p->K ? x[k] | (uint32_t)x[k + 4] << 16 : 0;
            }
    _Alignas(64) uint8_t table[64];
    GemvPlan plan = {p, order, table, bf16_table(p->weight.code, table), NULL};
    return run_gemv(gemv_bf16_rows, &plan, order);
}
