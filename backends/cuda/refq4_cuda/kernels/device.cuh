/* What every kernel shares: the arguments as C sees them, the number formats, and all the PTX there is.
 *
 * Dimensions, everywhere: M tokens, N out_features, K in_features; y[m][n] = sum over k of x[m][k] * w[n][k].
 * No header is included: NVRTC then needs nothing but this folder. A kernel is compiled for one dtype of activations
 * or results, named by a macro: T_FP32, T_BF16 or T_FP16.
 */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

/* --- arguments: one struct per kernel, by value; launch.py has the same fields in the same order ------------------ */

/* One scale for `blocksize` elements of the flat weight. With double quantisation `q` is there, and a scale is
 * nested_code[q[i]] * absmax[i / nested_blocksize] + *nested_offset, each operation rounded to fp32.
 * The shifts are log2 of the sizes, or -1 where a size is no power of two. */
struct Scales {
    const float *absmax;
    const u8 *q;
    const float *nested_code, *nested_offset;
    i64 blocksize, nested_blocksize;
    int shift, nested_shift;
};

/*     element      0     1     2     3               w = code[nibble] * scale of element / blocksize
 *     byte       [ hi   lo ] [ hi   lo ] ...         the first element of a pair is in the high nibble        */
struct Weight {
    const u8 *packed;
    const float *code; /* 16 values */
    Scales scales;
};

struct QuantizeArguments {
    const void *x;
    i64 numel, blocksize;
    const float *thresholds; /* [code_length - 1], ascending */
    const u8 *order;         /* [code_length], rank to code */
    int code_length, pad_code;
    float *absmax;
    u8 *out;
};

struct DequantizeArguments {
    Weight weight;
    void *out;
    i64 numel;
    int aligned; /* sizes are powers of two, eight elements lie in one block, addresses allow 16-byte accesses */
};

struct ProductArguments {
    const void *x, *bias; /* [M, K] and [N] or NULL */
    void *y;              /* [M, N] */
    i64 M, N, K;
    Weight weight;
    float *partial; /* split-K: sums on their way from one CTA to another, and how many have arrived */
    u32 *arrived;
    int row_warps; /* how many of a CTA's warps stand side by side along N; the others share K */
    int splits;
    float factor, back; /* tensor cores: the code is multiplied by `factor` before it is rounded, sums by 1/factor */
};

/* A product for each expert (grouped.cuh): the sizes are those of one, the pointers those of expert 0 and row 0. */
struct GroupedArguments {
    ProductArguments product;
    const int4 *tiles; /* expert, first row, rows, 0 */
};

/* --- on the device ------------------------------------------------------------------------------------------------ */

#define DEVICE static __device__ __forceinline__
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
#define KERNEL_RESIDENT(name, threads, ctas) extern "C" __global__ void __launch_bounds__(threads, ctas) name
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]

/* Two fp32 to a packed pair of 16-bit numbers, nearest, ties to even; `lo` in bits 0..15. A NaN stays one. */
DEVICE u32 pack_bf16(float lo, float hi) {
    u32 r;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    u32 a = __float_as_uint(lo), b = __float_as_uint(hi);
    a = lo == lo ? a + 0x7FFFu + (a >> 16 & 1u) : 0x7FC00000u;
    b = hi == hi ? b + 0x7FFFu + (b >> 16 & 1u) : 0x7FC00000u;
    r = __byte_perm(a, b, 0x7632);
#endif
    return r;
}
DEVICE u32 pack_fp16(float lo, float hi) {
    u32 r;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    u16 l, h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(lo));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(hi));
    r = l | (u32)h << 16;
#endif
    return r;
}
DEVICE float fp16_to_fp32(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

/* threadIdx.x, read once: the compiler would read it, and what follows from it, anew in the middle of a loop. */
DEVICE u32 thread_number() {
    u32 number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    return number;
}

/* 32-bit address in shared memory, the form cp.async wants. */
DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

/* 16 bytes that are used once: past the L1 cache, so that they do not push the activations out of it. */
DEVICE uint4 load_once16(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

#if __CUDA_ARCH__ >= 800
/* 16 bytes from global to shared memory without passing through registers; `bytes` 0 writes zeros and reads nothing. */
DEVICE void copy_async16(void *to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Returns when all of this thread's groups but the newest `left` have landed. */
template <int left> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(left) : "memory"); }
#endif

/* D[16x8] += A[16x16] * B[16x8], fp32 sums of 16-bit products. Lane 4g + t (g = 0..7, t = 0..3) holds
 *
 *     A  row g: k = 2t, 2t+1 in a[0], k = 2t+8, 2t+9 in a[2];  row g+8: the same in a[1], a[3]
 *     B  column g: k = 2t, 2t+1 in b[0], k = 2t+8, 2t+9 in b[1]
 *     D  row g: columns 2t, 2t+1 in d[0], d[1];  row g+8: in d[2], d[3]
 *
 * Turing has half the depth, hence two steps; and no bf16. */
DEVICE void multiply_16x8x16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
#ifdef T_BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

/* --- the dtype this file is compiled for -------------------------------------------------------------------------- */

#if defined(T_FP32)
typedef float T;
DEVICE float to_fp32(T v) { return v; }
DEVICE T from_fp32(float v) { return v; }
#else
typedef u16 T;
#if defined(T_BF16)
DEVICE u32 pack(float lo, float hi) { return pack_bf16(lo, hi); }
DEVICE float to_fp32(T v) { return __uint_as_float((u32)v << 16); }
#else
DEVICE u32 pack(float lo, float hi) { return pack_fp16(lo, hi); }
DEVICE float to_fp32(T v) { return fp16_to_fp32(v); }
#endif
DEVICE T from_fp32(float v) { return (T)pack(v, 0.0f); }
#endif

#ifndef T_FP32
/* What the tensor cores multiply with for a stored byte: its two weights without their scale, rounded at a factor at
 * which the code rounds best (operands.py). */
DEVICE u32 pair_of_byte(const float *code, u32 byte, float factor) {
    return pack(__fmul_rn(__ldg(code + (byte >> 4)), factor), __fmul_rn(__ldg(code + (byte & 15)), factor));
}
#endif

/* Eight consecutive elements, by 16-byte accesses. */
DEVICE void load8(const T *p, float (&v)[8]) {
#ifdef T_FP32
    float4 a = ((const float4 *)p)[0], b = ((const float4 *)p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
#else
    uint4 a = *(const uint4 *)p;
    u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_fp32((T)(words[i / 2] >> 16 * (i % 2)));
#endif
}
DEVICE void store8(T *p, const float (&v)[8]) {
#ifdef T_FP32
    ((float4 *)p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    ((float4 *)p)[1] = make_float4(v[4], v[5], v[6], v[7]);
#else
    *(uint4 *)p = make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
#endif
}

/* --- scales ------------------------------------------------------------------------------------------------------- */

DEVICE i64 divide(i64 i, i64 size, int shift) { return shift >= 0 ? i >> shift : i / size; }

/* NVRTC would fuse the product and the sum into one rounding: __fmul_rn and __fadd_rn keep the two. */
DEVICE float nested_scale(const Scales &s, u32 q, float absmax) {
    return __fadd_rn(__fmul_rn(__ldg(s.nested_code + q), absmax), __ldg(s.nested_offset));
}

/* The scale of one block, whatever the sizes. */
DEVICE float scale_of_block(const Scales &s, i64 block) {
    if (!s.q) return __ldg(s.absmax + block);
    return nested_scale(s, __ldg(s.q + block), __ldg(s.absmax + divide(block, s.nested_blocksize, s.nested_shift)));
}

/* The same where all sizes are powers of two: no division, which takes a hundred instructions. */
DEVICE float scale_of_shifted_block(const Scales &s, i64 block) {
    if (!s.q) return __ldg(s.absmax + block);
    return nested_scale(s, __ldg(s.q + block), __ldg(s.absmax + (block >> s.nested_shift)));
}

DEVICE u32 nibble(const u8 *packed, i64 element) {
    u32 byte = __ldg(packed + (element >> 1));
    return element & 1 ? byte & 15u : byte >> 4;
}

/* One finished sum: bias, the one rounding, and the ends of M and N. */
DEVICE void store_product(const ProductArguments &p, i64 m, i64 n, float sum) {
    if (m >= p.M || n >= p.N) return;
    if (p.bias) sum += to_fp32(__ldg((const T *)p.bias + n));
    ((T *)p.y)[m * p.N + n] = from_fp32(sum);
}
