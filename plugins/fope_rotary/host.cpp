// The kernel's blocks and threads, run one after the other on the CPU.
#include <cstring>
#include <vector>

#include "plan.h"

namespace fope {

// As little as a GPU promises: shared memory starts as NaN, and threads come in an order of their own.
template <typename T, bool Interleaved, int Tile, int Vector, typename Arguments>
int run(Arguments const& a, Plan const& plan) {
    Layout const layout(a, Vector, plan.chunk, plan.parts);
    std::vector<Basis<8>> shared(plan.shared_bytes / sizeof(Basis<8>) + 1);
    for (int y = 0; y < plan.chunks; ++y) {
        for (int64_t x = 0; x < plan.tiles; ++x) {
            std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(Basis<8>));
            Block<Tile, Vector, Arguments> const block(a, layout, x, y, shared.data());
            for (int thread = plan.threads; thread--;) block.fill_basis(thread, plan.threads);
            for (int thread = plan.threads; thread--;)
                block.fill_table(thread, plan.threads, block.template ask<T, Interleaved>(thread));
            for (int thread = plan.threads; thread--;)
                block.template rotate<T, Interleaved>(thread, plan.threads, block.template ask<T, Interleaved>(thread));
        }
    }
    return 0;
}

template <typename Arguments>
int host(Arguments const* arguments, int tile, int vector, int threads) {
    Plan plan;
    if (int const code = choose(*arguments, plan, tile, vector, threads)) return code;
    return dispatch(arguments->dtype, plan, [&](auto c) {
        using T = typename decltype(c)::T;
        return arguments->interleaved ? run<T, true, c.Tile, c.Vector>(*arguments, plan)
                                      : run<T, false, c.Tile, c.Vector>(*arguments, plan);
    });
}

} // namespace fope

int fope_rotary_host(FopeRotaryArguments const* arguments, int tile, int vector, int threads) {
    return fope::host(arguments, tile, vector, threads);
}

int fope_rotary_host_general(FopeRotaryGeneralArguments const* arguments, int tile, int vector, int threads) {
    return fope::host(arguments, tile, vector, threads);
}
