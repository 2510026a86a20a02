// The simulator: fibres, their scheduler, barriers, warp exchanges, late copies, redzones, reports.
//
// One launch runs its blocks one after another in a seeded order, or all at once where the launch says
// that they are co-resident. Within a block a seeded choice picks the next thread at every switch. This
// file is compiled without sanitizers, so that they see the kernel's accesses and only those; it tells
// them about fibres and about the happens-before edges that CUDA promises: barriers, __syncwarp, the
// start and end of a launch. Anything else that two threads share is a race.
#include "sim.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
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

constexpr size_t RED = 256;      // bytes between regions that nobody may touch
constexpr int NAN_BYTE = 0xFF;   // four of them are a NaN, two are a bf16 NaN
constexpr size_t STACK = 256 << 10;

// -- sanitizers --------------------------------------------------------------------------------------

void poison(void* p, size_t n) {
#ifdef SIM_ASAN
    __asan_poison_memory_region(p, n);
#else
    (void)p, (void)n;
#endif
}
void unpoison(void* p, size_t n) {
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

// While one lives, the sanitizer takes no notice of this thread: the runtime's own memory is shared by all
// fibres, and its allocations and copies go through functions that the sanitizer watches.
struct Unseen {
#ifdef SIM_TSAN
    Unseen() { __tsan_ignore_thread_begin(); }
    ~Unseen() { __tsan_ignore_thread_end(); }
#else
    Unseen() {}
    ~Unseen() {}
#endif
};

// -- fibres --------------------------------------------------------------------------------------------

#if !defined(__x86_64__)
#error "the simulator switches fibres on x86-64 only"
#endif
// Saves what the ABI says a callee must keep, changes stacks, and restores it from there.
extern "C" void sim_switch(void** from, void* to);
asm(R"(
.globl sim_switch
.type sim_switch, @function
sim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size sim_switch, .-sim_switch
)");

struct Fibre {
    char* stack = nullptr;
    void* sp = nullptr;
    void* tsan = nullptr;
    void* fake = nullptr;

    Fibre() {
        void* p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) std::abort();
        stack = static_cast<char*>(p);
        // An overflow hits this page, not another fibre.
        mprotect(stack, 4096, PROT_NONE);
#ifdef SIM_TSAN
        tsan = __tsan_create_fiber(0);
#endif
    }
    // Fibres live as long as the process: the next launch takes them over.
};

struct Copy {
    void* to;
    const void* from;
    size_t bytes, zeros;
};

struct Block;

struct Thread {
    Fibre* fibre;
    Block* block;
    unsigned id;    // in its block
    unsigned warp;  // among those of all blocks that run together
    uint3 index;
    enum { Ready, Waiting, Done } state = Ready;
    Site site{"", 0};
    const char* what = "";
    std::vector<Copy> fresh;                 // cp.async not yet committed
    std::vector<std::vector<Copy>> groups;   // committed, oldest first
};

struct Barrier {
    std::vector<Thread*> waiting;
};

// A set of lanes that exchange values: one for each mask in use.
struct Meeting {
    unsigned mask = 0, arrived = 0;
    Warp kind = Warp::Sync;
    Site site{"", 0};
    uint64_t round = 0;
    std::vector<Thread*> waiting;
    // Two, since a fast lane may bring its next value before a slow one has read the last.
    alignas(16) char values[2][32][MAX_VALUE];
};

struct Counter {
    int arrivals = 0, pending = 0;
    uint64_t phase = 0;
    std::vector<Thread*> waiting;
};

struct Region {
    size_t offset, bytes;
    char* at;
};

struct Block {
    uint3 index;
    std::vector<Thread> threads;
    Barrier barriers[16];
    std::vector<std::vector<std::unique_ptr<Meeting>>> warps;
    char* shared = nullptr;
    size_t room = 0;
    std::vector<Region> regions;
    std::map<uint64_t*, Counter> counters;
    int done = 0;
};

struct Launch {
    std::string name;
    dim3 grid, size;
    size_t shared_bytes = 0;
    Call call = nullptr;
    void** args = nullptr;
    uint64_t random = 1;
    // What threads see of the host and the host of threads. Two: through one, a thread that starts late would
    // see all that others had ended with.
    char begin = 0, end = 0;
    std::vector<Block> blocks;               // that run together
    std::vector<std::deque<Thread*>> ready;  // by warp
    std::vector<unsigned> awake;             // warps that have a ready thread
    size_t alive = 0;
    std::string report;
    Fibre host;                               // the caller's own stack; its fibre's stack is unused
};

thread_local Launch* launch = nullptr;
thread_local Thread* current = nullptr;
thread_local std::vector<Fibre*> pool;
thread_local std::string last_error;

uint64_t draw() {
    // xorshift64*: the order of threads needs no better
    uint64_t& x = launch->random;
    x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
    return x * 0x2545F4914F6CDD1Dull;
}

void to_fibre(Thread* t) {
    current = t;
#ifdef SIM_ASAN
    __sanitizer_start_switch_fiber(&launch->host.fake, t->fibre->stack, STACK);
#endif
#ifdef SIM_TSAN
    // 1: no happens-before edge
    __tsan_switch_to_fiber(t->fibre->tsan, 1);
#endif
    sim_switch(&launch->host.sp, t->fibre->sp);
#ifdef SIM_ASAN
    __sanitizer_finish_switch_fiber(launch->host.fake, nullptr, nullptr);
#endif
    current = nullptr;
}

#ifdef SIM_ASAN
thread_local const void* host_stack = nullptr;
thread_local size_t host_size = 0;
#endif

void to_host(bool ends) {
    Thread* t = current;
#ifdef SIM_ASAN
    __sanitizer_start_switch_fiber(ends ? nullptr : &t->fibre->fake, host_stack, host_size);
#endif
#ifdef SIM_TSAN
    __tsan_switch_to_fiber(launch->host.tsan, 1);
#endif
    (void)ends;
    sim_switch(&t->fibre->sp, launch->host.sp);
#ifdef SIM_ASAN
    __sanitizer_finish_switch_fiber(t->fibre->fake, nullptr, nullptr);
#endif
}

void wait(Site site, const char* what) {
    current->state = Thread::Waiting;
    current->site = site;
    current->what = what;
    to_host(false);
}

void make_ready(Thread* t) {
    t->state = Thread::Ready;
    auto& warp = launch->ready[t->warp];
    if (warp.empty()) launch->awake.push_back(t->warp);
    warp.push_back(t);
}

void wake(std::vector<Thread*>& waiting) {
    for (Thread* t : waiting) make_ready(t);
    waiting.clear();
}

std::string at(Site s) { return std::string(s.file) + ":" + std::to_string(s.line); }

void finish_copies(std::vector<Copy>& group) {
    for (const Copy& c : group) {
#ifdef SIM_TSAN
        // These two accesses are the kernel's.
        __tsan_ignore_thread_end();
        __tsan_read_range(const_cast<void*>(c.from), c.bytes - c.zeros);
        __tsan_write_range(c.to, c.bytes);
        __tsan_ignore_thread_begin();
#endif
        std::memcpy(c.to, c.from, c.bytes - c.zeros);
        std::memset(static_cast<char*>(c.to) + c.bytes - c.zeros, 0, c.zeros);
    }
}

// The first frame of every fibre.
void body() {
#ifdef SIM_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_size);
#endif
    acquire(&launch->begin);
    launch->call(launch->args);
    {
        // It must end here: a fibre that leaves unseen would be unseen in all launches that take it over.
        Unseen unseen;
        Thread* t = current;
        if (!t->fresh.empty() || !t->groups.empty()) {
            fail("a copy is never waited for", t->fresh.empty() ? Site{launch->name.c_str(), 0} : t->site);
        }
        release(&launch->end);
        t->state = Thread::Done;
    }
    to_host(true);
    std::abort();
}

void prepare(Thread& t) {
    if (pool.empty()) pool.push_back(new Fibre);
    t.fibre = pool.back();
    pool.pop_back();
    t.fibre->fake = nullptr;
    unpoison(t.fibre->stack + 4096, STACK - 4096);
    // A frame as sim_switch leaves it: six registers, the return address, and a slot that keeps the
    // stack aligned as after a call.
    void** top = reinterpret_cast<void**>(t.fibre->stack + STACK);
    top[-2] = reinterpret_cast<void*>(&body);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    t.fibre->sp = &top[-8];
}

std::string stuck() {
    // Group the waiting threads by place.
    std::map<std::string, int> places;
    int done = 0, waiting = 0;
    bool full = false;
    for (Block& b : launch->blocks) {
        for (Thread& t : b.threads) {
            done += t.state == Thread::Done;
            if (t.state != Thread::Waiting) continue;
            ++waiting;
            full |= std::string(t.what) == "barrier";
            ++places[std::string(t.what) + " at " + at(t.site)];
        }
    }
    std::string text = full ? "divergent barrier: " : "deadlock: ";
    for (auto& [place, n] : places) text += std::to_string(n) + " threads wait for a " + place + ", ";
    return text + std::to_string(done) + " have exited";
}

void check_redzones(Block& b) {
    std::vector<char> mine(b.room, 0);
    for (const Region& r : b.regions) std::fill_n(mine.begin() + (r.at - b.shared), r.bytes, 1);
    unpoison(b.shared, b.room);
    for (size_t i = 0; i < b.room; ++i) {
        if (mine[i] || static_cast<unsigned char>(b.shared[i]) == NAN_BYTE) continue;
        launch->report = "shared memory was written outside its regions, " + std::to_string(i) + " bytes in";
        return;
    }
}

void start(Block& b, uint3 index) {
    const dim3 size = launch->size;
    const unsigned n = size.x * size.y * size.z;
    b.index = index;
    b.threads.resize(n);
    b.warps.resize((n + 31) / 32);
    // Room for the regions and a redzone around each of at most 64.
    b.room = launch->shared_bytes + 65 * RED;
    b.shared = static_cast<char*>(std::aligned_alloc(1024, (b.room + 1023) / 1024 * 1024));
    std::memset(b.shared, NAN_BYTE, b.room);
    poison(b.shared, b.room);
    const unsigned first = launch->ready.size();
    launch->ready.resize(first + b.warps.size());
    for (unsigned i = 0; i < n; ++i) {
        Thread& t = b.threads[i];
        t.block = &b;
        t.id = i;
        t.warp = first + i / 32;
        t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        prepare(t);
        make_ready(&t);
    }
    launch->alive += n;
}

// The thread that runs next, taken from the ready ones. Seed 0 goes through a warp's threads, and through warps,
// as they came. Another draws both, but lets the warp `last` go on most times if it can: a fair draw keeps warps
// abreast, and what a warp that is a round of a loop ahead writes too early would not show.
Thread* next(unsigned last) {
    auto& awake = launch->awake;
    const bool drawn = launch->random != 0, stays = !launch->ready[last].empty() && !(drawn && draw() % 8 == 0);
    if (!stays) last = awake[drawn ? draw() % awake.size() : 0];
    auto& warp = launch->ready[last];
    if (drawn) std::swap(warp.front(), warp[draw() % warp.size()]);
    Thread* t = warp.front();
    warp.pop_front();
    if (warp.empty()) awake.erase(std::find(awake.begin(), awake.end(), last));
    return t;
}

void run_blocks(const std::vector<uint3>& indices) {
    launch->blocks = std::vector<Block>(indices.size());
    launch->ready.clear();
    launch->awake.clear();
    launch->alive = 0;
    for (size_t i = 0; i < indices.size(); ++i) start(launch->blocks[i], indices[i]);
    unsigned last = 0;
    while (launch->alive > 0 && launch->report.empty()) {
        if (launch->awake.empty()) {
            launch->report = stuck();
            break;
        }
        Thread* t = next(last);
        last = t->warp;
        to_fibre(t);
        if (t->state == Thread::Done) {
            --launch->alive;
            ++t->block->done;
            pool.push_back(t->fibre);
        }
    }
    for (Block& b : launch->blocks) {
        if (launch->report.empty()) check_redzones(b);
        unpoison(b.shared, b.room);
        std::free(b.shared);
        // A fibre that was left in the middle of a kernel is not used again.
    }
}

struct Kernel {
    int threads;
    Call call;
};
std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

struct Allocation {
    size_t bytes;
    char* base;
};
std::map<char*, Allocation>& allocations() {
    static std::map<char*, Allocation> all;
    return all;
}

}  // namespace

// -- what kernels call -------------------------------------------------------------------------------

void enter(const char* name, int threads, Call call) { kernels()[name] = {threads, call}; }

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
dim3 block_size() { return launch->size; }
dim3 grid_size() { return launch->grid; }

void fail(const char* what, Site site) {
    Unseen unseen;
    if (launch->report.empty()) {
        launch->report = std::string(what) + " at " + at(site) + " (thread " + std::to_string(current->id) + " of block " +
                         std::to_string(current->block->index.x) + ")";
    }
    // Not done: its fibre stays in the middle of the kernel, unseen, and is not used again.
    current->state = Thread::Waiting;
    to_host(true);
    std::abort();
}

void barrier(Site site, int id, int threads) {
    Unseen unseen;
    Block& b = *current->block;
    if (id < 0 || id >= 16) fail("barrier number out of range", site);
    Barrier& bar = b.barriers[id];
    const size_t all = threads > 0 ? threads : b.threads.size();
    if (threads == 0 && b.done > 0) fail("divergent barrier: other threads have exited", site);
    release(&bar);
    if (bar.waiting.size() + 1 < all) {
        bar.waiting.push_back(current);
        wait(site, "barrier");
    } else {
        for (Thread* t : bar.waiting) {
            if (threads == 0 && (t->site.line != site.line || std::strcmp(t->site.file, site.file) != 0)) {
                fail(("divergent barrier: another thread waits at " + at(t->site)).c_str(), site);
            }
        }
        wake(bar.waiting);
    }
    acquire(&bar);
}

void exchange(Warp kind, unsigned mask, const void* value, size_t bytes, void* all, Site site) {
    Unseen unseen;
    Thread* t = current;
    const unsigned lane = t->id % 32;
    const unsigned there = t->block->threads.size() - t->id / 32 * 32;
    if (there < 32) mask &= (1u << there) - 1;
    if (!(mask >> lane & 1)) fail("a lane is not in its own mask", site);
    if (bytes > MAX_VALUE) fail("too many bytes for an exchange", site);
    auto& meetings = t->block->warps[t->id / 32];
    Meeting* m = nullptr;
    for (auto& x : meetings) {
        if (x->mask == mask) m = x.get();
    }
    if (m == nullptr) {
        meetings.push_back(std::make_unique<Meeting>());
        m = meetings.back().get();
        m->mask = mask;
    }
    if (m->arrived == 0) {
        m->kind = kind;
        m->site = site;
    } else if (m->kind != kind || m->site.line != site.line) {
        fail(("divergent warp: other lanes wait at " + at(m->site)).c_str(), site);
    }
    char(&values)[32][MAX_VALUE] = m->values[m->round & 1];
    if (bytes > 0) std::memcpy(values[lane], value, bytes);
    // Only __syncwarp promises that memory is seen.
    if (kind == Warp::Sync) release(m);
    m->arrived |= 1u << lane;
    if (m->arrived != mask) {
        m->waiting.push_back(t);
        wait(site, "warp exchange");
    } else {
        m->arrived = 0;
        ++m->round;
        wake(m->waiting);
    }
    if (kind == Warp::Sync) acquire(m);
    for (int i = 0; bytes > 0 && i < 32; ++i) std::memcpy(static_cast<char*>(all) + i * bytes, values[i], bytes);
}

void mbarrier_init(uint64_t* bar, int arrivals, Site site) {
    Unseen unseen;
    aligned(bar, 8, site);
    Counter& c = current->block->counters[bar];
    if (!c.waiting.empty()) fail("an mbarrier is initialised while others wait", site);
    if (arrivals < 1) fail("an mbarrier of no arrivals", site);
    c = Counter{arrivals, arrivals, 0, {}};
}

static Counter& counter(uint64_t* bar, Site site) {
    auto it = current->block->counters.find(bar);
    if (it == current->block->counters.end()) fail("an mbarrier was never initialised", site);
    return it->second;
}

void mbarrier_arrive(uint64_t* bar, Site site) {
    Unseen unseen;
    Counter& c = counter(bar, site);
    release(&c);
    if (--c.pending > 0) return;
    c.pending = c.arrivals;
    ++c.phase;
    wake(c.waiting);
}

void mbarrier_wait(uint64_t* bar, int parity, Site site) {
    Unseen unseen;
    Counter& c = counter(bar, site);
    // Phase p is complete once c.phase > p: the wait is over when the phase of this parity is behind.
    while ((c.phase & 1) == static_cast<uint64_t>(parity)) {
        c.waiting.push_back(current);
        wait(site, "mbarrier");
    }
    acquire(&c);
}

void copy_async(void* to, const void* from, size_t bytes, size_t zeros, Site site) {
    Unseen unseen;
    aligned(to, bytes, site);
    if (zeros < bytes) aligned(from, bytes, site);
    std::memset(to, NAN_BYTE, bytes);
    current->site = site;
    current->fresh.push_back({to, from, bytes, zeros});
}

void copy_commit() {
    Unseen unseen;
    current->groups.push_back(std::move(current->fresh));
    current->fresh.clear();
}

void copy_wait(int pending, Site site) {
    Unseen unseen;
    (void)site;
    auto& groups = current->groups;
    while (groups.size() > static_cast<size_t>(pending)) {
        finish_copies(groups.front());
        groups.erase(groups.begin());
    }
}

void* carve(int index, size_t offset, size_t bytes, Site site) {
    Unseen unseen;
    Block& b = *current->block;
    if (offset + bytes > launch->shared_bytes) fail("more shared memory is carved than the launch has", site);
    if (index >= 64) fail("too many regions of shared memory", site);
    char* p = b.shared + offset + (index + 1) * RED;
    if (static_cast<size_t>(index) < b.regions.size()) {
        if (b.regions[index].at != p || b.regions[index].bytes != bytes) fail("threads carve different regions", site);
    } else if (static_cast<size_t>(index) == b.regions.size()) {
        b.regions.push_back({offset, bytes, p});
        unpoison(p, bytes);
    } else {
        fail("regions are carved out of order", site);
    }
    return p;
}

}  // namespace sim

// -- what the driver calls ---------------------------------------------------------------------------

using namespace sim;

extern "C" {

// Device memory: NaN to begin with, redzones on both sides.
void* sim_alloc(size_t bytes) {
    const size_t room = (bytes + 2 * RED + 1023) / 1024 * 1024;
    char* base = static_cast<char*>(std::aligned_alloc(1024, room));
    if (base == nullptr) return nullptr;
    std::memset(base, NAN_BYTE, room);
    char* p = base + RED;
    allocations()[p] = {bytes, base};
    poison(base, RED);
    poison(p + bytes, room - RED - bytes);
    return p;
}

// 0, or 1 if a redzone was written.
int sim_free(void* p) {
    auto it = allocations().find(static_cast<char*>(p));
    if (it == allocations().end()) return 1;
    auto [bytes, base] = it->second;
    const size_t room = (bytes + 2 * RED + 1023) / 1024 * 1024;
    unpoison(base, room);
    auto clean = [](const char* q, size_t n) { return std::all_of(q, q + n, [](char c) { return static_cast<unsigned char>(c) == NAN_BYTE; }); };
    const bool ok = clean(base, RED) && clean(base + RED + bytes, room - RED - bytes);
    std::free(base);
    allocations().erase(it);
    return ok ? 0 : 1;
}

// Memory that kernels may not touch, such as the redzones of an arena.
void sim_poison(void* p, size_t n) { poison(p, n); }
void sim_unpoison(void* p, size_t n) { unpoison(p, n); }

// The threads of a kernel's block; 0 if there is no such kernel.
int sim_threads(const char* name) {
    auto it = kernels().find(name);
    return it == kernels().end() ? 0 : it->second.threads;
}

const char* sim_error() { return last_error.c_str(); }

// Runs a kernel; 0, or 1 with sim_error. Seed 0 is the natural order of threads and blocks.
int sim_launch(const char* name, const unsigned* grid, const unsigned* size, size_t shared, void** args, uint64_t thread_seed,
               uint64_t block_seed, int together) {
    auto it = kernels().find(name);
    if (it == kernels().end()) {
        last_error = std::string("no kernel is called ") + name;
        return 1;
    }
    Launch l;
    l.name = name;
    l.grid = {grid[0], grid[1], grid[2]};
    l.size = {size[0], size[1], size[2]};
    l.shared_bytes = shared;
    l.call = it->second.call;
    l.args = args;
    l.random = thread_seed == 0 ? 0 : thread_seed * 0x9E3779B97F4A7C15ull | 1;
#ifdef SIM_TSAN
    l.host.tsan = __tsan_get_current_fiber();
#endif
    if (static_cast<int>(size[0] * size[1] * size[2]) != it->second.threads) {
        last_error = std::string(name) + " is for blocks of " + std::to_string(it->second.threads) + " threads";
        return 1;
    }
    launch = &l;
    release(&launch->begin);
    Unseen unseen;
    std::vector<uint3> order;
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) order.push_back({x, y, z});
    if (block_seed != 0) {
        uint64_t s = block_seed * 0xD1B54A32D192ED03ull | 1;
        for (size_t i = order.size(); i > 1; --i) {
            s ^= s >> 12, s ^= s << 25, s ^= s >> 27;
            std::swap(order[i - 1], order[s * 0x2545F4914F6CDD1Dull % i]);
        }
    }
    if (together) {
        run_blocks(order);
    } else {
        for (size_t i = 0; i < order.size() && l.report.empty(); ++i) run_blocks({order[i]});
    }
    acquire(&launch->end);
    launch = nullptr;
    last_error = l.report.empty() ? "" : std::string(name) + ": " + l.report;
    return l.report.empty() ? 0 : 1;
}

}  // extern "C"
