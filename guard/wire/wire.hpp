// The page a tenant's processes and its arbiter share: a sealed memfd, one a tenant. Each word has one writer, named
// below, so that a process killed between any two instructions leaves nothing shut and nothing lost: its charges are in
// its own slot, and a slot goes back when the pidfd of its owner says that the owner is gone.
// Hostile tenants can write the whole page: the arbiter trusts nothing in it (it audits), and tenants harm only
// themselves. Freestanding: the guard includes nothing else of this project but abi.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace bulkhead::guard {

inline constexpr std::uint32_t wire_magic = 0x64686b62;  // "bkhd"
inline constexpr std::uint32_t wire_version = 1;
inline constexpr std::size_t max_slots = 512;  // processes of one tenant at a time
inline constexpr std::size_t max_gpus = 16;    // by RM device instance
inline constexpr std::uint64_t no_cap = ~0ULL;
inline constexpr const char* wire_environment = "BULKHEAD_GUARD_FD";  // number of the inherited memfd, for the guard

enum class Authority : std::uint32_t {
  guard,  // the guard charges in its slot, at libcuda's own RM calls
  hold,   // the arbiter charges from outside; the guard only answers and gates
};

struct alignas(64) Slot {  // of one process
  std::atomic<std::uint64_t> owner;           // pid << 32 | low half of its start time; 0: free. Taken by CAS by its
                                              // process, given back by the arbiter alone
  std::atomic<std::uint64_t> used[max_gpus];  // bytes reserved or held. Owner
  std::atomic<std::uint64_t> refused;         // allocations that met the cap. Owner
  std::atomic<std::uint64_t> gated_ns;        // time spent waiting at the gate. Owner
};

struct Page {
  std::uint32_t magic, version;  // before the page is shared
  std::uint64_t tenant;          // likewise
  // The arbiter writes these.
  alignas(64) std::atomic<std::uint64_t> cap[max_gpus];  // bytes; no_cap: none
  std::atomic<std::uint64_t> outside[max_gpus];  // bytes charged from outside: what the hold knows, or the audit found
                                                 // beyond the slots
  std::atomic<std::uint32_t> authority;          // Authority
  std::atomic<std::uint32_t> gate;               // a futex: 0 open, 1 closed: launches wait
  std::atomic<std::uint64_t> arbiter_beat;       // CLOCK_MONOTONIC ns; a gate closed by an arbiter silent for a second
                                                 // is taken as open
  Slot slots[max_slots];
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free);

}  // namespace bulkhead::guard
