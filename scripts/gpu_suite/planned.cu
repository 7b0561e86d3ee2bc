// The kernel with a plan of one's own, for tuning; 0 is what the library would take.
#include "launch.cu"

extern "C" __attribute__((visibility("default"))) int suite_planned(FopeRotaryArguments const* arguments, int tile,
                                                                    int vector, int threads, void* stream) {
    using namespace fope;
    Plan plan;
    if (int const code = choose(*arguments, plan, tile, vector, threads)) return code;
    return enqueue(*arguments, plan, stream);
}
