/* Runs cases of the NEON kernels on an ARM processor, real or emulated: test_cpu_arm.py writes them and judges the results.
 *
 *     stdin     a case: | 8 int64: see Case | operands, each of its size |     ... until the end
 *     stdout    the case's results, in order
 *
 * Every operand and every result lies against a page without rights, at its end (or at its beginning, if `at_start`), so
 * one byte read or written outside ends the process. Results are filled with 0x7F first. The product kernels are numbered
 * as in the table of library.c. Built with a tier's flags, in the folder of the kernels:
 *
 *     aarch64-linux-gnu-gcc -std=gnu11 -O3 ... -DREFQ4_NEON -static -I . arm_harness.c
 */
#include "library.c"
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    int64_t op, kernel, dtype, M, N, K, blocksize, at_start;
} Case;
enum { QUANTIZE_OP, DEQUANTIZE_OP, PRODUCT_OP, TILED_PRODUCT_OP };

static int64_t at_start;

/* `bytes` against a page that faults. Never freed: the process ends soon. */
static uint8_t *room(int64_t bytes) {
    int64_t page = sysconf(_SC_PAGESIZE), pages = ceil_div(bytes, page) * page;
    uint8_t *area = mmap(NULL, (size_t)(pages + 2 * page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED || mprotect(area, (size_t)page, PROT_NONE) ||
        mprotect(area + page + pages, (size_t)page, PROT_NONE))
        exit(2);
    uint8_t *at = area + page + (at_start ? 0 : pages - bytes);
    return memset(at, 0x7F, (size_t)bytes);
}

static void *operand(int64_t bytes) {
    uint8_t *at = room(bytes);
    if (fread(at, 1, (size_t)bytes, stdin) != (size_t)bytes) exit(3);
    return at;
}

static void result(const void *at, int64_t bytes) {
    if (fwrite(at, 1, (size_t)bytes, stdout) != (size_t)bytes) exit(4);
}

static void quantize_case(const Case *c) {
    int64_t numel = c->M, blocks = ceil_div(numel, c->blocksize), packed = ceil_div(numel, 2);
    const void *x = operand(numel * (c->dtype == FP32 ? 4 : 2));
    const float *thresholds = operand(15 * 4);
    const uint8_t *order = operand(16);
    float *absmax = (float *)room(blocks * 4);
    uint8_t *out = room(packed);
    refq4_quantize(x, (int)c->dtype, numel, c->blocksize, thresholds, order, 16, (int)c->N, NULL, absmax, out, 1, 2);
    result(out, packed);
    result(absmax, blocks * 4);
}

/* A weight of `numel` elements: codes, the code, scales. */
static Weight weight_operand(const Case *c, int64_t numel) {
    Weight w = {.blocksize = c->blocksize};
    w.packed = operand(ceil_div(numel, 2));
    w.code = operand(16 * 4);
    w.absmax = operand(ceil_div(numel, c->blocksize) * 4);
    return w;
}

static void dequantize_case(const Case *c) {
    int64_t bytes = c->M * (c->dtype == FP32 ? 4 : 2);
    Weight w = weight_operand(c, c->M);
    void *out = room(bytes);
    refq4_dequantize(&w, 4, c->M, out, (int)c->dtype, 2);
    result(out, bytes);
}

/* Tiles of the weight; ends the process if they don't give its bytes back. */
static uint8_t *tiles_of(const Case *c, const Weight *w) {
    uint8_t *tiles = room(ceil_div(c->N, PANEL) * panel_bytes(c->K, c->blocksize));
    uint8_t *packed = room(c->N * c->K / 2), *absmax = room(c->N * c->K / c->blocksize * 4);
    refq4_tile(w, c->N, c->K, tiles, 2);
    refq4_untile(tiles, c->N, c->K, c->blocksize, packed, (float *)absmax, 2);
    if (memcmp(packed, w->packed, (size_t)(c->N * c->K / 2))) exit(5);
    if (memcmp(absmax, w->absmax, (size_t)(c->N * c->K / c->blocksize * 4))) exit(6);
    return tiles;
}

static void product_case(const Case *c) {
    int64_t size = c->dtype == FP32 ? 4 : 2;
    const void *x = operand(c->M * c->K * size), *bias = operand(c->N * size);
    Weight w = weight_operand(c, c->N * c->K);
    void *y = room(c->M * c->N * size);
    const uint8_t *tiles = c->op == TILED_PRODUCT_OP ? tiles_of(c, &w) : NULL;
    ProductFn kernel = product_kernels[c->kernel].run;
    if (refq4_product(kernel, x, bias, y, (int)c->dtype, c->M, c->N, c->K, tiles, &w, 2) != OK) exit(7);
    result(y, c->M * c->N * size);
}

/* What the instructions that emulated_neon.h writes itself make of any bits: subnormals, infinities and NaN among them. */
static void instructions(void) {
    uint32_t state = 1;
    for (int i = 0; i < 20000; i++) {
        uint16_t a[8], b[8];
        float sum[4], out[16];
        for (int j = 0; j < 8; j++) {
            state = state * 1664525 + 1013904223, a[j] = (uint16_t)(state >> 16);
            state = state * 1664525 + 1013904223, b[j] = (uint16_t)(state >> 16);
            if (i % 2) b[j] = (uint16_t)((b[j] & 0x80FF) | (0x3F80 - (a[j] & 0x7F00) + 0x3F80)); /* products near each other */
        }
        for (int j = 0; j < 4; j++) state = state * 1664525 + 1013904223, sum[j] = i % 2 ? 1 + (float)(state >> 9) : float_of(state);
        float32x4_t s = vld1q_f32(sum);
        uint16x8_t x = vld1q_u16(a), y = vld1q_u16(b);
        vst1q_f32(out, vbfdotq_f32(s, vreinterpretq_bf16_u16(x), vreinterpretq_bf16_u16(y)));
        vst1q_f32(out + 4, vbfmmlaq_f32(s, vreinterpretq_bf16_u16(x), vreinterpretq_bf16_u16(y)));
        vst1q_f32(out + 8, vfmlalq_low_f16(s, vreinterpretq_f16_u16(x), vreinterpretq_f16_u16(y)));
        vst1q_f32(out + 12, vfmlalq_high_f16(s, vreinterpretq_f16_u16(x), vreinterpretq_f16_u16(y)));
        for (int j = 0; j < 16; j++) out[j] = out[j] == out[j] ? out[j] : float_of(0x7FC00000); /* any NaN is as good */
        result(out, sizeof out);
    }
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "beyond") == 0) return room(5)[5]; /* proof that the pages do fault */
    if (argc > 1 && strcmp(argv[1], "names") == 0) {
        for (size_t i = 0; i < sizeof product_kernels / sizeof *product_kernels; i++) puts(product_kernels[i].name);
        return 0;
    }
    if (argc > 1 && strcmp(argv[1], "instructions") == 0) {
        instructions();
        return 0;
    }
    Case c;
    while (fread(&c, sizeof c, 1, stdin) == 1) {
        at_start = c.at_start;
        if (c.op == QUANTIZE_OP) quantize_case(&c);
        else if (c.op == DEQUANTIZE_OP) dequantize_case(&c);
        else product_case(&c);
    }
    return 0;
}
