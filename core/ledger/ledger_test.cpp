#include "core/ledger/ledger.hpp"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

namespace bulkhead::ledger {
namespace {

constexpr std::uint64_t MiB = 1ULL << 20;

Event process(std::uint32_t number) {
  return {.kind = Kind::process, .process = number, .source_client = 1000 + number, .bytes = 77};
}
Event gone(std::uint32_t number) { return {.kind = Kind::process_gone, .process = number}; }
Event object(What what, std::uint32_t client, std::uint32_t parent, std::uint32_t handle,
             std::uint8_t gpu = 0, std::uint64_t bytes = 0, std::uint32_t number = 1) {
  return {.kind = Kind::object,
          .what = what,
          .gpu = gpu,
          .process = number,
          .client = client,
          .parent = parent,
          .handle = handle,
          .bytes = bytes,
          .fd = 9};
}
Event freed(std::uint32_t client, std::uint32_t handle) {
  return {.kind = Kind::free, .client = client, .handle = handle};
}
Event hearsay(Event event) {
  event.hearsay = 1;
  return event;
}
Event duplicate(std::uint32_t client, std::uint32_t parent, std::uint32_t handle, std::uint32_t from,
                std::uint32_t what, std::uint32_t number = 1) {
  return {.kind = Kind::duplicate,
          .process = number,
          .client = client,
          .parent = parent,
          .handle = handle,
          .source_client = from,
          .source_handle = what,
          .fd = 9};
}
Event exported(std::uint32_t client, std::uint32_t handle, std::uint32_t number = 1) {
  return {.kind = Kind::exported, .process = number, .client = client, .handle = handle};
}
Event imported(std::uint32_t client, std::uint32_t parent, std::uint32_t handle, std::uint32_t number) {
  return {
      .kind = Kind::import, .process = number, .client = client, .parent = parent, .handle = handle, .fd = 9};
}

constexpr Event unheld{.kind = Kind::unheld};

struct WithDevice : testing::Test {
  WithDevice() {
    ledger.apply(process(1));
    ledger.apply(process(2));
    ledger.apply(object(What::device, 0xc1, 0xc1, 2, 1));
    ledger.apply(object(What::subdevice, 0xc1, 2, 3, 1));
    ledger.apply(object(What::device, 0xc2, 0xc2, 2, 1, 0, 2));
  }
  Ledger ledger;
};

TEST_F(WithDevice, memory_counts_on_its_gpu_until_it_is_freed) {
  EXPECT_TRUE(ledger.apply(object(What::memory, 0xc1, 2, 10, 1, 5 * MiB)));
  EXPECT_EQ(ledger.used(1), 5 * MiB);
  EXPECT_EQ(ledger.used(0), 0U);
  EXPECT_TRUE(ledger.apply(freed(0xc1, 10)));
  EXPECT_EQ(ledger.used(1), 0U);
}

TEST_F(WithDevice, what_is_below_goes_with_what_is_above) {
  ledger.apply(object(What::memory, 0xc1, 2, 10, 1, 5 * MiB));
  ledger.apply(object(What::memory, 0xc1, 3, 11, 1, 7 * MiB));
  EXPECT_TRUE(ledger.apply(freed(0xc1, 3)));
  EXPECT_EQ(ledger.used(1), 5 * MiB);
  EXPECT_TRUE(ledger.apply(freed(0xc1, 0xc1)));
  EXPECT_EQ(ledger.used(1), 0U);
  EXPECT_FALSE(ledger.knows(0xc1, 3));
}

TEST_F(WithDevice, a_parent_nobody_recorded_still_takes_its_children_along) {
  ledger.apply(object(What::memory, 0xc1, 99, 10, 1, 5 * MiB));
  EXPECT_FALSE(ledger.knows(0xc1, 99));
  EXPECT_TRUE(ledger.apply(freed(0xc1, 99)));
  EXPECT_EQ(ledger.used(1), 0U);
}

TEST_F(WithDevice, bytes_live_while_any_handle_of_them_lives) {
  ledger.apply(object(What::memory, 0xc1, 2, 10, 1, 5 * MiB));
  EXPECT_TRUE(ledger.apply(duplicate(0xc2, 2, 20, 0xc1, 10, 2)));
  EXPECT_EQ(ledger.used(1), 5 * MiB);
  ledger.apply(gone(1));
  EXPECT_EQ(ledger.used(1), 5 * MiB);
  ledger.apply(freed(0xc2, 20));
  EXPECT_EQ(ledger.used(1), 0U);
}

TEST_F(WithDevice, exported_bytes_stay_beyond_their_exporter_until_no_descriptor_holds_them) {
  ledger.apply(object(What::memory, 0xc1, 2, 10, 1, 5 * MiB));
  EXPECT_TRUE(ledger.apply(exported(0xc1, 10)));
  ledger.apply(freed(0xc1, 10));
  EXPECT_FALSE(ledger.apply(unheld));  // the exporter lives
  EXPECT_EQ(ledger.used(1), 5 * MiB);
  EXPECT_FALSE(ledger.orphans());
  ledger.apply(gone(1));
  EXPECT_EQ(ledger.used(1), 5 * MiB);
  EXPECT_TRUE(ledger.orphans());
  EXPECT_TRUE(ledger.apply(unheld));
  EXPECT_EQ(ledger.used(1), 0U);
  EXPECT_FALSE(ledger.orphans());
}

TEST_F(WithDevice, orphans_stay_while_the_tenant_imports) {
  ledger.apply(object(What::memory, 0xc1, 2, 10, 1, 5 * MiB));
  ledger.apply(exported(0xc1, 10));
  ledger.apply(imported(0xc2, 2, 20, 2));
  EXPECT_EQ(ledger.used(1), 5 * MiB);  // not charged twice
  ledger.apply(gone(1));
  EXPECT_FALSE(ledger.orphans());
  EXPECT_FALSE(ledger.apply(unheld));
  EXPECT_EQ(ledger.used(1), 5 * MiB);
  ledger.apply(freed(0xc2, 20));
  EXPECT_EQ(ledger.used(1), 5 * MiB);  // its descriptor may be open still
  EXPECT_TRUE(ledger.apply(unheld));
  EXPECT_EQ(ledger.used(1), 0U);
}

TEST_F(WithDevice, the_last_handle_of_exported_bytes_may_go_after_their_exporter) {
  ledger.apply(object(What::memory, 0xc1, 2, 10, 1, 5 * MiB));
  ledger.apply(exported(0xc1, 10));
  ledger.apply(duplicate(0xc2, 2, 20, 0xc1, 10, 2));
  ledger.apply(gone(1));
  Ledger again;
  ledger.snapshot([&](const Event& event) { EXPECT_TRUE(again.apply(event)); });
  for (auto* each : {&ledger, &again}) {
    EXPECT_EQ(each->used(1), 5 * MiB);
    EXPECT_FALSE(each->orphans());
    each->apply(freed(0xc2, 20));
    EXPECT_EQ(each->used(1), 5 * MiB);
    EXPECT_TRUE(each->orphans());
    each->apply(unheld);
    EXPECT_EQ(each->used(1), 0U);
  }
}

TEST_F(WithDevice, hearsay_takes_no_bytes_out) {
  ledger.apply(object(What::memory, 0xc1, 2, 10, 1, 5 * MiB));
  EXPECT_FALSE(ledger.apply(hearsay(object(What::subdevice, 0xc1, 2, 10, 1))));
  EXPECT_FALSE(ledger.apply(hearsay(object(What::device, 0xc1, 0xc1, 2, 0))));
  EXPECT_FALSE(ledger.apply(hearsay(freed(0xc1, 2))));
  EXPECT_EQ(ledger.used(1), 5 * MiB);
  EXPECT_TRUE(ledger.apply(hearsay(object(What::subdevice, 0xc1, 2, 3, 1))));  // nothing was there to lose
}

TEST_F(WithDevice, the_driver_knows_better_than_what_was_known) {
  ledger.apply(object(What::memory, 0xc1, 2, 10, 1, 5 * MiB));
  EXPECT_TRUE(ledger.apply(object(What::memory, 0xc1, 2, 10, 1, 3 * MiB)));
  EXPECT_EQ(ledger.used(1), 3 * MiB);
}

TEST_F(WithDevice, a_group_is_listed_once_it_has_channels_with_what_it_takes_to_reach_it) {
  auto group = object(What::group, 0xc1, 2, 30, 1, 12345);
  group.engine = 1;
  ledger.apply(group);
  EXPECT_TRUE(ledger.groups().empty());
  const auto before = ledger.generation();
  ledger.apply(object(What::channel, 0xc1, 30, 32, 1));
  ledger.apply(object(What::channel, 0xc1, 30, 31, 1));
  EXPECT_NE(ledger.generation(), before);
  const auto groups = ledger.groups();
  ASSERT_EQ(groups.size(), 1U);
  EXPECT_EQ(groups[0].channels, (std::vector<std::uint32_t>{31, 32}));
  EXPECT_EQ(groups[0].subdevice, 3U);
  EXPECT_EQ(groups[0].gpu, 1U);
  EXPECT_EQ(groups[0].engine, 1U);
  EXPECT_EQ(groups[0].process, 1U);
  EXPECT_EQ(groups[0].fd, 9);
  EXPECT_EQ(groups[0].born_ns, 12345U);
}

TEST_F(WithDevice, clients_that_another_process_still_holds_live_on_with_it) {
  ledger.apply(object(What::memory, 0xc1, 2, 10, 1, 5 * MiB));
  EXPECT_TRUE(ledger.apply({.kind = Kind::moved, .process = 1, .cls = 2, .source_handle = 4, .fd = 9}));
  ledger.apply(gone(1));
  EXPECT_EQ(ledger.used(1), 5 * MiB);
  EXPECT_EQ(ledger.owner_of(0xc1), (std::pair<std::uint32_t, int>{2, 4}));
  ledger.apply(gone(2));
  EXPECT_EQ(ledger.used(1), 0U);
}

TEST_F(WithDevice, managed_bytes_are_what_a_process_has_mapped_now) {
  ledger.apply({.kind = Kind::managed, .gpu = 1, .process = 1, .bytes = 8 * MiB});
  ledger.apply({.kind = Kind::managed, .gpu = 1, .process = 1, .bytes = 2 * MiB});
  EXPECT_EQ(ledger.used(1), 2 * MiB);
  EXPECT_EQ(ledger.managed(1), 2 * MiB);
  EXPECT_EQ(ledger.home_of(1), 1U);
  ledger.apply(gone(1));
  EXPECT_EQ(ledger.used(1), 0U);
}

TEST(Ledger, at_its_bound_it_says_so_and_takes_no_more) {
  Ledger ledger;
  ledger.apply(process(1));
  std::uint32_t handle = 1000;
  while (!ledger.full()) ASSERT_TRUE(ledger.apply(object(What::memory, 0xc1, 0xc1, handle++, 0, MiB)));
  const auto used = ledger.used(0);
  while (ledger.apply(object(What::memory, 0xc1, 0xc1, handle++, 0, MiB))) {
  }
  EXPECT_LE(ledger.used(0), used + 4 * MiB);
  Ledger again;
  std::size_t events = 0;
  ledger.snapshot([&](const Event& event) {
    EXPECT_TRUE(again.apply(event));
    ++events;
  });
  EXPECT_EQ(again.used(0), ledger.used(0));
  EXPECT_LE(events, 2 * max_objects + 2 * max_processes);
  EXPECT_TRUE(ledger.apply(freed(0xc1, 1000)));
}

// The rules once more, by scanning everything every time.
struct Naive {
  struct Object {
    std::uint32_t client, handle, parent;
    What what;
    bool placeholder, imported;
    int gpu, bytes_id;
  };
  struct Bytes {
    std::uint64_t bytes;
    std::uint32_t exporter;
    int gpu;
    bool gone = false;  // or an orphan
  };
  static constexpr std::uint32_t ended = ~0U;
  std::vector<Object> objects;
  std::map<std::uint32_t, std::uint32_t> clients;  // to process
  std::vector<Bytes> bytes;
  std::map<std::uint32_t, std::pair<std::uint64_t, int>> processes;
  std::uint64_t orphaned[max_gpus] = {};

  Object* find(std::uint32_t c, std::uint32_t h) {
    for (auto& o : objects)
      if (o.client == c && o.handle == h) return &o;
    return nullptr;
  }
  std::set<std::uint32_t> below(std::uint32_t c, std::uint32_t h) {
    std::set<std::uint32_t> all{h};
    for (bool more = true; more;) {
      more = false;
      for (auto& o : objects)
        if (o.client == c && (all.contains(o.parent) || h == c) && all.insert(o.handle).second) more = true;
    }
    return all;
  }
  bool guarded(std::uint32_t c, std::uint32_t h) {
    for (const auto x : below(c, h))
      if (auto* o = find(c, x); o != nullptr && (o->bytes_id >= 0 || o->imported || o->what == What::group))
        return true;
    return false;
  }
  bool handled(int id) {
    for (auto& o : objects)
      if (o.bytes_id == id) return true;
    return false;
  }
  void settle() {
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      auto& b = bytes[i];
      if (b.gone || handled(static_cast<int>(i)) || (b.exporter != 0 && b.exporter != ended)) continue;
      b.gone = true;
      if (b.exporter == ended) orphaned[b.gpu] += b.bytes;
    }
  }
  void remove(std::uint32_t c, std::uint32_t h) {
    const auto all = below(c, h);
    std::erase_if(objects, [&](const Object& o) { return o.client == c && all.contains(o.handle); });
    if (h == c) clients.erase(c);
    settle();
  }
  bool place(const Event& e, Object made) {
    if (e.handle == 0 || e.handle == e.client) return false;
    if (auto* old = find(e.client, e.handle); old != nullptr && !old->placeholder) {
      if (e.hearsay != 0 && guarded(e.client, e.handle)) return false;
      remove(e.client, e.handle);
    }
    clients.try_emplace(e.client, e.process);
    if (e.parent != e.client && find(e.client, e.parent) == nullptr)
      objects.push_back({e.client, e.parent, e.client, What::other, true, false, -1, -1});
    made.parent = e.parent;
    if (below(e.client, e.handle).contains(e.parent) && find(e.client, e.handle) != nullptr)
      made.parent = e.client;
    if (auto* old = find(e.client, e.handle)) {
      *old = made;
    } else {
      objects.push_back(made);
    }
    return true;
  }
  void apply(const Event& e) {
    Object made{e.client, e.handle, e.parent, e.what, false, false, e.gpu < max_gpus ? e.gpu : -1, -1};
    switch (e.kind) {
      case Kind::process:
        processes.try_emplace(e.process, 0, 0);
        break;
      case Kind::process_gone: {
        if (processes.erase(e.process) == 0) break;
        for (auto copy = clients; const auto& [c, p] : copy)
          if (p == e.process) remove(c, c);
        for (auto& b : bytes)
          if (b.exporter == e.process) b.exporter = ended;
        settle();
        break;
      }
      case Kind::moved:
        for (auto& [c, p] : clients)
          if (p == e.process) p = e.cls;
        break;
      case Kind::object:
        if (e.what == What::client || !place(e, made) || e.what != What::memory) break;
        bytes.push_back({e.bytes, 0, e.gpu});
        find(e.client, e.handle)->bytes_id = static_cast<int>(bytes.size()) - 1;
        break;
      case Kind::duplicate: {
        auto* from = find(e.source_client, e.source_handle);
        if (from == nullptr || from->placeholder ||
            (e.source_client == e.client && e.source_handle == e.handle))
          break;
        if (from->what == What::group || from->what == What::channel) break;
        const Object source = *from;
        made.what = source.what;
        made.gpu = source.gpu;
        made.bytes_id = source.bytes_id;
        made.imported = source.imported;
        // Holds on to it meanwhile.
        objects.push_back({~0U, ~0U, ~0U, What::other, true, source.imported, -1, source.bytes_id});
        place(e, made);
        std::erase_if(objects, [](const Object& o) { return o.client == ~0U; });
        settle();
        break;
      }
      case Kind::import:
        made.what = What::memory;
        made.imported = true;
        place(e, made);
        break;
      case Kind::free:
        if (find(e.client, e.handle) == nullptr && !(e.client == e.handle && clients.contains(e.client)))
          break;
        if (e.hearsay != 0 && guarded(e.client, e.handle)) break;
        remove(e.client, e.handle);
        break;
      case Kind::exported: {
        auto* o = find(e.client, e.handle);
        if (o != nullptr && o->bytes_id >= 0 && processes.contains(e.process)) {
          auto& exporter = bytes[static_cast<std::size_t>(o->bytes_id)].exporter;
          if (exporter == 0 || exporter == ended) exporter = e.process;
        }
        break;
      }
      case Kind::unheld: {
        bool any = false;
        for (auto& o : objects) any |= o.imported;
        if (any) break;
        std::fill(std::begin(orphaned), std::end(orphaned), 0);
        for (auto& b : bytes)
          if (b.exporter == ended) b.exporter = 0;
        break;
      }
      case Kind::managed:
        if (processes.contains(e.process)) processes[e.process] = {e.bytes, e.gpu};
        break;
      default:
        break;
    }
  }
  std::uint64_t used(int gpu) {
    std::uint64_t sum = orphaned[gpu];
    for (auto& b : bytes)
      if (!b.gone && b.gpu == gpu) sum += b.bytes;
    for (auto& [n, p] : processes)
      if (p.second == gpu) sum += p.first;
    return sum;
  }
};

Event random_event(std::mt19937& random) {
  const auto pick = [&](unsigned n) { return static_cast<std::uint32_t>(random() % n); };
  Event e;
  e.process = 1 + pick(3);
  e.client = 0xc0 + pick(4);
  e.handle = 1 + pick(12);
  e.parent = pick(3) == 0 ? e.client : 1 + pick(12);
  e.fd = 9;
  e.gpu = static_cast<std::uint8_t>(pick(3));
  e.hearsay = pick(3) == 0 ? 1 : 0;
  e.bytes = (1 + pick(64)) << 16;
  const auto dice = pick(100);
  if (dice < 45) {
    e.kind = Kind::object;
    constexpr What kinds[] = {What::memory, What::memory,    What::memory, What::device,
                              What::device, What::subdevice, What::group,  What::channel};
    e.what = kinds[pick(8)];
    if (e.what == What::memory) e.hearsay = 0;
  } else if (dice < 60) {
    e.kind = Kind::duplicate;
    e.source_client = 0xc0 + pick(4);
    e.source_handle = 1 + pick(12);
  } else if (dice < 65) {
    e.kind = Kind::import;
  } else if (dice < 82) {
    e.kind = Kind::free;
    if (pick(8) == 0) e.handle = e.client;
  } else if (dice < 88) {
    e.kind = Kind::exported;
  } else if (dice < 90) {
    e.kind = Kind::unheld;
  } else if (dice < 94) {
    e.kind = Kind::managed;
  } else if (dice < 95) {
    e.kind = Kind::moved;
    e.cls = 1 + pick(3);
    e.source_handle = 9;
  } else if (dice < 97) {
    e.kind = Kind::process_gone;
  } else {
    e.kind = Kind::process;
  }
  return e;
}

// A client lives while it has a process; the driver gives its handle to nobody else meanwhile.
bool possible(const Event& e, const Ledger& ledger) {
  if (e.kind == Kind::process || e.kind == Kind::process_gone || e.kind == Kind::free ||
      e.kind == Kind::unheld)
    return true;
  if (e.kind == Kind::moved && !ledger.processes().contains(e.cls)) return false;
  return ledger.processes().contains(e.process);
}

void expect_same(const Ledger& a, const Ledger& b, unsigned seed, int step) {
  for (std::uint32_t gpu = 0; gpu < 3; ++gpu) ASSERT_EQ(a.used(gpu), b.used(gpu)) << seed << " " << step;
  ASSERT_EQ(a.orphans(), b.orphans()) << seed << " " << step;
  const auto one = a.groups(), two = b.groups();
  ASSERT_EQ(one.size(), two.size()) << seed << " " << step;
  for (std::size_t i = 0; i < one.size(); ++i) {
    ASSERT_EQ(one[i].handle, two[i].handle);
    ASSERT_EQ(one[i].channels, two[i].channels);
    ASSERT_EQ(one[i].subdevice, two[i].subdevice) << seed << " " << step;
    ASSERT_EQ(one[i].process, two[i].process);
  }
  for (std::uint32_t c = 0xc0; c < 0xc4; ++c)
    for (std::uint32_t h = 1; h < 13; ++h) ASSERT_EQ(a.knows(c, h), b.knows(c, h)) << seed << " " << step;
}

TEST(Ledger, holds_what_a_naive_reading_of_the_rules_holds) {
  for (unsigned seed = 1; seed <= 300; ++seed) {
    std::mt19937 random(seed);
    Ledger ledger;
    Naive naive;
    for (int step = 0; step < 200; ++step) {
      const Event e = random_event(random);
      if (!possible(e, ledger)) continue;
      ledger.apply(e);
      naive.apply(e);
      for (int gpu = 0; gpu < 3; ++gpu)
        ASSERT_EQ(ledger.used(static_cast<std::uint32_t>(gpu)), naive.used(gpu)) << seed << " " << step;
      for (std::uint32_t c = 0xc0; c < 0xc4; ++c) {
        for (std::uint32_t h = 1; h < 13; ++h) {
          const auto* o = naive.find(c, h);
          ASSERT_EQ(ledger.knows(c, h), o != nullptr && !o->placeholder) << seed << " " << step;
        }
      }
    }
  }
}

TEST(Ledger, made_again_from_its_snapshot_it_is_the_same_from_then_on) {
  for (unsigned seed = 1; seed <= 300; ++seed) {
    std::mt19937 random(seed * 7919);
    Ledger ledger;
    const int before = static_cast<int>(random() % 300);
    for (int step = 0; step < before; ++step) {
      const Event e = random_event(random);
      if (possible(e, ledger)) ledger.apply(e);
    }
    Ledger again;
    ledger.snapshot(
        [&](const Event& e) { ASSERT_TRUE(again.apply(e)) << seed << " " << static_cast<int>(e.kind); });
    expect_same(ledger, again, seed, -1);
    for (int step = 0; step < 150; ++step) {
      const Event e = random_event(random);
      if (!possible(e, ledger)) continue;
      ledger.apply(e);
      again.apply(e);
      expect_same(ledger, again, seed, step);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

}  // namespace
}  // namespace bulkhead::ledger
