#include "engine/slice/slice.hpp"

#include <algorithm>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/inventory/inventory.hpp"
#include "core/plan/plan.hpp"
#include "core/spec/spec.hpp"
#include "edge/store/store.hpp"
#include "edge/sysfs/sysfs.hpp"
#include "engine/execute/execute.hpp"

namespace bulkhead::slice {

namespace {

using inventory::Gpu;
using inventory::GpuInstance;
using inventory::Host;

std::string words(const Place& place) {
  return fmt::format("{} at {} on {}", printable(place.profile, 40), place.start,
                     printable(place.gpu.text, 64));
}

std::vector<Uuid> gpus_of(std::span<const Place> places) {
  std::set<Uuid> all;
  for (const auto& place : places) all.insert(place.gpu);
  return {all.begin(), all.end()};
}
std::vector<Uuid> gpus_of(const Change& change) {
  std::set<Uuid> all(change.mig_off.begin(), change.mig_off.end());
  for (const auto* places : {&change.destroy, &change.create}) {
    for (const auto& place : *places) all.insert(place.gpu);
  }
  return {all.begin(), all.end()};
}

// A GPU, readable and with MIG; or why not.
Result<const Gpu*> gpu_of(const Host& host, const Uuid& uuid) {
  for (const auto& gpu : host.gpus) {
    if (gpu.uuid != uuid) continue;
    if (!gpu.mig_capable)
      return Error(Errc::unsupported, fmt::format("gpu {} has no MIG: {}", gpu.index, gpu.mig_why));
    if (!gpu.mig_why.empty()) {
      return Error(Errc::unavailable,
                   fmt::format("gpu {}: its MIG state cannot be read: {}", gpu.index, gpu.mig_why),
                   "bulkhead doctor --for mig");
    }
    return &gpu;
  }
  std::string why = fmt::format("the driver shows no {}", printable(uuid.text, 64));
  for (const auto& note : host.notes) {
    if (note.starts_with("NVML") || note.starts_with("GPU ")) why += "; " + note;
  }
  return Error(Errc::not_found, std::move(why), "bulkhead inventory lists the GPUs");
}

Result<const mig::Profile*> profile_of(const Gpu& gpu, const Place& place) {
  const auto* profile = gpu.geometry.by_name(place.profile);
  if (profile == nullptr ||
      std::find(profile->starts.begin(), profile->starts.end(), place.start) == profile->starts.end()) {
    return Error(Errc::not_found,
                 profile == nullptr
                     ? fmt::format("gpu {} has no MIG profile {}", gpu.index, printable(place.profile, 40))
                     : fmt::format("gpu {}: a {} cannot start at memory slice {}", gpu.index, profile->name,
                                   place.start),
                 fmt::format("bulkhead inventory --gpu {}", gpu.index));
  }
  return profile;
}

const GpuInstance* find(const Gpu& gpu, const mig::Profile& profile, unsigned start) {
  for (const auto& instance : gpu.instances) {
    if (instance.profile == profile.id && instance.place.start == start) return &instance;
  }
  return nullptr;
}

std::string who_holds(const std::vector<inventory::Holder>& holders) {
  std::vector<std::string> who;
  for (const auto& holder : holders) {
    if (who.size() == 4) {
      who.push_back(fmt::format("{} more", holders.size() - 4));
      break;
    }
    who.push_back(fmt::format("pid {} ({})", holder.pid, printable(holder.name, 40)));
  }
  return join(who, ", ");
}

// nvml.h, NVML_COMPUTE_INSTANCE_PROFILE_*: the node file's words for them.
std::string compute_word(unsigned profile) {
  static constexpr unsigned slices[] = {1, 2, 3, 4, 7, 8, 6, 1};
  return profile < std::size(slices) ? fmt::format("{}c", slices[profile]) : "1c";
}

// What the GPU's node file would be: every instance of ours that stays, where it is, and the new ones.
Result<spec::GpuRule> rule_for(const Gpu& gpu, const Change& change, const plan::Remembered& remembered) {
  spec::GpuRule rule{.mode = spec::Mode::mig};
  rule.select.uuid = {gpu.uuid};
  // A rule without clocks would let go of a lock that the host's own node file has set.
  for (const auto& lock : remembered.clock_locks) {
    if (lock.gpu == gpu.uuid) rule.clocks = lock.range;
  }
  std::set<const GpuInstance*> going;
  for (const auto& place : change.destroy) {
    if (place.gpu != gpu.uuid) continue;
    BH_TRY(const auto* profile, profile_of(gpu, place));
    const auto* instance = find(gpu, *profile, place.start);
    if (instance == nullptr) continue;
    if (!instance->ours) {
      return Error(Errc::conflict, fmt::format("{} is there, and bulkhead did not make it", words(place)),
                   "let bulkhead have it: bulkhead apply --adopt");
    }
    if (instance->busy())
      return Error(Errc::in_use,
                   fmt::format("{}: in use by {}", words(place), who_holds(instance->holders())));
    going.insert(instance);
  }
  std::vector<mig::Placement> taken;
  for (const auto& instance : gpu.instances) {
    if (going.contains(&instance)) continue;
    taken.push_back(instance.place);
    if (!instance.ours) continue;
    spec::Slice slice{.profile = instance.name, .at = instance.place.start};
    for (const auto& compute : instance.compute) slice.compute.push_back(compute_word(compute.profile));
    rule.layout.push_back(std::move(slice));
  }
  for (const auto& place : change.create) {
    if (place.gpu != gpu.uuid) continue;
    BH_TRY(const auto* profile, profile_of(gpu, place));
    const auto* there = find(gpu, *profile, place.start);
    if (there != nullptr && !going.contains(there)) {
      if (there->busy())
        return Error(Errc::in_use,
                     fmt::format("{}: is there and in use by {}", words(place), who_holds(there->holders())));
      if (there->ours && there->compute.size() <= 1) continue;  // stands already, or is mended by the plan
    }
    const mig::Placement wanted{place.start, profile->size};
    if (std::any_of(taken.begin(), taken.end(), [&](const auto& other) { return other.overlaps(wanted); }))
      return Error(Errc::no_capacity, fmt::format("{}: another instance lies there", words(place)));
    taken.push_back(wanted);
    rule.layout.push_back({.profile = profile->name, .at = place.start});
  }
  return rule;
}

// The rule of a GPU that leaves MIG mode: the plan would take along what still lies there.
Status turn_off(const Gpu& gpu, spec::GpuRule& rule) {
  if (!rule.layout.empty()) {
    return Error(Errc::in_use, fmt::format("gpu {}: MIG mode cannot go off: {} at {} is to stay", gpu.index,
                                           rule.layout.front().profile, rule.layout.front().at.value_or(0)));
  }
  for (const auto& instance : gpu.instances) {
    if (instance.ours) continue;
    return Error(Errc::conflict, fmt::format("gpu {}: MIG mode cannot go off: bulkhead did not make {} at {}",
                                             gpu.index, instance.name, instance.place.start));
  }
  rule.mode = spec::Mode::exclusive;
  return ok_status();
}

Result<execute::Wanted> wanted(const Host& host, const plan::Remembered& remembered, const Change& change) {
  execute::Wanted out;
  for (const auto& uuid : gpus_of(change)) {
    BH_TRY(const Gpu* gpu, gpu_of(host, uuid));
    const bool creates = std::any_of(change.create.begin(), change.create.end(),
                                     [&](const Place& place) { return place.gpu == uuid; });
    // Nothing is there to be destroyed, and the mode is nobody's wish.
    if (!gpu->mig_now && !creates) continue;
    if (!gpu->mig_now && !gpu->holders.empty()) {
      return Error(Errc::in_use, fmt::format("gpu {}: MIG mode can go on only on an idle GPU: in use by {}",
                                             gpu->index, who_holds(gpu->holders)));
    }
    // The mode would count at the next reboot of the virtual machine, the lease now.
    if (!gpu->mig_now && gpu->compute_capability.value_or("").starts_with("8.") &&
        lower(gpu->virtualization.value_or("")).starts_with("pass")) {
      return Error(
          Errc::unsupported,
          fmt::format("gpu {}: in a virtual machine its MIG mode changes only at a reboot", gpu->index),
          "put it into MIG mode with the node file: bulkhead apply");
    }
    BH_TRY(auto rule, rule_for(*gpu, change, remembered));
    if (std::find(change.mig_off.begin(), change.mig_off.end(), uuid) != change.mig_off.end())
      BH_CHECK(turn_off(*gpu, rule));
    out.node.gpus.push_back(std::move(rule));
  }
  out.text = spec::to_yaml(out.node);
  return out;
}

Result<Device> device_of(const Settings& settings, const Host& host,
                         const std::vector<store::OwnedInstance>& owned, const Place& place) {
  BH_TRY(const Gpu* gpu, gpu_of(host, place.gpu));
  if (!gpu->mig_now) return Error(Errc::not_found, fmt::format("{}: MIG mode is off", words(place)));
  BH_TRY(const auto* profile, profile_of(*gpu, place));
  const auto* instance = find(*gpu, *profile, place.start);
  if (instance == nullptr) return Error(Errc::not_found, fmt::format("{}: it is not there", words(place)));
  if (instance->compute.size() != 1) {
    return Error(Errc::not_found, fmt::format("{} has {} compute instances, not one that fills it",
                                              words(place), instance->compute.size()));
  }
  const auto& compute = instance->compute.front();
  if (!compute.uuid)
    return Error(Errc::not_found, fmt::format("{}: {}", words(place), printable(compute.uuid.why, 200)));
  if (!gpu->minor)
    return Error(Errc::unavailable,
                 fmt::format("gpu {}: its device file is not known: {}", gpu->index, gpu->minor.why));
  Device out{.place = place,
             .device = *compute.uuid,
             .gpu_instance = instance->id,
             .compute_instance = compute.id,
             .memory = profile->memory};
  for (const auto& own : owned) {
    if (own.gpu == place.gpu && own.gpu_instance == instance->id && own.profile_id == instance->profile &&
        own.start == place.start)
      out.generation = own.generation;
  }
  const auto& root = settings.access.root;
  BH_TRY(const unsigned gi, sysfs::mig_capability(root, *gpu->minor, instance->id, std::nullopt));
  BH_TRY(const unsigned ci, sysfs::mig_capability(root, *gpu->minor, instance->id, compute.id));
  out.device_nodes = {fmt::format("/dev/nvidia{}", *gpu->minor),
                      "/dev/nvidiactl",
                      "/dev/nvidia-uvm",
                      "/dev/nvidia-uvm-tools",
                      fmt::format("/dev/nvidia-caps/nvidia-cap{}", gi),
                      fmt::format("/dev/nvidia-caps/nvidia-cap{}", ci)};
  return out;
}

Result<std::vector<Device>> devices_of(const Settings& settings, const Host& host,
                                       const std::vector<store::OwnedInstance>& owned,
                                       std::span<const Place> places) {
  std::vector<Device> out;
  for (const auto& place : places) {
    BH_TRY(auto device, device_of(settings, host, owned, place));
    out.push_back(std::move(device));
  }
  return out;
}

// A refusal of the plan, where the checks above saw nothing: who holds it says which.
Error refused(const plan::Refusal& refusal) {
  std::vector<std::string> whys;
  bool held = false;
  for (const auto& reason : refusal.reasons) {
    whys.push_back(fmt::format("{}: {}", reason.subject, reason.why));
    held = held || !reason.holders.empty();
  }
  return Error(held ? Errc::in_use : Errc::no_capacity, join(whys, "; "));
}

}  // namespace

Result<std::vector<Device>> change(const Settings& settings, const Change& change) {
  if (change.destroy.empty() && change.create.empty() && change.mig_off.empty()) return std::vector<Device>{};
  execute::Options options{.access = settings.access,
                           .verb = "lease",
                           .lock_wait_ms = static_cast<unsigned>(settings.lock_wait.count())};
  options.access.only = gpus_of(change);
  bool began = false;
  auto done = execute::alter(options, [&](const Host& host, const plan::Remembered& remembered) {
    began = true;
    return wanted(host, remembered, change);
  });
  if (!done.ok()) {
    // Before the lock is had, "in use" is said of the lock.
    if (!began && done.error().code() == Errc::in_use)
      return Error(Errc::unavailable, done.error().message(), done.error().hint());
    return std::move(done).error();
  }
  const auto& outcome = *done;
  switch (outcome.verdict) {
    case execute::Verdict::nothing_to_do:
    case execute::Verdict::applied:
    case execute::Verdict::differs:
      break;
    case execute::Verdict::refused:
      return refused(*outcome.proposal->refusal());
    default: {
      std::string why = outcome.failure;
      if (!outcome.left.empty()) why += "; could not be taken back: " + join(outcome.left, "; ");
      return Error(outcome.code.value_or(Errc::conflict), std::move(why), outcome.hint);
    }
  }
  if (!outcome.after) return Error(outcome.code.value_or(Errc::io), outcome.failure, outcome.hint);
  if (outcome.verdict == execute::Verdict::differs) {
    return Error(Errc::conflict,
                 "the host reads back otherwise than asked: " + join(outcome.remaining, "; "));
  }
  return devices_of(settings, *outcome.after, outcome.owned, change.create);
}

Result<std::vector<Device>> look(const Settings& settings, std::span<const Place> places) {
  if (places.empty()) return std::vector<Device>{};
  observe::Access access = settings.access;
  access.detail = observe::Detail::brief;
  access.only = gpus_of(places);
  BH_TRY(const Host host, observe::host(access));
  std::vector<store::OwnedInstance> owned;
  auto journal = store::Store::open(access.state_dir, store::Store::Access::read_only);
  if (!journal.ok() && journal.error().code() != Errc::not_found) return std::move(journal).error();
  if (journal.ok() && host.boot_id) {
    BH_TRY(owned, (*journal)->owned(*host.boot_id));
  }
  return devices_of(settings, host, owned, places);
}

}  // namespace bulkhead::slice
