// mbarriers, the async proxy, TMA and wgmma: what they do when their time has come.
#pragma once

#include "fibres.h"
#include "tensor_core.h"

namespace sim {
namespace {

// -- mbarriers ----------------------------------------

Counter& counter(Block& b, uint64_t* bar, Site site) {
    auto it = b.counters.find(bar);
    if (it == b.counters.end()) fail("an mbarrier was never initialised", site);
    return it->second;
}

// Ends the phase if nothing is missing; what is wrong with it, if anything. Bytes may come before
// the arrival that expects them: another block of the cluster sends some.
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

// -- the async proxy and shared memory ----------------------------------------

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

// Where 16 bytes lie when bits of their address from the fourth on are xored with those three
// above.
size_t swizzled(size_t offset, unsigned span) { return offset ^ (offset >> 3 & (span == 0 ? 0 : span - 16)); }

// -- TMA ----------------------------------------

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

// Calls f(offset in the box as it lies in shared memory at `offset`, address in global memory,
// bytes, whether inside) for its pieces, each of 16 bytes or of one element.
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

// -- wgmma ----------------------------------------

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

void compute(Block& b, Warpgroup& g) {
    float left[64 * 16], right[16 * 256];
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
        unpack(p.a, p.a_columns, 64, [&](int k, int m) -> float& { return left[m * 16 + k]; });
    } else {
        for (int t = 0; t < GROUP; ++t) {
            for (int i = 0; i < 4; ++i) {
                const uint32_t two = s.regs[4 * t + i];
                float* to = left + (t / 32 * 16 + t % 32 / 4 + i % 2 * 8) * 16 + 2 * (t % 4) + i / 2 * 8;
                to[0] = wide(two);
                to[1] = wide(two >> 16);
            }
        }
    }
    unpack(p.b, p.b_columns, n, [&](int k, int i) -> float& { return right[in_columns(k, i)]; });
    if (written) launch->report = "shared memory was written while a wgmma reads it, at " + at(s.site);
    multiply(g.chains[s.chain].tile.data(), left, right, 64, n, p.add);
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

}  // namespace
}  // namespace sim
