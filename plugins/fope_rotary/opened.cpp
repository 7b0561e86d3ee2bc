// Opens the plugin library, as programs do that leave the rest to it, beside a registry of its own, which the library
// has to find. Prints one JSON object: the registry's creators when the library is open, and after getCreators.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Registry final : IPluginRegistry {
    std::vector<IPluginCreatorInterface*> all;

    static IPluginCreatorV3One& of(IPluginCreatorInterface* creator) {
        return static_cast<IPluginCreatorV3One&>(*creator);
    }
    bool registerCreator(IPluginCreatorInterface& creator, char const*) noexcept override {
        all.push_back(&creator);
        return true;
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return !all.empty() && (all.pop_back(), true); }
    IPluginCreatorInterface* getCreator(char const* name, char const* version, char const* space) noexcept override {
        for (auto* each : all)
            if (!std::strcmp(of(each).getPluginName(), name) && !std::strcmp(of(each).getPluginVersion(), version) &&
                !std::strcmp(of(each).getPluginNamespace(), space))
                return each;
        return nullptr;
    }
    // What the library must not call is not there.
    bool registerCreator(IPluginCreator&, char const*) noexcept override { std::terminate(); }
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { std::terminate(); }
    IPluginCreator* getPluginCreator(char const*, char const*, char const*) noexcept override { std::terminate(); }
    void setErrorRecorder(IErrorRecorder*) noexcept override { std::terminate(); }
    IErrorRecorder* getErrorRecorder() const noexcept override { std::terminate(); }
    bool deregisterCreator(IPluginCreator const&) noexcept override { std::terminate(); }
    bool isParentSearchEnabled() const override { std::terminate(); }
    void setParentSearchEnabled(bool) override { std::terminate(); }
    void* loadLibrary(char const*) noexcept override { std::terminate(); }
    void deregisterLibrary(void*) noexcept override { std::terminate(); }
    IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override { std::terminate(); }
    IPluginResource* acquirePluginResource(char const*, IPluginResource*) noexcept override { std::terminate(); }
    int32_t releasePluginResource(char const*) noexcept override { std::terminate(); }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { std::terminate(); }
} registry;

// How many creators there are, and whether each version is found.
std::string seen() {
    auto const found = [](char const* version) { return registry.getCreator("FopeRotary", version, "fope") ? "true" : "false"; };
    return "[" + std::to_string(registry.all.size()) + ", " + found("1") + ", " + found("2") + "]";
}

} // namespace

extern "C" __attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept { return &registry; }

int main(int, char** arguments) {
    void* const library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    std::string const opened = seen();
    auto const get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    int32_t count = 0;
    get(count);
    std::string const asked = seen();
    dlclose(library);
    std::printf("{\"opened\": %s, \"asked\": %s, \"closed\": %s}\n", opened.c_str(), asked.c_str(), seen().c_str());
    return 0;
}
