// The scheduler: one block at a time, one fiber per CUDA thread, and the order in which they run is a seed.
//
//     seed 0     the lowest thread that can run, always: warp 0 gets as far ahead of the others as barriers let it
//     seed 1     the highest
//     seed 2...  a random order of warps, of lanes within each, and of blocks; drawn again now and then
//
// A kernel that is right gives the same bits under every seed: whatever one may rely on is a barrier.
//
// Under ThreadSanitizer each fiber is a thread of its own, and only __syncthreads, __syncwarp and the ends of a block
// order them. This file is compiled without any sanitizer: its own reads and writes are not the kernel's.
#include "fibers.h"

#include <cstdio>
#include <utility>
#include <vector>

#include <ucontext.h>
#include <unistd.h>

#include "sanitizers.h"
#include "scheduler.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
unsigned char *host::dynamic_shared;

namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr int REDRAW = 200;  // switches between two random orders, about
const char *const BARRIER = "__syncthreads";

enum class State { READY, WAITING, DONE };

struct Fiber {
    ucontext_t context;
    sanitizers::Stack stack;
    uint3 thread;
    int id;
    State state;
    const char *what;  // where it waits, or waited last
    int line;
    u32 mask;
    const void *give;
    void *get;
    std::vector<host::Copy> open;  // cp.async not yet committed, and the committed groups, oldest first
    std::vector<std::vector<host::Copy>> groups;
};

std::vector<Fiber> fibers;
Fiber scheduler;                 // the stack of run_kernel itself
Fiber *running = &scheduler;
std::vector<int> order;          // fibers, most urgent first
u64 seed, dice;
int arrived, done;               // at the barrier, at the end
void (*body)(const void *);
const void *body_arguments;

int threads() { return (int)fibers.size(); }

void switch_to(Fiber &next) {
    Fiber &from = *running;
    running = &next;
    threadIdx = next.thread;
    sanitizers::leaving(from.stack, next.stack, from.state == State::DONE);
    swapcontext(&from.context, &next.context);
    sanitizers::arrived(from.stack);
}

int roll(int sides) {
    dice = dice * 6364136223846793005ull + 1442695040888963407ull;  // Knuth's MMIX generator; the high bits are good
    return (int)((dice >> 33) % (u64)sides);
}

void shuffle(int *first, int count) {
    for (int i = count; i > 1; i--) std::swap(first[i - 1], first[roll(i)]);
}

void draw_order() {
    for (int i = 0; i < threads(); i++) order[i] = seed == 1 ? threads() - 1 - i : i;
    if (seed < 2) return;
    std::vector<int> warps((threads() + 31) / 32);
    for (int w = 0; w < (int)warps.size(); w++) warps[w] = w;
    shuffle(warps.data(), (int)warps.size());
    int *next = order.data();
    for (int w : warps) {
        int *first = next;
        for (int i = 32 * w; i < 32 * w + 32 && i < threads(); i++) *next++ = i;
        shuffle(first, (int)(next - first));
    }
}

[[noreturn]] void stuck(const char *why) {
    fprintf(stderr, "refq4 host: block (%u, %u, %u): %s:\n", blockIdx.x, blockIdx.y, blockIdx.z, why);
    for (int i = 0, next = 0; i < threads(); i = next) {  // runs of threads that wait for the same
        Fiber &f = fibers[i];
        auto like = [&](Fiber &g) {
            return g.state == f.state && (f.state == State::DONE || (g.line == f.line && g.mask == f.mask));
        };
        for (next = i + 1; next < threads() && like(fibers[next]);) next++;
        fprintf(stderr, "  threads %d to %d ", i, next - 1);
        if (f.state == State::DONE)
            fprintf(stderr, "have left the kernel\n");
        else
            fprintf(stderr, "wait in %s on line %d, mask %08x\n", f.what, f.line, f.mask);
    }
    fflush(stderr);
    _exit(host::EXIT_FAILED);
}

// The running fiber has parked or ended: the most urgent one that can run goes on.
void run_another() {
    if (seed >= 2 && roll(REDRAW) == 0) draw_order();
    for (int i : order)
        if (fibers[i].state == State::READY) {
            if (&fibers[i] != running) switch_to(fibers[i]);
            return;
        }
    if (done < threads()) stuck("no thread can go on");
    switch_to(scheduler);
}

void park(const char *what, int line, u32 mask) {
    running->what = what;
    running->line = line;
    running->mask = mask;
    running->state = State::WAITING;
}

void fiber_entry() {
    sanitizers::arrived_first(scheduler.stack);
    body(body_arguments);
    running->state = State::DONE;
    done++;
    run_another();
}

// What any of these fibers did before is seen by all of them after.
void order_memory(const std::vector<Fiber *> &members) {
    std::vector<sanitizers::Stack *> stacks;
    for (Fiber *f : members) stacks.push_back(&f->stack);
    sanitizers::order(stacks.data(), stacks.size(), running->stack);
}

void run_block() {
    arrived = done = 0;
    for (Fiber &f : fibers) {
        f.state = State::READY;
        f.open.clear();
        f.groups.clear();
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.bottom;
        f.context.uc_stack.ss_size = f.stack.bytes;
        f.context.uc_link = nullptr;
        makecontext(&f.context, fiber_entry, 0);
    }
    std::vector<Fiber *> all{&scheduler};
    for (Fiber &f : fibers) all.push_back(&f);
    order_memory(all);
    draw_order();
    switch_to(fibers[order[0]]);
    order_memory(all);
}

}  // namespace

void host::run_kernel(void (*kernel)(const void *), const void *arguments, const Shape &shape) {
    body = kernel;
    body_arguments = arguments;
    seed = dice = shape.seed;
    blockDim = {shape.block[0], shape.block[1], shape.block[2]};
    gridDim = {shape.grid[0], shape.grid[1], shape.grid[2]};
    fibers.resize((size_t)blockDim.x * blockDim.y * blockDim.z);
    order.resize(fibers.size());
    char *stacks = new char[STACK_BYTES * fibers.size()];
    sanitizers::adopt(scheduler.stack);
    for (int i = 0; i < threads(); i++) {
        Fiber &f = fibers[i];
        f.id = i;
        f.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        f.stack.bottom = stacks + STACK_BYTES * i;
        f.stack.bytes = STACK_BYTES;
        sanitizers::create(f.stack);
    }
    std::vector<int> blocks((size_t)gridDim.x * gridDim.y * gridDim.z);
    for (int i = 0; i < (int)blocks.size(); i++) blocks[i] = seed == 1 ? (int)blocks.size() - 1 - i : i;
    if (seed >= 2) shuffle(blocks.data(), (int)blocks.size());
    for (u32 i : blocks) {
        blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / (gridDim.x * gridDim.y)};
        reset_shared(shape.shared);
        run_block();
    }
    for (Fiber &f : fibers) sanitizers::destroy(f.stack);
    delete[] stacks;
}

void host::sync_threads(int line) {
    park(BARRIER, line, ~0u);
    if (++arrived == threads()) {
        std::vector<Fiber *> all;
        for (Fiber &f : fibers) {
            if (f.line != line) stuck("__syncthreads is reached on different lines");
            f.state = State::READY;
            all.push_back(&f);
        }
        arrived = 0;
        order_memory(all);
    }
    run_another();
}

void host::meet(const char *what, int line, u32 mask, const void *give, void *get, void (*compute)(const Lanes &)) {
    Fiber *warp = &fibers[running->id & ~31];
    int left = threads() - warp->id, lanes = left < 32 ? left : 32, me = running->id & 31;
    if (!(mask >> me & 1)) fail("a lane calls a warp operation whose mask leaves it out");
    if (lanes < 32 && mask >> lanes) fail("the mask of a warp operation names a lane that the block does not have");
    park(what, line, mask);
    running->give = give;
    running->get = get;
    Lanes met{mask, {}, {}};
    for (int l = 0; l < lanes; l++) {
        Fiber &f = warp[l];
        if (!(mask >> l & 1)) continue;
        if (f.state != State::WAITING || f.what != what || f.line != line || f.mask != mask) return run_another();
        met.give[l] = f.give;
        met.get[l] = f.get;
    }
    compute(met);
    for (int l = 0; l < lanes; l++)
        if (mask >> l & 1) warp[l].state = State::READY;
    run_another();
}

void host::sync_warp(u32 mask, int line) {
    meet("__syncwarp", line, mask, nullptr, nullptr, [](const Lanes &met) {
        std::vector<Fiber *> members;
        for (int l = 0; l < 32; l++)
            if (met.mask >> l & 1) members.push_back(&fibers[(running->id & ~31) + l]);
        order_memory(members);
    });
}

void host::copy_issued(Copy copy) { running->open.push_back(copy); }

void host::copies_committed() {
    running->groups.push_back(std::move(running->open));
    running->open.clear();
}

bool host::copy_landed(int groups_left_open, Copy *copy) {
    auto &groups = running->groups;
    while ((int)groups.size() > groups_left_open && groups.front().empty()) groups.erase(groups.begin());
    if ((int)groups.size() <= groups_left_open) return false;
    *copy = groups.front().back();
    groups.front().pop_back();
    return true;
}

void host::fail(const char *why) {
    fprintf(stderr, "refq4 host: block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
            threadIdx.x, threadIdx.y, threadIdx.z, why);
    fflush(stderr);
    _exit(EXIT_FAILED);
}
