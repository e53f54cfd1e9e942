/* GEMM, rung 5 with pairs of bf16: gemm_4bit_5_avx512_rows.c with half the instructions. A register read as words gives
 * 32 weights per look-up (gemm_4bit_4_avx512_bf16.c says how), so four shifts take a register apart where fp32 needs
 * eight:
 *
 *     lane i, shift s    the pair k = 8g + {1 0 3 2}[s]  and that + 4,     g: the group of eight elements in that lane
 *     x_order            [tile of up to 4 tokens][K/512 steps][4 T][4 shifts][token][16 lanes] pairs
 *
 * For 64 stored bytes that is two unpacks, three shifts and four look-ups, and for each token four vdpbf16ps and a
 * quarter of a multiply-add: what a tile costs, but for the unpacks and half of the multiply-adds.
 *
 * cc -O3 -mfma -mf16c -mavx512dq -mavx512vl -mavx512bf16 -DREFQ4_AVX512_BF16 -fsyntax-only gemm_4bit_5_avx512_bf16_rows.c
 */
#include "simd.h"
#include "gemm_4bit_4_avx512_bf16.c" /* bf16_table */
#include "gemm_4bit_5_avx512_rows.c" /* run_rows */

ROWS_KERNEL(bf16_streams, 1, 4) ROWS_KERNEL(bf16_streams, 2, 4)
ROWS_KERNEL(bf16_streams, 3, 4) ROWS_KERNEL(bf16_streams, 4, 4)
static const RowsKernel bf16_streams[] = {NULL, bf16_streams_1, bf16_streams_2, bf16_streams_3, bf16_streams_4};

static int gemm_4bit_5_avx512_bf16_rows(const Product *p) {
    _Alignas(64) uint8_t table[64];
    RowsPlan plan = {p, bf16_streams, 16, bf16_table(p->weight.code, table)};
    plan.table = _mm512_load_si512(table);
    return run_rows(&plan);
}
