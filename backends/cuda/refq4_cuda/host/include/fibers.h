// A block of CUDA threads as fibers of one CPU thread: what the kernel's side of it needs to know.
//
// A fiber runs until it needs others (a barrier, a warp operation), then another one goes on. Nothing here is about
// any kernel, and nothing here knows what a shuffle or an mma computes: see vocabulary.h and device.cuh.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;  // CUDA's: uint64_t may be unsigned long

struct uint3 {
    u32 x, y, z;
};
struct dim3 {
    u32 x, y, z;
};

// Where the running fiber stands. Real variables, so that a debugger shows them: `break f if threadIdx.x == 5`.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace host {

extern unsigned char *dynamic_shared;  // a heap block of exactly the bytes asked for

// __syncthreads and __syncwarp. `line` is the caller's: all threads must meet at the same one.
void sync_threads(int line);
void sync_warp(u32 mask, int line);

// A warp operation: the lanes of `mask` meet, each with something to give and room for what it gets; the last to
// arrive computes for all. Entries of lanes outside `mask` are null. It orders no memory, as on the GPU.
struct Lanes {
    u32 mask;
    const void *give[32];
    void *get[32];
};
void meet(const char *what, int line, u32 mask, const void *give, void *get, void (*compute)(const Lanes &));

// cp.async: copies join the open group, the group is committed, and the wait hands out those that land now.
struct Copy {
    void *to;
    const void *from;
    int bytes;
};
void copy_issued(Copy copy);
void copies_committed();
bool copy_landed(int groups_left_open, Copy *copy);  // false when no more has to land

// Ends the run: the message, the block and the thread go to stderr.
[[noreturn]] void fail(const char *why);

}  // namespace host
