// What kernels call.
#pragma once

#include "scheduler.h"

namespace sim {

void enter(const char* name, int threads, Call call, int cluster, int beside) { kernels()[name] = {threads, call, cluster, beside}; }

void fail(const char* what, Site site) {
    Unseen unseen;
    if (launch->report.empty()) {
        launch->report = std::string(what) + " at " + at(site) + " (thread " + std::to_string(current->id) + " of block " +
                         std::to_string(current->block->index.x) + ")";
    }
    // Not done: its fibre stays in the middle of the kernel, unseen, and is not used again.
    current->state = Thread::Waiting;
    switch_to(nullptr, true);
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

// D += A B of a warp: the lanes' fragments lie as ptx::mma_bf16 says.
void multiply(Values& values) {
    float a[16][16], b[16][8], d[16][8];
    for (int l = 0; l < 32; ++l) {
        const Fragments& f = reinterpret_cast<const Fragments&>(values[l]);
        const int r = l / 4, c = l % 4 * 2;
        for (int i = 0; i < 8; ++i) a[r + i / 2 % 2 * 8][c + i / 4 * 8 + i % 2] = wide(f.a[i / 2] >> i % 2 * 16);
        for (int i = 0; i < 4; ++i) b[c + i / 2 * 8 + i % 2][r] = wide(f.b[i / 2] >> i % 2 * 16);
        for (int i = 0; i < 2; ++i) std::memcpy(&d[r + 8 * i][c], &f.d[2 * i], 8);
    }
    multiply(d[0], a[0], b[0], 16, 8, true);
    for (int l = 0; l < 32; ++l) {
        for (int i = 0; i < 2; ++i) std::memcpy(values[l] + 8 * i, &d[l / 4 + 8 * i][l % 4 * 2], 8);
    }
}

const Values& exchange(Warp kind, unsigned mask, const void* value, size_t bytes, Site site) {
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
    Values& values = m->values[m->round & 1];
    if (bytes > 0) std::memcpy(values[lane], value, bytes);
    // Only __syncwarp promises that memory is seen.
    if (kind == Warp::Sync) release(m);
    m->arrived |= 1u << lane;
    if (m->arrived != mask) {
        m->waiting.push_back(t);
        wait(site, "warp exchange");
    } else {
        if (kind == Warp::Mma) multiply(values);
        m->arrived = 0;
        ++m->round;
        wake(m->waiting);
    }
    if (kind == Warp::Sync) acquire(m);
    return values;
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
    // Phase p is complete once c.phase > p: the wait is over when the phase of this parity is
    // behind.
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

// -- Hopper ----------------------------------------

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
    exchange(Warp::Elect, 0xFFFFFFFF, nullptr, 0, site);
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
