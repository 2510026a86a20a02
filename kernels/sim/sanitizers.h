// What the sanitizers are told: which memory may be touched, and which accesses come one after
// another.
#pragma once

#include "sim.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#ifdef SIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIM_TSAN
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* addr);
void __tsan_release(void* addr);
void __tsan_read_range(void* addr, unsigned long size);
void __tsan_write_range(void* addr, unsigned long size);
void __tsan_ignore_thread_begin(void);
void __tsan_ignore_thread_end(void);
}
#endif

namespace sim {
namespace {

// Bytes between regions that nobody may touch: as much as a swizzled tile is aligned to.
constexpr size_t RED = 1024;
constexpr int GROUP = 128;       // threads of a warpgroup
constexpr int NAN_BYTE = 0xFF;   // four of them are a NaN, two are a bf16 NaN
constexpr size_t STACK = 256 << 10;

void poison(const void* p, size_t n) {
#ifdef SIM_ASAN
    __asan_poison_memory_region(p, n);
#else
    (void)p, (void)n;
#endif
}
void unpoison(const void* p, size_t n) {
#ifdef SIM_ASAN
    __asan_unpoison_memory_region(p, n);
#else
    (void)p, (void)n;
#endif
}
void release(void* p) {
#ifdef SIM_TSAN
    __tsan_release(p);
#else
    (void)p;
#endif
}
void acquire(void* p) {
#ifdef SIM_TSAN
    __tsan_acquire(p);
#else
    (void)p;
#endif
}

// Accesses that an instruction makes for this thread, told to the sanitizer from where it is
// Unseen.
void seen_read(const void* p, size_t n) {
#ifdef SIM_TSAN
    __tsan_ignore_thread_end();
    __tsan_read_range(const_cast<void*>(p), n);
    __tsan_ignore_thread_begin();
#else
    (void)p, (void)n;
#endif
}
void seen_write(void* p, size_t n) {
#ifdef SIM_TSAN
    __tsan_ignore_thread_end();
    __tsan_write_range(p, n);
    __tsan_ignore_thread_begin();
#else
    (void)p, (void)n;
#endif
}

// The copy engine, which is a thread of its own. The host makes it: what a fibre did before it made
// a thread would come before all that the thread does.
void* engine() {
#ifdef SIM_TSAN
    static thread_local void* fiber = __tsan_create_fiber(0);
    return fiber;
#else
    return nullptr;
#endif
}

// A write of the engine: it comes after what was released at p, and is seen by those who acquire
// `to`.
void engine_write(void* p, size_t n, void* to) {
#ifdef SIM_TSAN
    void* from = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(engine(), 1);
    __tsan_acquire(p);
    __tsan_write_range(p, n);
    __tsan_release(to);
    __tsan_switch_to_fiber(from, 1);
#else
    (void)p, (void)n, (void)to;
#endif
}

// While one lives, the sanitizer takes no notice of this thread: the runtime's own memory is shared
// by all fibres, and its allocations and copies go through functions that the sanitizer watches.
struct Unseen {
#ifdef SIM_TSAN
    Unseen() { __tsan_ignore_thread_begin(); }
    ~Unseen() { __tsan_ignore_thread_end(); }
#else
    Unseen() {}
    ~Unseen() {}
#endif
};

}  // namespace
}  // namespace sim
