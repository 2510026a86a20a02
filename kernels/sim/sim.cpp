// The simulator: fibres, their scheduler, barriers, warp exchanges, late copies and products,
// redzones, reports.
//
// One launch runs its blocks one after another in a seeded order, or all at once where the launch
// says that they are co-resident. Within a block a seeded choice picks the next thread at every
// switch. This file is compiled without sanitizers, so that they see the kernel's accesses and only
// those; it tells them about fibres and about the happens-before edges that CUDA promises:
// barriers, __syncwarp, the start and end of a launch. Anything else that two threads share is a
// race.
#include "calls.h"

using namespace sim;

#pragma GCC visibility push(default)
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
    engine();
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
#pragma GCC visibility pop
