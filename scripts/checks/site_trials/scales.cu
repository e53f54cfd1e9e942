// scales.cu: the largest |w| of each group of 256 weights. A block of 128 threads takes a row, group after group.
//
//     w [rows, groups * 256] fp32  ->  scales [rows, groups] fp32       grid (rows), block (128)
//
//     warp 0   w[  0.. 31], w[128..159]  --shuffles-->  partial[0] --.
//     warp 1   w[ 32.. 63], w[160..191]  --shuffles-->  partial[1]   +-- thread 0: the largest of the four
//     warp 2   w[ 64.. 95], w[192..223]  --shuffles-->  partial[2]   |
//     warp 3   w[ 96..127], w[224..255]  --shuffles-->  partial[3] --'

extern "C" __global__ void group_scales(const float *w, float *scales, int groups) {
    __shared__ float partial[4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int group = 0; group < groups; group++) {
        const float *from = w + (blockIdx.x * groups + group) * 256;
        float largest = fmaxf(fabsf(from[threadIdx.x]), fabsf(from[threadIdx.x + 128]));
        for (int step = 16; step; step /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        if (lane == 0) partial[warp] = largest;
        __syncthreads();
        if (threadIdx.x == 0)
            scales[blockIdx.x * groups + group] =
                fmaxf(fmaxf(partial[0], partial[1]), fmaxf(partial[2], partial[3]));
    }
}
