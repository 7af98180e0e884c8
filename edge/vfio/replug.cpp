// Off the bus and on again.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "edge/vfio/vfio.hpp"

namespace bulkhead::vfio {

namespace fs = std::filesystem;
using passthrough::File;

namespace {

constexpr useconds_t pause_usec = 5'000;
constexpr std::uint64_t wait_ns = 10'000'000'000;

Status write_one(const fs::path& path, File file, const std::string& what) {
  const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!fd || ::write(fd.get(), "1", 1) != 1) return passthrough::refused(file, errno, what);
  return ok_status();
}

bool becomes(const fs::path& root, const PciAddress& address, bool there) {
  const std::uint64_t deadline = monotonic_ns() + wait_ns;
  while (is_there(root, address) != there) {
    if (monotonic_ns() >= deadline) return false;
    ::usleep(pause_usec);
  }
  return true;
}

}  // namespace

Status replug(const fs::path& root, const PciAddress& address) {
  const std::string what = address.str();
  if (is_there(root, address)) {
    // A device that has virtual functions takes them along, and their drivers with them.
    if (const auto now = virtual_functions(root, address); now.ok() && now->count > 0)
      return Error(Errc::conflict, fmt::format("{}: remove: it has {} virtual functions", what, now->count),
                   "take them away first: bulkhead reclaim " + what);
    // Without a driver the removal cannot block on one: what blocks is the unbind, which has its own answers.
    BH_CHECK(set_binding(root, address, {}));
    BH_CHECK(write_one(root / "sys/bus/pci/devices" / what / "remove", File::remove, what));
    if (!becomes(root, address, false))
      return Error(Errc::timeout, fmt::format("{}: remove: it is still on the bus", what), "see dmesg");
  }
  BH_CHECK(write_one(root / "sys/bus/pci/rescan", File::rescan, what));
  if (!becomes(root, address, true)) {
    const Error said = passthrough::refused(File::rescan, 0, what);
    return Error(Errc::gone, said.message(), said.hint());
  }
  return ok_status();
}

}  // namespace bulkhead::vfio
