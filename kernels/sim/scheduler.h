// Who runs next, and what is under way meanwhile: TMA loads, products and stores that are waited
// for, arrivals at other blocks.
#pragma once

#include "hopper.h"

namespace sim {
namespace {

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
    // The block's shared memory ends with its last thread: what others do with its mbarriers comes
    // before.
    Block& b = *t.block;
    release(&b);
    if (b.done + 1 < static_cast<int>(b.threads.size())) return;
    acquire(&b);
    for (auto& [bar, c] : b.counters) seen_write(bar, 8);
}

// The first frame of every fibre.
void body() {
#ifdef SIM_ASAN
    // The first fibre of a launch comes from the host.
    Context& host = launch->host;
    const bool first = host.stack == nullptr;
    __sanitizer_finish_switch_fiber(nullptr, first ? &host.stack : nullptr, first ? &host.bytes : nullptr);
#endif
    acquire(&launch->begin);
    launch->call(launch->args);
    Thread* after = nullptr;
    {
        // It must end here: a fibre that leaves unseen would be unseen in all launches that take it
        // over.
        Unseen unseen;
        Thread* t = current;
        if (!t->fresh.empty() || !t->groups.empty()) {
            fail("a copy is never waited for", t->fresh.empty() ? Site{launch->name.c_str(), 0} : t->site);
        }
        finish(*t);
        release(&launch->end);
        t->state = Thread::Done;
        --launch->alive;
        leave(*t->block);
        // Nobody takes it over before the host starts other blocks.
        pool.give(t->fibre);
        after = next();
    }
    switch_to(after, true);
    std::abort();
}

void prepare(Thread& t) {
    t.fibre = pool.take();
    t.fibre->fake = nullptr;
    unpoison(static_cast<const char*>(t.fibre->stack) + 4096, STACK - 4096);
    // A frame as sim_switch leaves it: six registers, the return address, and a slot that keeps the
    // stack aligned as after a call.
    void** top = reinterpret_cast<void**>(t.fibre->top);
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
        t.thread_index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        t.block_index = index, t.block_size = size, t.grid_size = launch->grid;
        prepare(t);
        make_ready(&t);
    }
    launch->alive += n;
}

// The thread that runs next, taken from the ready ones. Seed 0 goes through a warp's threads, and
// through warps, as they came. Another draws both, but lets the warp `last` go on most times if it
// can: a fair draw keeps warps abreast, and what a warp that is a round of a loop ahead writes too
// early would not show.
Thread* pick() {
    auto& awake = launch->awake;
    unsigned& last = launch->last;
    const bool drawn = launch->random != 0, stays = !launch->ready[last].empty() && !(drawn && draw() % 8 == 0);
    if (!stays) last = awake[drawn ? draw() % awake.size() : 0];
    auto& warp = launch->ready[last];
    if (drawn) std::swap(warp.front(), warp[draw() % warp.size()]);
    Thread* t = warp.front();
    warp.pop_front();
    if (warp.empty()) awake.erase(std::find(awake.begin(), awake.end(), last));
    return t;
}

Thread* next() {
    while (launch->alive > 0 && launch->report.empty()) {
        // What is under way is done at a random time, at the latest when nothing else can happen.
        if (launch->async && launch->random != 0 && draw() % 16 == 0) advance();
        if (!launch->awake.empty()) return pick();
        if (!advance()) launch->report = stuck();
    }
    return nullptr;
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
    launch->last = 0;
    while (Thread* t = next()) switch_to(t);
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
}  // namespace sim
