#include "guard/preload/ledger.hpp"

namespace bulkhead::guard {

namespace {

// Keys: life of the client << 32 | handle; of clients themselves: client_space << 32 | handle.
constexpr std::uint64_t empty = 0, removed = 1, busy = 2;
constexpr std::uint64_t client_space = 0xffffffff;
constexpr unsigned window = 64;

// holder: kind << 32 | life of the container
enum Kind : std::uint64_t { container = 1, memory = 2, imported = 3 };
// value of a container: has_children | gpu << 32 | life
constexpr std::uint64_t has_children = 1ULL << 63;
// value of memory: several | for good | lent | gpu << 48 | 4 KiB units; with `several`: the index of a body
// instead, whose extent is gpu << 48 | units and whose flags are these bits shifted
constexpr std::uint64_t several = 1ULL << 62, kept = 1ULL << 61, lent = 1ULL << 60;
constexpr std::uint64_t units_mask = (1ULL << 48) - 1;
constexpr std::uint32_t body_kept = 1, body_lent = 2;

constexpr std::uint64_t client_key(std::uint32_t client) { return client_space << 32 | client; }
constexpr std::uint64_t object_key(std::uint32_t life, std::uint32_t handle) {
  return static_cast<std::uint64_t>(life) << 32 | handle;
}
constexpr std::uint64_t held_by(Kind kind, std::uint32_t life) { return kind << 32 | life; }
constexpr Kind kind_of(std::uint64_t holder) { return static_cast<Kind>(holder >> 32); }
constexpr std::uint64_t extent_of(std::size_t gpu, std::uint64_t bytes) {
  return static_cast<std::uint64_t>(gpu) << 48 | ((bytes + 4095) / 4096 & units_mask);
}
constexpr std::size_t extent_gpu(std::uint64_t extent) { return extent >> 48 & (max_gpus - 1); }
constexpr std::uint64_t extent_bytes(std::uint64_t extent) { return (extent & units_mask) * 4096; }

std::size_t place_of(std::uint64_t key) {
  key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9ULL;
  key = (key ^ key >> 27) * 0x94d049bb133111ebULL;
  return (key ^ key >> 31) & (max_entries - 1);
}
Entry& entry_at(std::size_t place, unsigned step) {
  return books->entries[(place + step) & (max_entries - 1)];
}

Entry* find(std::uint64_t key) {
  const std::size_t place = place_of(key);
  for (unsigned step = 0; step < window; ++step) {
    Entry& entry = entry_at(place, step);
    const std::uint64_t found = entry.key.load(std::memory_order_acquire);
    if (found == key) return &entry;
    if (found == empty) return nullptr;
  }
  return nullptr;
}

// The value and holder that belong to `key`, or false if it went meanwhile.
bool read(std::uint64_t key, std::uint64_t& value, std::uint64_t& holder) {
  const Entry* entry = find(key);
  if (entry == nullptr) return false;
  value = entry->value.load(std::memory_order_acquire);
  holder = entry->holder.load(std::memory_order_acquire);
  return entry->key.load(std::memory_order_acquire) == key;
}

bool take_out(Entry& entry, std::uint64_t key, Taken& out) {
  if (!entry.key.compare_exchange_strong(key, busy)) return false;
  out = {key, entry.value.load(std::memory_order_relaxed), entry.holder.load(std::memory_order_relaxed)};
  entry.key.store(removed, std::memory_order_release);
  return true;
}

bool insert(std::uint64_t key, std::uint64_t value, std::uint64_t holder) {
  const std::size_t place = place_of(key);
  for (unsigned step = 0; step < window; ++step) {
    Entry& entry = entry_at(place, step);
    std::uint64_t found = entry.key.load(std::memory_order_relaxed);
    if (found != empty && found != removed) continue;
    if (!entry.key.compare_exchange_strong(found, busy)) continue;
    entry.value.store(value, std::memory_order_relaxed);
    entry.holder.store(holder, std::memory_order_relaxed);
    entry.key.store(key, std::memory_order_release);
    return true;
  }
  books->overflowed.store(1, std::memory_order_relaxed);
  return false;
}

// Whatever still stands under the key is dead: the driver has just given its number to another object.
void replace(std::uint64_t key, std::uint64_t value, std::uint64_t holder) {
  Taken old;
  if (Entry* entry = find(key); entry != nullptr && take_out(*entry, key, old)) gone(old);
  insert(key, value, holder);
}

std::uint32_t new_life() {
  std::uint32_t life = books->lives.fetch_add(1, std::memory_order_relaxed) + 1;
  while (life == 0 || life == client_space) life = books->lives.fetch_add(1, std::memory_order_relaxed) + 1;
  return life;
}

std::uint32_t life_of(std::uint32_t client) {  // 0: not ours
  std::uint64_t value = 0;
  std::uint64_t holder = 0;
  return read(client_key(client), value, holder) ? static_cast<std::uint32_t>(value) : 0;
}

void mark_parent(std::uint64_t key) {
  if (Entry* entry = find(key); entry != nullptr) {
    if ((entry->value.load(std::memory_order_relaxed) & has_children) == 0)
      entry->value.fetch_or(has_children);
  }
}

bool others_import(const Slot& mine) {
  for (std::size_t i = 0, n = slots_in_use(*page); i < n; ++i) {
    const Slot& slot = page->slots[i];
    if (&slot != &mine && slot.imports.load(std::memory_order_acquire) != 0) return true;
  }
  return false;
}

void memory_gone(std::uint64_t extent, bool for_good, bool is_lent) {
  Slot* slot = own_slot();
  if (for_good || slot == nullptr) return;
  const std::size_t gpu = extent_gpu(extent);
  if (is_lent) {
    if (others_import(*slot)) {
      books->parked[gpu].fetch_add(extent_bytes(extent));
      return;
    }
    slot->exported[gpu].fetch_sub(extent_bytes(extent));
  }
  slot->used[gpu].fetch_sub(extent_bytes(extent));
}

// Everything below a container. Depth: client, device, subdevice and one more; below that it stays charged.
void sweep(std::uint32_t life, bool is_client, unsigned depth) {
  for (auto& entry : books->entries) {
    const std::uint64_t key = entry.key.load(std::memory_order_acquire);
    if (key <= busy) continue;
    const bool below =
        is_client ? key >> 32 == life
                  : static_cast<std::uint32_t>(entry.holder.load(std::memory_order_acquire)) == life &&
                        key >> 32 != client_space;
    if (!below) continue;
    Taken object;
    if (!take_out(entry, key, object)) continue;
    if (kind_of(object.holder) == container) {
      if (!is_client && (object.value & has_children) != 0 && depth < 4) {
        sweep(static_cast<std::uint32_t>(object.value), false, depth + 1);
      }
    } else {
      gone(object);
    }
  }
}

}  // namespace

void add_client(std::uint32_t client) { replace(client_key(client), new_life(), held_by(container, 0)); }

void add_device(std::uint32_t client, std::uint32_t handle, std::size_t gpu) {
  const std::uint32_t life = life_of(client);
  if (life == 0) return;
  opened_gpu(gpu);
  mark_parent(client_key(client));
  replace(object_key(life, handle), static_cast<std::uint64_t>(gpu) << 32 | new_life(),
          held_by(container, life));
}

void add_below(std::uint32_t client, std::uint32_t parent, std::uint32_t handle) {
  const std::uint32_t life = life_of(client);
  if (life == 0) return;
  std::uint64_t value = 0;
  std::uint64_t holder = 0;
  std::uint32_t above = life;
  std::uint64_t gpu = first_gpu();
  if (read(object_key(life, parent), value, holder) && kind_of(holder) == container) {
    above = static_cast<std::uint32_t>(value);
    gpu = value >> 32 & (max_gpus - 1);
    mark_parent(object_key(life, parent));
  }
  mark_parent(client_key(client));
  replace(object_key(life, handle), gpu << 32 | new_life(), held_by(container, above));
}

bool knows_client(std::uint32_t client) {
  return life_of(client) != 0 || books->overflowed.load(std::memory_order_relaxed) != 0;
}

std::size_t gpu_of(std::uint32_t client, std::uint32_t object) {
  const std::uint32_t life = life_of(client);
  std::uint64_t value = 0;
  std::uint64_t holder = 0;
  if (life != 0 && read(object_key(life, object), value, holder) && kind_of(holder) == container) {
    return value >> 32 & (max_gpus - 1);
  }
  return first_gpu();
}

void add_memory(std::uint32_t client, std::uint32_t parent, std::uint32_t handle, std::size_t gpu,
                std::uint64_t bytes) {
  const std::uint32_t life = life_of(client);
  if (life == 0) return;
  std::uint64_t value = 0;
  std::uint64_t holder = 0;
  if (parent != client && !read(object_key(life, parent), value, holder)) {
    add_below(client, client, parent);  // a kind of parent that was not followed until now
    read(object_key(life, parent), value, holder);
  }
  std::uint32_t above = life;
  if (kind_of(holder) == container) {
    above = static_cast<std::uint32_t>(value);
    if ((value & has_children) == 0) mark_parent(object_key(life, parent));
  }
  replace(object_key(life, handle), extent_of(gpu, bytes), held_by(memory, above));
}

void add_import(std::uint32_t client, std::uint32_t handle) {
  const std::uint32_t life = life_of(client);
  Slot* slot = own_slot();
  if (slot == nullptr) return;
  slot->imports.fetch_add(1);
  if (life == 0) return;
  mark_parent(client_key(client));
  replace(object_key(life, handle), 0, held_by(imported, life));
}

void duplicated(std::uint32_t client, std::uint32_t handle, std::uint32_t source_client,
                std::uint32_t source) {
  const std::uint32_t from = life_of(source_client);
  if (from == 0) {
    add_import(client, handle);  // another process's object
    return;
  }
  const std::uint32_t life = life_of(client);
  const std::uint64_t key = object_key(from, source);
  Entry* entry = find(key);
  if (life == 0 || entry == nullptr || kind_of(entry->holder.load(std::memory_order_acquire)) == container)
    return;
  std::uint64_t expected = key;
  if (!entry->key.compare_exchange_strong(expected, busy)) return;
  std::uint64_t value = entry->value.load(std::memory_order_relaxed);
  const Kind kind = kind_of(entry->holder.load(std::memory_order_relaxed));
  if (kind == memory && (value & several) == 0) {
    std::uint32_t index = 0;
    for (; index < max_bodies; ++index) {
      std::uint32_t none = 0;
      if (books->bodies[index].references.compare_exchange_strong(none, 1)) break;
    }
    if (index == max_bodies) {  // no room: both handles lead nowhere, and the bytes stay charged
      books->overflowed.store(1, std::memory_order_relaxed);
      entry->key.store(removed, std::memory_order_release);
      return;
    }
    Body& body = books->bodies[index];
    body.extent.store(value & ~(kept | lent), std::memory_order_relaxed);
    body.flags.store(((value & kept) != 0 ? body_kept : 0) | ((value & lent) != 0 ? body_lent : 0));
    value = several | index;
    entry->value.store(value, std::memory_order_relaxed);
  }
  if (kind == memory) books->bodies[value & (max_bodies - 1)].references.fetch_add(1);
  entry->key.store(key, std::memory_order_release);
  mark_parent(client_key(client));
  if (kind == memory) {
    replace(object_key(life, handle), value, held_by(memory, life));
  } else {
    add_import(client, handle);
  }
}

void shared(std::uint32_t client, std::uint32_t handle, bool for_good) {
  const std::uint32_t life = life_of(client);
  if (life == 0) return;
  Entry* entry = find(object_key(life, handle));
  if (entry == nullptr || kind_of(entry->holder.load(std::memory_order_acquire)) != memory) return;
  const std::uint64_t bit = for_good ? kept : lent;
  const std::uint64_t value = entry->value.load(std::memory_order_acquire);
  std::uint64_t extent = value;
  bool first = false;
  if ((value & several) != 0) {
    Body& body = books->bodies[value & (max_bodies - 1)];
    extent = body.extent.load(std::memory_order_relaxed);
    first = (body.flags.fetch_or(for_good ? body_kept : body_lent) & (body_kept | body_lent)) == 0;
  } else {
    first = (entry->value.fetch_or(bit) & (kept | lent)) == 0;
  }
  if (!first) return;
  if (Slot* slot = own_slot()) slot->exported[extent_gpu(extent)].fetch_add(extent_bytes(extent));
}

bool take(std::uint32_t client, std::uint32_t handle, Taken& out) {
  std::uint64_t key = client_key(client);
  if (handle != client) {
    const std::uint32_t life = life_of(client);
    if (life == 0) return false;
    key = object_key(life, handle);
  }
  Entry* entry = find(key);
  return entry != nullptr && take_out(*entry, key, out);
}

void gone(const Taken& object) {
  switch (kind_of(object.holder)) {
    case container:
      if ((object.value & has_children) != 0) {
        sweep(static_cast<std::uint32_t>(object.value), object.key >> 32 == client_space, 0);
      }
      return;
    case imported:
      if (Slot* slot = own_slot()) slot->imports.fetch_sub(1);
      return;
    case memory:
      if ((object.value & several) == 0) {
        memory_gone(object.value, (object.value & kept) != 0, (object.value & lent) != 0);
        return;
      }
      Body& body = books->bodies[object.value & (max_bodies - 1)];
      const std::uint64_t extent = body.extent.load(std::memory_order_relaxed);
      const std::uint32_t flags = body.flags.load(std::memory_order_acquire);
      if (body.references.fetch_sub(1) == 1)
        memory_gone(extent, (flags & body_kept) != 0, (flags & body_lent) != 0);
      return;
  }
}

bool collect_parked(Slot& slot, std::size_t gpu) {
  if (books->parked[gpu].load(std::memory_order_relaxed) == 0 || others_import(slot)) return false;
  const std::uint64_t bytes = books->parked[gpu].exchange(0);
  slot.exported[gpu].fetch_sub(bytes);
  slot.used[gpu].fetch_sub(bytes);
  return bytes != 0;
}

void put_back(const Taken& object) { insert(object.key, object.value, object.holder); }

bool any_ranges() { return books != nullptr && books->range_count.load(std::memory_order_acquire) != 0; }

void add_range(std::uint64_t low, std::uint64_t high) {
  for (std::size_t i = 0; i < max_ranges; ++i) {
    Range& range = books->ranges[i];
    std::uint64_t found = range.low.load(std::memory_order_relaxed);
    if (found != empty || !range.low.compare_exchange_strong(found, busy)) continue;
    range.high.store(high, std::memory_order_relaxed);
    books->range_count.fetch_add(1);
    std::uint32_t top = books->range_high.load();
    while (top < i + 1 && !books->range_high.compare_exchange_weak(top, static_cast<std::uint32_t>(i) + 1)) {
    }
    range.low.store(low, std::memory_order_release);
    return;
  }
  books->overflowed.store(1, std::memory_order_relaxed);
}

void cut(std::uint64_t low, std::uint64_t high, Pieces& out) {
  const std::size_t top = books->range_high.load(std::memory_order_acquire);
  for (std::size_t i = 0; i < top && i < max_ranges && out.count < max_pieces; ++i) {
    Range& range = books->ranges[i];
    std::uint64_t begin = range.low.load(std::memory_order_acquire);
    for (unsigned round = 0; begin == busy && round < 100; ++round) {  // another thread cuts at it
      pause_briefly(round);
      begin = range.low.load(std::memory_order_acquire);
    }
    if (begin <= busy || begin >= high || range.high.load(std::memory_order_relaxed) <= low) continue;
    if (!range.low.compare_exchange_strong(begin, busy)) {
      --i;  // it has just changed: look again
      continue;
    }
    const std::uint64_t end = range.high.load(std::memory_order_relaxed);
    if (end <= low) {
      range.low.store(begin, std::memory_order_release);
      continue;
    }
    const std::uint64_t from = begin > low ? begin : low;
    const std::uint64_t to = end < high ? end : high;
    out.piece[out.count].low = from;
    out.piece[out.count].high = to;
    ++out.count;
    out.bytes += to - from;
    if (to < end) add_range(to, end);
    if (begin < from) {
      range.high.store(from, std::memory_order_relaxed);
      range.low.store(begin, std::memory_order_release);
    } else {
      range.low.store(empty, std::memory_order_release);
      books->range_count.fetch_sub(1);
    }
  }
}

void put_back(const Pieces& pieces) {
  for (unsigned i = 0; i < pieces.count; ++i) add_range(pieces.piece[i].low, pieces.piece[i].high);
}

}  // namespace bulkhead::guard
