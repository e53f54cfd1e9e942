// CUDA's own words, as far as the kernels use them, in C++: what nvcc would know without any #include.
#pragma once
#include "fibers.h"
#include "warp.h"

// One block at a time, so one copy; in a section of its own, so that each block can find it full of 0xff. But not
// under AddressSanitizer, which knows the ends of a variable only in the usual section.
#ifdef HOST_ADDRESS_SANITIZER
#define __shared__ static
#else
#define __shared__ static __attribute__((section("host_shared")))
#endif

// The C library's. In C++ <math.h> brings templates that take longer to compile than all of a kernel.
extern "C" float fmaf(float, float, float), fabsf(float), fminf(float, float), fmaxf(float, float);

// The alignment is the GPU's: UBSan reports the access that breaks it.
struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

static inline void __syncthreads(int line = __builtin_LINE()) { host::sync_threads(line); }
static inline void __syncwarp(u32 mask = ~0u, int line = __builtin_LINE()) { host::sync_warp(mask, line); }

template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcg(const T *p) { return *p; }

// Blocks run one after the other, so what orders them on a GPU has nothing to do here.
static inline void __threadfence() {}
static inline u32 atomicAdd(u32 *p, u32 value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }

static inline float __uint_as_float(u32 bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

static inline u32 __float_as_uint(float value) {
    u32 bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

// Compiled with -ffp-contract=off: each of these rounds on its own.
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline int __clzll(long long v) { return v ? __builtin_clzll((u64)v) : 64; }

// Bytes 0..3 are those of a, 4..7 those of b; each nibble of the selector picks one (bit 3 would copy its sign).
static inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u64 bytes = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= (u32)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

// Who reads from a lane that the mask leaves out has no defined value on the GPU, and is an error here.
template <class T>
static inline T __shfl_sync(u32 mask, T value, int source, int = 32, int line = __builtin_LINE()) {
    host::shuffle(&value, sizeof value, mask, source & 31, line);
    return value;
}
template <class T>
static inline T __shfl_xor_sync(u32 mask, T value, int bits, int = 32, int line = __builtin_LINE()) {
    host::shuffle(&value, sizeof value, mask, ((int)threadIdx.x & 31) ^ bits, line);
    return value;
}
