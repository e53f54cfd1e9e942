// The functions that kernels/device.cuh has "on the device", in C++: it includes this file when REFQ4_HOST is defined.
//
// What PTX does in one instruction is done here by its definition. Results are the GPU's, except that mma sums one
// product after the other in fp32, where tensor cores keep fewer or more bits of each; the error budget covers both.
#pragma once
#include "vocabulary.h"

// Dynamic shared memory is a heap block of exactly the bytes launched with, so AddressSanitizer knows its end.
#define DEVICE [[maybe_unused]] static inline
#define KERNEL(name, threads) extern "C" void name
#define KERNEL_RESIDENT(name, threads, ctas) extern "C" void name
#define DYNAMIC_SHARED(name) u8 *name = host::dynamic_shared

#if defined(T_BF16)
#define HOST_HALF host::Half::BF16
#else
#define HOST_HALF host::Half::FP16
#endif

DEVICE u32 pack_bf16(float lo, float hi) {
    return host::from_float(host::Half::BF16, lo) | (u32)host::from_float(host::Half::BF16, hi) << 16;
}
DEVICE u32 pack_fp16(float lo, float hi) {
    return host::from_float(host::Half::FP16, lo) | (u32)host::from_float(host::Half::FP16, hi) << 16;
}
DEVICE float fp16_to_fp32(u16 bits) { return host::to_float(host::Half::FP16, bits); }

DEVICE uint4 load_once16(const void *p) { return *(const uint4 *)p; }

// Between its issue and the wait the destination has no defined contents: it is written twice, first with 0xff, and a
// thread that looks meanwhile sees NaN, and under ThreadSanitizer is in a race with whichever write comes next.
DEVICE void copy_async16(void *to, const void *from, int bytes) {
    if ((uintptr_t)to % 16 || (bytes && (uintptr_t)from % 16)) host::fail("cp.async: an address is no multiple of 16");
    *(uint4 *)to = make_uint4(~0u, ~0u, ~0u, ~0u);
    host::copy_issued({to, from, bytes});
}
DEVICE void copy_async_commit() { host::copies_committed(); }
template <int left> DEVICE void copy_async_wait() {
    for (host::Copy copy; host::copy_landed(left, &copy);)
        *(uint4 *)copy.to = copy.bytes ? *(const uint4 *)copy.from : make_uint4(0, 0, 0, 0);
}

DEVICE void multiply_16x8x16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, int line = __builtin_LINE()) {
    u32 b[2] = {b0, b1};
#if __CUDA_ARCH__ >= 800
    host::mma(HOST_HALF, 2, d, a, b, line);
#else
    host::mma(HOST_HALF, 1, d, a, b, line);
    host::mma(HOST_HALF, 1, d, a + 2, b + 1, line);
#endif
}
