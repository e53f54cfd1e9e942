// Shuffles and mma.sync, computed by the last lane to arrive; and the 16-bit floats they are made of.
#include "warp.h"

#include <cstring>

namespace {

float as_float(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

u32 as_bits(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}

float from_fp16(u16 half) {
    u32 sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    float value = as_float(magnitude << 13) * 0x1p112f;  // the exponents' biases differ by 112, for subnormals too
    return sign ? -value : value;
}

u16 to_fp16(float value) {
    u32 bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
    if (magnitude < 0x38800000)                         // below 2^-14: fp32 rounds at 2^-24 when 0.5 is added
        return sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f));
    u32 rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return sign | (rounded - (112u << 23)) >> 13;
}

u16 to_bf16(float value) {
    u32 bits = as_bits(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

struct Shuffle {
    u64 value;
    int source;
};

struct Fragments {
    host::Half type;
    int steps;
    float d[4];
    u32 a[4], b[2];
};

// Lane 4g + t of the warp holds (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"):
//
//     A 16 x 16          k 2t, 2t+1   2t+8, 2t+9       B 16 x 8         n g          C, D 16 x 8     n 2t   2t+1
//       row g              a[0]         a[2]             k 2t, 2t+1     b[0]           row g          d[0]   d[1]
//       row g + 8          a[1]         a[3]             k 2t+8, 2t+9   b[1]           row g + 8      d[2]   d[3]
void multiply(const host::Lanes &met) {
    float A[16][16], B[16][8];
    auto given = [&](int lane) -> const Fragments & { return *(const Fragments *)met.give[lane]; };
    host::Half type = given(0).type;
    int depth = 8 * given(0).steps;
    for (int lane = 0; lane < 32; lane++)
        for (int k = 0; k < depth; k += 8)
            for (int half = 0; half < 2; half++) {
                int g = lane / 4, t = lane % 4, column = k + 2 * t + half, shift = 16 * half;
                const Fragments &f = given(lane);
                A[g][column] = host::to_float(type, f.a[k / 4] >> shift);
                A[g + 8][column] = host::to_float(type, f.a[k / 4 + 1] >> shift);
                B[column][g] = host::to_float(type, f.b[k / 8] >> shift);
            }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = given(lane).d[i];
            for (int k = 0; k < depth; k++) sum += A[row][k] * B[k][column];
            ((float *)met.get[lane])[i] = sum;
        }
}

}  // namespace

float host::to_float(Half type, u16 bits) { return type == Half::BF16 ? as_float((u32)bits << 16) : from_fp16(bits); }

u16 host::from_float(Half type, float value) { return type == Half::BF16 ? to_bf16(value) : to_fp16(value); }

void host::shuffle(void *value, int bytes, u32 mask, int source, int line) {
    Shuffle give{0, source};
    memcpy(&give.value, value, bytes);
    u64 got = 0;
    meet("a shuffle", line, mask, &give, &got, [](const Lanes &met) {
        for (int lane = 0; lane < 32; lane++) {
            if (!met.give[lane]) continue;
            const void *from = met.give[((const Shuffle *)met.give[lane])->source];
            if (!from) fail("a shuffle reads a lane that its mask leaves out");
            *(u64 *)met.get[lane] = ((const Shuffle *)from)->value;
        }
    });
    memcpy(value, &got, bytes);
}

void host::mma(Half type, int steps, float *d, const u32 *a, const u32 *b, int line) {
    Fragments give{type, steps, {}, {}, {}};
    memcpy(give.d, d, sizeof give.d);
    memcpy(give.a, a, 2 * steps * sizeof *a);
    memcpy(give.b, b, steps * sizeof *b);
    float got[4];
    meet("mma.sync", line, ~0u, &give, got, multiply);
    memcpy(d, got, sizeof got);
}
