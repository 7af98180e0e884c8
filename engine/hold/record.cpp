#include "engine/hold/record.hpp"

#include <algorithm>

namespace bulkhead::hold {

namespace {
constexpr std::uint64_t half_bit = 1ULL << 63U;
constexpr std::size_t compact_at_least = 4096;  // events
}  // namespace

Journal::Journal(Record& record) : record_(record) {
  const std::uint64_t state = record_.log_state.load(std::memory_order_acquire);
  const auto& log = record_.log[state >> 63U];
  const std::uint64_t count = std::min<std::uint64_t>(state & ~half_bit, log_capacity);
  for (std::uint64_t i = 0; i < count; ++i) ledger_.apply(log[i]);
}

std::uint64_t Journal::sequence() const {
  const std::uint64_t state = record_.log_state.load(std::memory_order_relaxed);
  return record_.base[state >> 63U] + (state & ~half_bit);
}

bool Journal::apply(const ledger::Event& event) {
  // Room is made first: an event that changed the ledger must be kept.
  const std::uint64_t count = record_.log_state.load(std::memory_order_relaxed) & ~half_bit;
  if (count >= std::min(log_capacity - 1, std::max(compact_at_least, 4 * ledger_.size()))) compact();
  if (!ledger_.apply(event)) return false;
  const std::uint64_t state = record_.log_state.load(std::memory_order_relaxed);
  record_.log[state >> 63U][state & ~half_bit] = event;
  record_.log_state.store(state + 1, std::memory_order_release);
  return true;
}

void Journal::compact() {
  const std::uint64_t half = (record_.log_state.load(std::memory_order_relaxed) >> 63U) ^ 1U;
  const std::uint64_t sequence_now = sequence();
  std::uint64_t count = 0;
  ledger_.snapshot([&](const ledger::Event& event) {
    if (count < log_capacity) record_.log[half][count++] = event;
  });
  record_.base[half] = sequence_now - count;
  record_.log_state.store(half << 63U | count, std::memory_order_release);
}

}  // namespace bulkhead::hold
