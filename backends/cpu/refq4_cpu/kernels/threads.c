/* Who runs the work items: torch's own threads where they can be had, else a pool of ours.
 *
 * Items are handed out by one atomic counter, so a core that the rest of the system takes away costs little. Which
 * thread computes an item never changes its result: each output is one item's, summed in one order.
 *
 * 1. Torch's threads. A PyTorch built with OpenMP keeps its helpers spinning for some milliseconds after each parallel
 *    operation, ready for the next one. A second pool would share the cores with those spinners and run at half speed
 *    (measured: a product between two torch operations took twice as long). So Python hands us the address of the
 *    runtime's GOMP_parallel (the entry behind "#pragma omp parallel" in gcc's ABI, which LLVM's and Intel's runtimes
 *    export too), and torch's helpers do our work. Inside a parallel region of torch's it runs on one thread.
 *
 * 2. Our pool, where there is no such runtime, and after fork(), which OpenMP helpers don't survive:
 *
 *     caller      publish job, open = 1 ──┬─ take items ... none left ── open = 0 ── wait until inside == 0
 *     helper      inside += 1, open?  ────┴─ take items ... none left ── inside -= 1
 *
 *    The caller waits for nobody who has not begun: a helper that wakes too late finds the job closed.
 *
 * A second caller at the same time (another Python thread) finds the pool busy and works alone, so the machine is
 * never asked for more threads than one caller's.
 *
 * cc -O3 -fsyntax-only threads.c
 */
#ifndef THREADS_C
#define THREADS_C
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include "refq4.h"

/* One work item, on thread number `thread`. */
typedef void (*WorkFn)(void *context, int64_t item, int thread);

#define MAX_HELPERS 255
#define SPIN_NANOSECONDS 50000 /* a helper looks for the next job this long before it sleeps */

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    atomic_int busy, open, inside, sleeping;
    atomic_uint generation;
    int helpers; /* threads started so far */
    int forked;  /* this is the child of a process that had the library loaded */
    WorkFn fn;
    void *context;
    int64_t items;
    int threads;
    atomic_llong next;
    atomic_int joined;                                             /* torch's threads: the next one's number */
    void (*torch_parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, or NULL */
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void take_items(int thread) {
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
        if (item >= pool.items) return;
        pool.fn(pool.context, item, thread);
    }
}

/* One of torch's threads, this one included. */
static void torch_thread(void *unused) {
    (void)unused;
    take_items(atomic_fetch_add(&pool.joined, 1));
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Returns once pool.generation is no longer `seen`: spins first, then sleeps. */
static void wait_for_job(unsigned seen) {
    int64_t until = nanoseconds() + SPIN_NANOSECONDS;
    while (atomic_load(&pool.generation) == seen) {
        for (int i = 0; i < 32; i++) relax();
        if (nanoseconds() < until) continue;
        pthread_mutex_lock(&pool.mutex);
        atomic_fetch_add(&pool.sleeping, 1);
        while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.mutex);
        atomic_fetch_sub(&pool.sleeping, 1);
        pthread_mutex_unlock(&pool.mutex);
    }
}

static void *helper(void *argument) {
    int index = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        wait_for_job(seen);
        seen = atomic_load(&pool.generation);
        atomic_fetch_add(&pool.inside, 1);
        if (atomic_load(&pool.open) && index < pool.threads) take_items(index);
        atomic_fetch_sub(&pool.inside, 1);
    }
    return NULL;
}

/* Helpers take no signals: Ctrl-C belongs to the interpreter's threads. */
static void start_helpers(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.helpers < wanted && pool.helpers < MAX_HELPERS) {
        pthread_t id;
        if (pthread_create(&id, NULL, helper, (void *)(intptr_t)(pool.helpers + 1))) break; /* fewer, then */
        pthread_detach(id);
        pool.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* The child of a fork has this thread only: whatever the pool was doing, it starts afresh. */
static void forget_helpers(void) {
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.helpers = 0;
    pool.torch_parallel = NULL;
    pool.forked = 1;
    atomic_store(&pool.busy, 0);
    atomic_store(&pool.open, 0);
    atomic_store(&pool.inside, 0);
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.generation, 0);
}

__attribute__((constructor)) static void prepare_for_fork(void) { pthread_atfork(NULL, NULL, forget_helpers); }

static void run_on_own_threads(void) {
    start_helpers((int)min64(pool.threads, pool.items) - 1);
    atomic_store(&pool.open, 1);
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.mutex);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.mutex);
    }
    take_items(0);
    atomic_store(&pool.open, 0);
    for (int spins = 0; atomic_load(&pool.inside); spins++) {
        if (spins < 2000) relax();
        else sched_yield(); /* the helper we wait for may need this core */
    }
}

/* fn(context, item, thread) for every item once, by at most `threads` threads; thread < threads. */
static void run_parallel(WorkFn fn, void *context, int64_t items, int threads) {
    int idle = 0;
    if (threads <= 1 || items <= 1 || !atomic_compare_exchange_strong(&pool.busy, &idle, 1)) {
        for (int64_t item = 0; item < items; item++) fn(context, item, 0);
        return;
    }
    pool.fn = fn;
    pool.context = context;
    pool.items = items;
    pool.threads = threads;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.joined, 0);
    if (pool.torch_parallel) pool.torch_parallel(torch_thread, NULL, (unsigned)threads, 0);
    else run_on_own_threads();
    atomic_store(&pool.busy, 0);
}
#endif
