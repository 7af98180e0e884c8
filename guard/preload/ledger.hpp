// The process's driver objects that bear on memory: clients, devices and what else memory hangs below, device
// memory, and handles to other processes' memory. A handle is a number that the driver gives out again, so
// each client and container gets a life, a number of its own: what is left of a dead one is never taken for
// the living.
//
// A table of fixed size without locks: an entry lies in one of 64 places from where its key hashes to. When
// they are all taken the bytes stay charged until the process ends; nothing is ever held uncharged.
#pragma once

#include <cstdint>

#include "guard/preload/process.hpp"

namespace bulkhead::guard {

struct Taken {  // an object out of the ledger while the driver frees it
  std::uint64_t key = 0, value = 0, holder = 0;
};

void add_client(std::uint32_t client);
// A device (with its GPU), or an object below one.
void add_device(std::uint32_t client, std::uint32_t handle, std::size_t gpu);
void add_below(std::uint32_t client, std::uint32_t parent, std::uint32_t handle);
// Whether this process made the client. A forked child could allocate through its parent's client: the memory
// would outlive the child and its charge.
bool knows_client(std::uint32_t client);
std::size_t gpu_of(std::uint32_t client, std::uint32_t object);

// `bytes` are charged already.
void add_memory(std::uint32_t client, std::uint32_t parent, std::uint32_t handle, std::size_t gpu,
                std::uint64_t bytes);
void add_import(std::uint32_t client, std::uint32_t handle);
void duplicated(std::uint32_t client, std::uint32_t handle, std::uint32_t source_client,
                std::uint32_t source);
// `for_good`: a descriptor may keep the memory alive unseen: it stays charged until the process ends. Else
// only while some process of the tenant holds imports.
void shared(std::uint32_t client, std::uint32_t handle, bool for_good);

// Out before the driver is asked (a moment later its number may name another object), then gone, or put back.
bool take(std::uint32_t client, std::uint32_t handle, Taken& out);
void gone(const Taken& object);
void put_back(const Taken& object);

// Memory freed here while another process held imports, perhaps of it, is parked: charged until nobody does.
// True if something was refunded.
bool collect_parked(Slot& slot, std::size_t gpu);

// Managed memory: address ranges.
inline constexpr unsigned max_pieces = 16;
struct Pieces {
  unsigned count = 0;
  std::uint64_t bytes = 0;
  struct {
    std::uint64_t low = 0, high = 0;
  } piece[max_pieces];
};
bool any_ranges();
void add_range(std::uint64_t low, std::uint64_t high);
void cut(std::uint64_t low, std::uint64_t high, Pieces& out);  // takes [low, high) out of all ranges
void put_back(const Pieces& pieces);

}  // namespace bulkhead::guard
