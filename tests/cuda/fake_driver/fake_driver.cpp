// A FAKE of the CUDA driver library (libcuda.so.1) for machines without one: one device, no memory of its own, and
// launches that run in the CPU emulator. It exists so that the host code, cuda-core included, runs end to end in tests.
// Nothing that it returns describes any real GPU.
//
// Environment: FAKE_DRIVER_EMULATOR, library with emulator_launch; FAKE_DRIVER_LOG, file that gets a line per launch.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#undef cuGetProcAddress

namespace {

struct Library {
    std::string image;
};

struct Kernel {
    std::string name;
};

thread_local CUcontext current = nullptr;
int context_storage, device_count = 1;

CUcontext the_context() { return reinterpret_cast<CUcontext>(&context_storage); }

std::string elf_image(const char* code) {
    if (std::memcmp(code, "\177ELF", 4) != 0) return "";
    unsigned long long section_table;
    unsigned short entry_size, entries;
    std::memcpy(&section_table, code + 40, 8);
    std::memcpy(&entry_size, code + 58, 2);
    std::memcpy(&entries, code + 60, 2);
    return std::string(code, section_table + entry_size * entries);
}

CUresult fake_init(unsigned) { return CUDA_SUCCESS; }
CUresult fake_driver_version(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult fake_device_count(int* count) { return *count = device_count, CUDA_SUCCESS; }
CUresult fake_device_get(CUdevice* device, int index) {
    if (index != 0) return CUDA_ERROR_INVALID_DEVICE;
    return *device = 0, CUDA_SUCCESS;
}
CUresult fake_device_name(char* name, int size, CUdevice) {
    std::snprintf(name, size, "FAKE device (CPU emulator)");
    return CUDA_SUCCESS;
}
CUresult fake_device_attribute(int* value, CUdevice_attribute attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
    return CUDA_SUCCESS;
}
CUresult fake_retain(CUcontext* context, CUdevice) { return *context = the_context(), CUDA_SUCCESS; }
CUresult fake_release(CUdevice) { return CUDA_SUCCESS; }
CUresult fake_set_current(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult fake_get_current(CUcontext* context) { return *context = current, CUDA_SUCCESS; }
CUresult fake_get_device(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult fake_stream_context(CUstream, CUcontext* context) { return *context = the_context(), CUDA_SUCCESS; }

CUresult fake_library_load(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned, CUlibraryOption*,
                           void**, unsigned) {
    std::string image = elf_image(static_cast<const char*>(code));
    if (image.empty()) return CUDA_ERROR_INVALID_IMAGE;
    *library = reinterpret_cast<CUlibrary>(new Library{image});
    return CUDA_SUCCESS;
}
CUresult fake_library_unload(CUlibrary library) { return delete reinterpret_cast<Library*>(library), CUDA_SUCCESS; }
CUresult fake_library_kernel(CUkernel* kernel, CUlibrary library, const char* name) {
    const std::string section = std::string(".text.") + name + '\0';
    if (reinterpret_cast<Library*>(library)->image.find(section) == std::string::npos) return CUDA_ERROR_NOT_FOUND;
    *kernel = reinterpret_cast<CUkernel>(new Kernel{name});
    return CUDA_SUCCESS;
}
CUresult fake_kernel_function(CUfunction* function, CUkernel kernel) {
    *function = reinterpret_cast<CUfunction>(kernel);
    return CUDA_SUCCESS;
}

CUresult fake_launch(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
    if (current != the_context()) return CUDA_ERROR_INVALID_CONTEXT;
    static const bool idle = std::getenv("FAKE_DRIVER_IDLE") != nullptr;
    if (idle) return CUDA_SUCCESS;
    using Launch = int (*)(const char*, unsigned, unsigned, void**, const void*, int, unsigned, char*, int);
    static void* emulator = dlopen(std::getenv("FAKE_DRIVER_EMULATOR"), RTLD_NOW);
    static auto launch = reinterpret_cast<Launch>(emulator ? dlsym(emulator, "emulator_launch") : nullptr);
    if (!launch) return CUDA_ERROR_NOT_SUPPORTED;
    const std::string& name = reinterpret_cast<Kernel*>(function)->name;
    char text[4096];
    const int violations = launch(name.c_str(), config->gridDimX, config->blockDimX, arguments, nullptr, 0, 0, text,
                                  static_cast<int>(sizeof text));
    if (FILE* log = std::fopen(std::getenv("FAKE_DRIVER_LOG"), "a")) {
        std::fprintf(log, "%s grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%p violations=%d\n", name.c_str(),
                     config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
                     config->blockDimZ, config->sharedMemBytes, static_cast<void*>(config->hStream), violations);
        std::fclose(log);
    }
    return violations == 0 ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_FAILED;
}
CUresult fake_launch_plain(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                           unsigned bz, unsigned shared, CUstream stream, void** arguments, void** extra) {
    CUlaunchConfig config{};
    config.gridDimX = x, config.gridDimY = y, config.gridDimZ = z;
    config.blockDimX = bx, config.blockDimY = by, config.blockDimZ = bz;
    config.sharedMemBytes = shared, config.hStream = stream;
    return fake_launch(&config, function, arguments, extra);
}

CUresult fake_error_name(CUresult, const char** text) { return *text = "FAKE_DRIVER_ERROR", CUDA_SUCCESS; }

struct Entry {
    const char* name;
    void* function;
};
#define ENTRY(name, function) {#name, reinterpret_cast<void*>(&function)}
const Entry entries[] = {
    ENTRY(cuInit, fake_init),
    ENTRY(cuDriverGetVersion, fake_driver_version),
    ENTRY(cuDeviceGetCount, fake_device_count),
    ENTRY(cuDeviceGet, fake_device_get),
    ENTRY(cuDeviceGetName, fake_device_name),
    ENTRY(cuDeviceGetAttribute, fake_device_attribute),
    ENTRY(cuDevicePrimaryCtxRetain, fake_retain),
    ENTRY(cuDevicePrimaryCtxRelease, fake_release),
    ENTRY(cuCtxSetCurrent, fake_set_current),
    ENTRY(cuCtxGetCurrent, fake_get_current),
    ENTRY(cuCtxGetDevice, fake_get_device),
    ENTRY(cuStreamGetCtx, fake_stream_context),
    ENTRY(cuLibraryLoadData, fake_library_load),
    ENTRY(cuLibraryUnload, fake_library_unload),
    ENTRY(cuLibraryGetKernel, fake_library_kernel),
    ENTRY(cuKernelGetFunction, fake_kernel_function),
    ENTRY(cuLaunchKernelEx, fake_launch),
    ENTRY(cuLaunchKernel, fake_launch_plain),
    ENTRY(cuGetErrorName, fake_error_name),
    ENTRY(cuGetErrorString, fake_error_name),
};

}  // namespace

extern "C" CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t,
                                        CUdriverProcAddressQueryResult* status) {
    *function = nullptr;
    if (std::strcmp(name, "cuGetProcAddress") == 0) *function = reinterpret_cast<void*>(&cuGetProcAddress_v2);
    for (const Entry& entry : entries) {
        if (std::strcmp(name, entry.name) == 0) *function = entry.function;
    }
    if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

extern "C" CUresult cuGetProcAddress(const char* name, void** function, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
