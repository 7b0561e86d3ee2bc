// What a launch costs when there is nothing to do: the floor that decoding is held against.
__global__ void nothing() {}

extern "C" __attribute__((visibility("default"))) int suite_empty(void* stream) {
    nothing<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>();
    return cudaGetLastError();
}
