// Field values. The chip's recorded answers (type, return code, constant) come from real boards; what lives
// is computed from the state here. A field that no record and no rule knows is NOT_SUPPORTED.
#include <algorithm>
#include <cmath>
#include <optional>

#include "twin/nvml/library.hpp"

using namespace bulkhead::twin;        // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;  // NOLINT(google-build-using-namespace)

namespace {

using Dev = const bulkhead::twin::nvml::Device&;

constexpr unsigned type_double = 0, type_uint = 1, type_ulonglong = 3, type_int = 5;  // nvmlValueType_t

struct Live {
  unsigned type;
  std::uint64_t bits;
};

Live unsigned_of(double value) {
  return {type_uint, value <= 0 ? 0U : static_cast<std::uint64_t>(std::llround(value))};
}
Live signed_of(std::int32_t value) { return {type_int, static_cast<std::uint32_t>(value)}; }
Live wide(std::uint64_t value) { return {type_ulonglong, value}; }

std::uint64_t crc_errors(const Gpu& gpu) {
  std::uint64_t n = 0;
  for (const std::uint64_t errors : gpu.nvlink_crc_errors) n += errors;
  return n;
}

// Ids are of nvml.h 13.
std::optional<Live> live(Dev d, unsigned id) {
  const Gpu& g = *d.gpu;
  const Chip& c = *d.chip;
  switch (id) {
    case 1:
      return wide(g.ecc_current);
    case 2:
      return wide(g.ecc_pending);
    case 3:
      return wide(g.ecc_corrected);
    case 4:
      return wide(g.ecc_uncorrected);
    case 5:
      return wide(g.ecc_corrected_total);
    case 6:
      return wide(g.ecc_uncorrected_total);
    case 74:
      return wide(g.ns_power_cap);
    case 75:
      return wide(g.ns_sw_thermal + g.ns_hw_thermal);
    case 76:
      return wide(g.ns_sync_boost);
    case 77:
      return wide(0);
    case 79:
      return wide(0);
    case 82:
      return unsigned_of(g.temperature + 1);  // memory: 31 read beside a GPU at 30
    case 83:
      return wide(static_cast<std::uint64_t>(g.energy_mj));
    case 94:
      return unsigned_of(static_cast<double>(g.pcie_replays));
    case 142:
      return wide(g.remapped_correctable);
    case 143:
      return wide(g.remapped_uncorrectable);
    case 144:
      return wide(g.remap_pending);
    case 145:
      return wide(g.remap_failed);
    case 185:
      return unsigned_of(g.watts_average * 1000);
    case 186:
      return unsigned_of(g.watts * 1000);
    case 187:
      return unsigned_of(c.power_min_mw);
    case 188:
      return unsigned_of(c.power_max_mw);
    case 189:
      return unsigned_of(c.power_default_mw);
    case 190:
      return unsigned_of(g.power_limit_mw);
    case 191:
      return wide(static_cast<std::uint64_t>(g.energy_mj));
    case 192:
      return unsigned_of(g.power_limit_mw);
    case 193:
      return c.tlimit_zero_at == 0 ? std::nullopt
                                   : std::optional(signed_of(c.tlimit_zero_at - c.threshold_shutdown));
    case 194:
      return c.tlimit_zero_at == 0 ? std::nullopt
                                   : std::optional(signed_of(c.tlimit_zero_at - c.threshold_slowdown));
    case 269:
      return wide(g.ns_sw_thermal);
    case 270:
      return wide(g.ns_hw_thermal);
    case 271:
      return wide(g.ns_power_brake);
    default:
      break;
  }
  // NVSWITCH_CONNECTED_LINK_COUNT: what nvidia-smi topo prints as NV18. Boards in virtual machines, without
  // their switches, answer a zero of type double; with switches the type was not read, nvml.h says unsigned
  // int.
  if (id == 147) {
    const auto up = std::count_if(std::begin(g.nvlink_active), std::end(g.nvlink_active),
                                  [](auto active) { return active != 0; });
    return unsigned_of(d.state->nvswitch_count > 0 ? static_cast<double>(up) : 0);
  }
  if (id == 38 && c.nvlinks > 0) return wide(crc_errors(g));  // NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL
  return std::nullopt;
}

// What boards with NVLink in use answer: nvidia-smi nvlink begins with the count, and NCCL asks Hopper for
// each link's state this way. The recordings come from guests with NvLinkDisable=1, which answer
// NOT_SUPPORTED.
std::optional<Live> of_links(Dev d, const nvmlFieldValue_t& asked) {
  const auto& active = d.gpu->nvlink_active;
  const bool used = d.state->nvswitch_count > 0 ||
                    std::any_of(std::begin(active), std::end(active), [](auto up) { return up != 0; });
  if (!used || d.chip->nvlinks == 0) return std::nullopt;
  if (asked.fieldId == 91) return Live{type_uint, d.chip->nvlinks};  // NVLINK_LINK_COUNT
  if (asked.fieldId == 165 && asked.scopeId < d.chip->nvlinks)       // NVLINK_GET_STATE
    return Live{type_uint, active[asked.scopeId] != 0 ? 1U : 0U};
  switch (asked.fieldId) {
    case 38:  // NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL
    case 52:  // NVLINK_REPLAY_ERROR_COUNT_TOTAL: what was damaged is sent again
      return wide(crc_errors(*d.gpu));
    case 45:  // NVLINK_CRC_DATA_ERROR_COUNT_TOTAL
    case 59:  // NVLINK_RECOVERY_ERROR_COUNT_TOTAL
      return wide(0);
    default:
      return std::nullopt;
  }
}

const FieldAnswer* recorded(const Chip& chip, unsigned id) {
  for (std::uint32_t i = 0; i < chip.field_count && i < max_fields; ++i) {
    if (chip.fields[i].id == id) return &chip.fields[i];
  }
  return nullptr;
}

void answer(Dev d, nvmlFieldValue_t& value) {
  const FieldAnswer* known = recorded(*d.chip, value.fieldId);
  const auto now = live(d, value.fieldId);
  value.timestamp = static_cast<long long>(d.state->now_ns / 1000);
  value.latencyUsec = 0;
  value.value.ullVal = 0;
  if (const auto links = of_links(d, value)) {
    value.nvmlReturn = NVML_SUCCESS;
    value.valueType = static_cast<nvmlValueType_t>(links->type);
    value.value.ullVal = links->bits;
    return;
  }
  if (known != nullptr) {
    value.nvmlReturn = static_cast<nvmlReturn_t>(known->nvml_return);
    value.valueType = static_cast<nvmlValueType_t>(known->value_type);
    if (value.nvmlReturn == NVML_SUCCESS) {
      value.value.ullVal = now ? now->bits : known->bits;
      // A recorded zero of type double takes the type of what lives here now.
      if (now && now->bits != 0 && known->value_type == type_double)
        value.valueType = static_cast<nvmlValueType_t>(now->type);
    }
    return;
  }
  value.nvmlReturn = now ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
  value.valueType = static_cast<nvmlValueType_t>(now ? now->type : type_double);
  if (now) value.value.ullVal = now->bits;
}

}  // namespace

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t* values) {
  return ask(__func__, device, count > 0 && values != nullptr, [&](Dev d) {
    for (int i = 0; i < count; ++i) answer(d, values[i]);
    return NVML_SUCCESS;
  });
}

extern "C" __attribute__((visibility("default"))) nvmlReturn_t nvmlDeviceClearFieldValues(
    nvmlDevice_t device, int count, nvmlFieldValue_t* values);
nvmlReturn_t nvmlDeviceClearFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t* values) {
  return ask(__func__, device, count > 0 && values != nullptr, [&](Dev) {
    for (int i = 0; i < count; ++i) values[i].nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
    return NVML_SUCCESS;
  });
}
