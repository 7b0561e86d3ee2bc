// The arithmetic: what one block computes, in three phases with a barrier between them. The same code runs on the GPU
// and on the host.
//
// A block takes `Tile` tokens and `chunk` coefficient groups, with all query and key heads of these groups. A pair of
// channels (left, right) turns by its group's series, in float32 whatever T is, rounded once at the end:
//   left * C - right * sign * S,   right * C + left * sign * S
// Channels that form no pair are copied.
#pragma once

#include <cmath>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arguments.h"

#ifdef __CUDACC__
#define FOPE_BOTH __host__ __device__ __forceinline__
#define FOPE_THREAD __device__ __forceinline__
#else
#define FOPE_BOTH inline
#define FOPE_THREAD inline
#endif

namespace fope {

constexpr int kRun = 16; // terms summed before they join the total: a long series rounds less often at full size

struct alignas(8) Turn {
    float cos, sin;
};

// One frequency at the tokens of a tile; aligned so that a thread reads it in 16-byte pieces.
template <int Tile>
struct alignas(Tile > 1 ? 16 : 8) Basis {
    Turn at[Tile];
};

template <typename T, int Size>
struct alignas(sizeof(T) * Size) Pack {
    T at[Size];
};

// The angle is by definition the rounded float32 product, so no compiler may keep it wider.
template <typename Position>
FOPE_BOTH Turn wave(Position position, float freq) {
    Turn turn;
#ifdef __CUDA_ARCH__
    sincosf(__fmul_rn(static_cast<float>(position), freq), &turn.sin, &turn.cos);
#else
    float const angle = static_cast<float>(position) * freq;
    turn = {std::cos(angle), std::sin(angle)};
#endif
    return turn;
}

// Where a token stands, for one frequency.
FOPE_BOTH int64_t position(FopeRotaryArguments const& a, int64_t token, int) { return a.position_ids[token]; }

FOPE_BOTH float position(FopeRotaryGeneralArguments const& a, int64_t token, int d) {
    int64_t const place = a.axis[d] * a.tokens + token;
    return a.position_type == 1 ? static_cast<float const*>(a.positions)[place]
                                : static_cast<float>(static_cast<int64_t const*>(a.positions)[place]);
}

// Rows of coefficients.
FOPE_BOTH int rows(FopeRotaryArguments const& a) { return a.frequencies; }
FOPE_BOTH int rows(FopeRotaryGeneralArguments const& a) { return a.rows; }

// Coefficients are read by every block and written by none.
FOPE_BOTH float constant(float const* address) {
#ifdef __CUDA_ARCH__
    return __ldg(address);
#else
    return *address;
#endif
}

// Frequencies with their last run filled up: an unrolled run may load ahead of its end, and never what others write.
FOPE_BOTH int basis_size(int frequencies) { return (frequencies + kRun - 1) / kRun * kRun; }

// Turns of one row of the table, its last vector filled up.
FOPE_BOTH int row_size(int pairs, int vector) { return (pairs + vector - 1) / vector * vector; }

template <int Tile, int Vector, typename Arguments = FopeRotaryArguments>
struct Block {
    Arguments const& a;
    int64_t first_token;
    int tokens, first_group, groups, row, stride;
    Basis<Tile>* basis; // [D], and room up to basis_size
    Turn* table;        // [tokens, groups, row]

    static size_t shared_bytes(Arguments const& a, int chunk) {
        return sizeof(Basis<Tile>) * basis_size(a.frequencies) + sizeof(Turn) * Tile * chunk * row_size(a.pairs, Vector);
    }

    FOPE_BOTH Block(Arguments const& arguments, int chunk, int64_t x, int y, void* shared)
        : a(arguments), first_token(x * Tile), first_group(y * chunk), row(row_size(a.pairs, Vector)),
          stride(row / Vector), basis(static_cast<Basis<Tile>*>(shared)),
          table(reinterpret_cast<Turn*>(basis + basis_size(a.frequencies))) {
        tokens = a.tokens - first_token < Tile ? static_cast<int>(a.tokens - first_token) : Tile;
        groups = a.groups - first_group < chunk ? a.groups - first_group : chunk;
    }

    // All that one thread does. `barrier` returns when every thread of the block has called it.
    template <typename T, typename Barrier>
    FOPE_THREAD void compute(int thread, int threads, Barrier barrier) const {
        fill_basis(thread, threads);
        barrier();
        fill_table(thread, threads);
        barrier();
        rotate<T>(thread, threads);
    }

    // Sines and cosines, shared by all heads: one thread for each frequency and token.
    FOPE_BOTH void fill_basis(int thread, int threads) const {
        for (int i = thread; i < a.frequencies * Tile; i += threads) {
            int const d = i / Tile, token = i % Tile;
            if (token < tokens) basis[d].at[token] = wave(position(a, first_token + token, d), a.freq[d]);
        }
    }

    // The series: one thread for each group and pair, so that a coefficient is read once for the whole tile.
    FOPE_BOTH void fill_table(int thread, int threads) const {
        for (int i = thread; i < groups * a.pairs; i += threads) {
            int const group = i / a.pairs, pair = i % a.pairs;
            int64_t const first = static_cast<int64_t>(first_group + group) * rows(a) * a.pairs + pair;
            int const other = (rows(a) - a.frequencies) * a.pairs; // from one basis to the other; 0 without another
            float const *cos_coef = a.cos_coef + first + other, *sin_coef = a.sin_coef + first;
            Basis<Tile> sum = {};
            for (int start = 0; start < a.frequencies; start += kRun) {
                int const end = a.frequencies - start < kRun ? a.frequencies : start + kRun;
                Basis<Tile> part = {};
#ifdef __CUDA_ARCH__
#pragma unroll(Tile == 1 ? kRun : 4) // a lone token has nothing but loads in flight to hide their latency
#endif
                for (int d = start; d < end; ++d) {
                    float const by_cos = constant(cos_coef + d * a.pairs), by_sin = constant(sin_coef + d * a.pairs);
                    Basis<Tile> const turns = basis[d];
                    for (int t = 0; t < Tile; ++t) {
                        part.at[t].cos = fmaf(turns.at[t].cos, by_cos, part.at[t].cos);
                        part.at[t].sin = fmaf(turns.at[t].sin, by_sin, part.at[t].sin);
                    }
                    if (!other) continue;
                    float const of_sin = constant(cos_coef + d * a.pairs - other);
                    float const of_cos = constant(sin_coef + d * a.pairs + other);
                    for (int t = 0; t < Tile; ++t) {
                        part.at[t].cos = fmaf(turns.at[t].sin, of_sin, part.at[t].cos);
                        part.at[t].sin = fmaf(turns.at[t].cos, of_cos, part.at[t].sin);
                    }
                }
                for (int t = 0; t < Tile; ++t) {
                    sum.at[t].cos += part.at[t].cos;
                    sum.at[t].sin += part.at[t].sin;
                }
            }
            for (int t = 0; t < Tile; ++t)
                if (t < tokens)
                    table[(t * groups + group) * row + column(pair)] = {sum.at[t].cos, a.sign * sum.at[t].sin};
        }
    }

    // q and k of the tile, streamed: one thread for `Vector` pairs of one head.
    template <typename T>
    FOPE_BOTH void rotate(int thread, int threads) const {
        if (a.interleaved) stream<T, true>(thread, threads);
        else stream<T, false>(thread, threads);
    }

  private:
    // Where a pair lies in its row. Threads side by side read the same element of neighbouring vectors, so these are
    // kept side by side: no two of them meet in a bank of shared memory.
    FOPE_BOTH int column(int pair) const { return pair % Vector * stride + pair / Vector; }

    template <typename T, bool Interleaved>
    FOPE_BOTH void stream(int thread, int threads) const {
        unsigned const lanes = a.head_dim / 2 / Vector, heads = a.heads / a.groups, kv_heads = a.kv_heads / a.groups;
        unsigned const members = heads + kv_heads, items = tokens * groups * members * lanes;
        for (unsigned i = thread; i < items; i += threads) {
            unsigned const lane = i % lanes, member = i / lanes % members, cell = i / lanes / members;
            int64_t const token = first_token + cell / groups;
            unsigned const group = first_group + cell % groups;
            bool const is_q = member < heads; // chosen, not branched on: both kinds meet in one warp
            int64_t const head = is_q ? token * a.heads + group * heads + member
                                      : token * a.kv_heads + group * kv_heads + (member - heads);
            turn<T, Interleaved>(is_q ? a.q : a.k, is_q ? a.q_rotated : a.k_rotated, head, lane, table + cell * row);
        }
    }

    // Turns `Vector` pairs of the head that is the `head`-th of all, or copies as many channels that form none.
    template <typename T, bool Interleaved>
    FOPE_BOTH void turn(void const* from, void* to, int64_t head, int lane, Turn const* turns) const {
        using Access = Pack<T, Vector>;
        int const pair = lane * Vector;
        bool const copied = pair >= a.rotary_dim / 2, adjacent = Interleaved || copied;
        int64_t const low = head * a.head_dim + (adjacent ? 2 * pair : pair);
        int64_t const high = low + (adjacent ? Vector : a.rotary_dim / 2);
        Access const x[2] = {*reinterpret_cast<Access const*>(static_cast<T const*>(from) + low),
                             *reinterpret_cast<Access const*>(static_cast<T const*>(from) + high)};
        Access y[2] = {x[0], x[1]};
        for (int v = 0; v < Vector && !copied; ++v) {
            int const i = Interleaved ? 2 * v : v, j = Interleaved ? i + 1 : i + Vector;
            float const left = static_cast<float>(x[i / Vector].at[i % Vector]);
            float const right = static_cast<float>(x[j / Vector].at[j % Vector]);
            Turn const by = pair + v < a.pairs ? turns[v * stride + lane] : Turn{a.cos_pad, a.sign * a.sin_pad};
            y[i / Vector].at[i % Vector] = static_cast<T>(fmaf(left, by.cos, -(right * by.sin)));
            y[j / Vector].at[j % Vector] = static_cast<T>(fmaf(right, by.cos, left * by.sin));
        }
        *reinterpret_cast<Access*>(static_cast<T*>(to) + low) = y[0];
        *reinterpret_cast<Access*>(static_cast<T*>(to) + high) = y[1];
    }
};

} // namespace fope
