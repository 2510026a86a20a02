// Threads of a kernel as fibres, the blocks and the launch that they are of, and how they wait.
#pragma once

#include "sanitizers.h"

namespace sim {

__thread const Place* here = nullptr;

namespace {

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

// Where a stack was left.
struct Context {
    void* sp = nullptr;
    void* tsan = nullptr;
    void* fake = nullptr;
    // Of the host, known once it was left.
    const void* stack = nullptr;
    size_t bytes = 0;
};

struct Fibre : Context {
    // Where it begins: not at the same place in each, or the fibres of a warp would share a few
    // lines of the processor's cache.
    char* top = nullptr;

    Fibre() {
        void* p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) std::abort();
        stack = p, bytes = STACK;
        top = static_cast<char*>(p) + STACK - reinterpret_cast<uintptr_t>(p) / STACK % 32 * 1088;
        // An overflow hits this page, not another fibre.
        mprotect(p, 4096, PROT_NONE);
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

// A box that TMA stores, by groups as cp.async copies.
struct Store {
    Map map;
    Corner corner;
    size_t offset;
    Site site;
    bool read = false;
    std::vector<char> bytes;
};

// Registers of a product: how many wgmma_fence there were when they were last waited for or, of A,
// what they held.
struct Known {
    uint64_t fences;
    std::vector<char> bytes;
};

struct Block;
struct Counter;

struct Thread : Place {
    Fibre* fibre;
    Block* block;
    unsigned id;    // in its block
    unsigned warp;  // among those of all blocks that run together
    enum { Ready, Waiting, Done } state = Ready;
    Site site{"", 0};
    const char* what = "";
    std::vector<Copy> fresh;                 // cp.async not yet committed
    std::vector<std::vector<Copy>> groups;   // committed, oldest first
    const Counter* counter = nullptr;        // that it waits for
    std::vector<Store> fresh_stores;
    std::vector<std::vector<Store>> stores;
    int registers = 0;
    // wgmma: how many it has issued, at which of them its groups end, and the accumulators under
    // way, by chain.
    size_t issued = 0;
    std::vector<size_t> commits;
    std::map<float*, size_t> chains;
    uint64_t fences = 0, fences_at_wait = 0;
    std::map<const void*, Known> known;
};

struct Barrier {
    std::vector<Thread*> waiting;
    size_t arrived = 0;  // without waiting
};

// A set of lanes that exchange values: one for each mask in use.
struct Meeting {
    unsigned mask = 0, arrived = 0;
    Warp kind = Warp::Sync;
    Site site{"", 0};
    uint64_t round = 0;
    std::vector<Thread*> waiting;
    // Two, since a fast lane may bring its next value before a slow one has read the last.
    alignas(16) Values values[2];
};

struct Counter {
    int arrivals = 0, pending = 0;
    uint64_t phase = 0;
    std::vector<Thread*> waiting;
    int64_t bytes = 0;           // expected and not yet there
    const Thread* owner = nullptr;
    bool known = false;          // to the async proxy
    bool shared = false;         // and to the other blocks of the cluster
};

// Products one after another on the same accumulators.
struct Chain {
    int columns;
    std::vector<float> tile;  // [64, columns]
    float* d[GROUP] = {};
    size_t last = 0;          // the number of its last product, and one
    int delivered = 0;
};
struct Step {
    Product product;
    Site site;
    size_t chain;
    int issued = 0;
    bool read = false;  // by the first that waits for it
    size_t low = 0, high = 0;    // what it reads of shared memory lies between these
    std::vector<uint32_t> regs;  // A of all threads
};
struct Warpgroup {
    std::deque<Step> steps;  // not yet computed; `computed` come before
    size_t computed = 0, wanted = 0, next_chain = 0;
    std::map<size_t, Chain> chains;
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
    // What the async proxy has seen of shared memory; made at its first use.
    std::vector<char> proxy;
    Barrier* cluster = nullptr;
    Block* first = nullptr;  // of the cluster
    int rank = 0;
    int free_registers = 0;
    std::vector<Thread*> need_registers;
    std::vector<Warpgroup> groups;
};

// A box on its way to blocks of a cluster.
struct Load {
    Map map;
    Corner corner;
    size_t offset, bar;
    std::vector<Block*> to;
    Site site;
};

struct Launch {
    std::string name;
    dim3 grid, size;
    size_t shared_bytes = 0;
    Call call = nullptr;
    void** args = nullptr;
    uint64_t random = 1;
    unsigned cluster = 1, beside = 1, elected = 0;
    bool together = false;                   // all blocks run at once
    std::map<const uint32_t*, std::vector<Thread*>> turns;  // who waits for them
    bool async = false;                      // TMA or wgmma are used
    std::vector<Load> loads;                 // under way
    std::vector<Thread*> late;               // threads whose next step is under way
    std::deque<Barrier> clusters;
    // What threads see of the host and the host of threads. Two: through one, a thread that starts
    // late would see all that others had ended with.
    char begin = 0, end = 0;
    std::vector<Block> blocks;               // that run together
    std::vector<std::deque<Thread*>> ready;  // by warp
    std::vector<unsigned> awake;             // warps that have a ready thread
    size_t alive = 0;
    unsigned last = 0;                       // warp that ran
    std::string report;
    Context host;                             // of the caller's own stack
};

// Both are read at every switch.
__thread Launch* launch __attribute__((tls_model("initial-exec"))) = nullptr;
__thread Thread* current __attribute__((tls_model("initial-exec"))) = nullptr;

// Fibres that are free. A host thread that ends leaves its own to the others: the system allows so
// many stacks.
struct Pool {
    std::vector<Fibre*> free;
    static Pool& of_all() {
        static Pool* all = new Pool; // outlives all threads
        return *all;
    }
    static std::mutex& lock() {
        static std::mutex* lock = new std::mutex;
        return *lock;
    }
    Fibre* take() {
        if (free.empty()) {
            std::lock_guard<std::mutex> turn(lock());
            free.swap(of_all().free);
        }
        if (free.empty()) return new Fibre;
        Fibre* f = free.back();
        free.pop_back();
        return f;
    }
    void give(Fibre* f) { free.push_back(f); }
};
struct OwnPool : Pool {
    ~OwnPool() {
        std::lock_guard<std::mutex> turn(lock());
        std::vector<Fibre*>& all = of_all().free;
        all.insert(all.end(), free.begin(), free.end());
    }
};
thread_local OwnPool pool;
thread_local std::string last_error;

uint64_t draw() {
    // xorshift64*: the order of threads needs no better
    uint64_t& x = launch->random;
    x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
    return x * 0x2545F4914F6CDD1Dull;
}

// Goes from the running stack to that of `t`, or of the host if null; `ends`: for good.
void switch_to(Thread* t, bool ends = false) {
    Context& from = current != nullptr ? *current->fibre : launch->host;
    Context& to = t != nullptr ? *t->fibre : launch->host;
    here = current = t;
    (void)ends;
#ifdef SIM_ASAN
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake, to.stack, to.bytes);
#endif
#ifdef SIM_TSAN
    // 1: no happens-before edge
    __tsan_switch_to_fiber(to.tsan, 1);
#endif
    sim_switch(&from.sp, to.sp);
#ifdef SIM_ASAN
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// Who runs next; null if none can. In scheduler.h.
Thread* next();

void wait(Site site, const char* what) {
    current->state = Thread::Waiting;
    current->site = site;
    current->what = what;
    Thread* t = next();
    if (t != current) switch_to(t);
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
        seen_read(c.from, c.bytes - c.zeros);
        seen_write(c.to, c.bytes);
        std::memcpy(c.to, c.from, c.bytes - c.zeros);
        std::memset(static_cast<char*>(c.to) + c.bytes - c.zeros, 0, c.zeros);
    }
}

}  // namespace
}  // namespace sim
