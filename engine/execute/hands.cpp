#include "engine/execute/hands.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "edge/process/process.hpp"
#include "edge/sysfs/sysfs.hpp"
#include "edge/systemd/systemd.hpp"
#include "edge/vfio/vfio.hpp"

namespace bulkhead::execute {

namespace fs = std::filesystem;

namespace {

constexpr unsigned unit_deadline_ms = 90'000;  // systemd's own default for a start is 90 s
constexpr unsigned probe_deadline_ms = 15'000;
constexpr std::size_t output_bytes = 4096;  // of a command's output, its end

// The instance at the place of an action, and whether something else lies across it.
struct Found {
  const nvml::GpuInstance* instance = nullptr;
  const nvml::GpuInstance* across = nullptr;
};
Found find(const std::vector<nvml::GpuInstance>& all, unsigned profile_id, mig::Placement place) {
  Found found;
  for (const auto& instance : all) {
    if (instance.profile_id == profile_id && instance.place.start == place.start &&
        instance.place.size == place.size) {
      found.instance = &instance;
    } else if (instance.place.overlaps(place)) {
      found.across = &instance;
    }
  }
  return found;
}

std::string place_words(mig::Placement place) {
  return fmt::format("slices {}-{}", place.start, place.end() - 1);
}

// "3g.40gb+me" has 3; 0 when the name does not say: the driver is asked for the largest then.
unsigned slices_of(std::string_view profile) {
  const auto number = parse_u64(profile.substr(0, profile.find('g')));
  return number && *number <= 64 ? static_cast<unsigned>(*number) : 0;
}

bool answers(unsigned port) {
  const UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return fd && ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
}

Result<std::optional<std::string>> content_of(const fs::path& path) {
  auto text = read_file(path);
  if (text.ok()) return std::optional<std::string>(std::move(*text));
  if (text.error().native() == ENOENT || text.error().native() == ENOTDIR)
    return std::optional<std::string>();
  return std::move(text).error();
}

// Temporary siblings "NAME.PID.new" of writers that were killed.
void sweep(const fs::path& path) {
  const auto names = list_directory(path.parent_path());
  if (!names.ok()) return;
  const std::string stem = path.filename().string() + ".";
  for (const auto& name : *names) {
    if (!name.starts_with(stem) || !name.ends_with(".new")) continue;
    const auto middle = std::string_view(name).substr(
        stem.size(), name.size() - stem.size() - 4 < name.size() ? name.size() - stem.size() - 4 : 0);
    if (parse_u64(middle)) ::unlink((path.parent_path() / name).c_str());
  }
}

}  // namespace

fs::path Hands::below(const std::string& absolute) const {
  return access_.root / fs::path(absolute).relative_path();
}

Result<nvml::Nvml*> Hands::nvml() {
  if (!nvml_) {
    BH_TRY(nvml_, nvml::Nvml::open(access_.nvml_library));
  }
  return nvml_.get();
}

Result<nvml::Device> Hands::device(const Uuid& gpu) {
  BH_TRY(nvml::Nvml * library, nvml());
  if (const auto known = devices_.find(gpu.text); known != devices_.end()) return known->second;
  BH_TRY(const nvml::Device found, library->device(gpu));
  devices_[gpu.text] = found;
  return found;
}

Result<bool> Hands::destroy_as_planned(nvml::Device gpu, const plan::DestroyInstance& a) {
  const auto there = nvml_->instance(gpu, a.gpu_instance);
  if (!there.ok() || there->profile_id != a.profile_id || there->place != a.place) return false;
  std::vector<unsigned> profiles = a.compute_profiles;
  std::sort(profiles.begin(), profiles.end());
  profiles.erase(std::unique(profiles.begin(), profiles.end()), profiles.end());
  for (const unsigned profile : profiles) BH_CHECK(nvml_->destroy_compute_of(gpu, a.gpu_instance, profile));
  Status gone = nvml_->destroy_instance(gpu, a.gpu_instance);
  if (gone.ok()) return true;
  if (gone.error().code() == Errc::in_use) return false;  // perhaps a compute instance made since the plan
  return std::move(gone).error();
}

bool Hands::stands_as_made(nvml::Device gpu, const plan::CreateInstance& a) {
  if (!made_ || made_->gpu != a.gpu) return false;
  const auto there = nvml_->instance(gpu, made_->id);
  if (!there.ok() || there->profile_id != a.profile_id || there->place != a.place) return false;
  std::size_t compute = 0;
  for (const auto& [profile, count] : made_->compute) {
    const auto found = nvml_->compute_count(gpu, made_->id, profile);
    if (!found.ok() || *found != count) return false;
    compute += count;
  }
  return compute == std::max<std::size_t>(1, a.compute_slices.size());
}

// ---- prepare
Result<Json> Hands::prepare(const plan::Action& action) {
  Json detail = Json::object();
  if (std::holds_alternative<plan::SetGovernor>(action)) {
    BH_TRY(const auto policies, sysfs::governors(access_.root));
    for (const auto& policy : policies) detail["policies"][policy.policy] = policy.now;
  }
  if (const auto* file = std::get_if<plan::SetFile>(&action)) {
    // The outermost directory that the write will have to make: undo removes down to it again.
    fs::path missing;
    for (fs::path at = below(file->path).parent_path();
         at.has_relative_path() && ::access(at.c_str(), F_OK) != 0; at = at.parent_path()) {
      missing = at;
    }
    if (!missing.empty()) detail["made_directory"] = missing.string();
    struct stat info {};
    if (::stat(below(file->path).c_str(), &info) == 0)
      detail["mode"] = static_cast<unsigned>(info.st_mode & 07777U);
  }
  return detail;
}

// ---- act
struct Hands::Acting {
  Hands& hands;
  const Json& detail;

  Status operator()(const plan::SetPersistence& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    return hands.nvml_->set_persistence(gpu, a.after);
  }

  Status operator()(const plan::SetMigMode& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    hands.devices_.clear();
    BH_TRY(const auto activation, hands.nvml_->set_mig_mode(gpu, a.after));
    if (activation.in_force || detail.value("reset_owed", false)) return ok_status();
    return Error(Errc::in_use,
                 fmt::format("the driver took the MIG mode but did not put it in force: {}", activation.why),
                 "see who holds the GPU: bulkhead inventory", activation.code);
  }

  Status operator()(const plan::DestroyInstance& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    if (!detail.value("again", false)) {
      BH_TRY(const bool gone, hands.destroy_as_planned(gpu, a));
      if (gone) return ok_status();
    }
    BH_TRY(const auto all, hands.nvml_->instances(gpu, a.profile_id));
    const auto found = find(all, a.profile_id, a.place);
    if (found.instance == nullptr) return ok_status();
    for (const auto& compute : found.instance->compute)
      BH_CHECK(hands.nvml_->destroy_compute(gpu, found.instance->id, compute.id));
    return hands.nvml_->destroy_instance(gpu, found.instance->id);
  }

  Status operator()(const plan::CreateInstance& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    hands.made_.reset();
    std::size_t there = 0;
    unsigned id = 0;
    // Only a recovery may find it there already. Asking costs a driver call a profile; the plan has just
    // asked.
    std::optional<unsigned> present;
    if (detail.value("again", false)) {
      BH_TRY(const auto all, hands.nvml_->instances(gpu));
      if (const auto found = find(all, a.profile_id, a.place); found.instance != nullptr) {
        present = found.instance->id;
        there = found.instance->compute.size();
      }
    }
    if (present) {
      id = *present;
    } else {
      BH_TRY(const auto made, hands.nvml_->create_instance(gpu, a.profile_id, a.place));
      id = made.id;
      if (made.place != a.place) {
        const Status removed = hands.nvml_->destroy_instance(gpu, made.id);
        return Error(Errc::conflict,
                     fmt::format("the driver made it at {} instead{}", place_words(made.place),
                                 removed.ok() ? "; it is destroyed again"
                                              : "; it could not be destroyed: " + removed.error().message()));
      }
    }
    const std::vector<unsigned> wanted =
        a.compute_slices.empty() ? std::vector<unsigned>{0} : a.compute_slices;
    Made made{.gpu = a.gpu, .id = id};
    for (std::size_t i = there; i < wanted.size(); ++i) {
      const unsigned slices = wanted[i] != 0 ? wanted[i] : slices_of(a.profile);
      BH_TRY(const unsigned profile, hands.nvml_->add_compute(gpu, id, slices));
      ++made.compute[profile];
    }
    if (there == 0) hands.made_ = std::move(made);
    return ok_status();
  }

  Status operator()(const plan::CreateCompute& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    BH_TRY(const auto all, hands.nvml_->instances(gpu));
    for (const auto& instance : all) {
      if (instance.id != a.gpu_instance || instance.place.start != a.place.start) continue;
      if (a.remove) {
        for (const auto& compute : instance.compute)
          BH_CHECK(hands.nvml_->destroy_compute(gpu, instance.id, compute.id));
        return ok_status();
      }
      if (!instance.compute.empty()) return ok_status();
      BH_TRY([[maybe_unused]] const auto made, hands.nvml_->create_compute(gpu, instance.id, 0));
      return ok_status();
    }
    return a.remove ? ok_status()
                    : Status(Error(Errc::conflict,
                                   fmt::format("GPU instance {} is no longer there", a.gpu_instance)));
  }

  Status operator()(const plan::SetPowerLimit& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    return hands.nvml_->set_power_limit(gpu, a.after);
  }

  Status operator()(const plan::LockClocks& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    return a.after ? hands.nvml_->lock_clocks(gpu, a.after->low, a.after->high)
                   : hands.nvml_->unlock_clocks(gpu);
  }

  Status operator()(const plan::SetGovernor& a) const {
    BH_TRY(const auto policies, sysfs::governors(hands.access_.root));
    for (const auto& policy : policies) {
      const std::string wanted = hands_wanted(policy.policy, a.after);
      if (policy.now != wanted) BH_CHECK(sysfs::set_governor(hands.access_.root, policy.policy, wanted));
    }
    return ok_status();
  }
  // An undo puts each policy back to its own.
  std::string hands_wanted(const std::string& policy, const std::string& otherwise) const {
    if (detail.contains("restore") && detail["restore"].is_object())
      return detail["restore"].value(policy, otherwise);
    return otherwise;
  }

  Status operator()(const plan::SetUnit& a) const {
    BH_TRY(const auto manager, systemd::Systemd::connect(hands.access_.root));
    if (a.enabled_before != a.enabled_after)
      BH_CHECK(a.enabled_after ? manager->enable(a.unit) : manager->disable(a.unit));
    if (a.active_before != a.active_after) {
      BH_CHECK(a.active_after ? manager->start(a.unit, unit_deadline_ms)
                              : manager->stop(a.unit, unit_deadline_ms));
    }
    if (!a.active_after || !a.probe_port) return ok_status();
    const std::uint64_t deadline = monotonic_ns() + std::uint64_t{probe_deadline_ms} * 1'000'000;
    while (!answers(*a.probe_port)) {
      if (monotonic_ns() > deadline) {
        return Error(Errc::timeout,
                     fmt::format("{} is active, but nothing answers on 127.0.0.1:{} after {} s", a.unit,
                                 *a.probe_port, probe_deadline_ms / 1000),
                     fmt::format("journalctl -u {} -n 20", a.unit));
      }
      ::usleep(50'000);
    }
    return ok_status();
  }

  Status put(const fs::path& path, const std::optional<std::string>& content) const {
    sweep(path);
    if (content) {
      std::error_code failed;
      fs::create_directories(path.parent_path(), failed);
      if (failed) return errno_error("create " + path.parent_path().string(), failed.value());
      return write_file_atomic(path, *content, detail.value("mode", 0644U));
    }
    if (::unlink(path.c_str()) != 0 && errno != ENOENT && errno != ENOTDIR)
      return errno_error("remove " + path.string(), errno);
    if (const UniqueFd directory(::open(path.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        directory)
      ::fsync(directory.get());
    const fs::path made = detail.value("made_directory", std::string());
    // Only empty ones go: rmdir refuses the others.
    for (fs::path at = path.parent_path(); !made.empty() && at.string().size() >= made.string().size();
         at = at.parent_path()) {
      if (::rmdir(at.c_str()) != 0) break;
    }
    return ok_status();
  }

  Status operator()(const plan::SetFile& a) const {
    const fs::path path = hands.below(a.path);
    BH_CHECK(put(path, a.after));
    if (a.then.empty()) return ok_status();
    Status ran = hands.run(a.then);
    if (ran.ok()) return ok_status();
    // The command that makes it count failed: the file alone would count at the next kernel update, unseen.
    if (const Status back = put(path, a.before); !back.ok()) {
      return std::move(ran).error().in(
          fmt::format("{} could not be put back ({})", a.path, back.error().message()));
    }
    return ran;
  }

  Status operator()(const plan::LoadModules& a) const {
    for (const auto& module : a.modules) {
      if (vfio::module_is_loaded(hands.access_.root, module) == a.after) continue;
      if (a.after) {
        BH_CHECK(hands.run({"modprobe", module}));
      } else if (const Status gone = hands.run({"modprobe", "-r", module}); !gone.ok()) {
        // Somebody else may use it by now; loaded and idle it does no harm.
        continue;
      }
    }
    return ok_status();
  }

  Status operator()(const plan::SetVirtualFunctions& a) const {
    return vfio::set_virtual_functions(hands.access_.root, a.physical, a.after, a.autoprobe_after);
  }

  Status operator()(const plan::SetDriver& a) const {
    BH_TRY(const auto address, hands.address_of(a.target));
    const bool to_host = a.after.driver_override != passthrough::vfio_driver;
    if (a.replug && address && (to_host || !vfio::is_there(hands.access_.root, *address))) {
      hands.proved_.erase(a.target);
      hands.close_driver();
      BH_CHECK(vfio::replug(hands.access_.root, *address));
    }
    if (!address || !vfio::is_there(hands.access_.root, *address)) {
      if (a.after.driver_override.empty()) return ok_status();  // gone, and what was done to it with it
      return Error(Errc::gone, fmt::format("{} is not there", passthrough::str(a.target)),
                   "bring it back: echo 1 > /sys/bus/pci/rescan");
    }
    hands.proved_.erase(a.target);
    hands.close_driver();
    // The undo of a reclaim has no step that loads them, and another boot may lie between.
    if (a.after.driver == passthrough::vfio_driver) {
      for (const auto module : passthrough::vfio_modules) {
        if (!vfio::module_is_loaded(hands.access_.root, module))
          BH_CHECK(hands.run({"modprobe", std::string(module)}));
      }
    }
    Status set = vfio::set_binding(hands.access_.root, *address, a.after);
    // No driver takes a dead device: unbound, it is nobody's, and must not stand in the way of all the rest.
    if (!set.ok() && to_host && set.error().code() == Errc::gone && set.error().native() == ENXIO)
      return ok_status();
    return set;
  }

  Status operator()(const plan::SetPermission& a) const {
    BH_TRY(const auto address, hands.address_of(a.target));
    if (!address) return ok_status();
    Status set = vfio::set_permission(hands.access_.root, *address, a.after);
    // Without a member on vfio-pci there is no file, so nothing to take back.
    if (!set.ok() && set.error().native() == ENOENT && a.after == passthrough::Permission{})
      return ok_status();
    return set;
  }

  Status operator()(const plan::Prove& a) const {
    hands.proved_.erase(a.target);
    if (a.forget) return ok_status();
    BH_TRY(const auto address, hands.must_be_there(a.target));
    BH_TRY(const auto proof, vfio::prove(hands.access_.root, address));
    hands.proved_[a.target] = !proof.busy && !proof.reset ? "not reset: " + proof.reset_why : std::string();
    return ok_status();
  }
};

void Hands::close_driver() {
  if (!nvml_) return;
  calls_closed_ += nvml_->calls();
  devices_.clear();
  made_.reset();
  nvml_.reset();
}

Result<std::optional<PciAddress>> Hands::address_of(const passthrough::Target& target) const {
  if (!target.vf) return std::optional(target.function);
  return vfio::virtual_function(access_.root, target.function, *target.vf);
}

Result<PciAddress> Hands::must_be_there(const passthrough::Target& target) const {
  BH_TRY(const auto address, address_of(target));
  if (!address) return Error(Errc::gone, fmt::format("{} is not there", passthrough::str(target)));
  return *address;
}

Status Hands::act(const plan::Action& action, const Json& detail) {
  return std::visit(Acting{*this, detail}, action);
}

// ---- inspect
struct Hands::Looking {
  Hands& hands;
  const Json& detail;

  template <class T>
  static Sight of(const T& now, const T& before, const T& after, std::string words) {
    return {.seen = now == after    ? Seen::after
                    : now == before ? Seen::before
                                    : Seen::neither,
            .words = std::move(words)};
  }

  Result<Sight> operator()(const plan::SetPersistence& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    BH_TRY(const bool now, hands.nvml_->persistence(gpu));
    return of(now, a.before, a.after, fmt::format("persistence mode is {}", now ? "on" : "off"));
  }

  Result<Sight> operator()(const plan::SetMigMode& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    BH_TRY(const auto mode, hands.nvml_->mig_mode(gpu));
    const std::string words =
        fmt::format("MIG mode is {}, pending {}", mode.now ? "on" : "off", mode.pending ? "on" : "off");
    if (mode.pending == a.after && (mode.now == a.after || detail.value("reset_owed", false)))
      return Sight{.seen = Seen::after, .words = words};
    if (mode.pending == a.before && (mode.now == a.before || detail.value("reset_owed", false)))
      return Sight{.seen = Seen::before, .words = words};
    return Sight{.seen = Seen::half, .words = words};
  }

  Result<Sight> operator()(const plan::DestroyInstance& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    if (!detail.value("again", false)) {
      const auto there = hands.nvml_->instance(gpu, a.gpu_instance);
      if (!there.ok() && there.error().code() == Errc::not_found)
        return Sight{.seen = Seen::after, .words = fmt::format("gi {} is gone", a.gpu_instance)};
    }
    auto all = hands.nvml_->instances(gpu, listed(a.profile_id));
    if (!all.ok()) return mode_off(gpu, std::move(all).error(), Seen::after);
    const auto found = find(*all, a.profile_id, a.place);
    if (found.instance != nullptr) {
      const bool whole = found.instance->compute.size() >= a.compute_profiles.size();
      return Sight{
          .seen = whole ? Seen::before : Seen::half,
          .words = fmt::format("{} is at {} with {} of {} compute instances", a.profile, place_words(a.place),
                               found.instance->compute.size(), a.compute_profiles.size()),
          .gpu_instance = found.instance->id};
    }
    if (found.across != nullptr)
      return Sight{.seen = Seen::neither,
                   .words = fmt::format("another instance (gi {}) lies there", found.across->id)};
    return Sight{.seen = Seen::after, .words = fmt::format("nothing is at {}", place_words(a.place))};
  }

  Result<Sight> operator()(const plan::CreateInstance& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    if (!detail.value("again", false) && hands.stands_as_made(gpu, a)) {
      return Sight{
          .seen = Seen::after,
          .words = fmt::format("{} is at {} with its compute instances", a.profile, place_words(a.place)),
          .gpu_instance = hands.made_->id};
    }
    auto all = hands.nvml_->instances(gpu, listed(a.profile_id));
    if (!all.ok()) return mode_off(gpu, std::move(all).error(), Seen::before);
    const auto found = find(*all, a.profile_id, a.place);
    if (found.instance != nullptr) {
      const std::size_t wanted = std::max<std::size_t>(1, a.compute_slices.size());
      const std::size_t there = found.instance->compute.size();
      std::vector<unsigned> sizes;
      for (const auto& compute : found.instance->compute) sizes.push_back(compute.place.size);
      std::vector<unsigned> asked = a.compute_slices;
      std::sort(sizes.begin(), sizes.end());
      std::sort(asked.begin(), asked.end());
      const bool right = there == wanted && (asked.empty() || asked.front() == 0 || sizes == asked);
      return Sight{.seen = right            ? Seen::after
                           : there < wanted ? Seen::half
                                            : Seen::neither,
                   .words = fmt::format("{} is at {} with {} of {} compute instances", a.profile,
                                        place_words(a.place), there, wanted),
                   .gpu_instance = found.instance->id};
    }
    if (found.across != nullptr)
      return Sight{.seen = Seen::neither,
                   .words = fmt::format("another instance (gi {}) lies there", found.across->id)};
    return Sight{.seen = Seen::before, .words = fmt::format("nothing is at {}", place_words(a.place))};
  }

  // A step that was planned a moment ago asks for its own profile; a recovery, which must know whether
  // somebody else has put something across the place meanwhile, for all of them.
  std::optional<unsigned> listed(unsigned profile_id) const {
    return detail.value("again", false) ? std::nullopt : std::optional<unsigned>(profile_id);
  }

  // A GPU out of MIG mode refuses to list instances: there are none.
  Result<Sight> mode_off(nvml::Device gpu, Error refused, Seen none) const {
    const auto mode = hands.nvml_->mig_mode(gpu);
    if (mode.ok() && !mode->now) return Sight{.seen = none, .words = "MIG mode is off"};
    return refused;
  }

  Result<Sight> operator()(const plan::CreateCompute& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    auto all = hands.nvml_->instances(gpu);
    if (!all.ok()) return mode_off(gpu, std::move(all).error(), Seen::neither);
    for (const auto& instance : *all) {
      if (instance.id != a.gpu_instance || instance.place.start != a.place.start) continue;
      return Sight{
          .seen = instance.compute.empty() == a.remove ? Seen::after : Seen::before,
          .words = fmt::format("gi {} has {} compute instances", instance.id, instance.compute.size()),
          .gpu_instance = instance.id};
    }
    return Sight{.seen = a.remove ? Seen::after : Seen::neither,
                 .words = fmt::format("gi {} is not there", a.gpu_instance)};
  }

  Result<Sight> operator()(const plan::SetPowerLimit& a) const {
    BH_TRY(const auto gpu, hands.device(a.gpu));
    BH_TRY(const auto now, hands.nvml_->power_limit(gpu));
    return of(now, a.before, a.after, fmt::format("the power limit is {} W", now.count / 1000));
  }

  Result<Sight> operator()(const plan::LockClocks&) const {
    return Sight{.seen = Seen::unknown, .words = "NVML cannot read a clock lock back"};
  }

  Result<Sight> operator()(const plan::SetGovernor& a) const {
    BH_TRY(const auto policies, sysfs::governors(hands.access_.root));
    bool all_after = true;
    bool all_before = true;
    std::string words;
    for (const auto& policy : policies) {
      const std::string after =
          detail.contains("restore") ? detail["restore"].value(policy.policy, a.after) : a.after;
      const std::string before =
          detail.contains("policies") ? detail["policies"].value(policy.policy, a.before) : a.before;
      all_after = all_after && policy.now == after;
      all_before = all_before && policy.now == before;
      if (policy.now != after && words.empty())
        words = fmt::format("{} has the governor '{}'", policy.policy, printable(policy.now, 32));
    }
    return Sight{.seen = all_after    ? Seen::after
                         : all_before ? Seen::before
                                      : Seen::half,
                 .words = words.empty() ? "all policies have it" : words};
  }

  Result<Sight> operator()(const plan::SetUnit& a) const {
    BH_TRY(const auto manager, systemd::Systemd::connect(hands.access_.root));
    BH_TRY(const auto unit, manager->unit(a.unit));
    const bool enabled = unit.file_state == "enabled" || unit.file_state == "enabled-runtime";
    const bool active = unit.active_state == "active";
    // What the step does not change is not its business.
    const bool file_moves = a.enabled_before != a.enabled_after;
    const bool run_moves = a.active_before != a.active_after;
    const bool after =
        (!file_moves || enabled == a.enabled_after) && (!run_moves || active == a.active_after);
    const bool before =
        (!file_moves || enabled == a.enabled_before) && (!run_moves || active == a.active_before);
    return Sight{.seen = after    ? Seen::after
                         : before ? Seen::before
                                  : Seen::half,
                 .words = fmt::format("{} is {}, {}", a.unit, unit.file_state, unit.active_state)};
  }

  Result<Sight> operator()(const plan::SetFile& a) const {
    BH_TRY(const auto now, content_of(hands.below(a.path)));
    return of(
        now, a.before, a.after,
        now ? fmt::format("{} holds {} bytes", a.path, now->size()) : fmt::format("{} is absent", a.path));
  }

  Result<Sight> operator()(const plan::LoadModules& a) const {
    std::size_t loaded = 0;
    for (const auto& module : a.modules) loaded += vfio::module_is_loaded(hands.access_.root, module) ? 1 : 0;
    const std::string words = fmt::format("{} of {} are loaded", loaded, a.modules.size());
    // Unloading is not insisted on.
    if (!a.after) return Sight{.seen = Seen::after, .words = words};
    return Sight{.seen = loaded == a.modules.size() ? Seen::after
                         : loaded == 0              ? Seen::before
                                                    : Seen::half,
                 .words = words};
  }

  Result<Sight> operator()(const plan::SetVirtualFunctions& a) const {
    const auto now = vfio::virtual_functions(hands.access_.root, a.physical);
    if (!now.ok() && now.error().code() == Errc::gone)
      return Sight{.seen = Seen::neither, .words = now.error().message()};
    if (!now.ok()) return now.error();
    const std::string words = fmt::format("{} has {} virtual functions", a.physical.str(), now->count);
    if (now->count == a.after && now->autoprobe == a.autoprobe_after)
      return Sight{.seen = Seen::after, .words = words};
    if (now->count == a.before && now->autoprobe == a.autoprobe_before)
      return Sight{.seen = Seen::before, .words = words};
    const bool half = now->count == a.after || now->count == a.before || now->count == 0;
    return Sight{.seen = half ? Seen::half : Seen::neither, .words = words};
  }

  Result<Sight> operator()(const plan::SetDriver& a) const {
    BH_TRY(const auto address, hands.address_of(a.target));
    if (a.replug && address && !vfio::is_there(hands.access_.root, *address)) {
      // Removed and not found anew yet.
      return Sight{.seen = Seen::half, .words = fmt::format("{} is off the bus", address->str())};
    }
    if (!address || !vfio::is_there(hands.access_.root, *address)) {
      // Its binding is gone with it: what is the host's is reached.
      return Sight{.seen = a.after.driver_override.empty()    ? Seen::after
                           : a.before.driver_override.empty() ? Seen::before
                                                              : Seen::neither,
                   .words = fmt::format("{} is not there", passthrough::str(a.target))};
    }
    BH_TRY(const auto now, vfio::binding(hands.access_.root, *address));
    const auto is = [&](const passthrough::Binding& wanted) {
      const bool driver =
          wanted.driver == "*" ? !now.driver.starts_with("vfio") : now.driver == wanted.driver;
      return driver && now.driver_override == wanted.driver_override;
    };
    const std::string words =
        fmt::format("{} has {}{}", address->str(), now.driver.empty() ? "no driver" : now.driver,
                    now.driver_override.empty() ? "" : ", held to " + now.driver_override);
    // Unbound, and not yet probed again; one that had no driver before has none after.
    if (a.replug && !a.after.driver.empty() && now.driver.empty() && now.driver_override.empty())
      return Sight{.seen = Seen::half, .words = words};
    if (is(a.after)) return Sight{.seen = Seen::after, .words = words};
    if (is(a.before)) return Sight{.seen = Seen::before, .words = words};
    // A dead device that was to go to its driver: without one, it has come as far as it can.
    const auto let_go = [&](const passthrough::Binding& host) {
      return host.driver_override != passthrough::vfio_driver && now.driver.empty() &&
             now.driver_override == host.driver_override;
    };
    if ((let_go(a.after) || let_go(a.before)) && vfio::is_dead(hands.access_.root, *address))
      return Sight{.seen = let_go(a.after) ? Seen::after : Seen::before,
                   .words = fmt::format("{}; {}", words, passthrough::dead_words)};
    const bool known = now.driver.empty() || now.driver == a.before.driver || now.driver == a.after.driver ||
                       a.before.driver == "*" || a.after.driver == "*";
    return Sight{.seen = known ? Seen::half : Seen::neither, .words = words};
  }

  Result<Sight> operator()(const plan::SetPermission& a) const {
    BH_TRY(const auto address, hands.address_of(a.target));
    const auto now = address ? vfio::permission(hands.access_.root, *address, a.after.owner)
                             : Result<passthrough::Permission>(Error(Errc::gone, "", "", ENOENT));
    if (!now.ok()) {  // without a member on vfio-pci there is no file
      return Sight{.seen = a.after == passthrough::Permission{} ? Seen::after : Seen::before,
                   .words = "there is no device file"};
    }
    Sight sight =
        of(*now, a.before, a.after, fmt::format("it is {}'s with mode {:04o}", now->owner, now->mode));
    // Owner and mode are two calls.
    if (sight.seen == Seen::neither && (now->owner == a.before.owner || now->owner == a.after.owner) &&
        (now->mode == a.before.mode || now->mode == a.after.mode))
      sight.seen = Seen::half;
    return sight;
  }

  Result<Sight> operator()(const plan::Prove& a) const {
    if (a.forget) return Sight{.seen = Seen::after, .words = "nothing is proved"};
    const auto proof = hands.proved_.find(a.target);
    if (proof == hands.proved_.end()) return Sight{.seen = Seen::before, .words = "not opened"};
    return Sight{.seen = Seen::after,
                 .words = "opened, mapped and closed" + (proof->second.empty() ? "" : "; " + proof->second),
                 .note = proof->second};
  }
};

Result<Sight> Hands::inspect(const plan::Action& action, const Json& detail) {
  return std::visit(Looking{*this, detail}, action);
}

Status Hands::evict(const inventory::Holder& holder, unsigned grace_ms) {
  return process::terminate(access_.root, holder, grace_ms);
}

// ---- commands
// The
// program is looked for below the root, in the directories a root shell would; the twin's stand-ins learn the
// root from BULKHEAD_ROOT. Its deadline is the step's: the worker is ended, and PDEATHSIG ends the command
// with it.
Status Hands::run(const std::vector<std::string>& command) const {
  const std::string shown = join(command, " ");
  fs::path program;
  for (const char* directory : {"usr/local/sbin", "usr/sbin", "sbin", "usr/bin", "bin"}) {
    const fs::path candidate = access_.root / directory / command.front();
    if (::access(candidate.c_str(), X_OK) == 0) {
      program = candidate;
      break;
    }
  }
  if (program.empty())
    return Error(Errc::not_found, fmt::format("run {}: there is no {} below {}", shown, command.front(),
                                              access_.root.string()));
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("run " + shown, errno);
  const UniqueFd out(ends[0]);
  UniqueFd in(ends[1]);
  const std::string root_variable = "BULKHEAD_ROOT=" + access_.root.string();
  const pid_t parent = ::getpid();
  const pid_t child = ::fork();
  if (child < 0) return errno_error("run " + shown, errno);
  if (child == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(127);
    ::signal(SIGINT, SIG_DFL);
    ::signal(SIGTERM, SIG_DFL);
    ::signal(SIGPIPE, SIG_DFL);
    const int null = ::open("/dev/null", O_RDONLY);
    ::dup2(null, 0);
    ::dup2(in.get(), 1);
    ::dup2(in.get(), 2);
    std::vector<std::string> words = command;
    words.front() = program.string();
    std::vector<char*> argv;
    for (auto& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    std::string path_variable = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    std::string root_copy = root_variable;
    std::string language = "LC_ALL=C.UTF-8";
    char* environment[] = {path_variable.data(), root_copy.data(), language.data(), nullptr};
    ::execve(program.c_str(), argv.data(), environment);
    ::_exit(127);
  }
  in.reset();
  std::string output;
  char block[4096];
  while (true) {
    const ssize_t got = ::read(out.get(), block, sizeof block);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    output.append(block, static_cast<std::size_t>(got));
    if (output.size() > 2 * output_bytes) output.erase(0, output.size() - output_bytes);
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return ok_status();
  if (output.size() > output_bytes) output.erase(0, output.size() - output_bytes);
  std::vector<std::string> lines;
  for (const auto line : split_lines(output)) lines.push_back(printable(line));
  const std::string how = WIFSIGNALED(status) ? fmt::format("killed by signal {}", WTERMSIG(status))
                                              : fmt::format("exit status {}", WEXITSTATUS(status));
  return Error(Errc::io, fmt::format("{}: {}{}{}", shown, how, lines.empty() ? "" : ": ", join(lines, "; ")));
}

}  // namespace bulkhead::execute
