/* Quantising, rung 1: the rule in two passes, for any blocksize, any code of up to 256 values, any alignment.
 *
 *     absmax    largest magnitude of the block; a NaN in the block makes it NaN           block_absmax: a warp per block
 *     scaled    x * (1/absmax), clamped to [-1, 1]; where 1/absmax is not finite, x * 0   block_codes: a thread per byte
 *     rank      how many thresholds lie below it; a NaN has rank 0
 *     code      order[rank]
 *
 * Two kernels, because a byte may hold the last element of one block and the first of the next: it can be written only
 * when both scales are known.
 *
 *     PACKED    two codes a byte, the first in the high nibble; an odd last one is padded with pad_code
 *
 * What limits it: x is read twice, and each code costs a search of four steps (eight for 256 values) in shared memory.
 */
#include "device.cuh"

#define THREADS 256
#define LONGEST 256

/* Magnitudes order like their bits, and a NaN's bits are above infinity's: an integer maximum keeps it. */
KERNEL(block_absmax, THREADS)(QuantizeArguments p) {
    i64 blocks = (p.numel + p.blocksize - 1) / p.blocksize, step = (i64)gridDim.x * (THREADS / 32);
    int lane = threadIdx.x % 32;
    for (i64 block = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; block < blocks; block += step) {
        i64 first = block * p.blocksize, last = first + p.blocksize;
        if (last > p.numel) last = p.numel;
        u32 most = 0;
        for (i64 i = first + lane; i < last; i += 32) {
            u32 magnitude = __float_as_uint(to_fp32(((const T *)p.x)[i])) & 0x7FFFFFFFu;
            most = magnitude > most ? magnitude : most;
        }
#pragma unroll
        for (int o = 16; o > 0; o /= 2) {
            u32 other = __shfl_xor_sync(0xFFFFFFFFu, most, o);
            most = other > most ? other : most;
        }
        if (lane == 0) p.absmax[block] = __uint_as_float(most);
    }
}

DEVICE u32 code_of(const QuantizeArguments &p, const float *thresholds, i64 i) {
    float inverse = __frcp_rn(__ldg(p.absmax + i / p.blocksize));
    if (!(fabsf(inverse) <= 3.402823466e38f)) inverse = 0.0f;
    float scaled = __fmul_rn(to_fp32(((const T *)p.x)[i]), inverse);
    scaled = scaled < -1.0f ? -1.0f : scaled > 1.0f ? 1.0f : scaled;
    int rank = 0, left = p.code_length - 1;
    while (left > 0) { /* the first `rank` thresholds are below; `left` are undecided */
        int half = (left + 1) / 2;
        bool up = scaled > thresholds[rank + half - 1];
        rank += up ? half : 0;
        left = up ? left - half : half - 1;
    }
    return __ldg(p.order + rank);
}

KERNEL(block_codes, THREADS)(QuantizeArguments p) {
    __shared__ float thresholds[LONGEST];
    for (int i = threadIdx.x; i < p.code_length - 1; i += THREADS) thresholds[i] = __ldg(p.thresholds + i);
    __syncthreads();
    i64 step = (i64)gridDim.x * THREADS, first = (i64)blockIdx.x * THREADS + threadIdx.x;
#ifdef PACKED
    for (i64 byte = first; byte < (p.numel + 1) / 2; byte += step) {
        u32 high = code_of(p, thresholds, 2 * byte);
        u32 low = 2 * byte + 1 < p.numel ? code_of(p, thresholds, 2 * byte + 1) : p.pad_code;
        p.out[byte] = (u8)(high << 4 | low);
    }
#else
    for (i64 i = first; i < p.numel; i += step) p.out[i] = (u8)code_of(p, thresholds, i);
#endif
}
