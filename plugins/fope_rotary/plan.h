// How the work is cut into blocks: a pure function of the arguments, so that the host runs what the GPU runs.
#pragma once

#include <algorithm>

#include "rotary.cuh"

namespace fope {

enum Type { kFloat = 1, kInt64 = 7, kHalf = 10, kBFloat16 = 16 }; // ONNX's numbers

constexpr int kMaxThreads = 256;
constexpr int kWarp = 32;
constexpr int kEnoughBlocks = 132;           // one for every multiprocessor of a large GPU
constexpr size_t kSharedBytes = 48 * 1024;   // what a block has everywhere, without asking
constexpr int64_t kMaxItems = int64_t{1} << 31;
constexpr int kMaxChunks = 65535;            // of a grid's second dimension

struct Plan {
    int tile, vector, threads; // tokens a block, pairs an access, threads a block
    int chunk, parts;          // groups a block, threads that share a series
    int64_t tiles;
    int chunks;
    size_t shared_bytes;
};

template <typename T_, int Tile_, int Vector_>
struct Config {
    using T = T_;
    static constexpr int Tile = Tile_, Vector = Vector_;
};

// Single tokens have few channels: rather many threads than long accesses.
constexpr int access_bytes(int tile) { return tile == 1 ? 4 : 16; }

template <typename T, int Tile, typename Run>
auto with_tile(Plan const& plan, Run run) {
    return plan.vector == 1 ? run(Config<T, Tile, 1>{}) : run(Config<T, Tile, access_bytes(Tile) / sizeof(T)>{});
}

template <typename T, typename Run>
auto with_type(Plan const& plan, Run run) {
    if (plan.tile == 1) return with_tile<T, 1>(plan, run);
    return plan.tile == 4 ? with_tile<T, 4>(plan, run) : with_tile<T, 8>(plan, run);
}

// Calls `run` with the Config that a plan and a type stand for.
template <typename Run>
auto dispatch(int dtype, Plan const& plan, Run run) {
    if (dtype == kFloat) return with_type<float>(plan, run);
    return dtype == kHalf ? with_type<__half>(plan, run) : with_type<__nv_bfloat16>(plan, run);
}

// What both versions ask for; the addresses of positions and the rows of coefficients are each one's own.
inline int common_fault(FopeRotaryArguments const& a, void const* positions, int64_t rows) {
    if (a.dtype != kFloat && a.dtype != kHalf && a.dtype != kBFloat16) return FOPE_ROTARY_DTYPE;
    if (a.tokens < 0 || a.frequencies < 0 || a.pairs < 0 || a.groups < 1 || a.heads < 1 || a.kv_heads < 1)
        return FOPE_ROTARY_SHAPE;
    if (a.head_dim < 2 || a.head_dim % 2 || a.rotary_dim < 2 || a.rotary_dim % 2) return FOPE_ROTARY_SHAPE;
    if (a.rotary_dim > a.head_dim || a.pairs > a.rotary_dim / 2) return FOPE_ROTARY_SHAPE;
    if (a.heads % a.groups || a.kv_heads % a.groups) return FOPE_ROTARY_SHAPE;
    if (a.tokens && !(a.q && a.k && positions && a.q_rotated && a.k_rotated)) return FOPE_ROTARY_POINTER;
    if (a.frequencies && !a.freq) return FOPE_ROTARY_POINTER;
    if (a.frequencies && a.pairs && !(a.sin_coef && a.cos_coef)) return FOPE_ROTARY_POINTER;
    int64_t const channels = (static_cast<int64_t>(a.heads) + a.kv_heads) * a.head_dim;
    return channels * 8 >= kMaxItems || rows * a.pairs >= kMaxItems ? FOPE_ROTARY_SIZE : 0;
}

inline int fault(FopeRotaryArguments const& a) { return common_fault(a, a.position_ids, a.frequencies); }

inline int fault(FopeRotaryGeneralArguments const& a) {
    if (int const code = common_fault(a, a.positions, a.rows)) return code;
    if (a.rows != a.frequencies && a.rows != 2 * static_cast<int64_t>(a.frequencies)) return FOPE_ROTARY_SHAPE;
    if (a.position_type != kFloat && a.position_type != kInt64) return FOPE_ROTARY_DTYPE;
    return a.frequencies && !a.axis ? FOPE_ROTARY_POINTER : 0;
}

// Pairs that fill an access, or 1 where they do not fit evenly.
inline int widest(FopeRotaryArguments const& a, int tile) {
    int const bytes = access_bytes(tile), vector = bytes / (a.dtype == kFloat ? 4 : 2);
    uintptr_t together = 0;
    for (void const* tensor : {a.q, a.k, static_cast<void const*>(a.q_rotated), static_cast<void const*>(a.k_rotated)})
        together |= reinterpret_cast<uintptr_t>(tensor);
    return a.head_dim / 2 % vector || a.rotary_dim / 2 % vector || together % bytes ? 1 : vector;
}

// What threads stream in a block: some tokens of a thread's pairs of a head, each.
inline int64_t pieces_of(FopeRotaryArguments const& a, Plan const& plan) {
    int64_t const members = (a.heads + a.kv_heads) / a.groups, lanes = a.head_dim / 2 / plan.vector;
    return plan.chunk * members * lanes * ((plan.tile + kAhead - 1) / kAhead);
}

// Whether a Divisor divides these by what it has to.
inline bool divisible(FopeRotaryArguments const& a, Plan const& plan) {
    return pieces_of(a, plan) * std::max({a.head_dim / 2, (a.heads + a.kv_heads) / a.groups, plan.chunk}) <= UINT32_MAX;
}

// Gives a block as many groups as its threads can fill a table for at once; fewer where shared memory is short or,
// with `few`, blocks are.
template <typename Arguments>
Plan cut(Arguments const& a, Plan plan, bool few) {
    int const row = row_size(a.pairs, plan.vector), runs = run_count(a.frequencies);
    plan.tiles = (a.tokens + plan.tile - 1) / plan.tile;
    plan.parts = plan.tile == 1 && row * runs <= kMaxThreads ? runs : 1;
    int const filling = row * plan.parts;
    plan.chunk = std::clamp(kMaxThreads / std::max(filling, 1), 1, a.groups);
    while (true) {
        plan.chunks = (a.groups + plan.chunk - 1) / plan.chunk;
        plan.chunk = (a.groups + plan.chunks - 1) / plan.chunks; // as many for each block
        plan.shared_bytes = dispatch(a.dtype, plan, [&](auto config) {
            Layout const layout(a, plan.vector, plan.chunk, plan.parts);
            return Block<config.Tile, config.Vector, Arguments>::shared_bytes(a, layout);
        });
        bool const idle = few && (plan.tile == 1 || plan.tiles * plan.chunks < kEnoughBlocks);
        if (plan.chunk == 1 || (plan.shared_bytes <= kSharedBytes && !idle)) break;
        plan.chunk = (plan.chunk + 1) / 2;
    }
    if (plan.threads) return plan;
    int64_t const wanted = std::max<int64_t>(pieces_of(a, plan), plan.chunk * filling);
    int64_t const rounds = (wanted + kMaxThreads - 1) / kMaxThreads; // as many for each thread
    plan.threads = static_cast<int>((wanted + rounds * kWarp - 1) / (rounds * kWarp)) * kWarp;
    return plan;
}

// Large tiles read the coefficients seldom; small ones occupy the GPU when tokens are few, as in decoding. Arguments
// that are not 0 are kept. Returns 0 or a fault.
template <typename Arguments>
int choose(Arguments const& a, Plan& plan, int tile = 0, int vector = 0, int threads = 0) {
    if (int const code = fault(a)) return code;
    if (tile != 0 && tile != 1 && tile != 4 && tile != 8) return FOPE_ROTARY_PLAN;
    if (threads < 0 || threads > kMaxThreads) return FOPE_ROTARY_PLAN;
    for (int const size : {8, 4, 1}) {
        if (tile && size != tile) continue;
        int const wide = widest(a, size);
        if (vector != 0 && vector != 1 && vector != wide) return FOPE_ROTARY_PLAN;
        plan = {size, vector ? vector : wide, threads, 0, 0, 0, 0, 0};
        plan = cut(a, plan, !tile);
        bool const fits = plan.shared_bytes <= kSharedBytes && plan.tiles < kMaxItems && plan.chunks <= kMaxChunks &&
                          divisible(a, plan);
        if (fits && (tile || size == 1 || plan.tiles * plan.chunks >= kEnoughBlocks)) return 0;
    }
    return FOPE_ROTARY_SIZE;
}

} // namespace fope
