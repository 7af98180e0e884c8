// The page a tenant's processes and its arbiter share: a sealed memfd, one a tenant. Each word has one
// writer, named below, so that a process killed between any two instructions leaves nothing shut and nothing
// lost: its charges are in its own slot, and a slot goes back when the pidfd of its owner says that the owner
// is gone. Hostile tenants can write the whole page: the arbiter trusts nothing in it (it audits), and
// tenants harm only themselves. Freestanding: the guard includes nothing else of this project but abi.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace bulkhead::guard {

inline constexpr std::uint32_t wire_magic = 0x64686b62;  // "bkhd"
inline constexpr std::uint32_t wire_version = 2;
inline constexpr std::size_t max_slots = 512;  // processes of one tenant at a time
inline constexpr std::size_t max_gpus = 16;    // by RM device instance
inline constexpr std::uint64_t no_cap = ~0ULL;
// The guard takes the page only sealed with F_SEAL_SHRINK (a truncated mapping would kill the tenant), of at
// least sizeof(Page). It looks at the inherited descriptor first, then at the path: many programs close what
// they do not know before they exec (Python's subprocess does), and a child without the page would be without
// a cap. The path may be /proc/PID/fd/N of whoever holds the memfd.
inline constexpr const char* wire_environment = "BULKHEAD_GUARD_FD";  // number of the inherited memfd
inline constexpr const char* wire_path_environment =
    "BULKHEAD_GUARD_PAGE";  // a path that opens the same memfd

enum class Authority : std::uint32_t {
  guard,  // the guard charges in its slot, at libcuda's own RM calls
  hold,   // the arbiter charges from outside; the guard only answers and gates
};

struct alignas(64) Slot {  // of one process; every word but the owner's release is its process's to write
  std::atomic<std::uint64_t> owner;  // pid << 32 | low half of its start time; 0: free. Taken by CAS by its
                                     // process, given back by the arbiter alone
  std::atomic<std::uint64_t> used[max_gpus];    // bytes held, and those being asked for
  std::atomic<std::uint64_t> asking[max_gpus];  // the part of `used` that is not granted yet
  std::atomic<std::uint64_t>
      exported[max_gpus];               // the part of `used` that other processes may hold a handle to
  std::atomic<std::uint64_t> imports;   // handles it holds to other processes' memory
  std::atomic<std::uint64_t> refused;   // allocations that met the cap
  std::atomic<std::uint64_t> gated_ns;  // time spent waiting at the gate
  std::atomic<std::uint64_t> self_set;  // times the process set a time slice of its own
};

struct Page {
  std::uint32_t magic, version;  // before the page is shared
  std::uint64_t tenant;          // likewise
  // The arbiter writes these.
  alignas(64) std::atomic<std::uint64_t> cap[max_gpus];  // bytes; no_cap: none
  std::atomic<std::uint64_t> outside[max_gpus];  // bytes charged from outside: what the hold knows, or the
                                                 // audit found beyond the slots
  std::atomic<std::uint64_t>
      orphaned[max_gpus];                // bytes of dead processes that a living one may still have imported
  std::atomic<std::uint32_t> authority;  // Authority
  std::atomic<std::uint32_t> gate;       // a futex: 0 open, 1 closed: launches wait
  std::atomic<std::uint64_t> arbiter_beat;  // CLOCK_MONOTONIC ns; a gate closed by an arbiter silent for a
                                            // second is taken as open
  // Raised by a process before it takes the slot, never lowered: slots from here on were never used.
  alignas(64) std::atomic<std::uint32_t> high_water;
  Slot slots[max_slots];
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free &&
              std::atomic<std::uint32_t>::is_always_lock_free);

// Sums stop at the top instead of wrapping: a page full of garbage must look full, not empty.
constexpr std::uint64_t add_saturating(std::uint64_t a, std::uint64_t b) { return a + b < a ? ~0ULL : a + b; }

inline std::size_t slots_in_use(const Page& page) {
  const std::uint32_t high = page.high_water.load(std::memory_order_acquire);
  return high < max_slots ? high : max_slots;
}

// What counts against the cap of `gpu`.
inline std::uint64_t charged(const Page& page, std::size_t gpu) {
  std::uint64_t sum = add_saturating(page.outside[gpu].load(std::memory_order_acquire),
                                     page.orphaned[gpu].load(std::memory_order_acquire));
  for (std::size_t i = 0, n = slots_in_use(page); i < n; ++i) {
    sum = add_saturating(sum, page.slots[i].used[gpu].load(std::memory_order_acquire));
  }
  return sum;
}

inline void clear_words(Slot& slot) {  // all but the owner
  for (std::size_t gpu = 0; gpu < max_gpus; ++gpu) {
    slot.used[gpu].store(0, std::memory_order_relaxed);
    slot.asking[gpu].store(0, std::memory_order_relaxed);
    slot.exported[gpu].store(0, std::memory_order_relaxed);
  }
  slot.imports.store(0, std::memory_order_relaxed);
  slot.refused.store(0, std::memory_order_relaxed);
  slot.gated_ns.store(0, std::memory_order_relaxed);
  slot.self_set.store(0, std::memory_order_relaxed);
}

struct Released {  // by one release_dead(): the counters of the slots that went back, for the arbiter's
                   // totals
  std::size_t slots = 0;
  std::uint64_t refused = 0, gated_ns = 0, self_set = 0;
};

// For the arbiter: gives back the slots whose owner is gone. `alive(pid, low half of start time)`; a start
// time of 0 is one that the process could not read. Cut off anywhere, it is finished by the next call; at
// worst an orphan's bytes then count twice until nobody imports. A memory export still in flight (its
// exporter dead, its descriptor not imported yet) is seen by nobody here: the audit's business.
template <class Alive>
Released release_dead(Page& page, Alive&& alive) {
  Released released;
  bool imported = false;
  for (std::size_t i = 0, n = slots_in_use(page); i < n; ++i) {
    Slot& slot = page.slots[i];
    const std::uint64_t owner = slot.owner.load(std::memory_order_acquire);
    if (owner == 0) continue;
    if (alive(static_cast<std::uint32_t>(owner >> 32), static_cast<std::uint32_t>(owner))) {
      if (slot.imports.load(std::memory_order_acquire) != 0) imported = true;
      continue;
    }
    for (std::size_t gpu = 0; gpu < max_gpus; ++gpu) {
      const std::uint64_t shared = slot.exported[gpu].load(std::memory_order_acquire);
      if (shared != 0) {
        page.orphaned[gpu].store(add_saturating(page.orphaned[gpu].load(std::memory_order_relaxed), shared),
                                 std::memory_order_release);
      }
    }
    ++released.slots;
    released.refused += slot.refused.load(std::memory_order_relaxed);
    released.gated_ns += slot.gated_ns.load(std::memory_order_relaxed);
    released.self_set += slot.self_set.load(std::memory_order_relaxed);
    clear_words(slot);
    slot.owner.store(0, std::memory_order_release);
  }
  if (!imported) {
    for (auto& bytes : page.orphaned) bytes.store(0, std::memory_order_release);
  }
  return released;
}

}  // namespace bulkhead::guard
