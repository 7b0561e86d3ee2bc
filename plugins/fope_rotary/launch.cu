// The kernel and its launch.
#include "plan.h"

namespace fope {

template <typename T, bool Interleaved, int Tile, int Vector, typename Arguments>
__global__ void __launch_bounds__(kMaxThreads, 2)
    rotary(__grid_constant__ Arguments const arguments, __grid_constant__ Layout const layout) {
    extern __shared__ __align__(16) unsigned char shared[];
    Block<Tile, Vector, Arguments> const block(arguments, layout, blockIdx.x, blockIdx.y, shared);
    block.template compute<T, Interleaved>(threadIdx.x, blockDim.x, [] { __syncthreads(); });
}

template <typename Arguments>
int enqueue(Arguments const& arguments, Plan const& plan, void* stream) {
    if (arguments.tokens == 0) return 0;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(plan.tiles), plan.chunks);
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    Layout const layout(arguments, plan.vector, plan.chunk, plan.parts);
    return dispatch(arguments.dtype, plan, [&](auto c) {
        using T = typename decltype(c)::T;
        auto const kernel = arguments.interleaved ? rotary<T, true, c.Tile, c.Vector, Arguments>
                                                  : rotary<T, false, c.Tile, c.Vector, Arguments>;
        return cudaLaunchKernelEx(&config, kernel, arguments, layout);
    });
}

template <typename Arguments>
int launch(Arguments const* arguments, void* stream) {
    Plan plan;
    if (int const code = choose(*arguments, plan)) return code;
    return enqueue(*arguments, plan, stream);
}

} // namespace fope

int fope_rotary_launch(FopeRotaryArguments const* arguments, void* stream) { return fope::launch(arguments, stream); }

int fope_rotary_launch_general(FopeRotaryGeneralArguments const* arguments, void* stream) {
    return fope::launch(arguments, stream);
}
