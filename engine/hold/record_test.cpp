#include "engine/hold/record.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <random>

namespace bulkhead::hold {
namespace {

using ledger::Event;
using ledger::Kind;
using ledger::What;

struct Mapped {
  Record* record = static_cast<Record*>(::mmap(nullptr, sizeof(Record), PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  ~Mapped() { ::munmap(record, sizeof(Record)); }
};

TEST(HoldRecord, a_journal_opened_again_has_the_same_ledger_through_any_number_of_compactions) {
  const Mapped mapped;
  auto journal = std::make_unique<Journal>(*mapped.record);
  journal->apply({.kind = Kind::process, .process = 1, .source_client = 4711, .bytes = 99});
  std::mt19937 random(3);
  std::uint64_t applied = journal->sequence();
  for (int i = 0; i < 60'000; ++i) {
    const auto handle = static_cast<std::uint32_t>(100 + random() % 3000);
    const bool free = random() % 2 == 0;
    const Event event{.kind = free ? Kind::free : Kind::object,
                      .what = What::memory,
                      .process = 1,
                      .client = 0xc1,
                      .parent = 2,
                      .handle = handle,
                      .bytes = 4096ULL * (1 + random() % 100),
                      .fd = 3};
    if (journal->apply(event)) ++applied;
    ASSERT_EQ(journal->sequence(), applied);
    if (i % 977 == 0) {
      const auto used = journal->ledger().used(0);
      journal = std::make_unique<Journal>(*mapped.record);
      ASSERT_EQ(journal->ledger().used(0), used);
      ASSERT_EQ(journal->sequence(), applied);
    }
  }
}

TEST(HoldRecord, an_event_without_effect_is_not_kept) {
  const Mapped mapped;
  Journal journal(*mapped.record);
  EXPECT_FALSE(journal.apply({.kind = Kind::free, .client = 0xc1, .handle = 5}));
  EXPECT_EQ(journal.sequence(), 0U);
}

TEST(HoldRecord, a_record_cut_off_before_its_last_store_is_the_one_before) {
  const Mapped mapped;
  std::uint64_t used = 0;
  {
    Journal journal(*mapped.record);
    journal.apply({.kind = Kind::object,
                   .what = What::memory,
                   .process = 1,
                   .client = 0xc1,
                   .parent = 2,
                   .handle = 5,
                   .bytes = 4096,
                   .fd = 3});
    used = journal.ledger().used(0);
  }
  const auto state = mapped.record->log_state.load();
  mapped.record->log[state >> 63U][state & ~(1ULL << 63U)] = {
      .kind = Kind::free, .client = 0xc1, .handle = 5};
  EXPECT_EQ(Journal(*mapped.record).ledger().used(0), used);
}

}  // namespace
}  // namespace bulkhead::hold
