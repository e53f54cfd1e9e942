/* What every kernel file shares: the weight as C sees it, and the number formats.
 *
 * One tier is one translation unit: library.c includes the files its tier can run and is compiled with that tier's
 * flags. So everything is static. A file also compiles alone, for an editor or to look at one kernel: each has its
 * includes, and the command stands at the top. It is run in this folder.
 *
 * Dimensions, everywhere: M tokens, N out_features, K in_features; y[m][n] = sum over k of x[m][k] * w[n][k].
 * All sizes are 64-bit.
 *
 * cc -O3 -fsyntax-only refq4.h
 */
#ifndef REFQ4_H
#define REFQ4_H

#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum dtype { FP32 = 0, BF16 = 1, FP16 = 2 };

/* The canonical weight: flat, the first element of a pair in the high nibble, one scale for `blocksize` elements.
 *
 *     element      0     1     2     3               w = code[nibble] * absmax[element / blocksize]
 *     byte       [ hi   lo ] [ hi   lo ] ...
 *
 * With double quantisation absmax is NULL, and  absmax[i] = nested_code[q[i]] * nested_absmax[i / nested_blocksize]
 * + *nested_offset, each operation rounded to fp32 (the file is compiled with -ffp-contract=off for that).
 *
 * Python fills this struct in (refq4_cpu/arguments.py), nine words of eight bytes.
 */
typedef struct {
    const uint8_t *packed;
    const float *code; /* 16 values */
    int64_t blocksize;
    const float *absmax;
    const uint8_t *q;
    const float *nested_absmax, *nested_code, *nested_offset;
    int64_t nested_blocksize;
} Weight;
_Static_assert(sizeof(Weight) == 72, "refq4_cpu/arguments.py packs nine words of eight bytes");
_Static_assert(offsetof(Weight, blocksize) == 16 && offsetof(Weight, nested_blocksize) == 64, "in this order");

/* A product in full. `tiles` is the weight in the tile layout (tiles.h) or NULL; then `weight` is canonical. */
typedef struct {
    const void *x, *bias; /* [M, K] and [N] (or NULL), both of `dtype` */
    void *y;              /* [M, N] of `dtype` */
    enum dtype dtype;
    int64_t M, N, K;
    Weight weight;
    const uint8_t *tiles;
    int threads;
    const uint8_t *then; /* tiles of the product that comes next, if any: only asked for, never read */
} Product;

/* A long sum in fp32 is a sum of subtotals, each of this many elements and begun at zero: in one chain, every addition
 * would round at the size of all that came before. Over 4096 elements the mean error is a third to a half less. */
enum { SUBTOTAL_ELEMENTS = 512 };

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* 64-byte aligned scratch that the caller frees. */
static inline void *scratch(size_t bytes) { return aligned_alloc(64, (bytes + 64) & ~(size_t)63); }

/* Ask the system for 2 MB pages under a large result that is about to be written: a fresh mapping otherwise takes an
 * interrupt for every 4 KB, and every 4 KB another walk through the page tables when it is read. Only a request. */
static inline void ask_for_large_pages(void *at, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t large = 2 << 20;
    uintptr_t first = ((uintptr_t)at + large - 1) & ~(large - 1), last = ((uintptr_t)at + (uintptr_t)bytes) & ~(large - 1);
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)at, (void)bytes;
#endif
}

static inline float block_scale(const Weight *w, int64_t block) {
    if (w->absmax) return w->absmax[block];
    float scaled = w->nested_code[w->q[block]] * w->nested_absmax[block / w->nested_blocksize];
    return scaled + *w->nested_offset;
}

static inline unsigned nibble(const uint8_t *packed, int64_t element) {
    uint8_t byte = packed[element >> 1];
    return element & 1 ? byte & 15u : byte >> 4;
}

/* --- number formats ---------------------------------------------------------------------------------------------
 *
 *     fp32   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm        bf16   the upper half of it
 *     fp16   s eeeee mmmmmmmmmm                        exponent bias 15 instead of 127
 */
static inline uint32_t bits_of(float v) { uint32_t u; memcpy(&u, &v, 4); return u; }
static inline float float_of(uint32_t u) { float v; memcpy(&v, &u, 4); return v; }

static inline float bf16_to_fp32(uint16_t h) { return float_of((uint32_t)h << 16); }

/* Nearest, ties to even: add just under half a unit, plus one if the last kept bit is odd. A NaN stays one. */
static inline uint16_t fp32_to_bf16(float v) {
    uint32_t u = bits_of(v);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1)) >> 16;
    return (uint16_t)(v == v ? rounded : 0x7FC0u);
}

/* Shift the 15 lower bits into fp32's place and let a multiplication by 2**112 mend the exponent bias: it is exact,
 * for subnormals too. Infinity and NaN need their exponent filled up. */
static inline float fp16_to_fp32(uint16_t h) {
    uint32_t u = (uint32_t)(h & 0x7FFF) << 13;
    float magnitude = float_of(u) * 0x1p112f;
    if ((h & 0x7C00) == 0x7C00) magnitude = float_of(u | 0x7F800000u);
    return float_of(bits_of(magnitude) | (uint32_t)(h & 0x8000) << 16);
}

static inline uint16_t fp32_to_fp16(float v) {
    uint32_t u = bits_of(v), sign = u >> 16 & 0x8000u, a = u & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (a >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u); /* 65520 and above round to infinity */
    if (a < 0x38800000u) /* below 2**-14: adding 0.5 rounds at fp16's subnormal step, 2**-24 */
        return (uint16_t)(sign | (bits_of(float_of(a) + 0.5f) - 0x3F000000u));
    return (uint16_t)(sign | (a - 0x38000000u + 0xFFFu + (a >> 13 & 1)) >> 13);
}

static inline float load_as_fp32(const void *p, enum dtype dtype, int64_t i) {
    if (dtype == FP32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return dtype == BF16 ? bf16_to_fp32(h) : fp16_to_fp32(h);
}

static inline void store_from_fp32(void *p, enum dtype dtype, int64_t i, float v) {
    if (dtype == FP32) ((float *)p)[i] = v;
    else ((uint16_t *)p)[i] = dtype == BF16 ? fp32_to_bf16(v) : fp32_to_fp16(v);
}

#endif
