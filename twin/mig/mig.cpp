#include "twin/mig/mig.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include <fmt/format.h>

namespace bulkhead::twin::mig {

namespace {

const Chip& chip_of(const State& state, std::uint32_t gpu) { return state.chips[state.gpus[gpu].chip]; }

bool overlap(Place a, Place b) { return a.start < b.start + b.size && b.start < a.start + a.size; }

std::vector<Place> taken(const Gpu& gpu) {
  std::vector<Place> places;
  for (const GpuInstance& instance : gpu.instances) {
    if (instance.used != 0) places.push_back({instance.start, instance.size});
  }
  return places;
}

bool is_free(const std::vector<Place>& used, Place place) {
  return std::none_of(used.begin(), used.end(), [&](Place other) { return overlap(other, place); });
}

std::uint32_t count_of(const Gpu& gpu, std::uint32_t profile_id) {
  std::uint32_t n = 0;
  for (const GpuInstance& instance : gpu.instances)
    n += instance.used != 0 && instance.profile_id == profile_id ? 1U : 0U;
  return n;
}

std::uint32_t compute_slices_used(const Chip& chip, const Gpu& gpu) {
  std::uint32_t n = 0;
  for (const GpuInstance& instance : gpu.instances) {
    if (instance.used == 0) continue;
    for (std::uint32_t i = 0; i < chip.profile_count; ++i) {
      if (chip.profiles[i].id == instance.profile_id) n += chip.profiles[i].slices;
    }
  }
  return n;
}

// The rule that reproduces every A100 sequence printed in the User Guide: leave the most (profile, placement)
// pairs.
std::uint32_t pairs_left(const Chip& chip, const std::vector<Place>& used) {
  std::uint32_t n = 0;
  for (std::uint32_t i = 0; i < chip.profile_count; ++i) {
    const MigProfile& profile = chip.profiles[i];
    for (std::uint32_t s = 0; s < profile.start_count; ++s)
      n += is_free(used, {profile.starts[s], profile.size}) ? 1U : 0U;
  }
  return n;
}

// The rule that fits the one Hopper sequence seen: leave the most ids of the tree 0..14.
std::uint32_t ids_left(const Chip& chip, const std::vector<Place>& used) {
  std::uint32_t n = 0;
  for (std::uint32_t parts = 1; parts <= 8 && chip.memory_slices % parts == 0; parts *= 2) {
    const std::uint32_t size = chip.memory_slices / parts;
    for (std::uint32_t part = 0; part < parts; ++part) n += is_free(used, {part * size, size}) ? 1U : 0U;
  }
  return n;
}

std::optional<Place> default_place(const Chip& chip, const Gpu& gpu, const MigProfile& profile) {
  const std::vector<Place> used = taken(gpu);
  std::optional<Place> best;
  std::uint32_t best_left = 0;
  for (std::uint32_t s = 0; s < profile.start_count; ++s) {
    const Place place{profile.starts[s], profile.size};
    if (!is_free(used, place)) continue;
    std::vector<Place> after = used;
    after.push_back(place);
    const std::uint32_t left = chip.placement_policy == PlacementPolicy::most_pairs_left
                                   ? pairs_left(chip, after)
                                   : ids_left(chip, after);
    if (!best || left > best_left ||
        (left == best_left && instance_id(chip, place) < instance_id(chip, *best))) {
      best = place;
      best_left = left;
    }
  }
  return best;
}

// SHA-1 (FIPS 180-4), for names only.
std::array<std::uint8_t, 20> sha1(const std::string& message) {
  std::string padded = message;
  padded.push_back(static_cast<char>(0x80));
  while (padded.size() % 64 != 56) padded.push_back('\0');
  const std::uint64_t bits = message.size() * 8U;
  for (int shift = 56; shift >= 0; shift -= 8)
    padded.push_back(static_cast<char>((bits >> static_cast<unsigned>(shift)) & 0xffU));
  std::array<std::uint32_t, 5> h = {0x67452301U, 0xefcdab89U, 0x98badcfeU, 0x10325476U, 0xc3d2e1f0U};
  const auto rotate = [](std::uint32_t x, unsigned n) { return (x << n) | (x >> (32U - n)); };
  for (std::size_t at = 0; at < padded.size(); at += 64) {
    std::array<std::uint32_t, 80> w{};
    for (std::size_t i = 0; i < 64; ++i)
      w[i / 4] = w[i / 4] << 8U | static_cast<std::uint8_t>(padded[at + i]);
    for (std::size_t i = 16; i < 80; ++i) w[i] = rotate(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
    auto [a, b, c, d, e] = h;
    for (std::size_t i = 0; i < 80; ++i) {
      std::uint32_t f = 0, k = 0;
      if (i < 20) {
        f = (b & c) | (~b & d), k = 0x5a827999U;
      } else if (i < 40) {
        f = b ^ c ^ d, k = 0x6ed9eba1U;
      } else if (i < 60) {
        f = (b & c) | (b & d) | (c & d), k = 0x8f1bbcdcU;
      } else {
        f = b ^ c ^ d, k = 0xca62c1d6U;
      }
      const std::uint32_t next = rotate(a, 5) + f + e + k + w[i];
      e = d, d = c, c = rotate(b, 30), b = a, a = next;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e;
  }
  std::array<std::uint8_t, 20> out{};
  for (std::size_t i = 0; i < 20; ++i) out[i] = static_cast<std::uint8_t>(h[i / 4] >> (24U - 8U * (i % 4)));
  return out;
}

void drop_instances(Gpu& gpu) {
  for (GpuInstance& instance : gpu.instances) instance = GpuInstance{};
}

}  // namespace

bool process_on(const State& state, std::uint32_t gpu, std::uint32_t gpu_instance,
                std::uint32_t compute_instance) {
  return std::any_of(std::begin(state.processes), std::end(state.processes), [&](const Process& process) {
    return process.used != 0 && process.gpu == gpu &&
           (gpu_instance == none || process.gpu_instance == gpu_instance) &&
           (compute_instance == none || process.compute_instance == compute_instance);
  });
}

// ---- mode
ModeAnswer set_mode(State& state, std::uint32_t gpu, bool on, bool held) {
  Gpu& g = state.gpus[gpu];
  const MigActivation how = chip_of(state, gpu).mig;
  if (how == MigActivation::unsupported) return {not_supported, success};
  const std::uint32_t wanted = on ? 1 : 0;
  g.mig_pending = wanted;
  if (g.mig_current == wanted) return {};
  if (held || !taken(g).empty() || process_on(state, gpu)) return {success, in_use};
  if (how == MigActivation::needs_reset && state.virtualization != 0) return {success, reset_required};
  reset(state, gpu);
  return {};
}

void reset(State& state, std::uint32_t gpu) {
  Gpu& g = state.gpus[gpu];
  drop_instances(g);
  g.mig_current = g.mig_pending;
  g.ecc_current = g.ecc_pending;
  ++g.generation;
}

void forget(State& state, std::uint32_t gpu) {
  if (chip_of(state, gpu).mig == MigActivation::immediate) state.gpus[gpu].mig_pending = 0;
  reset(state, gpu);
}

// ---- profiles
const MigProfile* profile_by_enum(const State& state, std::uint32_t gpu, std::uint32_t nvml_enum) {
  const Chip& chip = chip_of(state, gpu);
  for (std::uint32_t i = 0; i < chip.profile_count; ++i) {
    if (chip.profiles[i].nvml_enum == nvml_enum) return &chip.profiles[i];
  }
  return nullptr;
}

const MigProfile* profile_by_id(const State& state, std::uint32_t gpu, std::uint32_t id) {
  const Chip& chip = chip_of(state, gpu);
  for (std::uint32_t i = 0; i < chip.profile_count; ++i) {
    if (chip.profiles[i].id == id) return &chip.profiles[i];
  }
  return nullptr;
}

std::optional<ComputeProfile> compute_profile(const State& state, std::uint32_t gpu,
                                              const GpuInstance& instance, std::uint32_t nvml_enum) {
  static constexpr std::array<std::uint32_t, 9> slices_of = {1, 2, 3, 4, 7,
                                                             8, 6, 1, 7};  // nvml.h; index = enum
  if (nvml_enum >= slices_of.size()) return std::nullopt;
  const MigProfile* of = profile_by_id(state, gpu, instance.profile_id);
  if (of == nullptr) return std::nullopt;
  const std::uint32_t slices = slices_of[nvml_enum];
  if (slices > of->slices || nvml_enum == 8) return std::nullopt;
  ComputeProfile profile{nvml_enum, nvml_enum, slices, of->slices / slices, of->sm};
  if (nvml_enum == 7) {
    // 1c REV1 was seen once: in the 2g of an H100, one instance with the multiprocessors of the double-memory
    // 1g (go-nvml issue 146). Elsewhere it is not known to exist.
    const MigProfile* rev = profile_by_id(state, gpu, 15);
    if (chip_of(state, gpu).mig != MigActivation::immediate || of->slices != 2 || rev == nullptr)
      return std::nullopt;
    profile.max_instances = 1;
    profile.sm = rev->sm;
    return profile;
  }
  if (slices < of->slices) {
    // What a GPU instance of as many slices has: read for 1c of 2g on H100, and exact on A100 (14 a slice).
    // The others on Hopper are assumed, no listing of theirs being known.
    const Chip& chip = chip_of(state, gpu);
    std::uint32_t sm = of->sm * slices / of->slices;
    for (std::uint32_t i = 0; i < chip.profile_count; ++i) {
      if (chip.profiles[i].slices == slices) {
        sm = chip.profiles[i].sm;
        break;
      }
    }
    profile.sm = std::min(sm, of->sm);
  }
  return profile;
}

std::vector<Place> compute_places(const MigProfile& of, const ComputeProfile& profile) {
  std::vector<Place> places;
  for (std::uint32_t start = 0; start + profile.slices <= of.slices; ++start)
    places.push_back({start, profile.slices});
  return places;
}

// ---- GPU instances
std::uint32_t instance_id(const Chip& chip, Place place) {
  // A grid of 4 or 12 slices is the same tree, stretched.
  const std::uint32_t parts = chip.memory_slices / std::max(place.size, 1U);  // 1, 2, 4, 8
  return parts - 1 + place.start / std::max(place.size, 1U);
}

GpuInstance* find(State& state, std::uint32_t gpu, std::uint32_t id) {
  for (GpuInstance& instance : state.gpus[gpu].instances) {
    if (instance.used != 0 && instance.id == id) return &instance;
  }
  return nullptr;
}

const GpuInstance* find(const State& state, std::uint32_t gpu, std::uint32_t id) {
  for (const GpuInstance& instance : state.gpus[gpu].instances) {
    if (instance.used != 0 && instance.id == id) return &instance;
  }
  return nullptr;
}

std::uint32_t capacity(const State& state, std::uint32_t gpu, const MigProfile& profile) {
  const Chip& chip = chip_of(state, gpu);
  const Gpu& g = state.gpus[gpu];
  std::vector<Place> used = taken(g);
  const std::uint32_t of_it = count_of(g, profile.id);
  const std::uint32_t by_profile = profile.max_instances > of_it ? profile.max_instances - of_it : 0;
  const std::uint32_t by_slots = static_cast<std::uint32_t>(max_gpu_instances - used.size());
  const std::uint32_t slices = compute_slices_used(chip, g);
  const std::uint32_t by_slices =
      profile.slices == 0 ? 0
                          : (chip.compute_slices - std::min(slices, chip.compute_slices)) / profile.slices;
  std::uint32_t fit = 0;
  for (std::uint32_t s = 0; s < profile.start_count; ++s) {
    const Place place{profile.starts[s], profile.size};
    if (!is_free(used, place)) continue;
    used.push_back(place);
    ++fit;
  }
  return std::min({fit, by_profile, by_slots, by_slices});
}

Code create(State& state, std::uint32_t gpu, std::uint32_t profile_id, std::optional<Place> place,
            GpuInstance** made) {
  const Chip& chip = chip_of(state, gpu);
  Gpu& g = state.gpus[gpu];
  if (chip.mig == MigActivation::unsupported || g.mig_current == 0) return not_supported;
  const MigProfile* profile = profile_by_id(state, gpu, profile_id);
  if (profile == nullptr) return invalid_argument;
  if (place) {
    const bool legal = place->size == profile->size &&
                       std::find(profile->starts, profile->starts + profile->start_count, place->start) !=
                           profile->starts + profile->start_count;
    if (!legal) return invalid_argument;
  }
  // The first instance partitions the board: no channel may live on it (kmigmgrCreateGPUInstanceCheck_GA100).
  if (taken(g).empty() && process_on(state, gpu)) return in_use;
  if (capacity(state, gpu, *profile) == 0) return insufficient_resources;
  if (place && !is_free(taken(g), *place)) return insufficient_resources;
  if (!place) place = default_place(chip, g, *profile);
  if (!place) return insufficient_resources;
  for (GpuInstance& slot : g.instances) {
    if (slot.used != 0) continue;
    slot = GpuInstance{};
    slot.used = 1;
    slot.id = instance_id(chip, *place);
    slot.profile_id = profile_id;
    slot.start = place->start;
    slot.size = place->size;
    slot.born = ++g.generation;
    *made = &slot;
    return success;
  }
  return insufficient_resources;
}

Code destroy(State& state, std::uint32_t gpu, std::uint32_t id) {
  GpuInstance* instance = find(state, gpu, id);
  if (instance == nullptr) return invalid_argument;
  const bool has_compute = std::any_of(std::begin(instance->compute), std::end(instance->compute),
                                       [](const ComputeInstance& c) { return c.used != 0; });
  if (has_compute || process_on(state, gpu, id)) return in_use;
  *instance = GpuInstance{};
  ++state.gpus[gpu].generation;
  return success;
}

// ---- compute instances
namespace {
std::vector<Place> compute_taken(const GpuInstance& instance) {
  std::vector<Place> places;
  for (const ComputeInstance& compute : instance.compute) {
    if (compute.used != 0) places.push_back({compute.start, compute.size});
  }
  return places;
}

std::uint32_t compute_pairs_left(const State& state, std::uint32_t gpu, const GpuInstance& instance,
                                 const MigProfile& of, const std::vector<Place>& used) {
  std::uint32_t n = 0;
  for (std::uint32_t e = 0; e < 8; ++e) {
    if (const auto profile = compute_profile(state, gpu, instance, e)) {
      for (const Place place : compute_places(of, *profile)) n += is_free(used, place) ? 1U : 0U;
    }
  }
  return n;
}
}  // namespace

std::uint32_t compute_capacity(const State& state, std::uint32_t gpu, const GpuInstance& instance,
                               const ComputeProfile& profile) {
  const MigProfile* of = profile_by_id(state, gpu, instance.profile_id);
  if (of == nullptr) return 0;
  std::vector<Place> used = compute_taken(instance);
  const std::uint32_t slots = static_cast<std::uint32_t>(max_compute_instances - used.size());
  std::uint32_t of_it = 0;
  for (const ComputeInstance& compute : instance.compute)
    of_it += compute.used != 0 && compute.profile == profile.nvml_enum ? 1U : 0U;
  std::uint32_t fit = 0;
  for (const Place place : compute_places(*of, profile)) {
    if (!is_free(used, place)) continue;
    used.push_back(place);
    ++fit;
  }
  return std::min({fit, slots, profile.max_instances - std::min(of_it, profile.max_instances)});
}

Code create_compute(State& state, std::uint32_t gpu, GpuInstance& instance, std::uint32_t profile_enum,
                    std::optional<Place> place, ComputeInstance** made) {
  const MigProfile* of = profile_by_id(state, gpu, instance.profile_id);
  const auto profile = compute_profile(state, gpu, instance, profile_enum);
  if (instance.half_made != 0) return unknown_error;
  if (of == nullptr || !profile) return not_supported;
  const std::vector<Place> used = compute_taken(instance);
  const std::vector<Place> legal = compute_places(*of, *profile);
  if (place && std::find(legal.begin(), legal.end(), *place) == legal.end()) return invalid_argument;
  if (compute_capacity(state, gpu, instance, *profile) == 0) return insufficient_resources;
  if (place && !is_free(used, *place)) return insufficient_resources;
  if (!place) {
    // kmigmgrGetFreeCTSId_IMPL: what leaves the most for others, lowest first.
    std::uint32_t best_left = 0;
    for (const Place candidate : legal) {
      if (!is_free(used, candidate)) continue;
      std::vector<Place> after = used;
      after.push_back(candidate);
      const std::uint32_t left = compute_pairs_left(state, gpu, instance, *of, after);
      if (!place || left > best_left) {
        place = candidate;
        best_left = left;
      }
    }
  }
  if (!place) return insufficient_resources;
  std::uint32_t id = 0;  // the lowest that is free
  while (std::any_of(std::begin(instance.compute), std::end(instance.compute),
                     [&](const ComputeInstance& c) { return c.used != 0 && c.id == id; })) {
    ++id;
  }
  Gpu& g = state.gpus[gpu];
  for (ComputeInstance& slot : instance.compute) {
    if (slot.used != 0) continue;
    slot = ComputeInstance{};
    slot.used = 1;
    slot.id = id;
    slot.profile = profile_enum;
    slot.start = place->start;
    slot.size = place->size;
    slot.uuid.set(device_uuid(g.uuid.view(), instance.id, instance.start + place->start));
    slot.born = ++g.generation;
    *made = &slot;
    return success;
  }
  return insufficient_resources;
}

Code destroy_compute(State& state, std::uint32_t gpu, GpuInstance& instance, std::uint32_t id) {
  for (ComputeInstance& compute : instance.compute) {
    if (compute.used == 0 || compute.id != id) continue;
    if (process_on(state, gpu, instance.id, id)) return in_use;
    compute = ComputeInstance{};
    ++state.gpus[gpu].generation;
    return success;
  }
  return invalid_argument;
}

// ---- what follows from them
std::vector<Device> devices(const State& state, std::uint32_t gpu) {
  std::vector<Device> found;
  if (state.gpus[gpu].mig_current == 0) return found;
  for (const GpuInstance& instance : state.gpus[gpu].instances) {
    if (instance.used == 0 || instance.half_made != 0) continue;
    for (const ComputeInstance& compute : instance.compute) {
      if (compute.used != 0) found.push_back({&instance, &compute});
    }
  }
  std::sort(found.begin(), found.end(), [](const Device& a, const Device& b) {
    return std::pair(a.instance->id, a.compute->id) < std::pair(b.instance->id, b.compute->id);
  });
  return found;
}

std::uint32_t max_devices(const State& state, std::uint32_t gpu) {
  return state.gpus[gpu].mig_current == 0 ? 0 : chip_of(state, gpu).compute_slices;
}

std::string device_uuid(std::string_view gpu_uuid, std::uint32_t gpu_instance, std::uint32_t pipe) {
  std::string message(gpu_uuid);
  message += '\x0b';
  message += "SMC";
  for (const std::uint32_t word : {gpu_instance, pipe}) {
    for (unsigned shift = 0; shift < 32; shift += 8) message += static_cast<char>(word >> shift & 0xffU);
  }
  auto bytes = sha1(message);
  bytes[6] = static_cast<std::uint8_t>((bytes[6] & 0x0fU) | 0x50U);
  bytes[8] = static_cast<std::uint8_t>((bytes[8] & 0x3fU) | 0x80U);
  std::string text = "MIG-";
  for (std::size_t i = 0; i < 16; ++i) {
    text += fmt::format("{:02x}", bytes[i]);
    if (i == 3 || i == 5 || i == 7 || i == 9) text += '-';
  }
  return text;
}

std::uint32_t cap_minor(std::uint32_t gpu_minor, std::uint32_t gpu_instance) {
  return 3 + 135 * gpu_minor + 9 * gpu_instance;
}
std::uint32_t cap_minor(std::uint32_t gpu_minor, std::uint32_t gpu_instance, std::uint32_t compute_instance) {
  return cap_minor(gpu_minor, gpu_instance) + 1 + compute_instance;
}

std::string device_name(const Chip& chip, const GpuInstance& instance, const ComputeInstance& compute) {
  for (std::uint32_t i = 0; i < chip.profile_count; ++i) {
    const MigProfile& profile = chip.profiles[i];
    if (profile.id != instance.profile_id) continue;
    if (compute.size < profile.slices) return fmt::format("{}c.{}", compute.size, profile.name.view());
    return std::string(profile.name.view());
  }
  return "unknown";
}

}  // namespace bulkhead::twin::mig
