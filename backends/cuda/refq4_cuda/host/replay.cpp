// A recorded launch, run again: `replay FILE` reads it, runs the kernel on fibers, and writes the buffers back.
//
//     FILE       u64  seed, grid x y z, block x y z, shared bytes, argument bytes, number of buffers
//                the argument bytes, as cuLaunchKernel would get them, padded to a multiple of 8
//                for each buffer: u64 address, u64 bytes, and its bytes (padded likewise)
//
// Each buffer gets a heap block of its own with the same alignment as the original, and the addresses in the argument
// bytes are moved there. So AddressSanitizer knows where each buffer ends; without it, guard bytes on both sides do.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernel.h"
#include "sanitizers.h"
#include "scheduler.h"

extern "C" __attribute__((weak)) unsigned char __start_host_shared[], __stop_host_shared[];

namespace {

constexpr u64 ALIGNMENT = 1024;  // what device.cuh promises for shared memory
constexpr unsigned char GUARD = 0xa5;

struct Buffer {
    u64 address, bytes;
    long at;               // in the file
    unsigned char *block;  // ALIGNMENT or fewer guard bytes, the contents, ALIGNMENT guard bytes
    u64 before() const { return address % ALIGNMENT + ALIGNMENT; }
    unsigned char *contents() const { return block + before(); }
    u64 after() const { return sanitizers::knows_bounds ? 0 : ALIGNMENT; }
};

[[noreturn]] void refuse(const char *why) {
    fprintf(stderr, "refq4 host: %s\n", why);
    exit(2);
}

unsigned char *allocate(u64 bytes) {
    void *block;
    if (posix_memalign(&block, ALIGNMENT, bytes ? bytes : 1)) refuse("out of memory");
    return (unsigned char *)block;
}

void read_exactly(FILE *file, void *to, u64 bytes) {
    if (fread(to, 1, bytes, file) != bytes) refuse("the recorded launch is cut short");
}

u64 padded(u64 bytes) { return (bytes + 7) / 8 * 8; }

Buffer read_buffer(FILE *file) {
    Buffer buffer{};
    read_exactly(file, &buffer.address, 8);
    read_exactly(file, &buffer.bytes, 8);
    buffer.at = ftell(file);
    buffer.block = allocate(buffer.before() + buffer.bytes + buffer.after());
    memset(buffer.block, GUARD, buffer.before() + buffer.bytes + buffer.after());
    read_exactly(file, buffer.contents(), buffer.bytes);
    fseek(file, buffer.at + (long)padded(buffer.bytes), SEEK_SET);
    sanitizers::forbid(buffer.block, buffer.before());
    return buffer;
}

void move_addresses(std::vector<u64> &arguments, const std::vector<Buffer> &buffers) {
    for (u64 &word : arguments)
        for (const Buffer &b : buffers)
            if (word >= b.address && word - b.address < b.bytes) {
                word = (u64)(uintptr_t)b.contents() + (word - b.address);
                break;
            }
}

// Without AddressSanitizer: a write outside a buffer is known by what it left there.
bool guards_hold(const Buffer &buffer) {
    if (sanitizers::knows_bounds) return true;
    const unsigned char *first = buffer.contents(), *last = first + buffer.bytes;
    for (const unsigned char *p = buffer.block; p < last + buffer.after(); p++) {
        if ((p >= first && p < last) || *p == GUARD) continue;
        fprintf(stderr, "refq4 host: the kernel wrote outside a buffer of %llu bytes, at offset %td\n", buffer.bytes,
                p - first);
        return false;
    }
    return true;
}

}  // namespace

void host::reset_shared(u32 dynamic_bytes) {
    static u32 allocated = 0;
    if (!dynamic_shared || allocated != dynamic_bytes) dynamic_shared = allocate(allocated = dynamic_bytes);
    memset(dynamic_shared, 0xff, dynamic_bytes);
    if (__start_host_shared) memset(__start_host_shared, 0xff, __stop_host_shared - __start_host_shared);
}

int main(int count, char **words) {
    if (count != 2) refuse("usage: replay FILE");
    FILE *file = fopen(words[1], "r+b");
    if (!file) refuse("can't open the recorded launch");
    u64 header[10];
    read_exactly(file, header, sizeof header);
    host::Shape shape{{(u32)header[1], (u32)header[2], (u32)header[3]},
                      {(u32)header[4], (u32)header[5], (u32)header[6]},
                      (u32)header[7],
                      header[0]};
    if (header[8] != host::kernel_argument_bytes()) {
        fprintf(stderr, "refq4 host: the launch has %llu argument bytes, the kernel's struct %zu\n", header[8],
                host::kernel_argument_bytes());
        return 2;
    }
    std::vector<u64> arguments(padded(header[8]) / 8 + 2);
    read_exactly(file, arguments.data(), padded(header[8]));
    std::vector<Buffer> buffers;
    for (u64 i = 0; i < header[9]; i++) buffers.push_back(read_buffer(file));
    move_addresses(arguments, buffers);
    host::run_kernel(host::kernel, arguments.data(), shape);
    bool good = true;
    for (const Buffer &b : buffers) {
        good = guards_hold(b) && good;
        fseek(file, b.at, SEEK_SET);
        fwrite(b.contents(), 1, b.bytes, file);
    }
    return fclose(file) == 0 && good ? 0 : host::EXIT_FAILED;
}
