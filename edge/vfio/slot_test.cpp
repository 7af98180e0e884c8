// What a kernel answers is in tests/lab: left-behind.
#include "edge/vfio/slot.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/vfio.h>

#include <cstring>

namespace bulkhead::vfio {
namespace {

using testing::HasSubstr;

// As the kernel fills it: the room keeps its size, whatever was needed of it.
std::vector<std::uint32_t> answer(const std::vector<vfio_pci_dependent_device>& devices,
                                  std::uint32_t flags = 0) {
  auto room = room_for_slot();
  vfio_pci_hot_reset_info info{};
  info.argsz = room[0];
  info.flags = flags;
  info.count = static_cast<std::uint32_t>(devices.size());
  std::memcpy(room.data(), &info, sizeof info);
  auto* bytes = reinterpret_cast<char*>(room.data()) + sizeof info;
  if (!devices.empty()) std::memcpy(bytes, devices.data(), devices.size() * sizeof devices[0]);
  return room;
}
vfio_pci_dependent_device device(std::uint32_t group, std::uint16_t segment, std::uint8_t bus,
                                 std::uint8_t devfn) {
  vfio_pci_dependent_device one{};
  one.group_id = group;
  one.segment = segment;
  one.bus = bus;
  one.devfn = devfn;
  return one;
}

TEST(Slot, FunctionsAreReadWithTheirAddressAndGroup) {
  const auto all = taken_along(answer({device(7, 0, 1, 0), device(7, 0, 1, 1), device(9, 0x10, 0x81, 0xff)}));
  ASSERT_TRUE(all.ok()) << all.error().message();
  ASSERT_EQ(all->size(), 3U);
  EXPECT_EQ((*all)[0].address.str(), "0000:01:00.0");
  EXPECT_EQ((*all)[1].address.str(), "0000:01:00.1");
  EXPECT_EQ((*all)[2].address.str(), "0010:81:1f.7");
  EXPECT_EQ((*all)[0].group, 7U);
  EXPECT_EQ((*all)[2].group, 9U);
}

TEST(Slot, RoomIsForAWholeBusAndSaysItsSize) {
  const auto room = room_for_slot();
  EXPECT_EQ(room[0], room.size() * sizeof(std::uint32_t));
  const auto all = taken_along(answer(std::vector(256, device(1, 0, 2, 3))));
  ASSERT_TRUE(all.ok());
  EXPECT_EQ(all->size(), 256U);
}

TEST(Slot, ACountBeyondTheRoomIsNotBelieved) {
  auto lies = answer({device(7, 0, 1, 0)});
  for (const std::uint32_t count : {257U, 0xffffffffU}) {
    lies[offsetof(vfio_pci_hot_reset_info, count) / sizeof(std::uint32_t)] = count;
    const auto all = taken_along(lies);
    ASSERT_FALSE(all.ok());
    EXPECT_THAT(all.error().message(), HasSubstr("more than there was room for"));
  }
  EXPECT_FALSE(taken_along(std::span(lies).first(2)).ok());
  EXPECT_FALSE(taken_along({}).ok());
}

TEST(Slot, IdsThatAreNotGroupsAreNotTakenForGroups) {
  EXPECT_FALSE(taken_along(answer({device(7, 0, 1, 0)}, 1)).ok());
  EXPECT_FALSE(taken_along(answer({device(7, 0, 1, 0)}, 3)).ok());
}

TEST(Slot, NobodyIsAnAnswerToo) {
  const auto all = taken_along(answer({}));
  ASSERT_TRUE(all.ok());
  EXPECT_TRUE(all->empty());
}

}  // namespace
}  // namespace bulkhead::vfio
