// The warp operations: what lanes give, what they get.
#pragma once
#include "fibers.h"

namespace host {

// value becomes that of lane `source`.
void shuffle(void *value, int bytes, u32 mask, int source, int line);

enum class Half { FP16, BF16 };

// d[16 x 8] += a[16 x 8*steps] * b[8*steps x 8], fragments as PTX has them (steps 2 is m16n8k16, 1 is m16n8k8).
void mma(Half type, int steps, float *d, const u32 *a, const u32 *b, int line);

// The number a 16-bit pattern stands for, and the nearest pattern to a number (ties to even; NaN is 0x7fff).
float to_float(Half type, u16 bits);
u16 from_float(Half type, float value);

}  // namespace host
