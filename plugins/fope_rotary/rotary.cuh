// The arithmetic: what one block computes, in three phases with a barrier between them. The same code runs on the GPU
// and on the host.
//
// A block takes `Tile` tokens and some coefficient groups, with all query and key heads of these groups. What a thread
// needs from afar it asks for before the first barrier, so that it waits once. A pair of channels (left, right) turns
// by its group's series, in float32 whatever T is, rounded once at the end:
//   left * C - right * sign * S,   right * C + left * sign * S
// Channels that form no pair are copied.
#pragma once

#include <cmath>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

#include "arguments.h"

#ifdef __CUDACC__
#define FOPE_BOTH __host__ __device__ __forceinline__
#define FOPE_THREAD __device__ __forceinline__
#else
#define FOPE_BOTH inline
#define FOPE_THREAD inline
#endif

#ifdef __CUDA_ARCH__
#define FOPE_UNROLL _Pragma("unroll")
#define FOPE_UNROLL_8 _Pragma("unroll 8")
#else
#define FOPE_UNROLL
#define FOPE_UNROLL_8
#endif

namespace fope {

constexpr int kRun = 8;     // terms of a series that are summed before they join the total, at least
constexpr int kMaxRuns = 8; // as many sums at most: a long series has longer ones
constexpr int kAhead = 2;   // tokens that a thread reads before it needs them

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

template <typename To, typename From>
FOPE_BOTH To reinterpret(From const& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

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

template <typename Arguments>
constexpr bool kGeneral = !std::is_same_v<Arguments, FopeRotaryArguments>;

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

// What is read once does not drive the coefficients out of a cache.
template <typename Access>
FOPE_BOTH Access once(Access const* address) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Access) == 16) return reinterpret<Access>(__ldcs(reinterpret_cast<int4 const*>(address)));
    if constexpr (sizeof(Access) == 4) return reinterpret<Access>(__ldcs(reinterpret_cast<int const*>(address)));
#endif
    return *address;
}

// Frequencies with room behind them: an unrolled run may load ahead of its end, and never what others write.
FOPE_BOTH int basis_size(int frequencies) { return (frequencies + kRun - 1) / kRun * kRun; }

// How a series is cut: the order of its sum is the same for every plan.
FOPE_BOTH int run_size(int frequencies) {
    int const even = (frequencies + kMaxRuns - 1) / kMaxRuns;
    return even < kRun ? kRun : even;
}
FOPE_BOTH int run_count(int frequencies) {
    return frequencies ? (frequencies + run_size(frequencies) - 1) / run_size(frequencies) : 1;
}

// Turns of one row of the table, its last vector filled up with what channels without a frequency turn by.
FOPE_BOTH int row_size(int pairs, int vector) { return (pairs + vector - 1) / vector * vector; }

// Divides by a number that is known before the launch, without the GPU's slow division: right wherever the product of
// both is below 2^32.
struct Divisor {
    uint32_t inverse; // of 2^32, rounded up

    explicit Divisor(unsigned by) : inverse(by == 1 ? 0 : UINT32_MAX / by + 1) {}

    FOPE_BOTH unsigned operator()(unsigned number) const {
#ifdef __CUDA_ARCH__
        unsigned const quotient = __umulhi(inverse, number);
#else
        unsigned const quotient = static_cast<unsigned>(uint64_t{inverse} * number >> 32);
#endif
        return inverse ? quotient : number;
    }
};

// What follows from the arguments and a plan, once for all blocks.
struct Layout {
    int chunk, parts;       // groups a block, threads that share a series
    int run, runs;          // terms of the sums that a series is cut into, and how many there are
    int row, pitch, stride; // turns of a row, its last vector filled up; from row to row, from vector to vector
    int heads, kv_heads;    // of a group
    int lanes, members;     // threads that turn a head at one token, heads of a group
    Divisor by_row, by_parts, by_lanes, by_members, by_chunk;

    template <typename Arguments>
    Layout(Arguments const& a, int vector, int chunk, int parts)
        : chunk(chunk), parts(parts), run(run_size(a.frequencies)), runs(run_count(a.frequencies)),
          row(row_size(a.pairs, vector)), pitch(row + row / vector), stride(row / vector), heads(a.heads / a.groups),
          kv_heads(a.kv_heads / a.groups), lanes(a.head_dim / 2 / vector), members(heads + kv_heads),
          by_row(row ? row : 1), by_parts(parts), by_lanes(lanes), by_members(members), by_chunk(chunk) {}
};

template <int Tile, int Vector, typename Arguments = FopeRotaryArguments>
struct Block {
    static constexpr bool kAlone = Tile == 1; // a lone token: all that counts is how long one thing waits for another
    static constexpr int kTogether = Tile < kAhead ? Tile : kAhead;
    static constexpr int kEarly = kAlone ? kRun : 1;

    Arguments const& a;
    Layout const& of;
    int64_t first_token;
    int tokens, first_group, groups;
    Basis<Tile>* basis; // [D], and room up to basis_size
    Turn* table;        // [Tile, chunk, parts, pitch]; a pair's turn is the sum of its parts. Then a row of pads

    // `kTogether` tokens of one head, at both vectors of a thread's pairs.
    template <typename T>
    struct Piece {
        Pack<T, Vector> at[kTogether][2];
    };

    // What a thread reads before the first barrier.
    template <typename T>
    struct Early {
        Piece<T> piece;
        float cos[kEarly], sin[kEarly];
    };

    // Where a piece lies.
    struct Place {
        bool is_q, copied, padded;
        int first, tokens; // of the tile
        int64_t low;       // the first pair's left channels, from the first element of q or k
        int high, step;    // from left channels to right ones, from token to token
        Turn const* turns;
    };

    static size_t shared_bytes(Arguments const& a, Layout const& of) {
        size_t const turns = static_cast<size_t>(Tile) * of.chunk * of.parts * of.pitch + Vector;
        return sizeof(Basis<Tile>) * basis_size(a.frequencies) + sizeof(Turn) * turns;
    }

    FOPE_BOTH Block(Arguments const& arguments, Layout const& layout, int64_t x, int y, void* shared)
        : a(arguments), of(layout), first_token(x * Tile), first_group(y * of.chunk),
          basis(static_cast<Basis<Tile>*>(shared)), table(reinterpret_cast<Turn*>(basis + basis_size(a.frequencies))) {
        tokens = a.tokens - first_token < Tile ? static_cast<int>(a.tokens - first_token) : Tile;
        groups = a.groups - first_group < of.chunk ? a.groups - first_group : of.chunk;
    }

    // All that one thread does. `barrier` returns when every thread of the block has called it.
    template <typename T, bool Interleaved, typename Barrier>
    FOPE_THREAD void compute(int thread, int threads, Barrier barrier) const {
        Early<T> const early = ask<T, Interleaved>(thread);
        fill_basis(thread, threads);
        barrier();
        fill_table(thread, threads, early);
        barrier();
        rotate<T, Interleaved>(thread, threads, early);
    }

    template <typename T, bool Interleaved>
    FOPE_BOTH Early<T> ask(int thread) const {
        Early<T> early = {};
        if (kAlone && thread < groups * of.parts * of.row) {
            int const above = of.by_row(thread), group = of.by_parts(above), pair = thread - above * of.row;
            int const d = (above - group * of.parts) * of.run, left = a.frequencies - d;
            float const *cos = cos_coef(group) + d * a.pairs + pair, *sin = sin_coef(group) + d * a.pairs + pair;
            FOPE_UNROLL for (int j = 0; j < kEarly; ++j) {
                if (pair >= a.pairs || j >= left) continue;
                early.cos[j] = constant(cos + j * a.pairs);
                early.sin[j] = constant(sin + j * a.pairs);
            }
        }
        if (thread < pieces()) early.piece = read<T>(place<Interleaved>(thread));
        return early;
    }

    // Sines and cosines, shared by all heads: one thread for each frequency and token.
    FOPE_BOTH void fill_basis(int thread, int threads) const {
        for (int i = thread; i < a.frequencies * Tile; i += threads) {
            int const d = i / Tile, token = i % Tile;
            if (token < tokens) basis[d].at[token] = wave(position(a, first_token + token, d), a.freq[d]);
        }
    }

    // The series: one thread for each group, part and pair, so that a coefficient is read once for the whole tile.
    template <typename T>
    FOPE_BOTH void fill_table(int thread, int threads, Early<T> const& early) const {
        for (int i = thread; i < groups * of.parts * of.row; i += threads) {
            int const above = of.by_row(i), group = of.by_parts(above);
            int const part = above - group * of.parts, pair = i - above * of.row;
            Basis<Tile> sum = {};
            if (pair < a.pairs) sum = series(group, pair, part, i == thread, early.cos, early.sin);
            else if (part == 0)
                for (int t = 0; t < Tile; ++t) sum.at[t] = {a.cos_pad, a.sin_pad};
            for (int t = 0; t < Tile; ++t)
                table[((t * of.chunk + group) * of.parts + part) * of.pitch + column(pair)] = {sum.at[t].cos,
                                                                                             a.sign * sum.at[t].sin};
        }
        for (int i = thread; i < Vector; i += threads) pads()[i] = {a.cos_pad, a.sign * a.sin_pad};
    }

    // q and k of the tile, streamed: a thread has asked for its next piece before it turns one.
    template <typename T, bool Interleaved>
    FOPE_BOTH void rotate(int thread, int threads, Early<T> const& early) const {
        Piece<T> now = early.piece;
        for (int i = thread; i < pieces(); i += threads) {
            Piece<T> next = {};
            if (i + threads < pieces()) next = read<T>(place<Interleaved>(i + threads));
            write<T, Interleaved>(place<Interleaved>(i), now);
            now = next;
        }
    }

  private:
    FOPE_BOTH int pieces() const { return of.chunk * of.members * of.lanes * (Tile / kTogether); }

    // What channels turn by that no frequency turns.
    FOPE_BOTH Turn* pads() const { return table + Tile * of.chunk * of.parts * of.pitch; }

    // Of a group of this block: cosines of the cosines' series, and sines of the sines'.
    FOPE_BOTH float const* cos_coef(int group) const { return a.cos_coef + first(group) + other(); }
    FOPE_BOTH float const* sin_coef(int group) const { return a.sin_coef + first(group); }
    FOPE_BOTH int64_t first(int group) const { return static_cast<int64_t>(first_group + group) * rows(a) * a.pairs; }
    // From one basis to the other; 0 without another.
    FOPE_BOTH int other() const { return (rows(a) - a.frequencies) * a.pairs; }

    // Both series of a pair, or one part of them.
    FOPE_BOTH Basis<Tile> series(int group, int pair, int part, bool asked, float const* cos, float const* sin) const {
        float const *by_cos = cos_coef(group) + pair, *by_sin = sin_coef(group) + pair;
        int const last = of.parts == 1 ? of.runs : part + 1;
        Basis<Tile> sum = {};
        for (int run = part; run < last; ++run) {
            int d = run * of.run;
            int const end = a.frequencies - d < of.run ? a.frequencies : d + of.run;
            Basis<Tile> terms = {};
            if (kAlone && asked && run == part) {
                FOPE_UNROLL for (int j = 0; j < kEarly; ++j)
                    if (d + j < end) add(terms, d + j, cos[j], sin[j], by_cos, by_sin);
                d += kEarly;
            }
            FOPE_UNROLL_8 for (; d < end; ++d)
                add(terms, d, constant(by_cos + d * a.pairs), constant(by_sin + d * a.pairs), by_cos, by_sin);
            for (int t = 0; t < Tile; ++t) {
                sum.at[t].cos += terms.at[t].cos;
                sum.at[t].sin += terms.at[t].sin;
            }
        }
        return sum;
    }

    // One frequency's terms, with those of the other basis.
    FOPE_BOTH void add(Basis<Tile>& sum, int d, float cos, float sin, float const* by_cos, float const* by_sin) const {
        Basis<Tile> const turns = basis[d];
        for (int t = 0; t < Tile; ++t) {
            sum.at[t].cos = fmaf(turns.at[t].cos, cos, sum.at[t].cos);
            sum.at[t].sin = fmaf(turns.at[t].sin, sin, sum.at[t].sin);
        }
        if (!kGeneral<Arguments> || !other()) return;
        float const of_sin = constant(by_cos + d * a.pairs - other());
        float const of_cos = constant(by_sin + d * a.pairs + other());
        for (int t = 0; t < Tile; ++t) {
            sum.at[t].cos = fmaf(turns.at[t].sin, of_sin, sum.at[t].cos);
            sum.at[t].sin = fmaf(turns.at[t].cos, of_cos, sum.at[t].sin);
        }
    }

    // Where a pair lies in its row. Threads side by side read the same element of neighbouring vectors, so these are
    // kept side by side, and rows are a little apart: no two of them meet in a bank of shared memory.
    FOPE_BOTH int column(int pair) const { return pair % Vector * of.stride + pair / Vector; }

    template <bool Interleaved>
    FOPE_BOTH Place place(int i) const {
        int const head = of.by_lanes(i), above = of.by_members(head), part = of.by_chunk(above);
        int const pair = (i - head * of.lanes) * Vector, member = head - above * of.members;
        int const group = above - part * of.chunk, first = part * kTogether;
        bool const is_q = member < of.heads; // chosen, not branched on: both kinds meet in one warp
        bool const copied = pair >= a.rotary_dim / 2, adjacent = Interleaved || copied, padded = pair >= a.pairs;
        int const step = (is_q ? a.heads : a.kv_heads) * a.head_dim;
        int const nth = (first_group + group) * (is_q ? of.heads : of.kv_heads) + (is_q ? member : member - of.heads);
        int64_t const low = (first_token + first) * step + nth * a.head_dim + (adjacent ? 2 * pair : pair);
        return {is_q, copied, padded, first, group < groups ? tokens - first : 0, low,
                adjacent ? Vector : a.rotary_dim / 2, step,
                padded ? pads() : table + (first * of.chunk + group) * of.parts * of.pitch + pair / Vector};
    }

    template <typename T>
    FOPE_BOTH Piece<T> read(Place const& at) const {
        using Access = Pack<T, Vector>;
        T const* const low = static_cast<T const*>(at.is_q ? a.q : a.k) + at.low;
        Piece<T> piece = {};
        FOPE_UNROLL for (int u = 0; u < kTogether; ++u) {
            if (u >= at.tokens) continue;
            piece.at[u][0] = once(reinterpret_cast<Access const*>(low + u * at.step));
            piece.at[u][1] = once(reinterpret_cast<Access const*>(low + u * at.step + at.high));
        }
        return piece;
    }

    // Turns a piece, or copies channels that form no pair.
    template <typename T, bool Interleaved>
    FOPE_BOTH void write(Place const& at, Piece<T> const& piece) const {
        using Access = Pack<T, Vector>;
        T* const low = static_cast<T*>(at.is_q ? a.q_rotated : a.k_rotated) + at.low;
        FOPE_UNROLL for (int u = 0; u < kTogether; ++u) {
            if (u >= at.tokens) continue;
            Access y[2] = {piece.at[u][0], piece.at[u][1]};
            if (!at.copied) turn<T, Interleaved>(at, u, y);
            *reinterpret_cast<Access*>(low + u * at.step) = y[0];
            *reinterpret_cast<Access*>(low + u * at.step + at.high) = y[1];
        }
    }

    template <typename T, bool Interleaved>
    FOPE_BOTH void turn(Place const& at, int token, Pack<T, Vector> (&y)[2]) const {
        int const along = at.padded ? 1 : of.stride, down = at.padded ? 0 : token * of.chunk * of.parts * of.pitch;
        Turn by[Vector];
        FOPE_UNROLL for (int v = 0; v < Vector; ++v) by[v] = at.turns[down + v * along];
        for (int part = 1; kAlone && part < of.parts && !at.padded; ++part)
            FOPE_UNROLL for (int v = 0; v < Vector; ++v) {
                Turn const more = at.turns[down + part * of.pitch + v * along];
                by[v] = {by[v].cos + more.cos, by[v].sin + more.sin};
            }
        FOPE_UNROLL for (int v = 0; v < Vector; ++v) {
            int const i = Interleaved ? 2 * v : v, j = Interleaved ? i + 1 : i + Vector;
            float const left = static_cast<float>(y[i / Vector].at[i % Vector]);
            float const right = static_cast<float>(y[j / Vector].at[j % Vector]);
            y[i / Vector].at[i % Vector] = static_cast<T>(fmaf(left, by[v].cos, -(right * by[v].sin)));
            y[j / Vector].at[j % Vector] = static_cast<T>(fmaf(right, by[v].cos, left * by[v].sin));
        }
    }
};

} // namespace fope
