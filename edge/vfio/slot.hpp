// What VFIO answers when it is asked whom a reset of a device's slot, or of its bus, takes along.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/result.hpp"
#include "core/passthrough/passthrough.hpp"

namespace bulkhead::vfio {

// Room to ask VFIO_DEVICE_GET_PCI_HOT_RESET_INFO with, for a whole bus and its argsz written.
std::vector<std::uint32_t> room_for_slot();
// The functions in the answer, without their drivers. Errc::io: it names more than there was room for, or
// names them otherwise than by group.
Result<std::vector<passthrough::TakenAlong>> taken_along(std::span<const std::uint32_t> answer);

}  // namespace bulkhead::vfio
