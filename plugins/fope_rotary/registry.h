// TensorRT's registry of plugins, where this process has one: a library that is only opened registers itself.
//
// Its functions are called by their places in its table, because TensorRT 11 and RTX dropped four that stood before
// them, whatever the headers say that this is compiled with.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <link.h>

#include <string>
#include <vector>

namespace registry {

using Creators = nvinfer1::IPluginCreatorInterface* const (&)[2];

// The library that an address is in.
inline Dl_info library_of(void const* address) {
    Dl_info info = {};
    dladdr(address, &info);
    return info;
}

inline int note(dl_phdr_info* info, size_t, void* names) {
    static_cast<std::vector<std::string>*>(names)->emplace_back(info->dlpi_name);
    return 0;
}

// A function that everybody sees, or that one of the loaded libraries has: others may be open without being seen.
inline void* find(char const* name) {
    if (void* const seen = dlsym(RTLD_DEFAULT, name)) return seen;
    std::vector<std::string> names;
    dl_iterate_phdr(note, &names);
    for (std::string const& each : names) {
        void* const library = dlopen(each.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        void* const there = library ? dlsym(library, name) : nullptr;
        if (library) dlclose(library);
        if (there) return there;
    }
    return nullptr;
}

struct Registry {
    using Change = bool (*)(void*, nvinfer1::IPluginCreatorInterface*, char const*);

    void* const entry = find("getPluginRegistry");
    void* const version = entry ? find("getInferLibMajorVersion") : nullptr;
    void* const self = entry ? reinterpret_cast<void* (*)()>(entry)() : nullptr;
    bool holds_ours = false;

    // The function at a place of TensorRT 11's table.
    Change at(int place) const {
        int32_t const major = version ? reinterpret_cast<int32_t (*)()>(version)() : NV_TENSORRT_MAJOR;
        return (*static_cast<Change* const*>(self))[major == 10 ? place + 4 : place];
    }
};

inline Registry& the() {
    static Registry one;
    return one;
}

// Registers, and then stays loaded, because the registry keeps what it was given.
inline void enroll(Creators creators, char const* name_space) {
    Registry& known = the();
    if (!known.self) return;
    for (auto* creator : creators) known.holds_ours |= known.at(8)(known.self, creator, name_space);
    if (known.holds_ours)
        dlopen(library_of(reinterpret_cast<void*>(enroll)).dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
}

// TensorRT itself asks for creators in order to register them, and refuses what is registered already.
inline void asked_from(void const* address, Creators creators) {
    Registry& known = the();
    if (!known.holds_ours || !known.version || library_of(address).dli_fbase != library_of(known.entry).dli_fbase) return;
    for (auto* creator : creators) known.at(11)(known.self, creator, nullptr);
    known.holds_ours = false;
}

} // namespace registry
