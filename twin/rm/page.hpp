// What TWIN/rm.bin holds. Plain data, fixed bounds, indices instead of pointers: element 0 of every table is never
// used, so that 0 means "none" and a file of zeros is an empty driver.
#pragma once

#include <cstddef>
#include <cstdint>

#include "twin/state/state.hpp"

namespace bulkhead::twin::rm {

inline constexpr std::uint32_t page_version = 1;
inline constexpr std::size_t max_files = 1024;
inline constexpr std::size_t max_clients = 1024;
inline constexpr std::size_t max_objects = 131072;
inline constexpr std::size_t max_memory = 65536;
inline constexpr std::size_t max_exports = 4096;
inline constexpr std::size_t max_groups = 2048;
inline constexpr std::size_t max_charges = 1024;
inline constexpr std::size_t hash_buckets = 65536;
inline constexpr std::size_t jobs_of_a_group = 1024;
inline constexpr std::size_t journal_bytes = 256UL << 10;

using Index = std::uint32_t;  // into one of the tables

struct File {  // an open file description of nvidiactl
  std::uint32_t used, link;
  std::uint64_t serial;  // its file offset, and the byte it holds locked
  std::uint32_t export_device, export_max;
  std::uint8_t export_metadata[64];
};

struct Client {
  std::uint32_t used, link;
  std::uint32_t handle, pid, uid;
  Index object, file;
  std::uint32_t next_handle;  // for callers that let RM choose
  std::uint64_t start_time;   // of pid
  Text<64> name;
};

struct Object {
  std::uint32_t used, link;
  std::uint32_t handle, cls, gpu;
  Index client, parent, first_child, next_sibling, previous_sibling, hash_next;
  Index memory, group;      // what it is, or for a channel the group it is in
  Index next_holder;        // of the same memory
  std::uint32_t disables;   // of a channel
};

struct Memory {  // bytes on a GPU; lives while an object or an exported file holds it
  std::uint32_t used, link;
  std::uint32_t gpu, exports, owner_pid;
  Index first_holder, charge;
  std::uint64_t bytes;
};

struct Export {  // memory that an open file keeps
  std::uint32_t used, link;
  Index file, memory;
};

struct Charge {  // what a process holds of a GPU: a row of State::processes
  std::uint32_t used, link;
  std::uint32_t pid, gpu, groups;
  std::uint32_t dirty;  // the twin's state does not say so yet
  std::uint64_t start_time, bytes;
  double busy;  // share of the GPU when last measured
  Text<64> name;
};

struct Group {
  std::uint32_t used, link;
  std::uint32_t gpu, engine, scheduled, channels, disabled;  // disabled: channels that are off
  Index object, charge, next, previous;                      // in the GPU's runlist, compute groups only
  std::uint64_t slice_ns;
  std::uint64_t submitted, completed;
  std::uint64_t head_left_ns;  // of job completed + 1, when there is one
  std::uint64_t busy_ns, measured_busy_ns, last_done_ns;
};

struct Job {  // of ticket t, in slot t % jobs_of_a_group: its duration until it has finished, then when it did
  std::uint64_t ns;
};

enum class Phase : std::uint32_t { choosing, switching, running, taking_off };

struct Gpu {
  std::uint64_t now_ns;
  Phase phase;
  std::uint32_t ignores_slices, ignores_disable;  // faults of the twin
  Index first, last;                              // the runlist
  Index loaded;                                   // whose context is on the GPU
  Index turn;                                     // who had the last turn
  std::uint64_t phase_left_ns, slice_left_ns;
  std::uint64_t memory_bytes;  // of every Memory on it
  std::uint64_t measured_ns;   // when shares were measured last
};

struct FreeList {
  Index head;  // through Element::link
  Index used;  // elements ever used, without element 0
};

struct Counters {
  std::uint64_t next_serial;
  std::uint32_t next_client;
  FreeList files, clients, objects, memory, exports, charges, groups;
};

struct Journal {
  std::uint64_t bytes;  // in use; 0: no step is half done
  alignas(8) unsigned char entries[journal_bytes];
};

struct Page {
  char magic[8];
  std::uint32_t version;
  std::uint64_t size;
  std::uint64_t reaped_ns;  // host clock, not journalled: when dead files were looked for last
  Journal journal;
  Counters counters;
  Gpu gpus[max_gpus];
  File files[max_files];
  Client clients[max_clients];
  Object objects[max_objects];
  Memory memory[max_memory];
  Export exports[max_exports];
  Charge charges[max_charges];
  Group groups[max_groups];
  Index hash[hash_buckets];
  Job jobs[max_groups][jobs_of_a_group];  // last: mostly holes
};

}  // namespace bulkhead::twin::rm
