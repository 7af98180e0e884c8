// What there is: devices and their properties.
#include <cstdlib>
#include <cstring>

#include "twin/cuda/driver.hpp"

using namespace bulkhead::twin::cuda;

namespace {

struct Attribute {
  int number, value;
};
// What does not depend on the chip here: the H100's published limits.
constexpr Attribute constants[] = {
    {1, 1024},    {2, 1024},     {3, 1024},        {4, 64},      {5, 2147483647},  {6, 65535},
    {7, 65535},   {8, 49152},    {9, 65536},       {10, 32},     {11, 2147483647}, {12, 65536},
    {14, 512},    {15, 1},       {17, 0},          {18, 0},      {19, 1},          {21, 131072},
    {22, 131072}, {23, 65536},   {24, 16384},      {25, 16384},  {26, 16384},      {27, 32768},
    {28, 32768},  {29, 2048},    {30, 512},        {31, 1},      {35, 0},          {39, 2048},
    {40, 3},      {41, 1},       {42, 32768},      {43, 2048},   {44, 1},          {45, 32768},
    {46, 32768},  {47, 8192},    {48, 8192},       {49, 32768},  {51, 32},         {52, 32768},
    {53, 32768},  {54, 2046},    {55, 32768},      {56, 131072}, {57, 65536},      {58, 16384},
    {59, 16384},  {60, 16384},   {61, 32768},      {62, 2048},   {63, 32768},      {64, 32768},
    {65, 2048},   {66, 32768},   {67, 32768},      {68, 2046},   {69, 268435456},  {70, 131072},
    {71, 65000},  {72, 2097120}, {73, 32768},      {74, 32768},  {77, 32768},      {78, 1},
    {79, 1},      {80, 1},       {82, 65536},      {83, 1},      {84, 0},          {86, 0},
    {87, 2},      {88, 0},       {89, 1},          {90, 1},      {91, 1},          {92, 0},
    {93, 0},      {94, 0},       {95, 1},          {96, 1},      {98, 0},          {99, 1},
    {100, 0},     {101, 0},      {102, 1},         {103, 1},     {104, 0},         {105, 0},
    {106, 32},    {107, 1},      {109, 134213632}, {110, 1},     {111, 1024},      {112, 1},
    {113, 1},     {114, 1},      {115, 1},         {116, 1},     {117, 1},         {118, 200},
    {119, 1},     {121, 1},      {122, 0},         {123, 0},     {124, 0},         {125, 1},
    {128, 0},     {129, 1},      {130, 0},         {131, -1},    {132, 0},         {133, 0},
    {135, 0},     {136, 0},      {137, 0},         {138, 0},     {141, 0},         {142, 0},
    {143, 0},     {144, 0},      {145, 0},         {146, 0},     {147, 0},
};

int attribute(const Device& device, int number, bool& known) {
  const bool hopper = device.cc_major >= 9;
  const int l2_mib = hopper ? 50 : device.cc_minor == 9 ? 96 : 40;
  const int shared_kib = hopper ? 228 : device.cc_minor == 0 ? 164 : 100;
  switch (number) {
    case 13:
      return static_cast<int>(device.clock_mhz * 1000);
    case 16:
      return static_cast<int>(device.multiprocessors);
    case 20:
      return static_cast<int>(device.compute_mode);
    case 32:
      return static_cast<int>(device.ecc);
    case 33:
      return static_cast<int>(device.pci_bus);
    case 34:
      return static_cast<int>(device.pci_device);
    case 36:
      return static_cast<int>(device.memory_clock_mhz * 1000);
    case 37:
      return static_cast<int>(device.memory_bus_bits);
    case 38:
      return l2_mib << 20;
    case 50:
      return static_cast<int>(device.pci_domain);
    case 75:
      return static_cast<int>(device.cc_major);
    case 76:
      return static_cast<int>(device.cc_minor);
    case 81:
      return shared_kib << 10;
    case 85:
      return device.ordinal;
    case 97:
      return (shared_kib - 1) << 10;
    case 108:
      return l2_mib * 10 / 16 << 20;
    case 120:
      return hopper ? 1 : 0;
    case 126:
      return hopper ? 4 : 1;
    case 127:
      return hopper ? 1 : 0;
    case 134:
      return device.numa == bulkhead::twin::none ? -1 : static_cast<int>(device.numa);
    case 139:
      return static_cast<int>(device.pci_id);
    case 140:
      return static_cast<int>(device.pci_subsystem);
    default:
      break;
  }
  for (const auto& row : constants) {
    if (row.number == number) return row.value;
  }
  known = false;
  return 0;
}

}  // namespace

EXPORT CUresult cuDeviceGetCount(int* count) {
  ENTER(call, driver);
  if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *count = static_cast<int>(process().devices.size());
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER(call, driver);
  if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (device_of(ordinal) == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

namespace {
CUresult give_text(const std::string& text, char* out, int length) {
  if (out == nullptr || length <= 0) return CUDA_ERROR_INVALID_VALUE;
  const auto room = static_cast<std::size_t>(length) - 1;
  const std::size_t n = std::min(room, text.size());
  std::memcpy(out, text.data(), n);
  out[n] = '\0';
  return CUDA_SUCCESS;
}

CUresult give_uuid(const Device& device, CUuuid* uuid) {
  if (uuid == nullptr) return CUDA_ERROR_INVALID_VALUE;
  std::size_t digits = 0;
  std::memset(uuid->bytes, 0, sizeof uuid->bytes);
  for (std::size_t i = 4; i < device.uuid.size() && digits < 32; ++i) {  // after "GPU-"
    const char c = device.uuid[i];
    const int value = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (value < 0) continue;
    char& byte = uuid->bytes[digits / 2];
    const auto before = static_cast<unsigned>(static_cast<unsigned char>(byte));
    byte = static_cast<char>(digits % 2 == 0 ? static_cast<unsigned>(value) << 4U
                                             : before | static_cast<unsigned>(value));
    ++digits;
  }
  return CUDA_SUCCESS;
}
}  // namespace

#define WITH_DEVICE(call, device, ordinal)   \
  ENTER(call, driver);                       \
  Device* const device = device_of(ordinal); \
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE

EXPORT CUresult cuDeviceGetName(char* name, int length, CUdevice ordinal) {
  WITH_DEVICE(call, device, ordinal);
  return give_text(device->name, name, length);
}
EXPORT CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice ordinal) {
  WITH_DEVICE(call, device, ordinal);
  return give_uuid(*device, uuid);
}
EXPORT CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice ordinal) { return cuDeviceGetUuid(uuid, ordinal); }
EXPORT CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice ordinal) {
  WITH_DEVICE(call, device, ordinal);
  return give_text(device->pci, id, length);
}
EXPORT CUresult cuDeviceGetByPCIBusId(CUdevice* ordinal, const char* id) {
  ENTER(call, driver);
  if (ordinal == nullptr || id == nullptr) return CUDA_ERROR_INVALID_VALUE;
  // domain:bus:device.function, with the domain and the function left out at will.
  unsigned numbers[3] = {};
  const char* end = id;
  int parts = 0;
  for (; parts < 3; ++parts) {
    char* after = nullptr;
    numbers[parts] = static_cast<unsigned>(std::strtoul(end, &after, 16));
    if (after == end) break;
    end = after;
    if (*end != ':') {
      ++parts;
      break;
    }
    ++end;
  }
  if (parts < 2) return CUDA_ERROR_INVALID_VALUE;
  const unsigned domain = parts == 3 ? numbers[0] : 0, bus = numbers[parts - 2], slot = numbers[parts - 1];
  for (const auto& device : process().devices) {
    if (device->pci_domain != domain || device->pci_bus != bus || device->pci_device != slot) continue;
    *ordinal = device->ordinal;
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_DEVICE;
}
EXPORT CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice ordinal) {
  WITH_DEVICE(call, device, ordinal);
  if (bytes == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *bytes = device->total;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int* value, int number, CUdevice ordinal) {
  WITH_DEVICE(call, device, ordinal);
  if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
  bool known = true;
  const int got = attribute(*device, number, known);
  if (!known) return CUDA_ERROR_INVALID_VALUE;
  *value = got;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice ordinal) {
  WITH_DEVICE(call, device, ordinal);
  if (major == nullptr || minor == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *major = static_cast<int>(device->cc_major);
  *minor = static_cast<int>(device->cc_minor);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetProperties(CUdevprop* out, CUdevice ordinal) {
  WITH_DEVICE(call, device, ordinal);
  if (out == nullptr) return CUDA_ERROR_INVALID_VALUE;
  bool known = true;
  const auto of = [&](int number) { return attribute(*device, number, known); };
  *out = {of(1), {of(2), of(3), of(4)}, {of(5), of(6), of(7)}, of(8), of(9), of(10), of(11), of(12), of(13),
          of(14)};
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceCanAccessPeer(int* can, CUdevice ordinal, CUdevice other_ordinal) {
  WITH_DEVICE(call, device, ordinal);
  const Device* other = device_of(other_ordinal);
  if (other == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (can == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *can = other != device && other->nvlinks != 0 && device->nvlinks != 0 ? 1 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetP2PAttribute(int* value, int number, CUdevice ordinal, CUdevice other_ordinal) {
  WITH_DEVICE(call, device, ordinal);
  const Device* other = device_of(other_ordinal);
  if (other == nullptr || other == device) return CUDA_ERROR_INVALID_DEVICE;
  if (value == nullptr || number < 1 || number > 5) return CUDA_ERROR_INVALID_VALUE;
  const bool linked = other->nvlinks != 0 && device->nvlinks != 0;
  *value = number == 1 || number == 5 ? 0 : linked ? 1 : 0;  // performance rank 0: the best
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetTexture1DLinearMaxWidth(size_t* width, int format, unsigned channels,
                                                   CUdevice ordinal) {
  WITH_DEVICE(call, device, ordinal);
  static_cast<void>(format);
  if (width == nullptr || channels == 0) return CUDA_ERROR_INVALID_VALUE;
  *width = 268435456;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetExecAffinitySupport(int* supported, int type, CUdevice ordinal) {
  WITH_DEVICE(call, device, ordinal);
  static_cast<void>(type);
  if (supported == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *supported = 0;  // with MPS only
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetLuid(char*, unsigned*, CUdevice) {
  return CUDA_ERROR_NOT_SUPPORTED;
}  // Windows only
