// The memory that outlives an arbiter: the events that make the ledger, and the call in flight. Every state a
// kill can leave is one of those that Hold's recovery names: each step ends with one store that makes it so.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "abi/rm/rm.hpp"
#include "core/ledger/ledger.hpp"
#include "edge/seccomp/seccomp.hpp"

namespace bulkhead::hold {

inline constexpr std::size_t params_limit = 4096;
// A snapshot of the fullest ledger, and room to go on.
inline constexpr std::size_t log_capacity = 2 * ledger::max_objects + 2 * ledger::max_processes + 16384;
inline constexpr std::uint32_t unanswered = 0xbadca11;  // no status of the driver's

enum class Stage : std::uint32_t {
  received,    // nothing was done yet: it can be handled from the start
  performing,  // the driver was asked: `status` tells whether it answered
  answering,   // all is done and in the ledger; the caller has its answer or is about to
};

struct Pending {  // a managed mapping that was let through, and that the kernel may not have made yet
  std::uint64_t bytes, until_ns;
  std::uint32_t process, pad;
};
inline constexpr std::size_t most_pending = 256;

struct Record {
  std::uint64_t magic;
  Pending pending[most_pending];
  std::atomic<std::uint64_t> refused, escapes, self_set, beyond[ledger::max_gpus];

  // ---- the call in flight: there is one when call.arch != 0
  seccomp::Call call;
  std::atomic<Stage> stage;
  std::uint32_t known;     // the handle was in the ledger before the driver was asked
  std::uint64_t sequence;  // of the ledger then: it has grown when the outcome is in it
  std::uint32_t rights;
  union {
    abi::Alloc alloc;
    abi::AllocOld alloc_old;
    abi::Free free;
  } request;  // what the driver gets and fills in
  alignas(16) std::byte params[params_limit];
  alignas(16) std::byte params_before[params_limit];

  // ---- the events: log[half][0..count)
  std::atomic<std::uint64_t> log_state;  // half << 63 | count
  std::uint64_t base[2];  // events before those of each half, as far as sequence() is concerned
  ledger::Event log[2][log_capacity];
};

// The ledger, and its events in the record.
class Journal {
 public:
  explicit Journal(Record& record);  // replays what is there
  // Applies the event and keeps it, when it changes anything.
  bool apply(const ledger::Event& event);
  const ledger::Ledger& ledger() const { return ledger_; }
  std::uint64_t sequence() const;  // grows by one with each event kept

 private:
  void compact();
  Record& record_;
  ledger::Ledger ledger_;
};

}  // namespace bulkhead::hold
