// The C interface of the rotation, the same for the GPU and for the host.
//
// B batch, S sequence, A axes of positions, H query heads, K key-value heads, E head_dim, R rotary_dim, D kept
// frequencies, J rows of coefficients, F rotated pairs, G coefficient groups; a token is one of the B * S positions.
#pragma once

#include <stdint.h>

#define FOPE_ROTARY_EXPORT extern "C" __attribute__((visibility("default")))

// Every tensor is contiguous, in the memory of the device that computes; nothing is owned. T is `dtype`.
struct FopeRotaryArguments {
    void const* q;               // T [B, S, H, E]
    void const* k;               // T [B, S, K, E]
    int64_t const* position_ids; // [B, S]
    float const* freq;           // [D]
    float const* sin_coef;       // [G, D, F]
    float const* cos_coef;       // [G, D, F]
    void* q_rotated;             // T [B, S, H, E]; may not overlap an input
    void* k_rotated;             // T [B, S, K, E]
    int64_t tokens;              // B * S
    int32_t heads;               // H
    int32_t kv_heads;            // K
    int32_t head_dim;            // E
    int32_t rotary_dim;          // R: the other channels of a head are copied
    int32_t frequencies;         // D
    int32_t pairs;               // F
    int32_t groups;              // G
    int32_t interleaved;         // pairs are (2i, 2i + 1) instead of (i, i + R/2)
    int32_t dtype;               // ONNX element type: 1 float, 10 float16, 16 bfloat16
    float sin_pad;               // sine and cosine of the R/2 - F pairs that no frequency turns
    float cos_pad;
    float sign;
};

// The general version: a token has a position on each of A axes, and each frequency turns by one of these. Of 2D rows of
// coefficients the first D are of sines, the others of cosines, in both tensors.
struct FopeRotaryGeneralArguments : FopeRotaryArguments {
    void const* positions; // int64 or float [A, B, S], in the place of position_ids
    int64_t const* axis;   // [D], each from 0 to A - 1
    int32_t rows;          // J: D, or 2D over both bases
    int32_t position_type; // ONNX element type: 1 float, 7 int64
};

enum FopeRotaryFault {
    FOPE_ROTARY_POINTER = -1, // a tensor with elements has no address
    FOPE_ROTARY_SHAPE = -2,   // sizes that contradict each other
    FOPE_ROTARY_DTYPE = -3,   // none of the three types
    FOPE_ROTARY_SIZE = -4,    // more than a block's shared memory or a grid can hold
    FOPE_ROTARY_PLAN = -5,    // a tile, vector or block size that does not exist (host only)
};

// Enqueues one kernel on `stream` (a cudaStream_t). Returns 0, a cudaError_t, or a FopeRotaryFault.
FOPE_ROTARY_EXPORT int fope_rotary_launch(FopeRotaryArguments const* arguments, void* stream);
FOPE_ROTARY_EXPORT int fope_rotary_launch_general(FopeRotaryGeneralArguments const* arguments, void* stream);

// Computes the same on the CPU, block by block and thread by thread. `tile`, `vector` and `threads` are tokens a
// block, pairs an access and threads a block; 0 is what the GPU would take. Returns 0 or a FopeRotaryFault.
FOPE_ROTARY_EXPORT int fope_rotary_host(FopeRotaryArguments const* arguments, int tile, int vector, int threads);
FOPE_ROTARY_EXPORT int fope_rotary_host_general(FopeRotaryGeneralArguments const* arguments, int tile, int vector,
                                                int threads);
