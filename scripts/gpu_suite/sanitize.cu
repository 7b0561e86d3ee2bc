// Small rotations for compute-sanitizer to watch: no torch, and every tensor an allocation of exactly its size, so
// that a step beyond it is seen. Ends with 1 where a call fails or leaves an element unwritten.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "launch.cu"

namespace {

struct Shape {
    int tokens, heads, kv_heads, head_dim, frequencies, pairs, groups;
};

constexpr Shape kShapes[] = {
    {1, 1, 1, 2, 1, 1, 1},      {7, 6, 3, 48, 5, 4, 3},       {63, 12, 6, 32, 7, 8, 3},  {11, 4, 2, 30, 11, 7, 2},
    {4, 37, 37, 16, 3, 3, 37},  {1030, 2, 1, 16, 3, 4, 1},    {2501, 2, 1, 16, 3, 4, 1}, {9, 1, 1, 400, 200, 150, 1},
    {64, 32, 8, 128, 31, 31, 8}, {1, 16, 16, 64, 16, 16, 16}, {5, 4, 2, 48, 0, 0, 1},
};

void succeed(int code, char const* what) {
    if (code == 0) return;
    char const* const told = code > 0 ? cudaGetErrorString(static_cast<cudaError_t>(code)) : "a fault of arguments.h";
    std::fprintf(stderr, "%s: %d (%s)\n", what, code, told);
    std::exit(1);
}

template <typename T>
class Array {
  public:
    explicit Array(std::vector<T> const& values) : size_(values.size()) {
        if (!size_) return;
        succeed(cudaMalloc(&address_, size_ * sizeof(T)), "cudaMalloc");
        succeed(cudaMemcpy(address_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    Array(Array const&) = delete;
    Array& operator=(Array const&) = delete;
    ~Array() { cudaFree(address_); }
    T* address() const { return address_; }
    std::vector<T> values() const {
        std::vector<T> out(size_);
        succeed(cudaMemcpy(out.data(), address_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return out;
    }

  private:
    size_t size_;
    T* address_ = nullptr;
};

template <typename T>
std::vector<T> normal(size_t size, int seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> draw;
    std::vector<T> out(size);
    for (T& value : out) value = static_cast<T>(draw(random));
    return out;
}

template <typename T>
bool written(Array<T> const& output, int shift) {
    auto const values = output.values();
    for (size_t i = shift; i < values.size(); ++i)
        if (!std::isfinite(static_cast<float>(values[i]))) return false;
    return true;
}

// `shift` moves q, k and their results off their alignment.
template <typename T>
void rotate(Shape const& s, int dtype, bool interleaved, int shift) {
    size_t const tokens = s.tokens, coefficients = static_cast<size_t>(s.groups) * s.frequencies * s.pairs;
    size_t const q_size = tokens * s.heads * s.head_dim + shift, k_size = tokens * s.kv_heads * s.head_dim + shift;
    std::vector<int64_t> positions(tokens);
    for (size_t i = 0; i < tokens; ++i) positions[i] = i * 399989 % 1000001;
    Array<T> const q(normal<T>(q_size, 1)), k(normal<T>(k_size, 2));
    Array<T> const q_rotated(std::vector<T>(q_size, static_cast<T>(NAN)));
    Array<T> const k_rotated(std::vector<T>(k_size, static_cast<T>(NAN)));
    Array<int64_t> const position_ids(positions);
    Array<float> const freq(std::vector<float>(s.frequencies, 0.37F));
    Array<float> const sin_coef(normal<float>(coefficients, 3)), cos_coef(normal<float>(coefficients, 4));
    FopeRotaryArguments a = {};
    a.q = q.address() + shift;
    a.k = k.address() + shift;
    a.position_ids = position_ids.address();
    a.freq = freq.address();
    a.sin_coef = sin_coef.address();
    a.cos_coef = cos_coef.address();
    a.q_rotated = q_rotated.address() + shift;
    a.k_rotated = k_rotated.address() + shift;
    a.tokens = s.tokens;
    a.heads = s.heads;
    a.kv_heads = s.kv_heads;
    a.head_dim = a.rotary_dim = s.head_dim;
    a.frequencies = s.frequencies;
    a.pairs = s.pairs;
    a.groups = s.groups;
    a.interleaved = interleaved;
    a.dtype = dtype;
    a.sin_pad = a.cos_pad = a.sign = 1;
    succeed(fope_rotary_launch(&a, nullptr), "fope_rotary_launch");
    succeed(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    if (written(q_rotated, shift) && written(k_rotated, shift)) return;
    std::fprintf(stderr, "%d tokens, head_dim %d, type %d: not everything was written\n", s.tokens, s.head_dim, dtype);
    std::exit(1);
}

} // namespace

int main() {
    int rotations = 0;
    for (Shape const& shape : kShapes)
        for (bool const interleaved : {false, true})
            for (int const shift : {0, 1}) {
                rotate<float>(shape, fope::kFloat, interleaved, shift);
                rotate<__half>(shape, fope::kHalf, interleaved, shift);
                rotate<__nv_bfloat16>(shape, fope::kBFloat16, interleaved, shift);
                rotations += 3;
            }
    std::printf("%d rotations\n", rotations);
}
