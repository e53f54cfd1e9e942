/* Quantising, rung 2: one pass over memory, eight elements a thread, no search. The rule is in quantize_1_naive.cu.
 *
 * For blocks of 8, 16, ... elements (a power of two), 16-byte aligned. A warp works on 256 elements at a time:
 *
 *     lane        0           1          ...     7           8         ...    31
 *     elements  [0 .. 7]   [8 .. 15]     ...  [56 .. 63]  [64 .. 71]  ...  [248 .. 255]
 *               |<-- a block of 64: 3 shuffles give its maximum -->|
 *
 * Blocks of more than 256 are read twice, and the second time they come from the cache.
 *
 * Which code? [-1, 1] is cut into 65 cells, and each cell knows the one threshold that lies in it:
 *
 *     cell     round(32 * scaled) + 32             rises with `scaled`, so thresholds in lower cells lie below it,
 *     code     scaled > threshold ? above : below  and those in higher cells do not: one comparison is left
 *
 *     ----|--------t--------|-----------------|---------t-------|----        t: a threshold (+infinity if none)
 *           below    above      below             below   above
 *
 * A cell with several thresholds (FP4 has three near zero) says so, and its elements count on from the first. The clamp
 * to [-1, 1] costs nothing: a threshold of 1 or more becomes +infinity, one below -1 becomes -infinity.
 */
#include "device.cuh"

#define THREADS 256
#define GROUP 8
#define PIECE (32 * GROUP)
#define CELLS 65
#define SLOTS 128  /* a cell's number is seven bits; only a NaN can reach the last slots */
#define COPIES 16  /* a cell is 8 bytes: one copy per pair of banks */
#define LONGEST 16
#define INFINITE __uint_as_float(0x7F800000u)

struct alignas(8) Cell {
    float threshold;
    u32 codes; /* below | above << 8 | rank of below << 16 | several << 31 */
};

struct Tables {
    Cell cells[SLOTS * COPIES];
    float thresholds[LONGEST]; /* clamped; infinity after the last */
    u32 order[LONGEST];
};

/* 1.5 * 2**23 + 32: adding it rounds to an integer and leaves that in the lowest bits. */
DEVICE u32 cell_of(float scaled) { return __float_as_uint(__fmaf_rn(scaled, 32.0f, 12582944.0f)) & (SLOTS - 1); }

DEVICE Cell make_cell(const Tables &tables, int length, u32 slot) {
    int rank = 0, inside = 0;
    for (int i = 0; i < length - 1; i++) {
        u32 its_cell = cell_of(fminf(fmaxf(tables.thresholds[i], -1.0f), 1.0f));
        rank += its_cell < slot;
        inside += its_cell == slot;
    }
    if (slot >= CELLS) rank = 0; /* a NaN is above no threshold */
    Cell cell;
    cell.threshold = inside ? tables.thresholds[rank] : INFINITE;
    cell.codes = tables.order[rank] | tables.order[inside ? rank + 1 : rank] << 8 | rank << 16 | (inside > 1 ? 1u << 31 : 0);
    return cell;
}

DEVICE void make_tables(const QuantizeArguments &p, Tables &tables) {
    u32 i = threadIdx.x;
    if (i < LONGEST) {
        float t = i < p.code_length - 1 ? __ldg(p.thresholds + i) : INFINITE;
        tables.thresholds[i] = t >= 1.0f ? INFINITE : t < -1.0f ? -INFINITE : t;
        tables.order[i] = i < p.code_length ? __ldg(p.order + i) : 0;
    }
    __syncthreads();
    if (i < SLOTS) {
        Cell cell = make_cell(tables, p.code_length, i);
        for (int copy = 0; copy < COPIES; copy++) tables.cells[i * COPIES + (copy + i) % COPIES] = cell;
    }
    __syncthreads();
}

/* The 8 elements from `first` on; zeros beyond the end, where only the last threads get to. */
DEVICE void load_group(const QuantizeArguments &p, i64 first, float (&v)[GROUP]) {
    const T *x = (const T *)p.x + first;
    if (first + GROUP <= p.numel) load8(x, v);
    else {
#pragma unroll
        for (int k = 0; k < GROUP; k++) v[k] = first + k < p.numel ? to_fp32(x[k]) : 0.0f;
    }
}

DEVICE void store_group(const QuantizeArguments &p, i64 first, u32 word) {
    if (first + GROUP <= p.numel) *(u32 *)(p.out + first / 2) = word;
    else {
#pragma unroll
        for (int k = 0; k < GROUP; k += 2) {
            if (first + k + 1 == p.numel) word = (word & ~(15u << 4 * k)) | (u32)p.pad_code << 4 * k;
            if (first + k < p.numel) p.out[(first + k) / 2] = (u8)(word >> 4 * k);
        }
    }
}

DEVICE u32 quantize_group(const Tables &tables, const float (&v)[GROUP], float inverse) {
    const Cell *cells = tables.cells + threadIdx.x % COPIES;
    u32 word = 0;
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
        float scaled = __fmul_rn(v[k], inverse);
        Cell cell = cells[cell_of(scaled) * COPIES];
        u32 code = (scaled > cell.threshold ? cell.codes >> 8 : cell.codes) & 15u;
        if ((int)cell.codes < 0) {
            u32 rank = cell.codes >> 16 & 15u;
            while (scaled > tables.thresholds[rank]) rank++;
            code = tables.order[rank];
        }
        word |= code << (8 * (k / 2) + (k % 2 ? 0 : 4));
    }
    return word;
}

DEVICE u32 largest(const float (&v)[GROUP], u32 most) {
#pragma unroll
    for (int k = 0; k < GROUP; k++) most = max(most, __float_as_uint(v[k]) & 0x7FFFFFFFu);
    return most;
}

KERNEL_RESIDENT(quantize_4bit, THREADS, 4)(QuantizeArguments p) {
    __shared__ Tables tables;
    make_tables(p, tables);
    int lane = threadIdx.x % 32, shift = 63 - __clzll(p.blocksize);
    int sharers = (int)(p.blocksize < PIECE ? p.blocksize : PIECE) / GROUP; /* lanes that share a block */
    i64 span = p.blocksize < PIECE ? PIECE : p.blocksize, step = (i64)gridDim.x * (THREADS / 32) * span;

    for (i64 first = ((i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * span; first < p.numel; first += step) {
        float v[GROUP];
        i64 at = first + lane * GROUP;
        load_group(p, at, v);
        u32 most = largest(v, 0);
        for (i64 i = PIECE; i < span; i += PIECE) {
            load_group(p, at + i, v);
            most = largest(v, most);
        }
        for (int o = 1; o < sharers; o *= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, o));
        float absmax = __uint_as_float(most), inverse = __frcp_rn(absmax);
        if (!(fabsf(inverse) <= 3.402823466e38f)) inverse = 0.0f;
        if (lane % sharers == 0 && at < p.numel) p.absmax[at >> shift] = absmax;
        for (i64 i = 0; i < span; i += PIECE) {
            if (span > PIECE) load_group(p, at + i, v);
            store_group(p, at + i, quantize_group(tables, v, inverse));
        }
    }
}
