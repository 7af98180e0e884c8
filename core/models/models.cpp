#include "core/models/models.hpp"

#include <array>
#include <cstdint>

#include "base/text.hpp"

namespace bulkhead::models {

namespace {

struct Row {
  std::string_view name;
  unsigned id, nvml_enum, compute_slices, max_instances;
  std::uint64_t memory_mib;
  unsigned multiprocessors, copy_engines, decoders, encoders, jpeg_engines, optical_flow;
  unsigned starts;  // a bit per memory slice
  unsigned size;
};

// name, id, NVML number, compute slices, most, MiB, SM, copy, decode, encode, JPEG, optical flow, starts,
// size
// clang-format off
constexpr Row k_a100_40gb[] = {
    {"1g.5gb", 19, 0, 1, 7, 4864, 14, 1, 0, 0, 0, 0, 0x07f, 1},
    {"2g.10gb", 14, 1, 2, 3, 9856, 28, 2, 1, 0, 0, 0, 0x015, 2},
    {"3g.20gb", 9, 2, 3, 2, 19968, 42, 3, 2, 0, 0, 0, 0x011, 4},
    {"4g.20gb", 5, 3, 4, 1, 19968, 56, 4, 2, 0, 0, 0, 0x001, 4},
    {"7g.40gb", 0, 4, 7, 1, 40192, 98, 7, 5, 0, 1, 1, 0x001, 8},
    {"1g.5gb+me", 20, 7, 1, 1, 4864, 14, 1, 1, 0, 1, 1, 0x07f, 1},
    {"1g.10gb", 15, 9, 1, 4, 9856, 14, 1, 1, 0, 0, 0, 0x055, 2},
};
constexpr Row k_a100_80gb[] = {
    {"1g.10gb", 19, 0, 1, 7, 9728, 14, 1, 0, 0, 0, 0, 0x07f, 1},
    {"2g.20gb", 14, 1, 2, 3, 19968, 28, 2, 1, 0, 0, 0, 0x015, 2},
    {"3g.40gb", 9, 2, 3, 2, 40192, 42, 3, 2, 0, 0, 0, 0x011, 4},
    {"4g.40gb", 5, 3, 4, 1, 40192, 56, 4, 2, 0, 0, 0, 0x001, 4},
    {"7g.80gb", 0, 4, 7, 1, 80640, 98, 7, 5, 0, 1, 1, 0x001, 8},
    {"1g.10gb+me", 20, 7, 1, 1, 9728, 14, 1, 1, 0, 1, 1, 0x07f, 1},
    {"1g.20gb", 15, 9, 1, 4, 19968, 14, 1, 1, 0, 0, 0, 0x055, 2},
};
constexpr Row k_a30[] = {
    {"1g.6gb", 14, 0, 1, 4, 5952, 14, 1, 1, 0, 0, 0, 0x00f, 1},
    {"2g.12gb", 5, 1, 2, 2, 11968, 28, 2, 2, 0, 0, 0, 0x005, 2},
    {"4g.24gb", 0, 3, 4, 1, 24000, 56, 4, 4, 0, 1, 1, 0x001, 4},
    {"1g.6gb+me", 21, 7, 1, 1, 5952, 14, 1, 1, 0, 1, 1, 0x00f, 1},
    {"2g.12gb+me", 6, 8, 2, 1, 11968, 28, 2, 2, 0, 1, 1, 0x005, 2},
};
constexpr Row k_h100_80gb[] = {
    {"1g.10gb", 19, 0, 1, 7, 9984, 16, 1, 1, 0, 1, 0, 0x07f, 1},
    {"2g.20gb", 14, 1, 2, 3, 20096, 32, 2, 2, 0, 2, 0, 0x015, 2},
    {"3g.40gb", 9, 2, 3, 2, 40448, 60, 3, 3, 0, 3, 0, 0x011, 4},
    {"4g.40gb", 5, 3, 4, 1, 40448, 64, 4, 4, 0, 4, 0, 0x001, 4},
    {"7g.80gb", 0, 4, 7, 1, 81152, 132, 8, 7, 0, 7, 1, 0x001, 8},
    {"1g.10gb+me", 20, 7, 1, 1, 9984, 16, 1, 1, 0, 1, 1, 0x07f, 1},
    {"1g.20gb", 15, 9, 1, 4, 20096, 26, 1, 1, 0, 1, 0, 0x055, 2},
};
constexpr Row k_h100_nvl[] = {
    {"1g.12gb", 19, 0, 1, 7, 11008, 16, 1, 1, 0, 1, 0, 0x07f, 1},
    {"2g.24gb", 14, 1, 2, 3, 22144, 32, 2, 2, 0, 2, 0, 0x015, 2},
    {"3g.47gb", 9, 2, 3, 2, 47488, 60, 3, 3, 0, 3, 0, 0x011, 4},
    {"4g.47gb", 5, 3, 4, 1, 47488, 64, 4, 4, 0, 4, 0, 0x001, 4},
    {"7g.94gb", 0, 4, 7, 1, 95360, 132, 8, 7, 0, 7, 1, 0x001, 8},
    {"1g.12gb+me", 20, 7, 1, 1, 11008, 16, 1, 1, 0, 1, 1, 0x07f, 1},
    {"1g.24gb", 15, 9, 1, 4, 22144, 26, 1, 1, 0, 1, 0, 0x055, 2},
};
constexpr Row k_h200[] = {
    {"1g.18gb", 19, 0, 1, 7, 16384, 16, 1, 1, 0, 1, 0, 0x07f, 1},
    {"2g.35gb", 14, 1, 2, 3, 33280, 32, 2, 2, 0, 2, 0, 0x015, 2},
    {"3g.71gb", 9, 2, 3, 2, 71424, 60, 3, 3, 0, 3, 0, 0x011, 4},
    {"4g.71gb", 5, 3, 4, 1, 71424, 64, 4, 4, 0, 4, 0, 0x001, 4},
    {"7g.141gb", 0, 4, 7, 1, 143360, 132, 8, 7, 0, 7, 1, 0x001, 8},
    {"1g.18gb+me", 20, 7, 1, 1, 16384, 16, 1, 1, 0, 1, 1, 0x07f, 1},
    {"1g.35gb", 15, 9, 1, 4, 33280, 26, 1, 1, 0, 1, 0, 0x055, 2},
};
constexpr Row k_rtx_pro_6000[] = {
    {"1g.24gb", 14, 0, 1, 4, 24192, 46, 1, 1, 1, 1, 0, 0x249, 3},
    {"2g.48gb", 5, 1, 2, 2, 48512, 94, 2, 2, 2, 2, 0, 0x041, 6},
    {"4g.96gb", 0, 3, 4, 1, 97408, 188, 4, 4, 4, 4, 1, 0x001, 12},
    {"1g.24gb+me", 21, 7, 1, 1, 24192, 46, 1, 1, 1, 1, 1, 0x249, 3},
    {"1g.24gb+gfx", 47, 10, 1, 4, 24192, 46, 1, 1, 1, 1, 0, 0x249, 3},
    {"2g.48gb+gfx", 35, 11, 2, 2, 48512, 94, 2, 2, 2, 2, 0, 0x041, 6},
    {"4g.96gb+gfx", 32, 12, 4, 1, 97408, 188, 4, 4, 4, 4, 1, 0x001, 12},
    {"1g.24gb-me", 67, 13, 1, 4, 24192, 46, 1, 0, 0, 0, 0, 0x249, 3},
    {"2g.48gb-me", 66, 14, 2, 2, 48512, 94, 2, 0, 0, 0, 0, 0x041, 6},
    {"1g.24gb+me.all", 65, 15, 1, 1, 24192, 46, 1, 4, 4, 4, 1, 0x249, 3},
    {"2g.48gb+me.all", 64, 16, 2, 1, 48512, 94, 2, 4, 4, 4, 1, 0x041, 6},
};
// clang-format on

constexpr std::string_view k_a100_40gb_also[] = {"a100-sxm4-40gb"};
constexpr std::string_view k_a100_80gb_also[] = {"a100", "a100-sxm4-80gb"};
constexpr std::string_view k_a30_also[] = {"a30-24gb"};
constexpr std::string_view k_h100_80gb_also[] = {"h100", "h100-sxm-80gb"};
constexpr std::string_view k_h100_nvl_also[] = {"h100-94gb-nvl", "h100-94gb"};
constexpr std::string_view k_h200_also[] = {"h200-141gb", "h200-sxm-141gb"};
constexpr std::string_view k_rtx_pro_6000_also[] = {"rtx-pro-6000-96gb"};

struct Chip {
  Model model;
  unsigned memory_slices;
  std::span<const Row> profiles;
};
// clang-format off
const std::array<Chip, 7> chips = {{
    {{"a100-40gb", "NVIDIA A100 40GB",
      "nvidia-smi mig -lgip and -lgipp of an A100-SXM4-40GB, driver R525 or later",
      k_a100_40gb_also},
     8, k_a100_40gb},
    {{"a100-80gb", "NVIDIA A100 80GB",
      "nvidia-smi mig -lgip of an A100 80GB; memory of 1g.20gb assumed to be that of 2g.20gb",
      k_a100_80gb_also},
     8, k_a100_80gb},
    {{"a30", "NVIDIA A30",
      "nvidia-smi mig -lgip and -lgipp of an A30",
      k_a30_also},
     4, k_a30},
    {{"h100-80gb", "NVIDIA H100 80GB",
      "read through NVML on an H100 80GB HBM3, driver 580.159.04",
      k_h100_80gb_also},
     8, k_h100_80gb},
    {{"h100-nvl", "NVIDIA H100 NVL",
      "nvidia-smi mig -lgip and -lgipp of an H100 NVL, driver 560.35.03",
      k_h100_nvl_also},
     8, k_h100_nvl},
    {{"h200", "NVIDIA H200",
      "read through NVML on an H200 141GB, driver 580.159.04",
      k_h200_also},
     8, k_h200},
    {{"rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell",
      "nvidia-smi mig -lgip and -lgipp of an RTX PRO 6000 Blackwell Server Edition; NVML numbers of the profiles inferred from their suffixes",
      k_rtx_pro_6000_also},
     12, k_rtx_pro_6000},
}};
// clang-format on

}  // namespace

std::span<const Model> all() {
  static const auto models = [] {
    std::array<Model, chips.size()> out = {};
    for (std::size_t i = 0; i < chips.size(); ++i) out[i] = chips[i].model;
    return out;
  }();
  return models;
}

const Model* find(std::string_view name) {
  const std::string wanted = lower(name);
  for (const Model& model : all()) {
    if (model.name == wanted) return &model;
    for (const auto alias : model.aliases) {
      if (alias == wanted) return &model;
    }
  }
  return nullptr;
}

std::vector<std::string_view> names() {
  std::vector<std::string_view> out;
  for (const Model& model : all()) out.push_back(model.name);
  return out;
}

mig::Geometry geometry(const Model& model) {
  mig::Geometry out;
  for (const Chip& chip : chips) {
    if (chip.model.name != model.name) continue;
    out.memory_slices = chip.memory_slices;
    for (const Row& row : chip.profiles) {
      mig::Profile profile{.id = row.id,
                           .nvml_enum = row.nvml_enum,
                           .name = std::string(row.name),
                           .compute_slices = row.compute_slices,
                           .max_instances = row.max_instances,
                           .memory = mebibytes(row.memory_mib),
                           .multiprocessors = row.multiprocessors,
                           .copy_engines = row.copy_engines,
                           .decoders = row.decoders,
                           .encoders = row.encoders,
                           .jpeg_engines = row.jpeg_engines,
                           .optical_flow = row.optical_flow,
                           .size = row.size};
      for (unsigned start = 0; start < chip.memory_slices; ++start) {
        if ((row.starts >> start & 1U) != 0) profile.starts.push_back(start);
      }
      out.profiles.push_back(std::move(profile));
    }
  }
  return out;
}

}  // namespace bulkhead::models
