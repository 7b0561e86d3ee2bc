// The TensorRT plugin fope::FopeRotary: settings from the ONNX node, checks that name what is wrong, one launch.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "registry.h"

using namespace nvinfer1;

namespace {

constexpr char kName[] = "FopeRotary";
constexpr char const* kVersions[] = {"1", "2"}; // plain, general
constexpr char kNamespace[] = "fope";

ILoggerFinder* finder = nullptr;

// One line for the log of the engine at work, or for stderr where there is none: TensorRT 11 put another function into
// findLogger's place, and a plugin built with older headers hears null from it.
void report(std::string const& where, std::string const& what) {
    std::string const line = std::string(kName) + " " + where + ": " + what;
    ILogger* const logger = finder ? finder->findLogger() : nullptr;
    if (logger) logger->log(ILogger::Severity::kERROR, line.c_str());
    else std::fprintf(stderr, "%s\n", line.c_str());
}

struct Settings {
    float sin_pad, cos_pad, sign;
    int32_t interleaved, rotary_dim, compute_dtype, head_dim, heads_per_group, kv_heads_per_group;
};

struct Field {
    char const* name;
    float Settings::*real;
    int32_t Settings::*integer;

    PluginField describe(Settings const* settings) const {
        if (real) return {name, settings ? &(settings->*real) : nullptr, PluginFieldType::kFLOAT32, 1};
        return {name, settings ? &(settings->*integer) : nullptr, PluginFieldType::kINT32, 1};
    }
};

constexpr Field kFields[] = {
    {"sin_pad", &Settings::sin_pad, nullptr},
    {"cos_pad", &Settings::cos_pad, nullptr},
    {"sign", &Settings::sign, nullptr},
    {"interleaved", nullptr, &Settings::interleaved},
    {"rotary_dim", nullptr, &Settings::rotary_dim},
    {"compute_dtype", nullptr, &Settings::compute_dtype},
    {"head_dim", nullptr, &Settings::head_dim},
    {"heads_per_group", nullptr, &Settings::heads_per_group},
    {"kv_heads_per_group", nullptr, &Settings::kv_heads_per_group},
};

std::vector<PluginField> describe(Settings const* settings) {
    std::vector<PluginField> fields;
    for (Field const& field : kFields) fields.push_back(field.describe(settings));
    return fields;
}

// Takes one field's value; returns what is wrong with it, or nothing.
std::string read(Field const& field, PluginFieldCollection const& given, Settings& settings) {
    for (int32_t i = 0; i < given.nbFields; ++i) {
        PluginField const& found = given.fields[i];
        if (std::strcmp(found.name, field.name) != 0) continue;
        if (!found.data) return std::string(field.name) + " has no value";
        if (found.length != 1)
            return std::string(field.name) + " has " + std::to_string(found.length) + " values, expected one";
        if (field.real && found.type == PluginFieldType::kFLOAT32)
            settings.*field.real = *static_cast<float const*>(found.data);
        else if (field.integer && found.type == PluginFieldType::kINT32)
            settings.*field.integer = *static_cast<int32_t const*>(found.data);
        else if (field.integer && found.type == PluginFieldType::kINT64)
            settings.*field.integer = static_cast<int32_t>(*static_cast<int64_t const*>(found.data));
        else
            return std::string(field.name) + " is of type " + std::to_string(static_cast<int>(found.type)) +
                   ", expected " + (field.real ? "float32" : "int32 or int64");
        return "";
    }
    return std::string("the node has no ") + field.name;
}

std::string fault(Settings const& s) {
    for (Field const& field : kFields)
        if (field.real && !std::isfinite(s.*field.real)) return std::string(field.name) + " is not finite";
    if (s.interleaved != 0 && s.interleaved != 1)
        return "interleaved is " + std::to_string(s.interleaved) + ", expected 0 or 1";
    if (s.compute_dtype != 1 && s.compute_dtype != 10 && s.compute_dtype != 16)
        return "compute_dtype is " + std::to_string(s.compute_dtype) + ", expected 1, 10 or 16 (float, half, bfloat16)";
    if (s.head_dim < 2 || s.head_dim % 2)
        return "head_dim is " + std::to_string(s.head_dim) + ", and channel pairs need an even one";
    if (s.rotary_dim < 2 || s.rotary_dim % 2 || s.rotary_dim > s.head_dim)
        return "rotary_dim is " + std::to_string(s.rotary_dim) + ", expected an even number up to head_dim, " +
               std::to_string(s.head_dim);
    for (auto const& [name, count] : {std::pair{"heads_per_group", s.heads_per_group},
                                      std::pair{"kv_heads_per_group", s.kv_heads_per_group}})
        if (count < 1) return std::string(name) + " is " + std::to_string(count) + ", expected 1 or more";
    return "";
}

enum Port { kQ, kK, kPositions, kFreq, kSin, kCos, kAxis, kMost };
constexpr char const* kPorts[kMost] = {"q", "k", "position_ids", "freq", "sin_coef", "cos_coef", "axis"};
constexpr int32_t kRanks[kMost] = {4, 4, 2, 1, 3, 3, 1};
constexpr int32_t kOutputs = 2;

// Inputs of a version, and the rank of one: a general token has a position on each of several axes.
constexpr int32_t inputs_of(bool general) { return general ? kMost : kAxis; }
constexpr int32_t rank_of(int port, bool general) { return kRanks[port] + (general && port == kPositions); }

// An extent that two ports share, or that `expected` fixes. One that is still unknown (-1) agrees with any.
struct Extent {
    Port port;
    int axis;
    int64_t expected;
    std::string reason;
};

std::string mismatch(Dims const* dims, Settings const& s, bool general) {
    for (int i = 0; i < inputs_of(general); ++i)
        if (dims[i].nbDims != rank_of(i, general))
            return std::string(kPorts[i]) + " has " + std::to_string(dims[i].nbDims) + " dimensions, expected " +
                   std::to_string(rank_of(i, general));
    int64_t const groups = dims[kSin].d[0], pairs = dims[kSin].d[2], half = s.rotary_dim / 2;
    int64_t const frequencies = dims[kFreq].d[0];
    bool const both = general && frequencies > 0 && dims[kSin].d[1] == 2 * frequencies;
    auto const heads = [&](int32_t per_group) { return groups < 0 ? -1 : groups * per_group; };
    Extent const extents[] = {
        {kQ, 3, s.head_dim, "head_dim"},
        {kK, 3, s.head_dim, "head_dim"},
        {kQ, 2, heads(s.heads_per_group), "heads_per_group times the groups of sin_coef"},
        {kK, 2, heads(s.kv_heads_per_group), "kv_heads_per_group times the groups of sin_coef"},
        {kK, 0, dims[kQ].d[0], "the batch of q"},
        {kK, 1, dims[kQ].d[1], "the sequence of q"},
        {kPositions, general, dims[kQ].d[0], "the batch of q"},
        {kPositions, general + 1, dims[kQ].d[1], "the sequence of q"},
        {kSin, 1, both ? 2 * frequencies : frequencies,
         general ? "the number of frequencies, or twice that" : "the number of frequencies"},
        {kCos, 0, groups, "as in sin_coef"},
        {kCos, 1, dims[kSin].d[1], "as in sin_coef"},
        {kCos, 2, pairs, "as in sin_coef"},
        {general ? kAxis : kFreq, 0, frequencies, "the number of frequencies"},
    };
    for (Extent const& extent : extents) {
        int64_t const found = dims[extent.port].d[extent.axis];
        if (found >= 0 && extent.expected >= 0 && found != extent.expected)
            return std::string(kPorts[extent.port]) + " has " + std::to_string(found) + " on axis " +
                   std::to_string(extent.axis) + ", expected " + std::to_string(extent.expected) + " (" +
                   extent.reason + ")";
    }
    if (pairs > half)
        return "sin_coef turns " + std::to_string(pairs) + " pairs, and rotary_dim has " + std::to_string(half);
    return "";
}

// ONNX's number of a type that the kernel takes, or 0.
int32_t onnx_type(DataType type) {
    switch (type) {
    case DataType::kFLOAT: return 1;
    case DataType::kHALF: return 10;
    case DataType::kBF16: return 16;
    default: return 0;
    }
}

class FopeRotary final : public IPluginV3,
                         public IPluginV3OneCore,
                         public IPluginV3OneBuild,
                         public IPluginV3OneRuntime {
  public:
    FopeRotary(Settings const& settings, std::string layer, bool general)
        : settings_(settings), layer_(std::move(layer)), general_(general) {}
    FopeRotary(FopeRotary const& other) : FopeRotary(other.settings_, other.layer_, other.general_) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override { return new FopeRotary(*this); }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersions[general_]; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    char const* getTimingCacheID() noexcept override { return kVersions[general_]; }
    int32_t getNbOutputs() const noexcept override { return kOutputs; }

    int32_t getOutputDataTypes(DataType* out, int32_t outputs, DataType const* in,
                               int32_t inputs) const noexcept override {
        if (!counted(inputs, outputs)) return -1;
        out[0] = out[1] = in[kQ];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out,
                            int32_t outputs, IExprBuilder&) noexcept override {
        if (!counted(inputs, outputs)) return -1;
        out[0] = in[kQ];
        out[1] = in[kK];
        return 0;
    }

    bool supportsFormatCombination(int32_t port, DynamicPluginTensorDesc const* ports, int32_t inputs,
                                   int32_t outputs) noexcept override {
        if (inputs != inputs_of(general_) || outputs != kOutputs || ports[port].desc.format != TensorFormat::kLINEAR) return false;
        DataType const type = ports[port].desc.type;
        if (port == kAxis && general_) return type == DataType::kINT64;
        switch (port) {
        case kQ: return onnx_type(type) != 0;
        case kPositions: return type == DataType::kINT64 || (general_ && type == DataType::kFLOAT);
        case kFreq:
        case kSin:
        case kCos: return type == DataType::kFLOAT;
        default: return type == ports[kQ].desc.type;
        }
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*,
                            int32_t outputs) noexcept override {
        Dims dims[kMost];
        if (!counted(inputs, outputs)) return -1;
        for (int i = 0; i < inputs; ++i) dims[i] = in[i].desc.dims;
        return checked(dims);
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const*,
                          int32_t outputs) noexcept override {
        Dims dims[kMost];
        if (!counted(inputs, outputs)) return -1;
        for (int i = 0; i < inputs; ++i) dims[i] = in[i].dims;
        return checked(dims);
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void*, cudaStream_t stream) noexcept override {
        Dims const &q = in[kQ].dims, &coef = in[kSin].dims;
        FopeRotaryGeneralArguments arguments = {};
        arguments.q = inputs[kQ];
        arguments.k = inputs[kK];
        arguments.freq = static_cast<float const*>(inputs[kFreq]);
        arguments.sin_coef = static_cast<float const*>(inputs[kSin]);
        arguments.cos_coef = static_cast<float const*>(inputs[kCos]);
        arguments.q_rotated = outputs[0];
        arguments.k_rotated = outputs[1];
        arguments.tokens = q.d[0] * q.d[1];
        arguments.heads = static_cast<int32_t>(q.d[2]);
        arguments.kv_heads = static_cast<int32_t>(in[kK].dims.d[2]);
        arguments.head_dim = static_cast<int32_t>(q.d[3]);
        arguments.rotary_dim = settings_.rotary_dim;
        arguments.groups = static_cast<int32_t>(coef.d[0]);
        arguments.frequencies = static_cast<int32_t>(in[kFreq].dims.d[0]);
        arguments.pairs = static_cast<int32_t>(coef.d[2]);
        arguments.interleaved = settings_.interleaved;
        arguments.dtype = onnx_type(in[kQ].type);
        arguments.sin_pad = settings_.sin_pad;
        arguments.cos_pad = settings_.cos_pad;
        arguments.sign = settings_.sign;
        int const code = general_ ? launch_general(arguments, in, inputs, stream) : launch(arguments, inputs, stream);
        if (code < 0) report(layer_, "the kernel refuses its arguments: " + std::to_string(code) + ", see arguments.h");
        if (code > 0) report(layer_, std::string("no launch: ") + cudaGetErrorString(static_cast<cudaError_t>(code)));
        return code;
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        fields_ = describe(&settings_);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

  private:
    static int launch(FopeRotaryArguments arguments, void const* const* inputs, cudaStream_t stream) {
        arguments.position_ids = static_cast<int64_t const*>(inputs[kPositions]);
        return fope_rotary_launch(&arguments, stream);
    }

    static int launch_general(FopeRotaryGeneralArguments arguments, PluginTensorDesc const* in,
                              void const* const* inputs, cudaStream_t stream) {
        arguments.positions = inputs[kPositions];
        arguments.position_type = in[kPositions].type == DataType::kFLOAT ? 1 : 7;
        arguments.axis = static_cast<int64_t const*>(inputs[kAxis]);
        arguments.rows = static_cast<int32_t>(in[kSin].dims.d[1]);
        return fope_rotary_launch_general(&arguments, stream);
    }

    bool counted(int32_t inputs, int32_t outputs) const {
        if (inputs == inputs_of(general_) && outputs == kOutputs) return true;
        report(layer_, "the node has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
                           " outputs, expected " + std::to_string(inputs_of(general_)) + " and 2");
        return false;
    }

    int32_t checked(Dims const* dims) const {
        std::string const wrong = mismatch(dims, settings_, general_);
        if (wrong.empty()) return 0;
        report(layer_, wrong);
        return -1;
    }

    Settings settings_;
    std::string layer_;
    bool general_;
    std::vector<PluginField> fields_; // owned here because TensorRT reads them after the call
    PluginFieldCollection collection_{};
};

class Creator final : public IPluginCreatorV3One {
  public:
    explicit Creator(bool general) : general_(general) {}

    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersions[general_]; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

    IPluginV3* createPlugin(char const* layer, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
        std::string const where = layer ? layer : "";
        Settings settings{};
        std::string wrong;
        for (Field const& field : kFields)
            if (wrong.empty()) wrong = read(field, *given, settings);
        if (wrong.empty()) wrong = fault(settings);
        if (wrong.empty()) return new FopeRotary(settings, where, general_);
        report(where, wrong);
        return nullptr;
    }

  private:
    bool general_;
    std::vector<PluginField> fields_ = describe(nullptr);
    PluginFieldCollection collection_{static_cast<int32_t>(fields_.size()), fields_.data()};
};

struct Creators {
    Creator plain{false}, general{true};
    IPluginCreatorInterface* all[2] = {&plain, &general};
};

Creators& creators() {
    static Creators both;
    return both;
}

// Some programs, Triton among them, only open the library: it then registers itself.
__attribute__((constructor)) void enroll() { registry::enroll(creators().all, kNamespace); }

} // namespace

FOPE_ROTARY_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
    registry::asked_from(__builtin_return_address(0), creators().all);
    count = 2;
    return creators().all;
}

FOPE_ROTARY_EXPORT void setLoggerFinder(ILoggerFinder* found) { finder = found; }
