// The host reboots: what lives in the driver, in /proc and in /sys is as after a boot; files stay as they
// are.
#include <algorithm>
#include <cstdlib>
#include <system_error>

#include <fcntl.h>
#include <unistd.h>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "twin/control/control.hpp"
#include "twin/mig/mig.hpp"
#include "twin/tree/tree.hpp"

namespace bulkhead::twin {

namespace fs = std::filesystem;

namespace {

// What the boot loader hands over: the kernel and root of now, and the arguments of grub.cfg's first entry.
Result<std::string> next_cmdline(const fs::path& root, std::string_view now) {
  BH_TRY(const auto menu, read_file(root / "boot/grub/grub.cfg"));
  for (const auto line : split_lines(menu)) {
    const auto words = split(trim(line), '\t');
    if (words.size() < 2 || words[0] != "linux") continue;
    std::string out;
    const auto add = [&](std::string_view word) { out += (out.empty() ? "" : " ") + std::string(word); };
    const auto loaders = [](std::string_view word) {
      return word.starts_with("BOOT_IMAGE=") || word.starts_with("root=") || word == "ro";
    };
    for (const auto word : split(now, ' ')) {
      if (loaders(word)) add(word);
    }
    const auto arguments = split(words[1], ' ');
    for (std::size_t i = 1; i < arguments.size(); ++i) {
      if (!arguments[i].empty() && !loaders(arguments[i])) add(arguments[i]);
    }
    return out;
  }
  return Error(Errc::corrupt, "boot/grub/grub.cfg of the twin boots no kernel");
}

bool has_word(std::string_view text, std::string_view word) {
  const auto words = split(text, ' ');
  return std::find(words.begin(), words.end(), word) != words.end();
}

// Attributes are written in place, as the kernel changes them: no rename, programs may hold them open.
Status write_attribute(const fs::path& path, std::string_view value) {
  const std::string line = std::string(value) + "\n";
  std::error_code ignored;
  fs::permissions(path, fs::perms::owner_write, fs::perm_options::add, ignored);
  const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_TRUNC | O_CLOEXEC));
  if (!fd || ::write(fd.get(), line.data(), line.size()) != static_cast<ssize_t>(line.size()))
    return errno_error(fmt::format("write {}", path.string()), errno);
  return ok_status();
}

bool persistence_daemon(const State& state) {
  return std::any_of(std::begin(state.units), std::end(state.units), [](const Unit& unit) {
    return unit.used != 0 && unit.active != 0 && unit.name.view().starts_with("nvidia-persistenced");
  });
}

void boot(State& state, std::string_view boot_id) {
  state.boot_id.set(boot_id);
  state.boot_time_ns =
      static_cast<std::uint64_t>(std::chrono::nanoseconds(wall_now().time_since_epoch()).count());
  state.last_step_host_ns = monotonic_ns();
  state.now_ns = 0;
  for (auto& process : state.processes) process = Process{};
  for (auto& event : state.events) event = Event{};
  for (auto& unit : state.units) {
    if (unit.used == 0) continue;
    unit.active = unit.loaded != 0 && unit.enabled != 0 ? 1 : 0;
    unit.failed = 0;
  }
  const bool persistence = persistence_daemon(state);
  const bool fabric_manager =
      std::any_of(std::begin(state.units), std::end(state.units), [](const Unit& unit) {
        return unit.used != 0 && unit.active != 0 && unit.name.view().starts_with("nvidia-fabricmanager");
      });
  for (std::uint32_t g = 0; g < state.gpu_count; ++g) {
    Gpu& gpu = state.gpus[g];
    const Chip& chip = state.chips[gpu.chip];
    mig::forget(state, g);
    gpu.persistence = persistence ? 1 : 0;
    gpu.power_limit_mw = chip.power_default_mw;
    gpu.clock_lock_low = gpu.clock_lock_high = gpu.memory_lock_low = gpu.memory_lock_high = 0;
    gpu.app_clock_graphics = chip.clock_graphics_max;
    gpu.app_clock_memory = chip.clock_memory[0];
    gpu.compute_mode = gpu.accounting = 0;
    if (gpu.fabric_state != 0) gpu.fabric_state = fabric_manager ? 3 : 1;  // COMPLETED, NOT_STARTED
    gpu.energy_mj = 0;
    gpu.ecc_corrected = gpu.ecc_uncorrected = gpu.remap_pending = 0;
    gpu.ns_power_cap = gpu.ns_sw_thermal = gpu.ns_hw_thermal = gpu.ns_power_brake = gpu.ns_sync_boost = 0;
    gpu.asked_busy = 0;
    gpu.asked_watts = -1;
  }
}

}  // namespace

Status reboot(const fs::path& directory) {
  BH_TRY(auto file, open_twin(directory));
  std::uint64_t seed = 0;
  file->read([&](const State& state) {
    seed = state.seed + std::strtoull(std::string(state.boot_id.view()).c_str(), nullptr, 16);
  });
  // The same machine under another seed: its boot id is the next one, its governor the kernel's default.
  BH_TRY(const auto machine, load_profile_file(directory / "profile.yaml", seed));
  const fs::path root = directory / "root";
  BH_TRY(const auto before, read_trimmed(root / "proc/cmdline"));
  BH_TRY(const auto cmdline, next_cmdline(root, before));

  const bool written = file->write([&](State& state) {
    boot(state, machine.state->boot_id.view());
    return true;
  });
  if (!written)
    return Error(Errc::permission,
                 fmt::format("twin state {} may not be written", (directory / "state.bin").string()));
  BH_CHECK(write_attribute(root / "proc/sys/kernel/random/boot_id", machine.state->boot_id.view()));
  BH_CHECK(write_attribute(root / "proc/cmdline", cmdline));
  const fs::path policies = root / "sys/devices/system/cpu/cpufreq";
  if (const auto names = list_directory(policies); names.ok() && !machine.host.cpu.governor.empty()) {
    for (const auto& name : *names) {
      if (name.starts_with("policy"))
        BH_CHECK(write_attribute(policies / name / "scaling_governor", machine.host.cpu.governor));
    }
  }
  // Of the IOMMU only the groups' default domain follows: identity with iommu=pt, else lazily flushed DMA.
  if (has_word(before, "iommu=pt") != has_word(cmdline, "iommu=pt")) {
    const fs::path groups = root / "sys/kernel/iommu_groups";
    if (const auto names = list_directory(groups); names.ok()) {
      for (const auto& name : *names)
        BH_CHECK(
            write_attribute(groups / name / "type", has_word(cmdline, "iommu=pt") ? "identity" : "DMA-FQ"));
    }
  }
  const std::string line = fmt::format("kernel: [    0.000000] Command line: {}\n", cmdline);
  const UniqueFd log((::open((root / "var/log/kern.log").c_str(), O_WRONLY | O_APPEND | O_CLOEXEC)));
  if (!log || ::write(log.get(), line.data(), line.size()) != static_cast<ssize_t>(line.size()))
    return errno_error("append to the twin's var/log/kern.log", errno);
  Status refreshed = ok_status();
  file->read([&](const State& state) { refreshed = refresh_tree(root, state); });
  return refreshed;
}

}  // namespace bulkhead::twin
