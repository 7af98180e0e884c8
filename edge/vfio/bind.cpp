// Drivers and virtual functions: one write at a time, read back.
#include <fcntl.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "edge/vfio/patient.hpp"
#include "edge/vfio/vfio.hpp"

namespace bulkhead::vfio {

namespace fs = std::filesystem;
using passthrough::Binding;
using passthrough::File;

namespace {

constexpr std::string_view any = "*";
constexpr unsigned answer_wait_ms = 5'000;
constexpr useconds_t pause_usec = 5'000;
constexpr std::uint64_t probe_ns = 10'000'000'000;  // a driver that probes in the background: nvme, nvidia

fs::path device_at(const fs::path& root, const PciAddress& address) {
  return root / "sys/bus/pci/devices" / address.str();
}

// One write(2), as sysfs wants; the errno is a row of the table.
Status write(const fs::path& path, std::string_view text, File file, const std::string& what) {
  const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!fd) return passthrough::refused(file, errno, what);
  const ssize_t put = ::write(fd.get(), text.data(), text.size());
  if (put < 0) return passthrough::refused(file, errno, what);
  return ok_status();
}

Result<unsigned> count_in(const fs::path& path) {
  BH_TRY(const auto text, read_trimmed(path));
  const auto value = parse_u64(text);
  if (!value || *value > 0xffff)
    return Error(Errc::corrupt, fmt::format("{} says '{}'", path.string(), printable(text, 40)));
  return static_cast<unsigned>(*value);
}

bool is_so(const Binding& now, const Binding& wanted) {
  if (now.driver_override != wanted.driver_override) return false;
  if (wanted.driver == any) return !now.driver.starts_with("vfio");
  return now.driver == wanted.driver;
}

// Whether the VFIO group is open: unbinding would then block for as long as it is.
Status not_open(const fs::path& root, const PciAddress& address, const std::string& what) {
  const auto node = group_node(root, address);
  if (!node.ok()) return ok_status();
  const fs::path path = root / fs::path(*node).relative_path();
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (fd || errno != EBUSY) return ok_status();
  return Error(
      Errc::in_use,
      fmt::format("{}: unbind: a virtual machine has {} open; the write would block until it lets go", what,
                  *node),
      fmt::format("see who: fuser -v {}; stop it, then try again", *node), EBUSY);
}

}  // namespace

bool is_dead(const fs::path& root, const PciAddress& address) {
  return answers(root, address, answer_wait_ms) == Answers::all_ones;
}

bool is_there(const fs::path& root, const PciAddress& address) {
  return ::access(device_at(root, address).c_str(), F_OK) == 0;
}

Result<std::string> group_node(const fs::path& root, const PciAddress& address) {
  std::error_code failed;
  const auto target = fs::read_symlink(device_at(root, address) / "iommu_group", failed);
  const std::string number = target.filename().string();
  if (failed || !parse_u64(number))
    return Error(Errc::not_found, fmt::format("{} is in no IOMMU group", address.str()),
                 "bulkhead doctor --for passthrough says why");
  const auto name = read_trimmed(root / "sys/kernel/iommu_groups" / number / "name");
  const bool without = name.ok() && *name == "vfio-noiommu";
  return fmt::format("/dev/vfio/{}{}", without ? "noiommu-" : "", number);
}

std::string device_node(const fs::path& root, const PciAddress& address) {
  const auto names = list_directory(device_at(root, address) / "vfio-dev");
  for (const auto& name : names.value_or({})) {
    if (!name.starts_with("vfio") || !parse_u64(std::string_view(name).substr(4))) continue;
    // The folder is there without CONFIG_VFIO_DEVICE_CDEV too; only with it has the device a number.
    if (::access((device_at(root, address) / "vfio-dev" / name / "dev").c_str(), F_OK) == 0)
      return "/dev/vfio/devices/" + name;
  }
  return {};
}

Result<Binding> binding(const fs::path& root, const PciAddress& address) {
  const fs::path device = device_at(root, address);
  if (!is_there(root, address))
    return Error(Errc::gone, fmt::format("{} is not on the PCI bus", address.str()),
                 "bring it back: echo 1 > /sys/bus/pci/rescan", ENODEV);
  Binding now;
  std::error_code failed;
  const auto driver = fs::read_symlink(device / "driver", failed);
  if (!failed) now.driver = printable(driver.filename().string(), 64);
  BH_TRY(const auto text, read_trimmed(device / "driver_override"));
  if (text != "(null)") now.driver_override = printable(text, 64);
  return now;
}

Status set_binding(const fs::path& root, const PciAddress& address, const Binding& wanted) {
  const fs::path device = device_at(root, address);
  const std::string what = address.str();
  BH_TRY(Binding now, binding(root, address));
  if (is_so(now, wanted)) return ok_status();
  const bool keeps_driver = wanted.driver == any ? !now.driver.empty() && !now.driver.starts_with("vfio")
                                                 : now.driver == wanted.driver;
  if (!keeps_driver && now.driver.starts_with("vfio")) BH_CHECK(not_open(root, address, what));
  const auto override_with = [&](const std::string& driver) {
    // An empty write would change nothing: a line end clears.
    return write(device / "driver_override", driver.empty() ? std::string("\n") : driver,
                 File::driver_override, what);
  };
  // A driver beside an override for another: an override written after its driver was bound. The probe would
  // heed it, so it comes last.
  const bool beside =
      !keeps_driver && !wanted.driver_override.empty() && wanted.driver_override != wanted.driver;
  const std::string first = beside ? std::string() : wanted.driver_override;
  if (now.driver_override != first) BH_CHECK(override_with(first));
  if (!keeps_driver) {
    if (!now.driver.empty()) {
      const Status unbound = write(device / "driver/unbind", what, File::unbind, what);
      // Somebody else may have unbound it meanwhile.
      if (!unbound.ok() && unbound.error().native() != ENODEV && unbound.error().native() != ENOENT)
        return unbound;
    }
    if (!wanted.driver.empty()) {
      BH_CHECK(write(root / "sys/bus/pci/drivers_probe", what, File::drivers_probe, what));
      // The probe says yes with no driver bound, too; and a driver may take a moment.
      const std::uint64_t deadline = monotonic_ns() + (wanted.driver == any ? probe_ns / 100 : probe_ns / 10);
      while (true) {
        BH_TRY(now, binding(root, address));
        if (!now.driver.empty() || monotonic_ns() >= deadline) break;
        ::usleep(pause_usec);
      }
    }
  }
  if (beside) BH_CHECK(override_with(wanted.driver_override));
  BH_TRY(now, binding(root, address));
  if (is_so(now, wanted)) return ok_status();
  if (now.driver.empty() && !wanted.driver.empty()) {
    if (is_dead(root, address))
      return Error(Errc::gone,
                   fmt::format("{}: drivers_probe: no driver took it: {}", what, passthrough::dead_words),
                   std::string(passthrough::dead_mend), ENXIO);
    return passthrough::refused(File::drivers_probe, 0, what);
  }
  if (now.driver_override != wanted.driver_override)
    return passthrough::refused(File::driver_override, 0, what);
  return Error(
      Errc::conflict,
      fmt::format("{}: {} has it, {} was asked for", what, now.driver.empty() ? "no driver" : now.driver,
                  wanted.driver.empty() ? "none" : wanted.driver),
      "see dmesg; another tool may be binding drivers: driverctl list-overrides");
}

Result<VirtualFunctions> virtual_functions(const fs::path& root, const PciAddress& physical) {
  const fs::path device = device_at(root, physical);
  if (!is_there(root, physical))
    return Error(Errc::gone, fmt::format("{} is not on the PCI bus", physical.str()),
                 "bring it back: echo 1 > /sys/bus/pci/rescan", ENODEV);
  VirtualFunctions out;
  BH_TRY(out.total, count_in(device / "sriov_totalvfs"));
  BH_TRY(out.count, count_in(device / "sriov_numvfs"));
  if (const auto probe = count_in(device / "sriov_drivers_autoprobe"); probe.ok())
    out.autoprobe = *probe != 0;
  return out;
}

Result<std::optional<PciAddress>> virtual_function(const fs::path& root, const PciAddress& physical,
                                                   unsigned number) {
  std::error_code failed;
  const auto target = fs::read_symlink(device_at(root, physical) / fmt::format("virtfn{}", number), failed);
  if (failed) return std::optional<PciAddress>();
  BH_TRY(const auto address, PciAddress::parse(target.filename().string()));
  return std::optional(address);
}

Status set_virtual_functions(const fs::path& root, const PciAddress& physical, unsigned count,
                             bool autoprobe) {
  const fs::path device = device_at(root, physical);
  const std::string what = physical.str();
  BH_TRY(const auto now, virtual_functions(root, physical));
  // Written before they are made, so that no driver of the host takes one.
  if (now.autoprobe != autoprobe)
    BH_CHECK(write(device / "sriov_drivers_autoprobe", autoprobe ? "1" : "0", File::sriov_autoprobe, what));
  if (now.count == count) return ok_status();
  for (unsigned i = 0; i < now.count; ++i) {
    BH_TRY(const auto vf, virtual_function(root, physical, i));
    if (!vf) continue;
    BH_TRY(const auto has, binding(root, *vf));
    if (has.driver.starts_with("vfio")) BH_CHECK(not_open(root, *vf, vf->str()));
  }
  const fs::path number = device / "sriov_numvfs";
  if (now.count != 0) BH_CHECK(write(number, "0", File::sriov_numvfs, what));
  if (count != 0) BH_CHECK(write(number, std::to_string(count), File::sriov_numvfs, what));
  BH_TRY(const auto after, virtual_functions(root, physical));
  if (after.count == count) return ok_status();
  return Error(Errc::no_capacity,
               fmt::format("{}: asked for {} virtual functions, {} are there: {}", what, count, after.count,
                           passthrough::cause_of(File::sriov_numvfs, 0)->cause),
               std::string(passthrough::cause_of(File::sriov_numvfs, 0)->mend));
}

// ---- the device file's owner
namespace {

// /etc/passwd below the root; the machine's own name service when the root is its own.
Result<unsigned> user_id(const fs::path& root, const std::string& name) {
  if (const auto number = parse_u64(name); number && *number < 0xffffffffU)
    return static_cast<unsigned>(*number);
  if (name == "root") return 0U;
  const auto text = read_file(root / "etc/passwd", 1U << 20U);
  for (const auto line : split_lines(text.ok() ? std::string_view(*text) : std::string_view())) {
    const auto words = split(line, ':');
    if (words.size() < 3 || words[0] != name) continue;
    if (const auto id = parse_u64(words[2]); id && *id < 0xffffffffU) return static_cast<unsigned>(*id);
  }
  return Error(Errc::not_found, fmt::format("there is no user {}", printable(name, 64)),
               "host.vfio.owner names a user of /etc/passwd");
}

std::string user_name(const fs::path& root, unsigned id) {
  if (id == 0) return "root";
  const auto text = read_file(root / "etc/passwd", 1U << 20U);
  for (const auto line : split_lines(text.ok() ? std::string_view(*text) : std::string_view())) {
    const auto words = split(line, ':');
    if (words.size() > 2 && parse_u64(words[2]) == id) return printable(words[0], 64);
  }
  return std::to_string(id);
}

}  // namespace

Result<passthrough::Permission> permission(const fs::path& root, const PciAddress& address,
                                           std::string_view spelled) {
  BH_TRY(const auto node, group_node(root, address));
  struct stat info {};
  const fs::path path = root / fs::path(node).relative_path();
  if (::stat(path.c_str(), &info) != 0) return errno_error("look at " + node, errno);
  const auto asked =
      spelled.empty() ? Result<unsigned>(Error(Errc::not_found, "")) : user_id(root, std::string(spelled));
  return passthrough::Permission{
      .owner = asked.ok() && *asked == info.st_uid ? std::string(spelled) : user_name(root, info.st_uid),
      .mode = static_cast<unsigned>(info.st_mode & 07777U)};
}

Status set_permission(const fs::path& root, const PciAddress& address,
                      const passthrough::Permission& wanted) {
  BH_TRY(const auto node, group_node(root, address));
  BH_TRY(const unsigned id, user_id(root, wanted.owner));
  std::vector<std::string> nodes = {node};
  if (auto own = device_node(root, address); !own.empty()) nodes.push_back(std::move(own));
  for (const auto& one : nodes) {
    const fs::path path = root / fs::path(one).relative_path();
    if (::chown(path.c_str(), id, static_cast<gid_t>(-1)) != 0)
      return errno_error("give " + one + " away", errno);
    if (::chmod(path.c_str(), wanted.mode) != 0) return errno_error("set the mode of " + one, errno);
  }
  return ok_status();
}

}  // namespace bulkhead::vfio
