// The tenants' accounts: who had and used what of which GPU, summed per quarter of an hour (the largest step
// in which every time zone's day begins). One SQLite database (`usage.db`, WAL, synchronous=FULL, STRICT
// tables) in the state directory; one writer, any number of readers. A commit adds its rows to what is there
// and sets the marks in the same transaction, so that what was counted and up to when can never disagree:
// after a crash the writer goes on from the marks, and nothing is counted twice. What is older than it should
// be kept goes, whole quarters at a time.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.hpp"
#include "base/ids.hpp"
#include "base/result.hpp"
#include "core/usage/usage.hpp"

namespace bulkhead::accounts {

inline constexpr std::int64_t quarter_s = 900;
inline constexpr std::size_t most_rows = 65'536;      // of one commit, all kinds together
inline constexpr std::size_t most_answers = 200'000;  // rows of one query; more is Errc::no_capacity
inline constexpr std::size_t text_bytes = 256;        // names

// Whose account a row is.
enum class Kind : std::uint8_t { lease, unallocated, out_of_service };

// One part of a lease, or nobody.
struct Holder {
  Kind kind = Kind::unallocated;
  std::int64_t lease = 0;  // 0 where kind is not `lease`
  unsigned part = 0;       // of the lease's parts
  std::string tenant = {}, user = {}, cls = {}, profile = {}, label = {};
  unsigned units = 0;           // of usage::whole_gpu
  std::int64_t generation = 0;  // of the MIG instance, from the journal
  friend auto operator<=>(const Holder&, const Holder&) = default;
};

// Which counter of energy: a boot of the host, a load of the driver.
struct Epoch {
  std::int64_t id = 0;                    // counts up
  std::string boot_id = {}, driver = {};  // driver: what told this load from another
  WallTime since = {};
  friend bool operator==(const Epoch&, const Epoch&) = default;
};

struct Row {
  std::int64_t quarter = 0;  // seconds since 1970 / quarter_s
  Uuid gpu = {};
  std::int64_t epoch = 0;
  Holder holder = {};
  usage::Amounts amounts = {};
};

// What passed on a GPU, whoever had it: kept beside the rows, not made of them, so that a reader can check.
struct Passed {
  std::int64_t quarter = 0;
  Uuid gpu = {};
  std::int64_t epoch = 0;
  std::uint64_t us = 0, energy_mj = 0, unmetered_us = 0;
};

// Up to where a GPU's accounts are written.
struct Mark {
  Uuid gpu = {};
  std::string name = {};           // its model
  std::int64_t until_us = 0;       // since 1970
  std::uint64_t monotonic_ns = 0;  // the same moment; of the boot of `epoch`
  std::int64_t epoch = 0;
  std::optional<std::uint64_t> counter_mj = {};  // the energy counter, as last read
  std::uint64_t counter_ns = 0;                  // when it was, monotonic: then, or earlier
};

// What a GPU model draws, and the samples it was fitted to.
struct Fit {
  std::string model = {};
  usage::PowerModel power = {};
  bool fitted = false;
  std::vector<usage::Sample> samples = {};
};

struct Batch {
  std::vector<Row> rows = {};
  std::vector<Passed> passed = {};
  std::vector<Mark> marks = {};
  std::vector<Epoch> epochs = {};
  std::vector<Fit> fits = {};
  bool empty() const {
    return rows.empty() && passed.empty() && marks.empty() && epochs.empty() && fits.empty();
  }
};

struct Query {
  std::int64_t from = 0, to = 0;           // quarters; `to` is not in it
  std::optional<std::string> tenant = {};  // of this tenant's leases alone; no GPU's totals then
  bool by_day = false, by_lease = false, by_gpu = false;
  std::int64_t day_offset_s = 0;  // a day begins so many seconds before UTC's; whole quarters
};
// A sum over the rows of one group. Tenant, class, profile and units are always told apart, as their prices
// are.
struct Sum {
  std::optional<std::int64_t> day = {};  // its first second since 1970
  Uuid gpu = {};                         // empty unless by_gpu
  Holder holder = {};  // lease, part, user and label only by_lease; generation only where all have the same
  usage::Amounts amounts = {};
};
struct GpuTotal {
  Uuid gpu = {};
  std::string name = {};
  std::uint64_t us = 0, energy_mj = 0, unmetered_us = 0;
};
struct Answer {
  std::vector<Sum> sums = {};
  std::vector<GpuTotal> gpus = {};
  std::vector<Epoch> epochs = {};               // that the period touches; none with Query::tenant
  std::optional<std::int64_t> first_us = {};    // the accounts begin here
  std::optional<std::int64_t> written_us = {};  // and are written up to here: the least of the marks
};

// One thread at a time. Who only reads opens one of its own, in another process or thread.
class Accounts {
 public:
  enum class Access { read_only, read_write };
  static Result<std::unique_ptr<Accounts>> open(const std::filesystem::path& directory, Access access);
  ~Accounts();
  Accounts(const Accounts&) = delete;
  Accounts& operator=(const Accounts&) = delete;
  static std::filesystem::path file_in(const std::filesystem::path& directory) {
    return directory / "usage.db";
  }

  // Adds rows and passed to what is there, replaces marks and fits; durable when it returns, or nothing of it
  // is. Errc::invalid: a bound, a sum beyond 63 bits.
  Status commit(const Batch& batch);
  Result<std::vector<Mark>> marks();
  Result<std::vector<Epoch>> epochs();
  Result<std::vector<Fit>> fits();
  // All of it is of one moment, though the writer goes on.
  Result<Answer> ask(const Query& query);
  // Drops what lies before a quarter, a bounded number of rows at once. False: there is more.
  Result<bool> forget(std::int64_t before_quarter);

 private:
  Accounts();
  struct Database;
  std::unique_ptr<Database> database_;
};

}  // namespace bulkhead::accounts
