// The part of the tree that follows the State. Linked into libnvidia-ml.so.1: nothing here but files.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <set>
#include <system_error>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "twin/tree/tree.hpp"

namespace bulkhead::twin {

namespace {

namespace fs = std::filesystem;

bool is_there(const fs::path& path) {
  struct stat info {};
  return ::lstat(path.c_str(), &info) == 0;
}

// Puts a file in place by rename: readers see the old one or the new one. Nothing is synced to a disk: procfs
// and sysfs are not on one, and this runs inside NVML calls whose time is measured.
Status replace(const fs::path& path, std::string_view content, unsigned mode) {
  const std::string fresh = fmt::format("{}.{}", path.string(), ::getpid());
  {
    const UniqueFd fd(::open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!fd) return errno_error(fmt::format("create {}", fresh), errno);
    if (::write(fd.get(), content.data(), content.size()) != static_cast<ssize_t>(content.size()) ||
        ::fchmod(fd.get(), mode) != 0) {
      return errno_error(fmt::format("write {}", fresh), errno);
    }
  }
  if (::rename(fresh.c_str(), path.c_str()) != 0) return errno_error(fmt::format("rename {}", fresh), errno);
  return ok_status();
}

// Writes a small file when it is missing; a second process doing the same at the same time writes the same.
Status ensure(const fs::path& path, std::string_view content, unsigned mode) {
  if (is_there(path)) return ok_status();
  std::error_code ignored;
  fs::create_directories(path.parent_path(), ignored);
  return replace(path, content, mode);
}

Status capability(const fs::path& root, const fs::path& access, std::uint32_t minor) {
  BH_CHECK(ensure(
      access, fmt::format("DeviceFileMinor: {}\nDeviceFileMode: 292\nDeviceFileModify: 1\n", minor), 0444));
  return ensure(root / fmt::format("dev/nvidia-caps/nvidia-cap{}", minor), "", 0444);
}

void keep_only(const fs::path& directory, std::string_view prefix, const std::set<std::string>& wanted) {
  const auto names = list_directory(directory);
  if (!names.ok()) return;
  for (const auto& name : *names) {
    std::error_code ignored;
    if (name.starts_with(prefix) && !wanted.contains(name)) fs::remove_all(directory / name, ignored);
  }
}

Status refresh_instances(const fs::path& root, const Gpu& gpu) {
  const fs::path capabilities = root / "proc/driver/nvidia/capabilities";
  const std::string name = fmt::format("gpu{}", gpu.minor);
  if (gpu.mig_current == 0) {
    std::error_code ignored;
    fs::remove_all(capabilities / name, ignored);
    return ok_status();
  }
  const fs::path mig = capabilities / name / "mig";
  std::error_code ignored;
  fs::create_directories(mig, ignored);
  std::set<std::string> instances;
  for (const auto& gi : gpu.instances) {
    if (gi.used == 0 || gi.id > 14) continue;
    const std::string gi_name = fmt::format("gi{}", gi.id);
    const std::uint32_t base = 3 + 135 * gpu.minor + 9 * gi.id;
    instances.insert(gi_name);
    BH_CHECK(capability(root, mig / gi_name / "access", base));
    std::set<std::string> computes;
    for (const auto& ci : gi.compute) {
      if (ci.used == 0 || ci.id > 7) continue;
      computes.insert(fmt::format("ci{}", ci.id));
      BH_CHECK(capability(root, mig / gi_name / fmt::format("ci{}", ci.id) / "access", base + 1 + ci.id));
    }
    keep_only(mig / gi_name, "ci", computes);
  }
  keep_only(mig, "gi", instances);
  return ok_status();
}

// A device that fell off the bus stays in sysfs until somebody removes it; its configuration space reads all
// ones. The sound files wait beside the root for its return.
Status refresh_bus(const fs::path& root, const Gpu& gpu) {
  const std::string address =
      fmt::format("{:04x}:{:02x}:{:02x}.0", gpu.pci_domain, gpu.pci_bus, gpu.pci_device);
  const fs::path device = root / "sys/bus/pci/devices" / address;
  const fs::path kept = root.parent_path() / "lost" / address;
  const bool is_lost = is_there(kept / "config");
  std::error_code failed;
  if (gpu.on_pci == 0 && !is_lost && is_there(device / "config")) {
    fs::create_directories(kept, failed);
    for (const char* file : {"current_link_speed", "current_link_width", "config"}) {
      if (!is_there(device / file)) continue;
      fs::copy_file(device / file, kept / file, fs::copy_options::overwrite_existing, failed);
      if (failed) return errno_error(fmt::format("keep {}", (device / file).string()), failed.value());
    }
    BH_CHECK(replace(device / "config", std::string(4096, '\xff'), 0644));
    BH_CHECK(replace(device / "current_link_speed", "Unknown\n", 0444));
    BH_CHECK(replace(device / "current_link_width", "63\n", 0444));
  } else if (gpu.on_pci != 0 && is_lost) {
    for (const char* file : {"current_link_speed", "current_link_width", "config"}) {
      if (!is_there(kept / file)) continue;
      fs::remove(device / file, failed);
      fs::copy_file(kept / file, device / file, fs::copy_options::overwrite_existing, failed);
      if (failed) return errno_error(fmt::format("restore {}", (device / file).string()), failed.value());
    }
    fs::remove_all(kept, failed);
  }
  return ok_status();
}

// A simulated process has the files of /proc/PID that holders are named by; a real one is linked to its own.
Status refresh_processes(const fs::path& root, const State& state) {
  std::set<std::string> pids;
  for (const auto& process : state.processes) {
    if (process.used == 0) continue;
    const std::string pid = fmt::format("{}", process.pid);
    pids.insert(pid);
    const fs::path path = root / "proc" / pid;
    if (process.start_time != 0) {
      if (!is_there(path) && ::symlink(fmt::format("/proc/{}", pid).c_str(), path.c_str()) != 0 &&
          errno != EEXIST) {
        return errno_error(fmt::format("link {}", path.string()), errno);
      }
      continue;
    }
    const std::string name = printable(process.name.view(), 15);
    BH_CHECK(ensure(path / "comm", name + "\n", 0644));
    BH_CHECK(ensure(path / "cmdline", std::string(process.name.view()) + '\0', 0444));
    BH_CHECK(ensure(path / "cgroup", fmt::format("0::/system.slice/{}-{}.scope\n", name, pid), 0444));
    BH_CHECK(ensure(
        path / "status",
        fmt::format(
            "Name:\t{}\nState:\tS (sleeping)\nTgid:\t{}\nPid:\t{}\nPPid:\t1\nUid:\t1000\t1000\t1000\t1000\n",
            name, pid, pid),
        0444));
    // Field 22 is the start time; made from the pid, for a simulated process never restarts.
    BH_CHECK(
        ensure(path / "stat",
               fmt::format("{} ({}) S 1 {} {} 0 -1 4194304 0 0 0 0 0 0 0 0 20 0 1 0 {} 0 0 "
                           "18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n",
                           pid, name, pid, pid, 1000 + 100ULL * process.pid),
               0444));
  }
  const auto names = list_directory(root / "proc");
  if (!names.ok()) return ok_status();
  for (const auto& name : *names) {
    std::error_code ignored;
    if (name != "1" && parse_u64(name) && !pids.contains(name)) fs::remove_all(root / "proc" / name, ignored);
  }
  return ok_status();
}

// The table of TCP sockets: Fabric Manager's command port, 6666 as shipped, while its unit is active.
Status refresh_sockets(const fs::path& root, const State& state) {
  std::string table =
      "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
  for (const auto& unit : state.units) {
    if (unit.used == 0 || unit.active == 0 || !unit.name.view().starts_with("nvidia-fabricmanager")) continue;
    table +=
        "   0: 0100007F:1A0A 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 "
        "0000000000000000 100 0 0 10 0\n";
  }
  const fs::path path = root / "proc/net/tcp";
  if (const auto now = read_file(path); now.ok() && *now == table) return ok_status();
  std::error_code ignored;
  fs::create_directories(path.parent_path(), ignored);
  return write_file_atomic(path, table, 0444);
}

// What the driver writes into the kernel log after the XID's header: the texts that log rules look for.
struct XidText {
  std::uint32_t xid;
  const char* text;
};
constexpr XidText xid_texts[] = {
    {13, "Graphics SM Warp Exception on (GPC 0, TPC 0, SM 0): Out Of Range Address"},
    {31,
     "Ch 00000008, intr 10000000. MMU Fault: ENGINE GRAPHICS GPCCLIENT_T1_0 faulted @ 0x7f2c_a4000000. Fault "
     "is of type FAULT_PDE ACCESS_TYPE_VIRT_READ"},
    {43, "Ch 00000008, engmask 00000101"},
    {45, "Preemptive Removal, Ch 00000008"},
    {48, "DBE (double bit error) ECC Error"},
    {63, "Row Remapper: New row marked for remapping, reset gpu to activate."},
    {64, "Row Remapper: Failed to mark row for remapping"},
    {74, "NVLink: fatal error detected on link 0"},
    {79, "GPU has fallen off the bus."},
    {92, "High single bit ECC error rate"},
    {94, "Contained: SM (0x1). RST: No, D-RST: No"},
    {95, "Uncontained: LTC TAG (0x2,0x0). RST: Yes, D-RST: No"},
    {119,
     "Timeout after 45s of waiting for RPC response from GPU0 GSP! Expected function 76 (GSP_RM_CONTROL)"},
    {120, "GSP task exception: 0x5"},
};

}  // namespace

Status refresh_tree(const fs::path& root, const State& state) {
  for (std::uint32_t g = 0; g < state.gpu_count; ++g) {
    BH_CHECK(refresh_instances(root, state.gpus[g]));
    BH_CHECK(refresh_bus(root, state.gpus[g]));
  }
  BH_CHECK(refresh_sockets(root, state));
  return refresh_processes(root, state);
}

Status log_xid(const fs::path& root, const State& state, const Event& event) {
  if (event.gpu >= state.gpu_count) return Error(Errc::invalid, fmt::format("no GPU {}", event.gpu));
  const Gpu& gpu = state.gpus[event.gpu];
  std::string text = "unknown";
  for (const auto& row : xid_texts) {
    if (row.xid == event.xid) text = row.text;
  }
  const std::string holder =
      event.pid == 0 ? std::string("pid='<unknown>', name=<unknown>")
                     : fmt::format("pid={}, name={}", event.pid, printable(event.process.view(), 64));
  std::string where = fmt::format("PCI:{:04x}:{:02x}:{:02x}", gpu.pci_domain, gpu.pci_bus, gpu.pci_device);
  if (event.gpu_instance != none) where += fmt::format(" GPU-I:{:02}", event.gpu_instance);
  const std::string line = fmt::format("NVRM: Xid ({}): {}, {}, {}", where, event.xid, holder, text);
  const auto append = [&](const char* file, const std::string& content) -> Status {
    const auto path = root / file;
    const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640));
    if (!fd) return errno_error(fmt::format("open {}", path.string()), errno);
    if (::write(fd.get(), content.data(), content.size()) != static_cast<ssize_t>(content.size())) {
      return errno_error(fmt::format("append to {}", path.string()), errno);
    }
    return ok_status();
  };
  const double seconds = static_cast<double>(event.time_ns) / 1e9;
  BH_CHECK(append("var/log/kern.log", fmt::format("kernel: [{:12.6f}] {}\n", seconds, line)));
  return append("dev/kmsg", fmt::format("3,{},{},-;{}\n", event.sequence, event.time_ns / 1000, line));
}

}  // namespace bulkhead::twin
