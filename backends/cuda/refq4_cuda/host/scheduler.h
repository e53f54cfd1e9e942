// Between replay.cpp, which knows what to run, and fibers.cpp, which runs it.
#pragma once
#include "fibers.h"

namespace host {

struct Shape {
    u32 grid[3], block[3], shared;
    u64 seed;
};

constexpr int EXIT_FAILED = 3;  // the kernel broke a rule; stderr says which

// Runs every block of the grid; `kernel` takes the argument struct's address. A broken rule ends the process.
void run_kernel(void (*kernel)(const void *), const void *arguments, const Shape &shape);

// Shared memory as a block finds it: full of 0xff, which reads as NaN.
void reset_shared(u32 dynamic_bytes);

}  // namespace host
