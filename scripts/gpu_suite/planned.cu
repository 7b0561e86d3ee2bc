// The kernel with a plan of one's own, for tuning; 0 is what the library would take.
#include "launch.cu"

extern "C" __attribute__((visibility("default"))) int suite_planned(FopeRotaryArguments const* arguments, int tile,
                                                                    int vector, int threads, void* stream) {
    using namespace fope;
    Plan plan;
    if (int const code = choose(*arguments, plan, tile, vector, threads)) return code;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(plan.tiles), plan.chunks);
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    return dispatch(arguments->dtype, plan, [&](auto c) {
        return cudaLaunchKernelEx(&config, rotary<typename decltype(c)::T, c.Tile, c.Vector>, *arguments, plan.chunk);
    });
}
