// The simulator: fibres, their scheduler, barriers, warp exchanges, late copies and products, redzones, reports.
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

constexpr size_t RED = 1024;     // bytes between regions that nobody may touch: as much as a swizzled tile is aligned to
constexpr int GROUP = 128;       // threads of a warpgroup
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

// Accesses that an instruction makes for this thread, told to the sanitizer from where it is Unseen.
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

// A write of the copy engine, which is a thread of its own: it comes after what was released at p, and is seen by those
// who acquire `to`.
void engine_write(void* p, size_t n, void* to) {
#ifdef SIM_TSAN
    static thread_local void* engine = __tsan_create_fiber(0);
    void* from = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(engine, 1);
    __tsan_acquire(p);
    __tsan_write_range(p, n);
    __tsan_release(to);
    __tsan_switch_to_fiber(from, 1);
#else
    (void)p, (void)n, (void)to;
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

// Where a stack was left.
struct Context {
    void* sp = nullptr;
    void* tsan = nullptr;
    void* fake = nullptr;
};

struct Fibre : Context {
    char* stack = nullptr;

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

// A box that TMA stores, by groups as cp.async copies.
struct Store {
    Map map;
    Corner corner;
    size_t offset;
    Site site;
    bool read = false;
    std::vector<char> bytes;
};

// Registers of a product: how many wgmma_fence there were when they were last waited for or, of A, what they held.
struct Known {
    uint64_t fences;
    std::vector<char> bytes;
};

struct Block;
struct Counter;

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
    const Counter* counter = nullptr;        // that it waits for
    std::vector<Store> fresh_stores;
    std::vector<std::vector<Store>> stores;
    int registers = 0;
    // wgmma: how many it has issued, at which of them its groups end, and the accumulators under way, by chain.
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
    alignas(16) char values[2][32][MAX_VALUE];
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
    // What threads see of the host and the host of threads. Two: through one, a thread that starts late would
    // see all that others had ended with.
    char begin = 0, end = 0;
    std::vector<Block> blocks;               // that run together
    std::vector<std::deque<Thread*>> ready;  // by warp
    std::vector<unsigned> awake;             // warps that have a ready thread
    size_t alive = 0;
    std::string report;
    Context host;                             // of the caller's own stack
};

thread_local Launch* launch = nullptr;
thread_local Thread* current = nullptr;

// Fibres that are free. A host thread that ends leaves its own to the others: the system allows so many stacks.
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
        seen_read(c.from, c.bytes - c.zeros);
        seen_write(c.to, c.bytes);
        std::memcpy(c.to, c.from, c.bytes - c.zeros);
        std::memset(static_cast<char*>(c.to) + c.bytes - c.zeros, 0, c.zeros);
    }
}

// -- mbarriers -----------------------------------------------------------------------------------------

Counter& counter(Block& b, uint64_t* bar, Site site) {
    auto it = b.counters.find(bar);
    if (it == b.counters.end()) fail("an mbarrier was never initialised", site);
    return it->second;
}

// Ends the phase if nothing is missing; what is wrong with it, if anything. Bytes may come before the arrival that
// expects them: another block of the cluster sends some.
const char* settle(Counter& c) {
    if (c.pending > 0 || c.bytes > 0) return nullptr;
    if (c.bytes < 0) return "an mbarrier gets more bytes than it expects";
    c.pending = c.arrivals;
    ++c.phase;
    wake(c.waiting);
    return nullptr;
}

void arrive(Block& b, uint64_t* bar, int bytes, Site site) {
    seen_read(bar, 8);
    Counter& c = counter(b, bar, site);
    if (c.pending == 0) fail("an mbarrier gets more arrivals than it counts", site);
    release(&c);
    c.bytes += bytes;
    --c.pending;
    if (const char* wrong = settle(c)) fail(wrong, site);
}

// Block `rank` of this cluster, whose shared memory is used from here.
Block& peer(int rank, Site site) {
    Block& b = *current->block;
    if (rank < 0 || rank >= static_cast<int>(launch->cluster)) fail("the cluster has no such block", site);
    Block& to = b.first[rank];
    if (to.done == static_cast<int>(to.threads.size())) {
        fail("a block has exited before its cluster was done with its shared memory", site);
    }
    return to;
}

// An mbarrier at this offset, of which the async proxy or another block has heard.
Counter& known_counter(Block& b, size_t offset, Site site) {
    Counter& c = counter(b, reinterpret_cast<uint64_t*>(b.shared + offset), site);
    if (!c.known) fail("missing fence_barrier_init after mbarrier_init", site);
    if (!c.shared && &b != current->block) fail("missing cluster_sync before an mbarrier of another block is used", site);
    return c;
}

// -- the async proxy and shared memory -------------------------------------------------------------------

size_t offset_of(const Block& b, const void* p, Site site) {
    const char* c = static_cast<const char*>(p);
    if (c < b.shared || c >= b.shared + b.room) fail("not this block's shared memory", site);
    return c - b.shared;
}

std::vector<char>& proxy(Block& b) {
    if (b.proxy.empty()) b.proxy.assign(b.room, static_cast<char>(NAN_BYTE));
    return b.proxy;
}

// Whether generic stores have changed bytes since the async proxy last saw them.
bool dirty(Block& b, size_t offset, size_t n) { return std::memcmp(b.shared + offset, proxy(b).data() + offset, n) != 0; }

constexpr const char* DIRTY = "missing fence.proxy.async: shared memory that was written by stores is used by ";

void check_region(const Block& b, size_t offset, size_t n, const char* what, Site site) {
    const char* p = b.shared + offset;
    for (const Region& r : b.regions) {
        if (p >= r.at && p + n <= r.at + r.bytes) return;
    }
    fail((std::string(what) + " reaches outside a region of shared memory").c_str(), site);
}

// Where 16 bytes lie when bits of their address from the fourth on are xored with those three above.
size_t swizzled(size_t offset, unsigned span) { return offset ^ (offset >> 3 & (span == 0 ? 0 : span - 16)); }

// -- TMA -------------------------------------------------------------------------------------------------

size_t box_bytes(const Map& m) { return size_t(m.box[0]) * m.box[1] * m.box[2] * m.element_bytes; }

// A map of a tensor of `rank` dimensions, 2 or 3; to a matrix it adds a third of size 1.
Map check_map(const void* map, int rank, Site site) {
    Map m;
    std::memcpy(&m, map, sizeof m);
    auto is = [&](bool ok, const char* what) {
        if (!ok) fail((std::string("a tensor map ") + what).c_str(), site);
    };
    if (m.rank != unsigned(rank)) {
        fail(("a tensor map of " + std::to_string(m.rank) + " dimensions is used with " + std::to_string(rank)).c_str(), site);
    }
    if (rank == 2) m.dims[2] = m.box[2] = 1, m.strides[2] = 0;
    is(m.element_bytes == 1 || m.element_bytes == 2 || m.element_bytes == 4 || m.element_bytes == 8, "has elements of no size");
    is(m.base % 16 == 0, "begins at an address that is no multiple of 16");
    is(m.strides[0] == m.element_bytes, "has gaps between neighbours");
    for (int i = 0; i < 3; ++i) {
        is(i == 0 || m.strides[i] % 16 == 0, "has a stride that is no multiple of 16 bytes");
        is(m.box[i] >= 1 && m.box[i] <= 256, "has a box of more than 256 elements");
    }
    is(m.box[0] * m.element_bytes % 16 == 0, "has a box whose rows are no multiple of 16 bytes");
    is(m.swizzle == 0 || m.swizzle == 32 || m.swizzle == 64 || m.swizzle == 128, "has no such swizzle");
    is(m.swizzle == 0 || m.box[0] * m.element_bytes == m.swizzle, "has a box whose rows are not as wide as its swizzle");
    return m;
}

// Calls f(offset in the box as it lies in shared memory at `offset`, address in global memory, bytes, whether inside)
// for its pieces, each of 16 bytes or of one element.
template <class F>
void each_piece(const Map& m, const Corner& corner, size_t offset, F f) {
    const size_t row_bytes = size_t(m.box[0]) * m.element_bytes;
    const int64_t wide = 16 / m.element_bytes;
    const auto cols = static_cast<int64_t>(m.dims[0]), rows = static_cast<int64_t>(m.dims[1]), planes = static_cast<int64_t>(m.dims[2]);
    for (int64_t r = 0; r < int64_t(m.box[1]) * m.box[2]; ++r) {
        const int64_t y = corner.at[1] + r % m.box[1], z = corner.at[2] + r / m.box[1];
        const bool row = y >= 0 && y < rows && z >= 0 && z < planes;
        for (size_t c = 0; c < row_bytes; c += 16) {
            const size_t at = swizzled(offset + r * row_bytes + c, m.swizzle);
            const int64_t col = corner.at[0] + static_cast<int64_t>(c / m.element_bytes);
            char* from = reinterpret_cast<char*>(m.base + y * m.strides[1] + z * m.strides[2] + col * m.element_bytes);
            if (row && col >= 0 && col + wide <= cols) {
                f(at, from, size_t(16), true);
                continue;
            }
            for (int64_t e = 0; e < wide; ++e) {
                f(at + e * m.element_bytes, from + e * m.element_bytes, size_t(m.element_bytes),
                  row && col + e >= 0 && col + e < cols);
            }
        }
    }
}

void check_place(const Block& b, const Map& m, size_t offset, Site site) {
    const size_t align = m.swizzle == 128 ? 1024 : m.swizzle == 64 ? 512 : m.swizzle == 32 ? 256 : 128;
    if (offset % align != 0) fail(("a TMA box begins at no multiple of " + std::to_string(align) + " bytes").c_str(), site);
    check_region(b, offset, box_bytes(m), "a TMA box", site);
}

// Brings a box to its blocks; what is wrong with it, if anything.
std::string land(const Load& l) {
    for (Block* b : l.to) {
        char* shared = b->shared;
        each_piece(l.map, l.corner, l.offset, [&](size_t to, const char* from, size_t n, bool inside) {
            if (inside) {
                std::memcpy(shared + to, from, n);
            } else {
                std::memset(shared + to, 0, n);
            }
        });
        std::memcpy(proxy(*b).data() + l.offset, shared + l.offset, box_bytes(l.map));
        Counter& c = b->counters[reinterpret_cast<uint64_t*>(shared + l.bar)];
        engine_write(shared + l.offset, box_bytes(l.map), &c);
        c.bytes -= static_cast<int64_t>(box_bytes(l.map));
        if (const char* wrong = settle(c)) return wrong;
    }
    return "";
}

void read_store(Store& s) {
    if (s.read) return;
    Block& b = *current->block;
    seen_read(b.shared + s.offset, box_bytes(s.map));
    s.bytes.assign(b.shared + s.offset, b.shared + s.offset + box_bytes(s.map));
    s.read = true;
}

void write_store(Store& s) {
    each_piece(s.map, s.corner, s.offset, [&](size_t from, char* to, size_t n, bool inside) {
        if (!inside) return;
        seen_write(to, n);
        std::memcpy(to, s.bytes.data() + (from - s.offset), n);
    });
}

// -- wgmma -------------------------------------------------------------------------------------------------

// Where 16 bytes of an operand begin: of row `r` (of 8-row groups) and piece `j` along it.
size_t place(const Block& b, uint64_t operand, bool columns, int r, int j, Site site) {
    const size_t start = (operand & 0x3FFF) << 4, leading = (operand >> 16 & 0x3FFF) << 4, stride = (operand >> 32 & 0x3FFF) << 4;
    size_t offset = start + r / 8 * stride + r % 8 * 128;
    offset += columns ? j / 8 * leading + j % 8 * 16 : j * 16;
    offset = swizzled(offset, 128);
    check_region(b, offset, 16, "a wgmma descriptor", site);
    return offset;
}

// Calls f(row, piece, offset) for an operand of 16 k and `n` rows, or of `n` columns.
template <class F>
void each_place(const Block& b, uint64_t operand, bool columns, int n, Site site, F f) {
    if (operand >> 62 != 1 || (operand >> 49 & 7) != 0) fail("a wgmma descriptor is not of the swizzle of 128 bytes", site);
    if ((operand & 0x38) != 0) fail("a wgmma descriptor's tile begins at no multiple of 1024 bytes", site);
    const int rows = columns ? 16 : n, pieces = columns ? n / 8 : 2;
    for (int r = 0; r < rows; ++r) {
        for (int j = 0; j < pieces; ++j) f(r, j, place(b, operand, columns, r, j, site));
    }
}

template <class F>
void each_place(const Block& b, const Step& s, F f) {
    auto only = [&](int, int, size_t offset) { f(offset); };
    if (s.product.regs == nullptr) each_place(b, s.product.a, s.product.a_columns, 64, s.site, only);
    each_place(b, s.product.b, s.product.b_columns, 2 * s.product.count, s.site, only);
}

// Whether a product that is under way reads any of these bytes.
bool read_by_step(const Block& b, size_t offset, size_t n) {
    for (const Warpgroup& g : b.groups) {
        for (const Step& s : g.steps) {
            bool any = false;
            if (s.high <= offset || s.low >= offset + n) continue;
            each_place(b, s, [&](size_t at) { any |= at >= offset && at < offset + n; });
            if (any) return true;
        }
    }
    return false;
}

float wide(uint16_t bits) {
    const uint32_t u = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

// d[64, n] += a[64, 16] b[16, n]: as mma_bf16, one rounding of the sum of the products and the old value.
__attribute__((target_clones("arch=haswell", "default"), optimize("O3")))
void multiply(float* d, const double* a, const double* b, int n, bool add) {
    double sum[256];
    for (int m = 0; m < 64; ++m) {
        for (int i = 0; i < n; ++i) sum[i] = add ? double(d[m * n + i]) : 0.0;
        for (int k = 0; k < 16; ++k) {
            const double x = a[m * 16 + k];
            for (int i = 0; i < n; ++i) sum[i] += x * b[k * n + i];
        }
        for (int i = 0; i < n; ++i) d[m * n + i] = float(sum[i]);
    }
}

void compute(Block& b, Warpgroup& g) {
    static thread_local double left[64 * 16], right[16 * 256];
    Step& s = g.steps.front();
    const Product& p = s.product;
    const int n = 2 * p.count;
    bool written = false;
    // to(k, row) = where it goes
    auto unpack = [&](uint64_t operand, bool columns, int rows, auto to) {
        each_place(b, operand, columns, rows, s.site, [&](int r, int j, size_t offset) {
            uint16_t x[8];
            std::memcpy(x, b.shared + offset, 16);
            written |= dirty(b, offset, 16);
            for (int i = 0; i < 8; ++i) (columns ? to(r, 8 * j + i) : to(8 * j + i, r)) = wide(x[i]);
        });
    };
    if (p.regs == nullptr) {
        unpack(p.a, p.a_columns, 64, [](int k, int m) -> double& { return left[m * 16 + k]; });
    } else {
        for (int t = 0; t < GROUP; ++t) {
            for (int i = 0; i < 4; ++i) {
                const uint32_t two = s.regs[4 * t + i];
                double* to = left + (t / 32 * 16 + t % 32 / 4 + i % 2 * 8) * 16 + 2 * (t % 4) + i / 2 * 8;
                to[0] = wide(two & 0xFFFF);
                to[1] = wide(two >> 16);
            }
        }
    }
    unpack(p.b, p.b_columns, n, [n](int k, int i) -> double& { return right[k * n + i]; });
    if (written) launch->report = "shared memory was written while a wgmma reads it, at " + at(s.site);
    multiply(g.chains[s.chain].tile.data(), left, right, n, p.add);
    g.steps.pop_front();
    ++g.computed;
}

// The place of accumulator i of thread t in its tile.
size_t in_tile(int t, int i, int columns) {
    return size_t(t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * columns + i / 4 * 8 + 2 * (t % 4) + i % 2;
}

Warpgroup& warpgroup(Site site) {
    Block& b = *current->block;
    b.groups.resize(b.threads.size() / GROUP);
    if (current->id / GROUP >= b.groups.size()) fail("a warpgroup is 128 threads", site);
    launch->async = true;
    return b.groups[current->id / GROUP];
}

constexpr const char* UNFENCED = "missing wgmma_fence: registers of a product were used since the last";

// Accumulators that a product starts on: since they were last waited for there was a fence.
void check_accumulators(const float* d, Site site) {
    Thread& t = *current;
    auto k = t.known.find(d);
    if (t.fences == (k != t.known.end() ? k->second.fences : t.fences_at_wait)) fail(UNFENCED, site);
}

// A in registers: since they were written there was a fence.
void check_operand(const uint32_t* a, Site site) {
    Thread& t = *current;
    auto k = t.known.find(a);
    const bool seen = k != t.known.end(), same = seen && std::memcmp(k->second.bytes.data(), a, 16) == 0;
    if (t.fences == (seen ? k->second.fences : t.fences_at_wait) && !same) fail(UNFENCED, site);
}

void remember(const void* registers, size_t n) {
    const char* p = static_cast<const char*>(registers);
    current->known[registers] = {current->fences, std::vector<char>(p, p + n)};
}

bool can_compute(const Warpgroup& g) {
    if (g.waiting.empty() || g.wanted <= g.computed) return false;
    const Step& last = g.steps[g.wanted - g.computed - 1];
    return last.issued == GROUP;
}

// -- what is under way: TMA loads, products and stores that are waited for, arrivals at other blocks -------------

// This thread goes on at a random time, at the latest when nothing else can happen.
void be_late(Site site, const char* what) {
    launch->async = true;
    launch->late.push_back(current);
    wait(site, what);
}

// Does one of them; false if there is none.
bool advance() {
    auto& loads = launch->loads;
    std::vector<std::pair<Block*, Warpgroup*>> ready;
    for (Block& b : launch->blocks) {
        for (Warpgroup& g : b.groups) {
            if (can_compute(g)) ready.push_back({&b, &g});
        }
    }
    const size_t all = loads.size() + ready.size() + launch->late.size();
    if (all == 0) return false;
    const size_t i = launch->random != 0 ? draw() % all : 0;
    if (i < loads.size()) {
        const Load l = loads[i];
        loads.erase(loads.begin() + i);
        const std::string wrong = land(l);
        if (!wrong.empty()) launch->report = wrong + " at " + at(l.site);
        return true;
    }
    if (i >= loads.size() + ready.size()) {
        auto it = launch->late.begin() + (i - loads.size() - ready.size());
        make_ready(*it);
        launch->late.erase(it);
        return true;
    }
    auto [b, g] = ready[i - loads.size()];
    while (g->computed < g->wanted && launch->report.empty()) compute(*b, *g);
    wake(g->waiting);
    return true;
}

// A thread of this block has exited.
void leave(Block& b) {
    if (++b.done < static_cast<int>(b.threads.size())) return;
    for (const Load& l : launch->loads) {
        if (std::find(l.to.begin(), l.to.end(), &b) == l.to.end()) continue;
        launch->report = "a block exits while a TMA load to its shared memory is under way, at " + at(l.site);
    }
}

// What a thread leaves behind.
void finish(Thread& t) {
    if (!t.fresh_stores.empty()) fail("a TMA store is never committed", t.fresh_stores[0].site);
    for (auto& group : t.stores) {
        for (Store& s : group) {
            if (!s.read) fail("a thread exits while its TMA store reads shared memory", s.site);
            write_store(s);
        }
    }
    t.stores.clear();
    if (!t.chains.empty()) fail("a wgmma is never waited for", t.site);
    // The block's shared memory ends with its last thread: what others do with its mbarriers comes before.
    Block& b = *t.block;
    release(&b);
    if (b.done + 1 < static_cast<int>(b.threads.size())) return;
    acquire(&b);
    for (auto& [bar, c] : b.counters) seen_write(bar, 8);
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
        finish(*t);
        release(&launch->end);
        t->state = Thread::Done;
    }
    to_host(true);
    std::abort();
}

void prepare(Thread& t) {
    t.fibre = pool.take();
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
    bool full = false, turn = false;
    for (Block& b : launch->blocks) {
        for (Thread& t : b.threads) {
            done += t.state == Thread::Done;
            if (t.state != Thread::Waiting) continue;
            ++waiting;
            full |= std::string(t.what) == "barrier";
            turn |= std::string(t.what) == "turn";
            std::string place = std::string(t.what) + " at " + at(t.site);
            if (const Counter* c = t.counter) {
                place += " (in block " + std::to_string(b.index.x) + ", that lacks " + std::to_string(c->pending) +
                         " arrivals and " + std::to_string(c->bytes) + " bytes)";
            }
            ++places[place];
        }
    }
    std::string text = full && !turn ? "divergent barrier: " : "deadlock: ";
    for (auto& [place, n] : places) text += std::to_string(n) + " threads wait for a " + place + ", ";
    return text + std::to_string(done) + " have exited";
}

void check_redzones(Block& b) {
    unpoison(b.shared, b.room);
    const char* p = b.shared;
    auto check = [&](const char* end) {
        for (; p < end; ++p) {
            if (static_cast<unsigned char>(*p) == NAN_BYTE || !launch->report.empty()) continue;
            launch->report = "shared memory was written outside its regions, " + std::to_string(p - b.shared) + " bytes in";
        }
    };
    for (const Region& r : b.regions) {
        check(r.at);
        p = r.at + r.bytes;
    }
    check(std::min(p + RED, const_cast<const char*>(b.shared) + b.room));
}

void start(Block& b, uint3 index) {
    const dim3 size = launch->size;
    const unsigned n = size.x * size.y * size.z;
    b.index = index;
    b.threads.resize(n);
    b.warps.resize((n + 31) / 32);
    // Room for the regions and a redzone around each of at most 64.
    b.room = launch->shared_bytes + 65 * RED;
    // What a launch gives each thread at most.
    const int registers = std::min(256u, 65536 / (n * launch->beside) / 8 * 8);
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
        t.registers = registers;
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
    launch->clusters.clear();
    for (size_t i = 0; i < indices.size(); ++i) {
        Block& b = launch->blocks[i];
        start(b, indices[i]);
        b.rank = i % launch->cluster;
        b.first = &b - b.rank;
        if (b.rank == 0) launch->clusters.emplace_back();
        b.cluster = &launch->clusters.back();
    }
    unsigned last = 0;
    while (launch->alive > 0 && launch->report.empty()) {
        // What is under way is done at a random time, at the latest when nothing else can happen.
        if (launch->async && launch->random != 0 && draw() % 16 == 0) advance();
        if (launch->awake.empty()) {
            if (advance()) continue;
            launch->report = stuck();
            break;
        }
        Thread* t = next(last);
        last = t->warp;
        to_fibre(t);
        if (t->state == Thread::Done) {
            --launch->alive;
            leave(*t->block);
            pool.give(t->fibre);
        }
    }
    launch->loads.clear();
    launch->late.clear();
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
    int cluster, beside;
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

void enter(const char* name, int threads, Call call, int cluster, int beside) { kernels()[name] = {threads, call, cluster, beside}; }

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
    if (bar.waiting.size() + bar.arrived + 1 < all) {
        bar.waiting.push_back(current);
        wait(site, "barrier");
    } else {
        bar.arrived = 0;
        for (Thread* t : bar.waiting) {
            if (threads == 0 && (t->site.line != site.line || std::strcmp(t->site.file, site.file) != 0)) {
                fail(("divergent barrier: another thread waits at " + at(t->site)).c_str(), site);
            }
        }
        wake(bar.waiting);
    }
    acquire(&bar);
}

void barrier_arrive(Site site, int id, int threads) {
    Unseen unseen;
    if (id < 1 || id >= 16) fail("barrier number out of range", site);
    Barrier& bar = current->block->barriers[id];
    release(&bar);
    if (bar.waiting.size() + ++bar.arrived < static_cast<size_t>(threads)) return;
    bar.arrived = 0;
    wake(bar.waiting);
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
    seen_write(bar, 8);
    Counter& c = current->block->counters[bar];
    if (!c.waiting.empty()) fail("an mbarrier is initialised while others wait", site);
    if (arrivals < 1) fail("an mbarrier of no arrivals", site);
    c = Counter{arrivals, arrivals, 0, {}, 0, current, false, false};
}

void mbarrier_arrive(uint64_t* bar, Site site) {
    Unseen unseen;
    arrive(*current->block, bar, 0, site);
}

void mbarrier_wait(uint64_t* bar, int parity, Site site) {
    Unseen unseen;
    seen_read(bar, 8);
    Counter& c = counter(*current->block, bar, site);
    // Phase p is complete once c.phase > p: the wait is over when the phase of this parity is behind.
    for (const uint64_t phase = c.phase; (c.phase & 1) == static_cast<uint64_t>(parity);) {
        if (c.phase > phase) fail("an mbarrier has gone on two phases while a thread waits for one", site);
        c.waiting.push_back(current);
        current->counter = &c;
        wait(site, "mbarrier");
        current->counter = nullptr;
    }
    acquire(&c);
}

void turn_wait(const uint32_t* turn, uint32_t mine, Site site) {
    Unseen unseen;
    aligned(turn, 4, site);
    if (!launch->together) fail("a wait for a turn in a launch whose blocks do not run together", site);
    while (*turn != mine) {
        launch->turns[turn].push_back(current);
        wait(site, "turn");
    }
    acquire(const_cast<uint32_t*>(turn));
}

void turn_pass(uint32_t* turn, uint32_t next, Site site) {
    Unseen unseen;
    aligned(turn, 4, site);
    if (*turn + 1 != next) fail("a turn is passed by who did not have it", site);
    release(turn);
    *turn = next;
    wake(launch->turns[turn]);
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

// -- Hopper --------------------------------------------------------------------------------------------------

void fence_barrier_init() {
    Unseen unseen;
    for (auto& [bar, c] : current->block->counters) c.known |= c.owner == current;
}

void mbarrier_expect(uint64_t* bar, int bytes, Site site) {
    Unseen unseen;
    if (bytes < 0) fail("an mbarrier expects fewer than no bytes", site);
    arrive(*current->block, bar, bytes, site);
}

void mbarrier_arrive_at(uint64_t* bar, int rank, Site site) {
    Unseen unseen;
    const size_t offset = offset_of(*current->block, bar, site);
    Block& to = peer(rank, site);
    if (&to != current->block) {
        be_late(site, "remote arrival");
        peer(rank, site);
    }
    known_counter(to, offset, site);
    arrive(to, reinterpret_cast<uint64_t*>(to.shared + offset), 0, site);
}

void tma_load(void* to, const void* map, Corner corner, uint64_t* bar, unsigned blocks, Site site) {
    Unseen unseen;
    Block& b = *current->block;
    launch->async = true;
    Load l{check_map(map, corner.rank, site), corner, offset_of(b, to, site), offset_of(b, bar, site), {}, site};
    const size_t bytes = box_bytes(l.map);
    if (blocks == 0) blocks = 1u << b.rank;
    for (int rank = 0; blocks >> rank != 0; ++rank) {
        if (!(blocks >> rank & 1)) continue;
        Block& p = peer(rank, site);
        check_place(p, l.map, l.offset, site);
        known_counter(p, l.bar, site);
        if (dirty(p, l.offset, bytes)) fail((std::string(DIRTY) + "a TMA load").c_str(), site);
        if (read_by_step(p, l.offset, bytes)) fail("a TMA load writes what a wgmma still reads", site);
        seen_read(p.shared + l.bar, 8);
        // What this thread knows, the copy may rely on.
        release(p.shared + l.offset);
        std::memset(p.shared + l.offset, NAN_BYTE, bytes);
        std::memset(p.proxy.data() + l.offset, NAN_BYTE, bytes);
        l.to.push_back(&p);
    }
#ifdef SIM_ASAN
    each_piece(l.map, corner, l.offset, [&](size_t, char* from, size_t n, bool inside) {
        if (inside && __asan_region_is_poisoned(from, n) != nullptr) fail("a TMA load reads outside a buffer", site);
    });
#endif
    if (launch->random != 0 && draw() % 4 == 0) {
        const std::string wrong = land(l);
        if (!wrong.empty()) fail(wrong.c_str(), site);
    } else {
        launch->loads.push_back(std::move(l));
    }
}

void tma_store(const void* map, int x, int y, const void* from, Site site) {
    Unseen unseen;
    Block& b = *current->block;
    launch->async = true;
    Store s{check_map(map, 2, site), {2, {x, y, 0}}, offset_of(b, from, site), site, false, {}};
    check_place(b, s.map, s.offset, site);
    if (dirty(b, s.offset, box_bytes(s.map))) fail((std::string(DIRTY) + "a TMA store").c_str(), site);
    seen_read(from, box_bytes(s.map));
#ifdef SIM_ASAN
    each_piece(s.map, s.corner, s.offset, [&](size_t, char* to, size_t n, bool inside) {
        if (inside && __asan_region_is_poisoned(to, n) != nullptr) fail("a TMA store writes outside a buffer", site);
    });
#endif
    current->fresh_stores.push_back(std::move(s));
}

void tma_store_commit() {
    Unseen unseen;
    current->stores.push_back(std::move(current->fresh_stores));
    current->fresh_stores.clear();
}

void tma_store_wait(int pending, bool written, Site site) {
    Unseen unseen;
    auto& groups = current->stores;
    const size_t n = groups.size() > static_cast<size_t>(pending) ? groups.size() - pending : 0;
    if (n == 0) return;
    be_late(site, "TMA store");
    for (size_t i = 0; i < n; ++i) {
        for (Store& s : groups[i]) {
            read_store(s);
            if (written) write_store(s);
        }
    }
    if (written) groups.erase(groups.begin(), groups.begin() + n);
}

void fence_async() {
    Unseen unseen;
    Block& b = *current->block;
    // What others have written goes with it: the simulator does not know who wrote a byte.
    for (const Region& r : b.regions) std::memcpy(proxy(b).data() + (r.at - b.shared), r.at, r.bytes);
    for (auto& [bar, c] : b.counters) c.known |= c.owner == current;
}

int cluster_rank() { return current->block->rank; }

void cluster_sync(Site site) {
    Unseen unseen;
    Block& b = *current->block;
    Barrier& bar = *b.cluster;
    size_t all = 0;
    for (unsigned r = 0; r < launch->cluster; ++r) {
        all += b.first[r].threads.size();
        if (b.first[r].done > 0) fail("divergent cluster barrier: other threads have exited", site);
    }
    release(&bar);
    if (bar.waiting.size() + 1 < all) {
        bar.waiting.push_back(current);
        wait(site, "cluster barrier");
    } else {
        for (unsigned r = 0; r < launch->cluster; ++r) {
            for (auto& [at, c] : b.first[r].counters) c.shared = c.known;
        }
        wake(bar.waiting);
    }
    acquire(&bar);
}

void registers(int count, bool up, Site site) {
    Unseen unseen;
    Thread& t = *current;
    Block& b = *t.block;
    if (up ? count < t.registers : count > t.registers) {
        fail(("setmaxnreg from " + std::to_string(t.registers) + " registers to " + std::to_string(count)).c_str(), site);
    }
    while (count - t.registers > b.free_registers) {
        b.need_registers.push_back(&t);
        wait(site, "share of the block's registers");
    }
    b.free_registers -= count - t.registers;
    t.registers = count;
    wake(b.need_registers);
}

bool elect(Site site) {
    exchange(Warp::Elect, 0xFFFFFFFF, nullptr, 0, nullptr, site);
    return current->id % 32 == launch->elected;
}

uint32_t shared_address(const void* p, Site site) {
    Unseen unseen;
    const size_t offset = offset_of(*current->block, p, site);
    if (offset >= 1 << 18) fail("shared memory is beyond what a descriptor reaches: too many regions", site);
    return offset;
}

void wgmma_fence(Site site) {
    Unseen unseen;
    warpgroup(site);
    ++current->fences;
}

void wgmma(const Product& p, Site site) {
    Unseen unseen;
    Thread& t = *current;
    Block& b = *t.block;
    Warpgroup& g = warpgroup(site);
    const int lane = t.id % GROUP, columns = 2 * p.count;
    const size_t number = t.issued++;
    auto mine = t.chains.find(p.d);
    // The first thread of the warpgroup says what the product is.
    if (number == g.computed + g.steps.size()) {
        const size_t chain = mine != t.chains.end() ? mine->second : g.next_chain++;
        Chain& c = g.chains[chain];
        if (c.tile.empty()) c.columns = columns, c.tile.resize(64 * columns);
        if (c.columns != columns) fail("accumulators are under way in another shape", site);
        c.last = number + 1;
        g.steps.push_back({p, site, chain, 0, false, b.room, 0, std::vector<uint32_t>(p.regs == nullptr ? 0 : 4 * GROUP)});
        Step& s = g.steps.back();
        each_place(b, s, [&](size_t offset) { s.low = std::min(s.low, offset), s.high = std::max(s.high, offset + 16); });
    }
    Step& s = g.steps[number - g.computed];
    const Product& q = s.product;
    auto kind = [](const Product& p) {
        return std::make_tuple(p.count, p.regs == nullptr, p.a, p.b, p.add, p.a_columns, p.b_columns);
    };
    if (s.site.line != site.line || kind(q) != kind(p)) {
        fail(("divergent warpgroup: other threads have another wgmma, at " + at(s.site)).c_str(), site);
    }
    Chain& c = g.chains[s.chain];
    if (c.d[lane] == nullptr && mine == t.chains.end()) {
        check_accumulators(p.d, site);
        for (int i = 0; i < p.count; ++i) c.tile[in_tile(lane, i, columns)] = p.d[i];
        std::memset(p.d, NAN_BYTE, 4 * p.count);
        c.d[lane] = p.d;
        t.chains[p.d] = s.chain;
    } else if (c.d[lane] != p.d) {
        fail("divergent warpgroup: other threads have other accumulators under way", site);
    }
    if (p.regs != nullptr) {
        check_operand(p.regs, site);
        remember(p.regs, 16);
        std::memcpy(&s.regs[4 * lane], p.regs, 16);
    }
#ifdef SIM_TSAN
    // For its warp.
    if (lane % 32 == 0) {
        each_place(b, s, [&](size_t offset) { seen_read(b.shared + offset, 16); });
        release(&g);
    }
#endif
    if (++s.issued < GROUP) return;
    each_place(b, s, [&](size_t offset) {
        if (dirty(b, offset, 16)) fail((std::string(DIRTY) + "a wgmma").c_str(), site);
    });
}

void wgmma_commit(Site site) {
    Unseen unseen;
    warpgroup(site);
    current->commits.push_back(current->issued);
}

void wgmma_wait(int pending, Site site) {
    Unseen unseen;
    Thread& t = *current;
    Block& b = *t.block;
    Warpgroup& g = warpgroup(site);
    const int lane = t.id % GROUP;
    const size_t groups = t.commits.size() > static_cast<size_t>(pending) ? t.commits.size() - pending : 0;
    if (groups == 0) return;
    const size_t upto = t.commits[groups - 1];
    t.commits.erase(t.commits.begin(), t.commits.begin() + groups);
    if (g.computed < upto) {
#ifdef SIM_TSAN
        // The first that waits has them read: as late as it may be.
        for (size_t i = g.computed; i < upto; ++i) {
            Step& s = g.steps[i - g.computed];
            if (s.read) continue;
            s.read = true;
            each_place(b, s, [&](size_t offset) { seen_read(b.shared + offset, 16); });
        }
        release(&g);
#endif
        (void)b;
        g.wanted = std::max(g.wanted, upto);
        while (g.computed < upto) {
            g.waiting.push_back(&t);
            wait(site, "wgmma");
        }
    }
    acquire(&g);
    for (auto it = t.chains.begin(); it != t.chains.end();) {
        Chain& c = g.chains[it->second];
        if (c.last > upto) {
            ++it;
            continue;
        }
        float* d = it->first;
        const auto* bytes = reinterpret_cast<const unsigned char*>(d);
        const size_t n = 2 * c.columns;
        if (!std::all_of(bytes, bytes + n, [](unsigned char x) { return x == NAN_BYTE; })) {
            fail("accumulators were written while a wgmma was under way", site);
        }
        for (int i = 0; i < c.columns / 2; ++i) d[i] = c.tile[in_tile(lane, i, c.columns)];
        remember(d, 0);
        const size_t chain = it->second;
        it = t.chains.erase(it);
        if (++c.delivered == GROUP) g.chains.erase(chain);
    }
    t.fences_at_wait = t.fences;
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
    l.elected = l.random >> 40 & 31;
    l.cluster = it->second.cluster;
    l.beside = it->second.beside;
    l.together = together != 0;
#ifdef SIM_TSAN
    l.host.tsan = __tsan_get_current_fiber();
#endif
    if (static_cast<int>(size[0] * size[1] * size[2]) != it->second.threads) {
        last_error = std::string(name) + " is for blocks of " + std::to_string(it->second.threads) + " threads";
        return 1;
    }
    if (grid[0] % l.cluster != 0) {
        last_error = std::string(name) + " is for clusters of " + std::to_string(l.cluster) + " blocks";
        return 1;
    }
    launch = &l;
    release(&launch->begin);
    Unseen unseen;
    // Clusters, each by its first block.
    std::vector<uint3> order;
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; x += l.cluster) order.push_back({x, y, z});
    if (block_seed != 0) {
        uint64_t s = block_seed * 0xD1B54A32D192ED03ull | 1;
        for (size_t i = order.size(); i > 1; --i) {
            s ^= s >> 12, s ^= s << 25, s ^= s >> 27;
            std::swap(order[i - 1], order[s * 0x2545F4914F6CDD1Dull % i]);
        }
    }
    std::vector<uint3> group;
    for (size_t i = 0; i < order.size() && l.report.empty(); ++i) {
        for (unsigned r = 0; r < l.cluster; ++r) group.push_back({order[i].x + r, order[i].y, order[i].z});
        if (together && i + 1 < order.size()) continue;
        run_blocks(group);
        group.clear();
    }
    acquire(&launch->end);
    launch = nullptr;
    last_error = l.report.empty() ? "" : std::string(name) + ": " + l.report;
    return l.report.empty() ? 0 : 1;
}

}  // extern "C"
