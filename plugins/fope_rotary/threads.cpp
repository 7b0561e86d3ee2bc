// The kernel's blocks and threads as threads of the CPU, all at once, for ThreadSanitizer: it reports a barrier that is
// missing, and two threads that meet in one place. Takes the numbers of `Wanted` in their order.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <pthread.h>
#include <thread>
#include <vector>

#include "plan.h"

namespace {

using namespace fope;

struct Wanted {
    int tile, vector, threads, dtype;
    int tokens, heads, kv_heads, head_dim, rotary_dim, frequencies, pairs, groups, interleaved;
    int axes; // 0 is the plain version; the general one has both bases
};
constexpr int kNumbers = sizeof(Wanted) / sizeof(int);
constexpr int kRefused = 1, kDifferent = 2;

// What the threads of one block share.
struct Shared {
    pthread_barrier_t barrier;
    std::vector<Basis<8>> memory;

    Shared(unsigned threads, size_t bytes) : memory(bytes / sizeof(Basis<8>) + 1) {
        pthread_barrier_init(&barrier, nullptr, threads);
    }
    ~Shared() { pthread_barrier_destroy(&barrier); }
};

template <typename T, bool Interleaved, int Tile, int Vector, typename Arguments>
int run(Arguments const& a, Plan const& plan) {
    Layout const layout(a, Vector, plan.chunk, plan.parts);
    std::deque<Shared> blocks;
    std::vector<std::thread> threads;
    for (int y = 0; y < plan.chunks; ++y) {
        for (int64_t x = 0; x < plan.tiles; ++x) {
            Shared& shared = blocks.emplace_back(plan.threads, plan.shared_bytes);
            for (int thread = 0; thread < plan.threads; ++thread)
                threads.emplace_back([&a, &plan, &layout, &shared, x, y, thread] {
                    Block<Tile, Vector, Arguments> const block(a, layout, x, y, shared.memory.data());
                    block.template compute<T, Interleaved>(thread, plan.threads, [&] { pthread_barrier_wait(&shared.barrier); });
                });
        }
    }
    for (std::thread& thread : threads) thread.join();
    return 0;
}

template <typename T>
std::vector<T> numbers(size_t count) {
    std::vector<T> made(count);
    for (size_t i = 0; i < count; ++i) made[i] = static_cast<T>(1.0F + static_cast<float>(i * 7 % 64) / 64.0F);
    return made;
}

int host(FopeRotaryArguments const& a, Wanted const& w) { return fope_rotary_host(&a, w.tile, w.vector, w.threads); }

int host(FopeRotaryGeneralArguments const& a, Wanted const& w) {
    return fope_rotary_host_general(&a, w.tile, w.vector, w.threads);
}

// Once with real threads and once with one after the other; the results must be the same.
template <typename T, typename Arguments>
int compare(Arguments a, Wanted const& w) {
    size_t const q_size = static_cast<size_t>(w.tokens) * w.heads * w.head_dim;
    size_t const k_size = static_cast<size_t>(w.tokens) * w.kv_heads * w.head_dim;
    std::vector<T> const q = numbers<T>(q_size), k = numbers<T>(k_size);
    std::vector<T> q_met(q_size), k_met(k_size), q_alone(q_size), k_alone(k_size);
    a.q = q.data(), a.k = k.data(), a.q_rotated = q_met.data(), a.k_rotated = k_met.data();
    Plan plan;
    if (choose(a, plan, w.tile, w.vector, w.threads)) return kRefused;
    dispatch(w.dtype, plan, [&](auto c) {
        return w.interleaved ? run<T, true, c.Tile, c.Vector>(a, plan) : run<T, false, c.Tile, c.Vector>(a, plan);
    });
    a.q_rotated = q_alone.data(), a.k_rotated = k_alone.data();
    if (host(a, w)) return kRefused;
    bool const same = !std::memcmp(q_met.data(), q_alone.data(), q_size * sizeof(T)) &&
                      !std::memcmp(k_met.data(), k_alone.data(), k_size * sizeof(T));
    return same ? 0 : kDifferent;
}

template <typename T>
int compare(Wanted const& w) {
    std::vector<int64_t> positions(static_cast<size_t>(w.tokens) * (w.axes ? w.axes : 1)), axis(w.frequencies);
    for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int64_t>(3 * i);
    for (int d = 0; d < w.frequencies && w.axes; ++d) axis[d] = d % w.axes;
    std::vector<float> const freq = numbers<float>(w.frequencies);
    std::vector<float> const coef = numbers<float>(2 * static_cast<size_t>(w.groups) * w.frequencies * w.pairs);
    FopeRotaryArguments const plain = {
        nullptr, nullptr, positions.data(), freq.data(), coef.data(), coef.data(), nullptr, nullptr,
        w.tokens, w.heads, w.kv_heads, w.head_dim, w.rotary_dim, w.frequencies, w.pairs, w.groups, w.interleaved,
        w.dtype, 0.5F, 0.25F, -1.0F};
    if (!w.axes) return compare<T>(plain, w);
    return compare<T>(FopeRotaryGeneralArguments{plain, positions.data(), axis.data(), 2 * w.frequencies, kInt64}, w);
}

} // namespace

int main(int count, char** words) {
    if (count != 1 + kNumbers) {
        std::fprintf(stderr, "expected %d numbers\n", kNumbers);
        return kRefused;
    }
    int numbers[kNumbers];
    for (int i = 0; i < kNumbers; ++i) numbers[i] = std::atoi(words[i + 1]);
    Wanted wanted;
    std::memcpy(&wanted, numbers, sizeof(wanted));
    if (wanted.dtype == kFloat) return compare<float>(wanted);
    return wanted.dtype == kHalf ? compare<__half>(wanted) : compare<__nv_bfloat16>(wanted);
}
