// The kernel and its launch.
#include "plan.h"

namespace fope {

template <typename T, int Tile, int Vector, typename Arguments>
__global__ void __launch_bounds__(kMaxThreads) rotary(__grid_constant__ Arguments const arguments, int chunk) {
    extern __shared__ __align__(16) unsigned char shared[];
    Block<Tile, Vector, Arguments> const block(arguments, chunk, blockIdx.x, blockIdx.y, shared);
    block.template compute<T>(threadIdx.x, blockDim.x, [] { __syncthreads(); });
}

template <typename Arguments>
int launch(Arguments const* arguments, void* stream) {
    Plan plan;
    if (int const code = choose(*arguments, plan)) return code;
    if (arguments->tokens == 0) return 0;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(plan.tiles), plan.chunks);
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    return dispatch(arguments->dtype, plan, [&](auto c) {
        auto const kernel = rotary<typename decltype(c)::T, c.Tile, c.Vector, Arguments>;
        return cudaLaunchKernelEx(&config, kernel, *arguments, plan.chunk);
    });
}

} // namespace fope

int fope_rotary_launch(FopeRotaryArguments const* arguments, void* stream) { return fope::launch(arguments, stream); }

int fope_rotary_launch_general(FopeRotaryGeneralArguments const* arguments, void* stream) {
    return fope::launch(arguments, stream);
}
