// What the sanitizers must be told about fibers; without one, all of it is empty.
//
//     AddressSanitizer   which stack runs, or it takes a switch for an overflow
//     ThreadSanitizer    which "thread" runs, and what orders two of them
#pragma once
#include <cstddef>

#if defined(HOST_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#elif defined(HOST_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace sanitizers {

struct Stack {
    void *bottom;
    size_t bytes;
    void *thread;  // ThreadSanitizer's
    void *fake;    // AddressSanitizer's
};

#if defined(HOST_THREAD_SANITIZER)

inline void adopt(Stack &own) { own.thread = __tsan_get_current_fiber(); }
inline void create(Stack &stack) { stack.thread = __tsan_create_fiber(0); }
inline void destroy(Stack &stack) { __tsan_destroy_fiber(stack.thread); }
inline void become(Stack &stack) { __tsan_switch_to_fiber(stack.thread, __tsan_switch_to_fiber_no_sync); }
inline void leaving(Stack &, Stack &next, bool) { become(next); }
inline void arrived(Stack &) {}
inline void arrived_first(Stack &) {}
inline void forbid(void *, size_t) {}
constexpr bool knows_bounds = false;

// In everybody's name: publish, then read what was published. The token is new each time, because an old one would
// also hold what other warps, or this one at an earlier barrier, had published.
inline void order(Stack *const *stacks, size_t count, Stack &running) {
    char *token = new char;
    for (size_t i = 0; i < count; i++) become(*stacks[i]), __tsan_release(token);
    for (size_t i = 0; i < count; i++) become(*stacks[i]), __tsan_acquire(token);
    become(running);
    delete token;
}

#else

inline void adopt(Stack &) {}
inline void create(Stack &) {}
inline void destroy(Stack &) {}
inline void order(Stack *const *, size_t, Stack &) {}

#if defined(HOST_ADDRESS_SANITIZER)
inline void leaving(Stack &from, Stack &next, bool for_ever) {
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake, next.bottom, next.bytes);
}
inline void arrived(Stack &self) { __sanitizer_finish_switch_fiber(self.fake, nullptr, nullptr); }
inline void arrived_first(Stack &came_from) {
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!came_from.bottom) came_from.bottom = (void *)bottom, came_from.bytes = bytes;
}
inline void forbid(void *from, size_t bytes) { __asan_poison_memory_region(from, bytes); }
constexpr bool knows_bounds = true;
#else
inline void leaving(Stack &, Stack &, bool) {}
inline void arrived(Stack &) {}
inline void arrived_first(Stack &) {}
inline void forbid(void *, size_t) {}
constexpr bool knows_bounds = false;
#endif
#endif

}  // namespace sanitizers
