#include "twin/control/control.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <system_error>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "twin/init/init.hpp"
#include "twin/mig/mig.hpp"
#include "twin/physics/physics.hpp"
#include "twin/rm/rm.hpp"
#include "twin/tree/tree.hpp"

namespace bulkhead::twin {

namespace fs = std::filesystem;

namespace {

fs::path base_directory() {
  if (const char* runtime = std::getenv("XDG_RUNTIME_DIR");
      runtime != nullptr && *runtime == '/' && ::access(runtime, W_OK) == 0) {
    return fs::path(runtime) / "bulkhead/twin";
  }
  return ::access("/run", W_OK) == 0 ? "/run/bulkhead/twin" : "/tmp/bulkhead/twin";
}

Result<fs::path> find_library(const fs::path& asked) {
  std::error_code failed;
  if (!asked.empty()) {
    const auto full = fs::absolute(asked, failed);
    if (!fs::exists(full, failed)) return Error(Errc::not_found, fmt::format("no library {}", full.string()));
    return full;
  }
  const fs::path self = fs::read_symlink("/proc/self/exe", failed);
  if (failed) return errno_error("find this program's own path", failed.value());
  for (const auto& candidate : {self.parent_path() / "libnvidia-ml.so.1",
                                self.parent_path() / "../lib/bulkhead/twin/libnvidia-ml.so.1"}) {
    if (fs::exists(candidate, failed)) return fs::weakly_canonical(candidate, failed);
  }
  return Error(Errc::not_found,
               fmt::format("the twin's libnvidia-ml.so.1 lies neither in {} nor in ../lib/bulkhead/twin",
                           self.parent_path().string()),
               "build it (./do build), or name it: bulkhead twin up PROFILE --library FILE");
}

bool is_twin(const fs::path& directory) {
  std::error_code failed;
  return fs::exists(directory / "profile.yaml", failed) &&
         (fs::exists(directory / "state.bin", failed) || fs::exists(directory / "root", failed));
}

// One change under the lock, then the files that follow it while nobody else changes anything.
Status change(const fs::path& directory, const std::function<Status(State&)>& what) {
  BH_TRY(auto file, open_twin(directory));
  Status result = ok_status();
  std::uint64_t first = 0, end = 0;
  const bool written = file->write([&](State& state) {
    physics::follow(state, monotonic_ns());
    first = state.next_event;
    result = what(state);
    end = state.next_event;
    return result.ok();
  });
  if (!result.ok()) return result;
  if (!written)
    return Error(Errc::permission,
                 fmt::format("twin state {} may not be written", (directory / "state.bin").string()));
  file->read([&](const State& state) {
    result = refresh_tree(directory / "root", state);
    for (auto sequence = std::max(first, end > max_events ? end - max_events : 0);
         result.ok() && sequence < end; ++sequence) {
      const Event& event = state.events[sequence % max_events];
      if (event.sequence == sequence) result = log_xid(directory / "root", state, event);
    }
  });
  return result;
}

Status check_gpu(const State& state, std::uint32_t gpu) {
  if (gpu < state.gpu_count) return ok_status();
  return Error(Errc::not_found, fmt::format("no GPU {}: this twin has {}", gpu, state.gpu_count));
}

Event& add_event(State& state, std::uint32_t gpu, std::uint32_t code) {
  Event& event = state.events[state.next_event % max_events];
  event = Event{};
  event.sequence = state.next_event++;
  event.time_ns = state.now_ns;
  event.gpu = gpu;
  event.xid = code;
  event.gpu_instance = event.compute_instance = none;
  return event;
}

}  // namespace

fs::path default_directory(std::string_view name) { return base_directory() / name; }

Result<std::unique_ptr<StateFile>> open_twin(const fs::path& directory) {
  return StateFile::open(directory / "state.bin");
}

Result<fs::path> up(const UpOptions& options) {
  BH_TRY(auto machine, options.profile_file.empty() ? load_profile(options.profile, options.seed)
                                                    : load_profile_file(options.profile_file, options.seed));
  BH_TRY(const auto library, find_library(options.library));
  std::error_code failed;
  const fs::path directory = fs::absolute(
      options.directory.empty() ? default_directory(machine.state->profile.view()) : options.directory,
      failed);
  if (fs::exists(directory / "state.bin", failed)) {
    return Error(Errc::conflict, fmt::format("a twin is already up in {}", directory.string()),
                 fmt::format("bulkhead twin down --dir {}", directory.string()));
  }
  if (fs::exists(directory, failed) && !fs::is_empty(directory, failed) && !is_twin(directory)) {
    return Error(Errc::conflict, fmt::format("{} is not empty and no twin", directory.string()),
                 "choose another: --dir DIR");
  }
  fs::create_directories(directory / "lib", failed);
  if (failed) return errno_error(fmt::format("make directory {}", directory.string()), failed.value());
  // The profile first: it marks the directory as a twin's, so that `down` may clear away what a failure
  // leaves.
  BH_CHECK(write_file_atomic(directory / "profile.yaml", machine.yaml));
  fs::remove_all(directory / "root", failed);
  fs::remove_all(directory / "lost", failed);
  State& state = *machine.state;
  state.realtime = options.realtime ? 1 : 0;
  state.boot_time_ns =
      static_cast<std::uint64_t>(std::chrono::nanoseconds(wall_now().time_since_epoch()).count());
  state.last_step_host_ns = monotonic_ns();
  state.now_ns = 600'000'000'000;  // ten minutes after its boot, as proc/uptime says
  BH_CHECK(make_tree(directory / "root", machine.host, state));
  fs::remove(directory / "lib/libnvidia-ml.so.1", failed);
  fs::create_symlink(library, directory / "lib/libnvidia-ml.so.1", failed);
  if (failed)
    return errno_error(fmt::format("link {}", (directory / "lib/libnvidia-ml.so.1").string()),
                       failed.value());
  // The driver's other libraries lie beside it, where they were built or installed.
  for (const char* name : {"libbulkhead-twin-device.so", "libcuda.so.1"}) {
    fs::remove(directory / "lib" / name, failed);
    const fs::path other = library.parent_path() / name;
    if (!fs::exists(other, failed)) continue;
    fs::create_symlink(other, directory / "lib" / name, failed);
    if (failed)
      return errno_error(fmt::format("link {}", (directory / "lib" / name).string()), failed.value());
  }
  fs::remove(directory / "rm.bin", failed);
  BH_CHECK(StateFile::create(directory / "state.bin", state));
  // The driver's file now, for its users may not make one here.
  BH_CHECK(rm::Driver::open(directory));
  if (options.init) {
    if (auto started = init::start(directory, {.fabric_manager_port = options.fabric_manager_port});
        !started.ok()) {
      static_cast<void>(down(directory));
      return std::move(started).error().in("start the twin's systemd");
    }
  }
  return directory;
}

Status down(const fs::path& directory) {
  if (!is_twin(directory)) {
    return Error(Errc::not_found, fmt::format("{} is no twin", directory.string()),
                 "see: bulkhead twin list");
  }
  BH_CHECK(init::stop(directory));
  std::error_code failed;
  // The state first: whoever holds the library open finds out at its next call, and the profile last, so that
  // a second `down` can finish what an interrupted one began.
  for (const char* part : {"state.bin", "rm.bin", "lib", "lost", "root", "run"}) {
    fs::remove_all(directory / part, failed);
    if (failed) return errno_error(fmt::format("remove {}", (directory / part).string()), failed.value());
  }
  fs::remove_all(directory, failed);
  if (failed) return errno_error(fmt::format("remove {}", directory.string()), failed.value());
  return ok_status();
}

std::vector<Running> running() {
  std::vector<Running> out;
  const auto names = list_directory(base_directory());
  if (!names.ok()) return out;
  for (const auto& name : *names) {
    Running twin{.name = name, .directory = base_directory() / name};
    auto file = open_twin(twin.directory);
    if (!file.ok()) continue;
    (*file)->read([&](const State& state) { twin.profile = state.profile.view(); });
    twin.init_pid = init::running(twin.directory);
    out.push_back(std::move(twin));
  }
  return out;
}

Result<Json> status(const fs::path& directory) {
  BH_TRY(auto file, open_twin(directory));
  // What programs hold, as of now; a twin that may only be read is shown as it was left.
  if (const auto driver = rm::Driver::open(directory); driver.ok()) static_cast<void>((*driver)->follow());
  Json out;
  file->read([&](const State& s) {
    out["directory"] = directory.string();
    out["profile"] = s.profile.view();
    out["driver_version"] = s.driver_version.view();
    out["clock"] = {{"follows_host", s.realtime != 0},
                    {"seconds_since_boot", static_cast<double>(s.now_ns) / 1e9}};
    out["boot_id"] = s.boot_id.view();
    out["gpus"] = Json::array();
    for (std::uint32_t g = 0; g < s.gpu_count; ++g) {
      const Gpu& gpu = s.gpus[g];
      Json row = {{"index", g},
                  {"model", s.chips[gpu.chip].model.view()},
                  {"uuid", gpu.uuid.view()},
                  {"pci", fmt::format("{:04x}:{:02x}:{:02x}.0", gpu.pci_domain, gpu.pci_bus, gpu.pci_device)},
                  {"on_pci", gpu.on_pci != 0},
                  {"in_nvml", gpu.in_nvml != 0},
                  {"mig", {{"current", gpu.mig_current != 0}, {"pending", gpu.mig_pending != 0}}},
                  {"busy", std::round(gpu.busy * 1000) / 1000},
                  {"watts", std::round(gpu.watts * 10) / 10},
                  {"power_limit_watts", gpu.power_limit_mw / 1000.0},
                  {"persistence", gpu.persistence != 0},
                  {"clock_lock_mhz", {gpu.clock_lock_low, gpu.clock_lock_high}},
                  {"temperature_c", std::round(gpu.temperature * 10) / 10},
                  {"sink_temperature_c", std::round(gpu.sink_temperature * 10) / 10},
                  {"graphics_mhz", std::lround(gpu.clock_graphics)},
                  {"clock_event_reasons", gpu.clock_reasons},
                  {"energy_j", std::round(gpu.energy_mj) / 1000}};
      row["instances"] = Json::array();
      for (const auto& gi : gpu.instances) {
        if (gi.used == 0) continue;
        Json instance = {{"id", gi.id},
                         {"profile", gi.profile_id},
                         {"start", gi.start},
                         {"size", gi.size},
                         {"half_made", gi.half_made != 0}};
        instance["compute"] = Json::array();
        for (const auto& ci : gi.compute) {
          if (ci.used != 0)
            instance["compute"].push_back({{"id", ci.id},
                                           {"profile", ci.profile},
                                           {"start", ci.start},
                                           {"size", ci.size},
                                           {"uuid", ci.uuid.view()}});
        }
        row["instances"].push_back(std::move(instance));
      }
      out["gpus"].push_back(std::move(row));
    }
    out["processes"] = Json::array();
    for (const auto& p : s.processes) {
      if (p.used == 0) continue;
      Json row = {{"pid", p.pid},   {"name", printable(p.name.view())},
                  {"gpu", p.gpu},   {"memory_bytes", p.memory_bytes},
                  {"busy", p.busy}, {"simulated", p.start_time == 0}};
      if (p.gpu_instance != none) row["gpu_instance"] = p.gpu_instance;
      if (p.compute_instance != none) row["compute_instance"] = p.compute_instance;
      out["processes"].push_back(std::move(row));
    }
    out["faults"] = Json::array();
    for (const auto& f : s.faults) {
      if (f.kind == FaultKind::nothing) continue;
      Json row = {{"kind", static_cast<unsigned>(f.kind)}};
      for (const auto& known : fault_names()) {
        if (static_cast<std::size_t>(&known - fault_names().data()) + 1 == static_cast<std::size_t>(f.kind))
          row["kind"] = known.name;
      }
      if (f.gpu != none) row["gpu"] = f.gpu;
      if (!f.function.view().empty()) row["function"] = f.function.view();
      if (f.remaining != none) row["remaining"] = f.remaining;
      out["faults"].push_back(std::move(row));
    }
    out["units"] = Json::array();
    for (const auto& u : s.units) {
      if (u.used != 0)
        out["units"].push_back({{"name", u.name.view()},
                                {"loaded", u.loaded != 0},
                                {"enabled", u.enabled != 0},
                                {"active", u.active != 0}});
    }
  });
  out["init_pid"] = init::running(directory);
  return out;
}

Status step(const fs::path& directory, std::uint64_t nanoseconds) {
  BH_CHECK(change(directory, [&](State& state) -> Status {
    physics::step(state, nanoseconds);
    return ok_status();
  }));
  BH_TRY(const auto driver, rm::Driver::open(directory));
  return driver->follow();
}

Status load(const fs::path& directory, std::uint32_t gpu, const Load& wanted) {
  if (wanted.busy && !(*wanted.busy >= 0 && *wanted.busy <= 1))
    return Error(Errc::invalid, "busy is a share from 0 to 1");
  if (wanted.watts && !(*wanted.watts >= 0 && *wanted.watts <= 2000))
    return Error(Errc::invalid, "watts is a power from 0 to 2000");
  if (wanted.inlet && !(*wanted.inlet >= -20 && *wanted.inlet <= 120))
    return Error(Errc::invalid, "the inlet is a temperature from -20 to 120 C");
  return change(directory, [&](State& state) -> Status {
    BH_CHECK(check_gpu(state, gpu));
    if (wanted.inlet) state.gpus[gpu].inlet = *wanted.inlet;
    if (wanted.inlet && !wanted.busy && !wanted.watts) return ok_status();
    state.gpus[gpu].asked_busy = wanted.busy.value_or(0);
    state.gpus[gpu].asked_watts = wanted.watts.value_or(-1);
    return ok_status();
  });
}

Result<std::uint32_t> attach(const fs::path& directory, const Attach& wanted) {
  Process process{};
  process.used = 1;
  process.gpu = wanted.gpu;
  process.gpu_instance = wanted.gpu_instance;
  process.compute_instance = wanted.compute_instance;
  process.graphics = wanted.graphics ? 1 : 0;
  process.memory_bytes = wanted.memory_bytes;
  process.busy = std::clamp(wanted.busy, 0.0, 1.0);
  std::string name = wanted.name;
  if (wanted.pid) {
    process.pid = *wanted.pid;
    auto stat = read_file(fmt::format("/proc/{}/stat", *wanted.pid));
    if (!stat.ok()) return Error(Errc::not_found, fmt::format("no process {}", *wanted.pid));
    // "pid (comm) S ppid ...": the name may contain anything, so fields are counted from its last
    // parenthesis.
    const auto open = stat->find('('), close = stat->rfind(')');
    if (open == std::string::npos || close == std::string::npos)
      return Error(Errc::corrupt, fmt::format("/proc/{}/stat is unreadable", *wanted.pid));
    if (name.empty()) name = stat->substr(open + 1, close - open - 1);
    const auto fields = split(std::string_view(*stat).substr(close + 2), ' ');
    if (fields.size() > 19) process.start_time = parse_u64(fields[19]).value_or(0);
    if (process.start_time == 0) process.start_time = 1;
  }
  process.name.set(name.empty() ? "python3" : name);
  std::uint32_t pid = process.pid;
  auto changed = change(directory, [&](State& state) -> Status {
    BH_CHECK(check_gpu(state, wanted.gpu));
    const Gpu& gpu = state.gpus[wanted.gpu];
    if (gpu.mig_current != 0) {
      if (wanted.gpu_instance == none || wanted.compute_instance == none) {
        return Error(Errc::invalid,
                     fmt::format("GPU {} is in MIG mode: a process runs on a compute instance", wanted.gpu),
                     "name it: GPU:GI:CI");
      }
      const auto found =
          std::any_of(std::begin(gpu.instances), std::end(gpu.instances), [&](const GpuInstance& gi) {
            return gi.used != 0 && gi.id == wanted.gpu_instance &&
                   std::any_of(std::begin(gi.compute), std::end(gi.compute), [&](const ComputeInstance& ci) {
                     return ci.used != 0 && ci.id == wanted.compute_instance;
                   });
          });
      if (!found)
        return Error(Errc::not_found, fmt::format("GPU {} has no compute instance {}:{}", wanted.gpu,
                                                  wanted.gpu_instance, wanted.compute_instance));
    } else if (wanted.gpu_instance != none) {
      return Error(Errc::invalid, fmt::format("GPU {} is not in MIG mode", wanted.gpu));
    }
    if (pid == 0) {
      // Numbers that no process of this machine has: above the kernel's highest, so that nobody signals a
      // stranger.
      pid = 4194305;
      for (const auto& other : state.processes) {
        if (other.used != 0 && other.pid >= pid) pid = other.pid + 1;
      }
      process.pid = pid;
    }
    for (auto& slot : state.processes) {
      if (slot.used != 0) continue;
      slot = process;
      return ok_status();
    }
    return Error(Errc::no_capacity, fmt::format("at most {} processes", max_processes));
  });
  if (!changed.ok()) return std::move(changed).error();
  return pid;
}

Status detach(const fs::path& directory, std::optional<std::uint32_t> pid) {
  return change(directory, [&](State& state) -> Status {
    bool found = !pid;
    for (auto& slot : state.processes) {
      if (slot.used == 0 || (pid && slot.pid != *pid)) continue;
      slot = Process{};
      found = true;
    }
    if (!found) return Error(Errc::not_found, fmt::format("process {} is attached to no GPU", *pid));
    return ok_status();
  });
}

Status xid(const fs::path& directory, std::uint32_t gpu, std::uint32_t code,
           std::optional<std::uint32_t> pid) {
  return change(directory, [&](State& state) -> Status {
    BH_CHECK(check_gpu(state, gpu));
    const Process* culprit = nullptr;
    for (const auto& process : state.processes) {
      if (pid && process.used != 0 && process.gpu == gpu && process.pid == *pid) culprit = &process;
    }
    if (pid && culprit == nullptr)
      return Error(Errc::not_found, fmt::format("process {} is not on GPU {}", *pid, gpu));
    Event& event = add_event(state, gpu, code);
    if (culprit != nullptr) {
      event.pid = culprit->pid;
      event.process = culprit->name;
      event.gpu_instance = culprit->gpu_instance;
      event.compute_instance = culprit->compute_instance;
    }
    return ok_status();
  });
}

Status reset(const fs::path& directory, std::uint32_t gpu) {
  return change(directory, [&](State& state) -> Status {
    BH_CHECK(check_gpu(state, gpu));
    Gpu& g = state.gpus[gpu];
    if (g.on_pci == 0 || g.in_nvml == 0) return Error(Errc::gone, fmt::format("GPU {} is lost", gpu));
    if (mig::process_on(state, gpu, none, none))
      return Error(Errc::in_use,
                   fmt::format("GPU {} is currently being used by one or more other processes", gpu));
    mig::reset(state, gpu);
    g.ecc_corrected = g.ecc_uncorrected = g.remap_pending = 0;
    return ok_status();
  });
}

const std::vector<FaultName>& fault_names() {
  // In the order of FaultKind, from fail_call on; `ecc` is not remembered as a fault, it happens.
  static const std::vector<FaultName> names = {
      {"fail-call", "an NVML function answers --code instead of working"},
      {"hang-call", "an NVML function answers after --delay-ms (default: a day)"},
      {"kill-before", "the process that calls an NVML function dies before the call acts"},
      {"kill-after", "the process that calls an NVML function dies after it acted"},
      {"slow-destroy", "destroying instances takes --delay-ms (default 5000)"},
      {"half-made-gi", "the next GPU instance is made half: it refuses everything but its destruction"},
      {"lost-from-nvml", "the GPU is gone from NVML and still on PCI"},
      {"off-the-bus", "the GPU fell off the bus: XID 79, its configuration space reads all ones"},
      {"fabric-lost", "the Fabric Manager is gone and the fabric with it"},
      {"no-systemd", "systemd does not answer"},
      {"ignores-slices", "the driver accepts time slices and runs its own"},
      {"ignores-disable", "the driver accepts taking channels off the GPU and leaves them on"},
      {"failed-fan",
       "a fan stands still: the board's sink loses less than half of its heat, and hwmon shows it"},
      {"power-brake", "the rack or a supply holds the board down: half the clock, the brake's counter runs"},
      {"sagging-rail", "hwmon shows 11.2 V on the 12 V rail"},
      {"link-errors", "NVLink carries 16 GB/s, and --count of a million flits arrive damaged"},
      {"other-clients", "MIG mode stays pending while another process has NVML open, as on a board"},
      {"computes-wrong", "multiprocessor --count gives results with one bit wrong, and no log says so"},
      {"ecc", "--count uncorrectable memory errors: XID 48"},
  };
  return names;
}

namespace {
// What the kernel's hwmon would show of the host's fans and rails (Documentation/hwmon/sysfs-interface.rst).
Status write_sensors(const fs::path& directory) {
  bool still = false, sags = false;
  BH_CHECK(change(directory, [&](State& state) -> Status {
    for (const auto& fault : state.faults) {
      still = still || fault.kind == FaultKind::failed_fan;
      sags = sags || fault.kind == FaultKind::sagging_rail;
    }
    return ok_status();
  }));
  const fs::path chip = directory / "root/sys/class/hwmon/hwmon0";
  std::error_code failed;
  fs::create_directories(chip, failed);
  const std::pair<const char*, std::string> files[] = {
      {"name", "twin"},     {"fan1_label", "SYS_FAN1"}, {"fan1_input", "9120"},
      {"fan1_min", "2000"}, {"fan2_label", "SYS_FAN2"}, {"fan2_input", still ? "0" : "9080"},
      {"fan2_min", "2000"}, {"in1_label", "P12V"},      {"in1_input", sags ? "11200" : "12080"},
      {"in1_min", "11400"}};
  for (const auto& [name, text] : files) BH_CHECK(write_file_atomic(chip / name, text + "\n"));
  return ok_status();
}
bool is_sensor(FaultKind kind) { return kind == FaultKind::failed_fan || kind == FaultKind::sagging_rail; }
}  // namespace

Status break_it(const fs::path& directory, const FaultRequest& request) {
  const auto& names = fault_names();
  const auto found =
      std::find_if(names.begin(), names.end(), [&](const FaultName& f) { return f.name == request.name; });
  if (found == names.end()) {
    std::vector<std::string_view> known;
    for (const auto& f : names) known.push_back(f.name);
    const auto meant = closest(request.name, known);
    return Error(Errc::invalid, fmt::format("no fault {}", printable(request.name)),
                 meant.empty() ? "see: bulkhead twin break --list" : fmt::format("did you mean {}?", meant));
  }
  const bool ecc = request.name == "ecc";
  const auto kind = static_cast<FaultKind>(found - names.begin() + 1);
  const bool wants_function = kind >= FaultKind::fail_call && kind <= FaultKind::kill_after;
  if (wants_function && !request.function.starts_with("nvml")) {
    return Error(Errc::invalid, fmt::format("{} needs the NVML function it is about", request.name),
                 "--function nvmlDeviceCreateGpuInstanceWithPlacement");
  }
  const bool wants_gpu = kind == FaultKind::lost_from_nvml || kind == FaultKind::off_the_bus || ecc;
  auto changed = change(directory, [&](State& state) -> Status {
    if (wants_gpu || request.gpu != none) BH_CHECK(check_gpu(state, request.gpu));
    if (ecc) {
      Gpu& gpu = state.gpus[request.gpu];
      gpu.ecc_uncorrected += request.count;
      gpu.ecc_uncorrected_total += request.count;
      gpu.remapped_uncorrectable += 1;
      gpu.remap_pending = 1;
      add_event(state, request.gpu, 48);
      add_event(state, request.gpu, 63);
      return ok_status();
    }
    Fault* slot = nullptr;
    for (auto& fault : state.faults) {
      if (fault.kind == FaultKind::nothing && slot == nullptr) slot = &fault;
    }
    if (slot == nullptr)
      return Error(Errc::no_capacity, fmt::format("at most {} faults at a time", max_faults),
                   "bulkhead twin mend");
    *slot = Fault{};
    slot->kind = kind;
    slot->gpu = request.gpu;
    slot->function.set(request.function);
    slot->code = kind == FaultKind::link_errors || kind == FaultKind::computes_wrong
                     ? static_cast<std::int32_t>(std::min<std::uint64_t>(request.count, 1'000'000))
                     : request.code;
    slot->remaining = request.times;
    slot->delay_ms = request.delay_ms != 0          ? request.delay_ms
                     : kind == FaultKind::hang_call ? 86400000
                                                    : 5000;
    switch (kind) {
      case FaultKind::lost_from_nvml:
        state.gpus[request.gpu].in_nvml = 0;
        break;
      case FaultKind::off_the_bus:
        state.gpus[request.gpu].on_pci = 0;
        add_event(state, request.gpu, 79);
        break;
      case FaultKind::fabric_lost:
        for (std::uint32_t g = 0; g < state.gpu_count; ++g) {
          if (state.gpus[g].fabric_state != 0 && (request.gpu == none || request.gpu == g))
            state.gpus[g].fabric_state = 1;  // NOT_STARTED
        }
        for (auto& unit : state.units) {
          if (unit.used != 0 && unit.name.view().starts_with("nvidia-fabricmanager")) {
            unit.active = 0;
            unit.failed = 1;
          }
        }
        break;
      default:
        break;
    }
    return ok_status();
  });
  if (!changed.ok()) return std::move(changed).error();
  if (kind == FaultKind::no_systemd && !ecc) return init::stop(directory);
  if (is_sensor(kind) && !ecc) return write_sensors(directory);
  return ok_status();
}

Status mend(const fs::path& directory, const std::string& name, std::uint32_t gpu) {
  const auto& names = fault_names();
  FaultKind kind = FaultKind::nothing;
  if (!name.empty()) {
    const auto found =
        std::find_if(names.begin(), names.end(), [&](const FaultName& f) { return f.name == name; });
    if (found == names.end())
      return Error(Errc::invalid, fmt::format("no fault {}", printable(name)),
                   "see: bulkhead twin break --list");
    kind = static_cast<FaultKind>(found - names.begin() + 1);
  }
  const bool ecc = name.empty() || name == "ecc";
  bool systemd_back = false, sensors_back = false;
  auto changed = change(directory, [&](State& state) -> Status {
    for (auto& fault : state.faults) {
      if (fault.kind == FaultKind::nothing || (!name.empty() && fault.kind != kind) ||
          (gpu != none && fault.gpu != gpu))
        continue;
      const auto each = [&](auto&& act) {
        for (std::uint32_t g = 0; g < state.gpu_count; ++g) {
          if (fault.gpu == none || fault.gpu == g) act(state.gpus[g]);
        }
      };
      switch (fault.kind) {
        case FaultKind::lost_from_nvml:
          each([](Gpu& g) { g.in_nvml = 1; });
          break;
        case FaultKind::off_the_bus:
          each([](Gpu& g) {
            if (g.on_pci == 0) ++g.generation;
            g.on_pci = 1;
          });
          break;
        case FaultKind::fabric_lost:
          each([](Gpu& g) {
            if (g.fabric_state != 0) g.fabric_state = 3;  // COMPLETED
          });
          for (auto& unit : state.units) {
            if (unit.used != 0 && unit.loaded != 0 && unit.name.view().starts_with("nvidia-fabricmanager")) {
              unit.active = 1;
              unit.failed = 0;
            }
          }
          break;
        case FaultKind::half_made_gi:
          each([](Gpu& g) {
            for (auto& gi : g.instances) gi.half_made = 0;
          });
          break;
        case FaultKind::no_systemd:
          systemd_back = true;
          break;
        default:
          break;
      }
      sensors_back = sensors_back || is_sensor(fault.kind);
      fault = Fault{};
    }
    for (std::uint32_t g = 0; ecc && g < state.gpu_count; ++g) {
      if (gpu != none && gpu != g) continue;
      // As after a reset: volatile counters start anew, the remapping is done.
      state.gpus[g].ecc_corrected = state.gpus[g].ecc_uncorrected = state.gpus[g].remap_pending = 0;
    }
    return ok_status();
  });
  if (!changed.ok()) return std::move(changed).error();
  if (sensors_back) BH_CHECK(write_sensors(directory));
  if (systemd_back) return init::start(directory);
  return ok_status();
}

}  // namespace bulkhead::twin
