#include "edge/vfio/slot.hpp"

#include <linux/vfio.h>

#include <cstring>

#include <fmt/format.h>

namespace bulkhead::vfio {

namespace {

constexpr std::size_t most = 256;  // of one bus
constexpr std::size_t word = sizeof(std::uint32_t);
// Since Linux 6.5, of a device that was opened by its own file: ids of an iommufd stand where groups do
// (VFIO_PCI_HOT_RESET_FLAG_DEV_ID; the headers here are of 6.1).
constexpr std::uint32_t not_by_group = 1;

}  // namespace

std::vector<std::uint32_t> room_for_slot() {
  std::vector<std::uint32_t> room(
      (sizeof(vfio_pci_hot_reset_info) + most * sizeof(vfio_pci_dependent_device)) / word);
  room[0] = static_cast<std::uint32_t>(room.size() * word);
  return room;
}

Result<std::vector<passthrough::TakenAlong>> taken_along(std::span<const std::uint32_t> answer) {
  vfio_pci_hot_reset_info info{};
  if (answer.size_bytes() < sizeof info) return Error(Errc::io, "the answer is too short");
  std::memcpy(&info, answer.data(), sizeof info);
  const auto rest = std::as_bytes(answer).subspan(sizeof info);
  if (info.count > rest.size() / sizeof(vfio_pci_dependent_device))
    return Error(Errc::io, fmt::format("{} functions are named, more than there was room for", info.count));
  if ((info.flags & not_by_group) != 0)
    return Error(Errc::io, "functions are named by another device file than their group's");
  std::vector<passthrough::TakenAlong> all;
  for (std::size_t i = 0; i < info.count; ++i) {
    vfio_pci_dependent_device one{};
    std::memcpy(&one, rest.data() + i * sizeof one, sizeof one);
    all.push_back({.address = {one.segment, one.bus, static_cast<std::uint8_t>(one.devfn >> 3U),
                               static_cast<std::uint8_t>(one.devfn & 7U)},
                   .group = one.group_id});
  }
  return all;
}

}  // namespace bulkhead::vfio
