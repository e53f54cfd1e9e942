/* The code table in bf16, for kernels that multiply pairs of bf16.
 *
 * The sixteen values must be rounded to bf16, and here is room to choose: any factor c on the table can be divided out
 * of the sums in fp32. table_factor looks for the c at which the sixteen round best. For FP4 (c = 12) and the integer
 * codes there is one where nothing is lost; for NF4 the error is well below what rounding each weight to bf16 costs,
 * which is what the reference does.
 *
 * But all weights of a code are rounded alike. Where activations have a mean, those errors do not average out as the
 * reference's do, so their mean over a weight counts as well as their size:
 *
 *     sum over k of x[k] * e[code k]     random x:    sqrt(K) * root mean square of e
 *                                        constant x:  that, and K * mean of e
 *
 * cc -O3 -fsyntax-only bf16_table.h
 */
#ifndef BF16_TABLE_H
#define BF16_TABLE_H
#include "refq4.h"

/* What rounding c*code to bf16 costs a product, relative to c: mean square plus 16 times the square of the mean, as in
 * a row of 16 constant activations. A longer row would be served by a smaller mean and a larger rms, at the expense of
 * random ones. Large codes are rare: in a normal weight, one of +-1 is met a quarter as often as one near zero. */
static float rounding_cost(const float *code, float c) {
    float square = 0, mean = 0, all = 0;
    for (int i = 0; i < 16; i++) {
        float e = bf16_to_fp32(fp32_to_bf16(code[i] * c)) / c - code[i], often = 4 - 3 * fminf(fabsf(code[i]), 1);
        square += often * e * e;
        mean += often * e;
        all += often;
    }
    return square / all + 16 * (mean / all) * (mean / all);
}

/* The factor in [1, 2) under which the code rounds best; a power of two more changes nothing. Remembered per thread,
 * because a model asks for the same code again and again. */
static float table_factor(const float *code) {
    static _Thread_local float known[16], factor = 0;
    if (factor != 0 && memcmp(known, code, sizeof known) == 0) return factor;
    float best = 1, least = rounding_cost(code, 1);
    for (int i = 1; i < 1536; i++) { /* steps of 1/1536 meet 12/8 for FP4 and E2M1 exactly; 7/4 for int4, too */
        float c = 1 + (float)i / 1536, e = rounding_cost(code, c);
        if (e < least) { least = e; best = c; }
    }
    memcpy(known, code, sizeof known);
    return factor = best;
}
#endif
