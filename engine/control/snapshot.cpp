#include <algorithm>

#include "engine/control/control.hpp"

namespace bulkhead::control {

namespace {
constexpr std::int64_t ids_of_chunk = 64;
}

Leases::Iterator Leases::begin() const { return {chunks_.begin(), 0}; }
Leases::Iterator Leases::end() const { return {chunks_.end(), 0}; }

Leases::Iterator Leases::lower_bound(std::int64_t id) const {
  const auto chunk = chunks_.lower_bound(id / ids_of_chunk);
  if (chunk == chunks_.end() || chunk->first > id / ids_of_chunk) return {chunk, 0};
  const auto& values = *chunk->second;
  const auto at =
      std::lower_bound(values.begin(), values.end(), id,
                       [](const Value& value, std::int64_t other) { return value.first < other; });
  if (at == values.end()) return {std::next(chunk), 0};
  return {chunk, static_cast<std::size_t>(at - values.begin())};
}

Leases::Iterator Leases::find(std::int64_t id) const {
  const auto at = lower_bound(id);
  return at == end() || at->first != id ? end() : at;
}

void Leases::put(std::int64_t id, std::shared_ptr<const lease::Lease> lease) {
  auto& slot = chunks_[id / ids_of_chunk];
  auto chunk = slot ? std::make_shared<Chunk>(*slot) : std::make_shared<Chunk>();
  const auto at =
      std::lower_bound(chunk->begin(), chunk->end(), id,
                       [](const Value& value, std::int64_t other) { return value.first < other; });
  if (at != chunk->end() && at->first == id) {
    at->second = std::move(lease);
  } else {
    chunk->insert(at, {id, std::move(lease)});
    ++size_;
  }
  slot = std::move(chunk);
}

void Leases::erase(std::int64_t id) {
  const auto slot = chunks_.find(id / ids_of_chunk);
  if (slot == chunks_.end()) return;
  auto chunk = std::make_shared<Chunk>(*slot->second);
  size_ -= std::erase_if(*chunk, [&](const Value& value) { return value.first == id; });
  if (chunk->empty())
    chunks_.erase(slot);
  else
    slot->second = std::move(chunk);
}

}  // namespace bulkhead::control
