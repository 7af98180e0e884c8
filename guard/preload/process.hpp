// What one process keeps for the guard: the tenant's page, the process's slot in it, and its own books. The
// books are in memory that the kernel wipes in a forked child (MADV_WIPEONFORK), so a child starts with none
// and takes a slot of its own; a vfork child runs on its parent's memory and driver files, and on its
// parent's slot, rightly. System calls are made raw: they leave errno alone and are no cancellation points.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "guard/wire/wire.hpp"

namespace bulkhead::guard {

long system_call(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0, long f = 0);
void pause_briefly(unsigned round);  // a yield at first, then 20 us

struct Entry {  // one driver object in the ledger
  std::atomic<std::uint64_t> key, value, holder, pad;
};
struct Body {  // memory with several handles
  std::atomic<std::uint32_t> references, flags;
  std::atomic<std::uint64_t> extent;
};
struct Range {  // of managed memory
  std::atomic<std::uint64_t> low, high;
};
inline constexpr std::size_t max_entries = std::size_t{1} << 18;  // 8 MiB of address space, touched as needed
inline constexpr std::size_t max_bodies = 4096;
inline constexpr std::size_t max_ranges = 4096;

struct Books {
  std::atomic<std::uint32_t> slot;         // index + 1; 0: none yet
  std::atomic<std::uint32_t> attaching;    // a thread is taking a slot
  std::atomic<std::uint32_t> elder;        // a thread of this process is the one that insists, see reserve()
  std::atomic<std::uint32_t> lives;        // the last life given to an object, see ledger.hpp
  std::atomic<std::uint32_t> first_gpu;    // + 1
  std::atomic<std::uint32_t> overflowed;   // something found no room: it stays charged until the process ends
  std::atomic<std::uint32_t> range_count;  // entries of `ranges` in use
  std::atomic<std::uint32_t> range_high;   // entries from here on were never used
  std::atomic<std::uint64_t> fresh_group;  // client << 32 | handle of the compute group made last
  std::atomic<std::uint64_t> parked[max_gpus];  // see ledger.hpp
  Entry entries[max_entries];
  Body bodies[max_bodies];
  Range ranges[max_ranges];
};

// Set when this thread was refused managed memory, for cuMemAllocManaged.
extern __thread bool managed_refused __attribute__((tls_model("initial-exec")));

extern Page* page;    // null: no page, everything passes through
extern Books* books;  // null with a page: no room for books, all memory is refused

void open_page();  // once, before the program runs
bool charging();   // there is a page and it is the guard that charges
// The process's slot, taken at first use. Null: all are taken.
Slot* own_slot();
// Adds `bytes` to the slot's charge unless the sum of all would pass the cap.
bool reserve(Slot& slot, std::size_t gpu, std::uint64_t bytes);
void refund(std::size_t gpu, std::uint64_t bytes);
std::size_t first_gpu();  // the one that managed memory is charged to; 0 before any was opened
void opened_gpu(std::size_t gpu);

}  // namespace bulkhead::guard
