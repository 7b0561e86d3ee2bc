// How the work is cut into blocks: a pure function of the arguments, so that the host runs what the GPU runs.
#pragma once

#include "rotary.cuh"

namespace fope {

enum Type { kFloat = 1, kInt64 = 7, kHalf = 10, kBFloat16 = 16 }; // ONNX's numbers

constexpr int kMaxThreads = 256;
constexpr int kEnoughBlocks = 256;           // about two for every multiprocessor of the largest GPUs
constexpr size_t kSharedBytes = 48 * 1024;   // what a block has everywhere, without asking
constexpr int64_t kMaxItems = int64_t{1} << 31;
constexpr int kMaxChunks = 65535;            // of a grid's second dimension

struct Plan {
    int tile, vector, threads, chunk; // tokens a block, pairs an access, threads a block, groups a block
    int64_t tiles;
    int chunks;
    size_t shared_bytes;
};

template <typename T_, int Tile_, int Vector_>
struct Config {
    using T = T_;
    static constexpr int Tile = Tile_, Vector = Vector_;
};

template <typename T, int Tile, typename Run>
auto with_tile(Plan const& plan, Run run) {
    return plan.vector == 1 ? run(Config<T, Tile, 1>{}) : run(Config<T, Tile, 16 / sizeof(T)>{});
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

// Pairs that fill 16 bytes, or 1 where they do not fit evenly.
inline int widest(FopeRotaryArguments const& a) {
    int const vector = a.dtype == kFloat ? 4 : 8;
    uintptr_t together = 0;
    for (void const* tensor : {a.q, a.k, static_cast<void const*>(a.q_rotated), static_cast<void const*>(a.k_rotated)})
        together |= reinterpret_cast<uintptr_t>(tensor);
    return a.head_dim / 2 % vector || a.rotary_dim / 2 % vector || together % 16 ? 1 : vector;
}

// Gives a block as many groups as its threads can fill a table for at once, or fewer where shared memory is short.
template <typename Arguments>
Plan cut(Arguments const& a, Plan plan) {
    plan.tiles = (a.tokens + plan.tile - 1) / plan.tile;
    int const most = plan.threads / (a.pairs ? a.pairs : 1);
    plan.chunk = most < 1 ? 1 : most > a.groups ? a.groups : most;
    while (true) {
        plan.chunks = (a.groups + plan.chunk - 1) / plan.chunk;
        plan.chunk = (a.groups + plan.chunks - 1) / plan.chunks; // as many for each block
        plan.shared_bytes = dispatch(a.dtype, plan, [&](auto config) {
            return Block<config.Tile, config.Vector, Arguments>::shared_bytes(a, plan.chunk);
        });
        // A single token's block is short: rather many of them than long ones.
        bool const idle = plan.tile == 1 && plan.tiles * plan.chunks < kEnoughBlocks;
        if (plan.chunk == 1 || (plan.shared_bytes <= kSharedBytes && !idle)) break;
        plan.chunk = (plan.chunk + 1) / 2;
    }
    return plan;
}

// Large tiles read the coefficients seldom; small ones occupy the GPU when tokens are few, as in decoding. Arguments
// that are not 0 are kept. Returns 0 or a fault.
template <typename Arguments>
int choose(Arguments const& a, Plan& plan, int tile = 0, int vector = 0, int threads = 0) {
    if (int const code = fault(a)) return code;
    int const wide = widest(a);
    if (tile != 0 && tile != 1 && tile != 4 && tile != 8) return FOPE_ROTARY_PLAN;
    if (vector != 0 && vector != 1 && vector != wide) return FOPE_ROTARY_PLAN;
    if (threads < 0 || threads > kMaxThreads) return FOPE_ROTARY_PLAN;
    for (int const size : {8, 4, 1}) {
        if (tile && size != tile) continue;
        plan = {size, vector ? vector : wide, threads ? threads : size == 1 ? 128 : kMaxThreads, 0, 0, 0, 0};
        plan = cut(a, plan);
        bool const fits = plan.shared_bytes <= kSharedBytes && plan.tiles < kMaxItems && plan.chunks <= kMaxChunks;
        if (fits && (tile || size == 1 || plan.tiles * plan.chunks >= kEnoughBlocks)) return 0;
    }
    return FOPE_ROTARY_SIZE;
}

} // namespace fope
