// lab_passthrough give|reclaim|prove|bind|unbind ADDRESS | vfs ADDRESS COUNT | keep ADDRESS COUNT | read:
// core/passthrough's order over edge/vfio's hands, with nothing between them, so that both are held against
// the kernel alone. Prints "deed: ..." for each thing done, "obstacle: ..." for each that stands in the way,
// "error: ..." and "hint: ...". Exit: 0 done, 1 refused, 2 failed.

#include <cstdio>
#include <cstdlib>

#include "edge/vfio/vfio.hpp"

namespace {

using namespace bulkhead;
namespace pt = bulkhead::passthrough;
const std::filesystem::path root = "/";

int fail(const Error& e) {
  std::printf("error: %s\n", e.message().c_str());
  if (!e.hint().empty()) std::printf("hint: %s\n", e.hint().c_str());
  return 2;
}

Status load(const std::vector<std::string>& modules) {
  for (const auto& m : modules) {
    if (std::system(("modprobe " + m).c_str()) != 0)
      return Error(Errc::unavailable, "modprobe " + m + " failed");
  }
  return ok_status();
}

Result<PciAddress> address_of(const pt::Target& target) {
  if (!target.vf) return target.function;
  BH_TRY(const auto address, vfio::virtual_function(root, target.function, *target.vf));
  if (!address) return Error(Errc::not_found, pt::str(target) + " is not made");
  return *address;
}

Status carry_out(const pt::Deed& deed) {
  if (const auto* d = std::get_if<pt::LoadModules>(&deed)) {
    std::printf("deed: load\n");
    return load(d->modules);
  }
  if (const auto* d = std::get_if<pt::SetVirtualFunctions>(&deed)) {
    std::printf("deed: %s: %u virtual functions\n", d->physical.str().c_str(), d->after);
    return vfio::set_virtual_functions(root, d->physical, d->after, d->autoprobe_after);
  }
  if (const auto* d = std::get_if<pt::SetDriver>(&deed)) {
    std::printf("deed: %s: driver %s\n", pt::str(d->target).c_str(), d->after.driver.c_str());
    BH_TRY(const auto address, address_of(d->target));
    return vfio::set_binding(root, address, d->after);
  }
  if (const auto* d = std::get_if<pt::SetPermission>(&deed)) {
    std::printf("deed: %s: permission\n", pt::str(d->target).c_str());
    BH_TRY(const auto address, address_of(d->target));
    return vfio::set_permission(root, address, d->after);
  }
  const auto& d = std::get<pt::Prove>(deed);
  BH_TRY(const auto address, address_of(d.target));
  BH_TRY(const auto proof, vfio::prove(root, address));
  std::printf("deed: %s: proved: %s\n", pt::str(d.target).c_str(), vfio::words(proof).c_str());
  return ok_status();
}

int wish(const pt::Wanted& wanted) {
  const auto tree = vfio::read(root);
  if (!tree.ok()) return fail(tree.error());
  const auto answer = pt::order(*tree, {.devices = {wanted}});
  if (const auto* obstacles = std::get_if<1>(&answer)) {
    for (const auto& o : *obstacles) {
      std::printf("obstacle: %s: %s\n", o.subject.c_str(), o.why.c_str());
      if (!o.way_out.empty()) std::printf("way out: %s\n", o.way_out.c_str());
    }
    return 1;
  }
  const auto& order = std::get<0>(answer);
  for (const auto& n : order.notes) std::printf("note: %s\n", n.c_str());
  for (const auto& one : order.deeds) {
    const auto done = carry_out(one.deed);
    if (!done.ok()) return fail(done.error());
    std::fflush(stdout);
  }
  std::printf("done: %zu deeds\n", order.deeds.size());
  return 0;
}

int read_all() {
  const auto tree = vfio::read(root);
  if (!tree.ok()) return fail(tree.error());
  for (const auto& f : tree->functions) {
    std::printf("%s %04x:%04x %06x driver=%s override=%s group=%s vfs=%u/%s vga=%d\n",
                f.address.str().c_str(), f.vendor, f.device, f.class_code,
                f.driver.empty() ? "none" : f.driver.c_str(),
                f.driver_override.empty() ? "none" : f.driver_override.c_str(),
                f.group ? std::to_string(*f.group).c_str() : "none", f.vfs_now,
                f.vfs_total ? std::to_string(*f.vfs_total).c_str() : "none", f.boot_vga);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string verb = argc > 1 ? argv[1] : "";
  if (verb == "read") return read_all();
  if (argc < 3) return 64;
  const auto address = PciAddress::parse(argv[2]);
  if (!address.ok()) return fail(address.error());
  if (verb == "give") return wish({.address = *address});
  if (verb == "reclaim") return wish({.address = *address, .purpose = pt::Purpose::host});
  // The bare change, for comparison with tools that prove nothing.
  if (verb == "bind" || verb == "unbind") {
    const auto done =
        vfio::set_binding(root, *address,
                          verb == "bind" ? pt::Binding{.driver = std::string(pt::vfio_driver),
                                                       .driver_override = std::string(pt::vfio_driver)}
                                         : pt::Binding{.driver = "*"});
    return done.ok() ? 0 : fail(done.error());
  }
  if (verb == "prove") {
    const auto proof = vfio::prove(root, *address);
    if (!proof.ok()) return fail(proof.error());
    std::printf("proved: %s\n", vfio::words(*proof).c_str());
    return 0;
  }
  if (argc < 4) return 64;
  const auto count = static_cast<unsigned>(std::strtoul(argv[3], nullptr, 10));
  if (verb == "vfs") return wish({.address = *address, .vfs = count});
  if (verb == "keep") return wish({.address = *address, .purpose = pt::Purpose::leave, .vfs = count});
  return 64;
}
