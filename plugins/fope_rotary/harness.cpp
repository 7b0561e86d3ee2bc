// Drives the plugin library as TensorRT would, without TensorRT: all its interfaces are virtual, so the headers are
// enough. Prints one JSON object of what it saw; judging is the tests' business.
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

using namespace nvinfer1;

namespace {

std::string text(std::string const& value) {
    std::string quoted = "\"";
    for (char const c : value) quoted += c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c};
    return quoted + "\"";
}

std::string number(double value) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.9g", value);
    return digits;
}

std::string number(DataType type) { return number(static_cast<int>(type)); }

std::string list(std::vector<std::string> const& items) {
    std::string all;
    for (std::string const& item : items) all += (all.empty() ? "" : ", ") + item;
    return "[" + all + "]";
}

std::string object(std::map<std::string, std::string> const& items) {
    std::string all;
    for (auto const& [key, value] : items) all += (all.empty() ? "" : ",\n ") + text(key) + ": " + value;
    return "{" + all + "}";
}

// What the plugin reports goes here.
struct Log final : ILogger, ILoggerFinder {
    std::vector<std::string> lines;
    void log(Severity, AsciiChar const* line) noexcept override { lines.push_back(text(line)); }
    ILogger* findLogger() override { return this; }
    std::string take() {
        std::string const all = list(lines);
        lines.clear();
        return all;
    }
} logger;

// The version at work. A general token has positions on A axes (here 3), and each frequency an axis.
bool general = false;
int32_t inputs() { return general ? 7 : 6; }

// A symbolic extent: TensorRT's expression forwards to an implementation, and this one has only an address.
struct Symbol final : IDimensionExpr {
    struct : apiv::VDimensionExpr {
        bool isConstant() const noexcept override { return false; }
        int64_t getConstantValue() const noexcept override { return -1; }
        bool isSizeTensor() const noexcept override { return false; }
    } unknown;
    std::string name;
    explicit Symbol(std::string letter) : name(std::move(letter)) { mImpl = &unknown; }
};

// Settings as TensorRT hands them to a creator.
struct Fields {
    float sin_pad = 0.25F, cos_pad = 0.5F, sign = -1.0F;
    int32_t interleaved = 1, rotary_dim = 8, compute_dtype = 1, head_dim = 8, heads_per_group = 3, kv_heads_per_group = 2;
    int64_t wide_head_dim = 8;
    std::vector<PluginField> all;

    Fields() {
        for (auto const& [name, value] : {std::pair{"sin_pad", &sin_pad}, {"cos_pad", &cos_pad}, {"sign", &sign}})
            all.emplace_back(name, value, PluginFieldType::kFLOAT32, 1);
        for (auto const& [name, value] :
             {std::pair{"interleaved", &interleaved}, {"rotary_dim", &rotary_dim}, {"compute_dtype", &compute_dtype},
              {"head_dim", &head_dim}, {"heads_per_group", &heads_per_group}, {"kv_heads_per_group", &kv_heads_per_group}})
            all.emplace_back(name, value, PluginFieldType::kINT32, 1);
    }
    Fields(Fields const&) = delete;
};

IPluginV3* create(IPluginCreatorV3One& creator, std::vector<PluginField> const& fields) {
    PluginFieldCollection const given{static_cast<int32_t>(fields.size()), fields.data()};
    return creator.createPlugin("layer 0", &given, TensorRTPhase::kBUILD);
}

IPluginV3OneBuild& build(IPluginV3& plugin) {
    return *static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime& runtime(IPluginV3& plugin) {
    return *static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

std::string serialized(IPluginV3& plugin) {
    std::vector<std::string> fields;
    PluginFieldCollection const& all = *runtime(plugin).getFieldsToSerialize();
    for (int32_t i = 0; i < all.nbFields; ++i) {
        PluginField const& field = all.fields[i];
        bool const real = field.type == PluginFieldType::kFLOAT32;
        double const value = real ? *static_cast<float const*>(field.data) : *static_cast<int32_t const*>(field.data);
        fields.push_back(list({text(field.name), text(real ? "float" : "int"), number(value)}));
    }
    return list(fields);
}

// A plan's settings come back through the creator; clones and contexts carry them too.
std::string copies(IPluginCreatorV3One& creator, IPluginV3& plugin) {
    PluginFieldCollection const* stored = runtime(plugin).getFieldsToSerialize();
    IPluginV3* const loaded = creator.createPlugin("layer 0", stored, TensorRTPhase::kRUNTIME);
    IPluginV3* const cloned = plugin.clone();
    IPluginV3* const attached = runtime(plugin).attachToContext(nullptr);
    std::string const all = list({serialized(plugin), serialized(*loaded), serialized(*cloned), serialized(*attached)});
    bool const apart = loaded != &plugin && cloned != &plugin && attached != &plugin;
    for (IPluginV3* const copy : {loaded, cloned, attached}) delete copy;
    return object({{"fields", all}, {"apart", apart ? "true" : "false"}});
}

std::string creators(IPluginCreatorInterface* const* all, int32_t count) {
    std::vector<std::string> described;
    for (int32_t i = 0; i < count; ++i) {
        auto& creator = static_cast<IPluginCreatorV3One&>(*all[i]);
        std::vector<std::string> fields;
        PluginFieldCollection const& names = *creator.getFieldNames();
        for (int32_t k = 0; k < names.nbFields; ++k)
            fields.push_back(list({text(names.fields[k].name),
                                   text(names.fields[k].type == PluginFieldType::kFLOAT32 ? "float" : "int")}));
        described.push_back(object({{"kind", text(creator.getInterfaceInfo().kind)},
                                    {"namespace", text(creator.getPluginNamespace())},
                                    {"name", text(creator.getPluginName())},
                                    {"version", text(creator.getPluginVersion())},
                                    {"fields", list(fields)}}));
    }
    return list(described);
}

std::string output_shapes(IPluginV3& plugin) {
    std::map<std::string, Symbol> symbols;
    char const* const ports[] = {"BSHE", "BSKE", general ? "ABS" : "BS", "D", "GJF", "GJF", "D"};
    DimsExprs in[7] = {}, out[2] = {};
    for (int i = 0; i < inputs(); ++i)
        for (char const* letter = ports[i]; *letter; ++letter)
            in[i].d[in[i].nbDims++] = &symbols.try_emplace({*letter}, std::string{*letter}).first->second;
    struct : IExprBuilder {
    } builder;
    if (build(plugin).getOutputShapes(in, inputs(), nullptr, 0, out, 2, builder)) return "null";
    std::vector<std::string> shapes;
    for (DimsExprs const& shape : out) {
        std::vector<std::string> letters;
        for (int32_t i = 0; i < shape.nbDims; ++i)
            letters.push_back(text(static_cast<Symbol const*>(shape.d[i])->name));
        shapes.push_back(list(letters));
    }
    return list(shapes);
}

std::string output_types(IPluginV3& plugin) {
    std::vector<std::string> all;
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        DataType const in[7] = {type,             type,             DataType::kINT64, DataType::kFLOAT,
                                DataType::kFLOAT, DataType::kFLOAT, DataType::kINT64};
        DataType out[2] = {DataType::kBOOL, DataType::kBOOL};
        build(plugin).getOutputDataTypes(out, 2, in, inputs());
        all.push_back(list({number(type), number(out[0]), number(out[1])}));
    }
    return list(all);
}

// Every type and format at every port, as TensorRT asks: a port's answer depends on the ports before it only.
void accepted(IPluginV3& plugin, std::vector<DynamicPluginTensorDesc>& ports, int port,
              std::vector<std::string>& found) {
    if (port == inputs() + 2) {
        std::vector<std::string> types;
        for (auto const& port : ports) types.push_back(number(port.desc.type));
        found.push_back(list(types));
        return;
    }
    for (int32_t type = 0; type < EnumMax<DataType>(); ++type)
        for (int32_t format = 0; format < EnumMax<TensorFormat>(); ++format) {
            ports[port].desc.type = static_cast<DataType>(type);
            ports[port].desc.format = static_cast<TensorFormat>(format);
            if (build(plugin).supportsFormatCombination(port, ports.data(), inputs(), 2))
                accepted(plugin, ports, port + 1, found);
        }
}

// What the creator says to each spoilt set of fields; an empty list where it made a plugin.
std::string spoilt_fields(IPluginCreatorV3One& creator) {
    std::map<std::string, std::string> all;
    auto const attempt = [&](std::string const& id, std::function<void(Fields&)> const& spoil) {
        Fields fields;
        spoil(fields);
        IPluginV3* const made = create(creator, fields.all);
        all[id] = object({{"made", made ? "true" : "false"}, {"said", logger.take()}});
        delete made;
    };
    attempt("none", [](Fields&) {});
    attempt("int64", [](Fields& f) { f.all[6] = {"head_dim", &f.wide_head_dim, PluginFieldType::kINT64, 1}; });
    attempt("reversed", [](Fields& f) { f.all = {f.all.rbegin(), f.all.rend()}; });
    for (size_t i = 0; i < 9; ++i) {
        std::string const name = Fields().all[i].name;
        attempt(name + " missing", [i](Fields& f) { f.all.erase(f.all.begin() + static_cast<int>(i)); });
        attempt(name + " of another type", [i](Fields& f) { f.all[i].type = PluginFieldType::kCHAR; });
        attempt(name + " twice", [i](Fields& f) { f.all[i].length = 2; });
        attempt(name + " empty", [i](Fields& f) { f.all[i].data = nullptr; });
    }
    attempt("sin_pad nan", [](Fields& f) { f.sin_pad = NAN; });
    attempt("cos_pad infinite", [](Fields& f) { f.cos_pad = INFINITY; });
    attempt("sign nan", [](Fields& f) { f.sign = NAN; });
    attempt("interleaved 2", [](Fields& f) { f.interleaved = 2; });
    attempt("compute_dtype 11", [](Fields& f) { f.compute_dtype = 11; });
    attempt("head_dim 0", [](Fields& f) { f.head_dim = 0; });
    attempt("head_dim 7", [](Fields& f) { f.head_dim = 7; });
    attempt("rotary_dim 0", [](Fields& f) { f.rotary_dim = 0; });
    attempt("rotary_dim 5", [](Fields& f) { f.rotary_dim = 5; });
    attempt("rotary_dim 10", [](Fields& f) { f.rotary_dim = 10; });
    attempt("heads_per_group 0", [](Fields& f) { f.heads_per_group = 0; });
    attempt("kv_heads_per_group -1", [](Fields& f) { f.kv_heads_per_group = -1; });
    return object(all);
}

// Shapes of a call: B 2, S 5, E 8, three query and two key-value heads in each of 2 groups, D 4, F 3.
struct Call {
    std::vector<std::vector<int64_t>> in = {{2, 5, 6, 8}, {2, 5, 4, 8}, {2, 5}, {4}, {2, 4, 3}, {2, 4, 3}};
    int32_t inputs = ::inputs(), outputs = 2;
    DataType type = DataType::kFLOAT;

    Call() {
        if (general) in[2] = {3, 2, 5}, in.push_back({4});
    }

    std::vector<PluginTensorDesc> descs() const {
        std::vector<PluginTensorDesc> all(in.size());
        for (size_t i = 0; i < in.size(); ++i) {
            all[i].type = i < 2 ? type : i == 2 || i == 6 ? DataType::kINT64 : DataType::kFLOAT;
            all[i].dims.nbDims = static_cast<int32_t>(in[i].size());
            for (size_t k = 0; k < in[i].size(); ++k) all[i].dims.d[k] = in[i][k];
        }
        return all;
    }
};

// What the plugin says to each spoilt call, when the engine is built and when its shapes change.
std::string spoilt_calls(IPluginV3& plugin) {
    std::map<std::string, std::string> all;
    auto const attempt = [&](std::string const& id, std::function<void(Call&)> const& spoil) {
        Call call;
        spoil(call);
        std::vector<PluginTensorDesc> const descs = call.descs();
        std::vector<DynamicPluginTensorDesc> dynamic(descs.size());
        for (size_t i = 0; i < descs.size(); ++i) dynamic[i].desc = descs[i];
        int32_t const built = build(plugin).configurePlugin(dynamic.data(), call.inputs, dynamic.data(), call.outputs);
        std::string const said = logger.take();
        int32_t const changed = runtime(plugin).onShapeChange(descs.data(), call.inputs, descs.data(), call.outputs);
        all[id] = object({{"codes", list({number(built), number(changed)})}, {"said", list({said, logger.take()})}});
    };
    attempt("none", [](Call&) {});
    attempt("unknown", [](Call& c) {
        for (auto& shape : c.in) shape.assign(shape.size(), -1);
    });
    attempt("dynamic", [](Call& c) {
        c.in[0] = {-1, -1, 6, 8}, c.in[1] = {-1, -1, 4, 8}, c.in[2][general] = c.in[2][general + 1] = -1;
    });
    attempt("dynamic q heads", [](Call& c) {
        c.in[0] = {-1, -1, 5, 8}, c.in[1] = {-1, -1, 4, 8}, c.in[2][general] = c.in[2][general + 1] = -1;
    });
    attempt("no tokens", [](Call& c) { c.in[0][1] = c.in[1][1] = c.in[2][general + 1] = 0; });
    attempt("nothing rotated", [](Call& c) {
        c.in[3] = {0}, c.in[4] = c.in[5] = {2, 0, 0};
        if (general) c.in[6] = {0};
    });
    attempt("both bases", [](Call& c) { c.in[4][1] = c.in[5][1] = 8; });
    if (general) {
        attempt("one axis", [](Call& c) { c.in[2][0] = 1; });
        attempt("positions on no axis", [](Call& c) { c.in[2] = {2, 5}; });
        attempt("an axis for others", [](Call& c) { c.in[6] = {3}; });
        attempt("rows", [](Call& c) { c.in[4][1] = c.in[5][1] = 7; });
    }
    attempt("q rank", [](Call& c) { c.in[0].pop_back(); });
    attempt("freq rank", [](Call& c) { c.in[3].push_back(1); });
    attempt("q head_dim", [](Call& c) { c.in[0][3] = 6; });
    attempt("k head_dim", [](Call& c) { c.in[1][3] = 6; });
    attempt("q heads", [](Call& c) { c.in[0][2] = 5; });
    attempt("k heads", [](Call& c) { c.in[1][2] = 2; });
    attempt("k batch", [](Call& c) { c.in[1][0] = 1; });
    attempt("k sequence", [](Call& c) { c.in[1][1] = 4; });
    attempt("position batch", [](Call& c) { c.in[2][general] = 1; });
    attempt("position sequence", [](Call& c) { c.in[2][general + 1] = 1; });
    attempt("frequencies", [](Call& c) { c.in[3][0] = 3; });
    attempt("cos groups", [](Call& c) { c.in[5][0] = 1; });
    attempt("cos frequencies", [](Call& c) { c.in[5][1] = 3; });
    attempt("cos pairs", [](Call& c) { c.in[5][2] = 2; });
    attempt("pairs", [](Call& c) { c.in[4][2] = c.in[5][2] = 5; });
    attempt("5 inputs", [](Call& c) { c.inputs = 5; });
    attempt("1 output", [](Call& c) { c.outputs = 1; });
    return object(all);
}

// A call that no kernel takes: without addresses, or of a type that supportsFormatCombination refuses.
std::string spoilt_launches(IPluginV3& plugin) {
    std::map<std::string, std::string> all;
    for (auto const& [id, type] : {std::pair{"no addresses", DataType::kFLOAT}, {"int8", DataType::kINT8}}) {
        Call call;
        call.type = type;
        std::vector<PluginTensorDesc> const descs = call.descs();
        void const* const inputs[7] = {};
        void* const outputs[2] = {};
        int32_t const code = runtime(plugin).enqueue(descs.data(), descs.data(), inputs, outputs, nullptr, nullptr);
        all[id] = object({{"code", number(code)}, {"said", logger.take()}});
    }
    return object(all);
}

// All of one version.
std::string drive(IPluginCreatorV3One& creator) {
    Fields const fields;
    IPluginV3* const plugin = create(creator, fields.all);
    if (!plugin) return text("no plugin: " + logger.take());
    auto& core = *static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
    std::vector<DynamicPluginTensorDesc> ports(inputs() + 2);
    std::vector<std::string> formats;
    accepted(*plugin, ports, 0, formats);
    std::vector<std::string> kinds;
    for (InterfaceInfo const& info : {core.getInterfaceInfo(), build(*plugin).getInterfaceInfo(),
                                      runtime(*plugin).getInterfaceInfo()})
        kinds.push_back(text(info.kind));
    std::string const seen = object({
        {"capabilities", list(kinds)},
        {"plugin", list({text(core.getPluginNamespace()), text(core.getPluginName()), text(core.getPluginVersion())})},
        {"outputs", number(build(*plugin).getNbOutputs())},
        {"timing_cache", text(build(*plugin).getTimingCacheID())},
        {"copies", copies(creator, *plugin)},
        {"shapes", output_shapes(*plugin)},
        {"types", output_types(*plugin)},
        {"formats", list(formats)},
        {"fields", spoilt_fields(creator)},
        {"calls", spoilt_calls(*plugin)},
        {"launches", spoilt_launches(*plugin)},
    });
    delete plugin;
    return seen;
}

} // namespace

int main(int, char** arguments) {
    void* const library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    auto const get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    auto const set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    if (!get || !set) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    int32_t count = 0;
    IPluginCreatorInterface* const* const all = get(count);
    std::map<std::string, std::string> seen = {{"creators", creators(all, count)}};
    for (int32_t i = 0; i < count; ++i) {
        auto& creator = static_cast<IPluginCreatorV3One&>(*all[i]);
        general = i > 0;
        set(nullptr);
        create(creator, {}); // nobody listens yet: it complains to stderr
        set(&logger);
        seen[creator.getPluginVersion()] = drive(creator);
    }
    std::printf("%s\n", object(seen).c_str());
    return 0;
}
