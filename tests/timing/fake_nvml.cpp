// A FAKE of NVIDIA's management library (libnvidia-ml.so.1) for machines without a driver: fixed answers to the
// questions that sasa_bench/timing/nvml.py asks, by the signatures of NVIDIA's NVML API reference. It has no thermometer.
#include <cstdio>
#include <cstring>

namespace {
constexpr int NOT_SUPPORTED = 3, INVALID_ARGUMENT = 2;
char name[96];
}  // namespace

extern "C" {
int nvmlInitWithFlags(unsigned) { return 0; }
const char* nvmlErrorString(int) { return "a fake error"; }
int nvmlSystemGetDriverVersion(char* version, unsigned length) {
    return std::snprintf(version, length, "999.11"), 0;
}
int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
    std::snprintf(name, sizeof name, "FAKE %s", uuid);
    return *device = name, 0;
}
int nvmlDeviceGetName(void* device, char* text, unsigned length) {
    return std::snprintf(text, length, "%s", static_cast<char*>(device)), 0;
}
int nvmlDeviceGetClockInfo(void* device, int type, unsigned* mhz) {
    if (device != name || (type != 1 && type != 2)) return INVALID_ARGUMENT;
    return *mhz = type == 1 ? 1755 : 1593, 0;
}
int nvmlDeviceGetMaxClockInfo(void* device, int type, unsigned* mhz) {
    if (device != name || (type != 1 && type != 2)) return INVALID_ARGUMENT;
    return *mhz = type == 1 ? 1980 : 2619, 0;
}
int nvmlDeviceGetEnforcedPowerLimit(void*, unsigned* milliwatts) { return *milliwatts = 350500, 0; }
int nvmlDeviceGetTemperature(void*, int, unsigned*) { return NOT_SUPPORTED; }
int nvmlDeviceGetCurrentClocksEventReasons(void*, unsigned long long* reasons) { return *reasons = 0x1 | 0x4 | 0x40, 0; }
int nvmlDeviceGetTotalEnergyConsumption(void*, unsigned long long* millijoules) { return *millijoules = 12345, 0; }
}
