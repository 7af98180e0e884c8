// Fills the tenants' accounts. Once a second it is shown what the GPUs say and who has them, and makes of it
// intervals in which nothing changed hands: a lease begins and ends at the times its own record says, not
// when the meter looked, so a lease's slice-seconds are exact. Energy is what the counter says passed between
// two of its readings. Every interval is split by core/usage and checked to add up before it is written.
//
// Accounts run `lag` behind, so that a lease whose record was on its way to the disk is not missed. What is
// not written yet is not lost: the next meter goes on from the marks in the file, which say up to when, and
// at which reading, the accounts are written. While no daemon ran, leases went on: the gap is theirs, without
// activity, and with energy where the counter went on counting (same boot, same load of the driver). A gap in
// which the host was booted is out of service: nobody pays for a machine that was off. docs/design/ledger.md.
//
// Whose: a lease has a part from `active` to its recorded end. Preparing and scrubbing, GPUs that are
// cordoned, lost, hung, in no pool, and what is free of a host that drains are out of service. The rest is
// unallocated.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "base/clock.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "engine/control/control.hpp"
#include "engine/sample/sample.hpp"

namespace bulkhead::meter {

struct Settings {
  std::filesystem::path root = "/";              // of the host: boot id, the driver's load
  std::function<void(unsigned gpu)> hurry = {};  // reads this GPU's energy counter soon; must not wait
  std::chrono::milliseconds write_every{5'000};
  std::chrono::milliseconds lag{2'000};
  std::chrono::hours keep{400 * 24};  // accounts; older quarters of an hour go
};

// What part of a GPU's time the programs of a share had over the last seconds, 0..1: by the GPU's UUID and
// the lease. The GPU's own counters cannot tell those apart who take turns on it; the driver's of each
// process can.
using Shares = std::map<std::pair<std::string, std::int64_t>, double>;
// From the registry of shares, whose arbiters ask the driver (nvmlDeviceGetProcessUtilization). A share whose
// arbiter does not know is not among them. Reads files, where there are leases of class share; asks no
// driver.
Shares shares_now(const std::filesystem::path& root, const control::Snapshot& has);

// One thread at a time.
class Meter {
 public:
  // An Error: the accounts' file is damaged, newer, or cannot be written.
  static Result<std::unique_ptr<Meter>> open(const std::filesystem::path& state, Settings settings);
  ~Meter();  // writes what is closed
  Meter(const Meter&) = delete;
  Meter& operator=(const Meter&) = delete;

  // An Error says what could not be counted or written, once while it lasts; it is tried again at the next
  // step.
  Status step(const sample::Snapshot& said, const control::Snapshot& has, WallTime now,
              std::uint64_t monotonic_ns, const Shares& shares = {});
  // Now, not when it is due.
  Status write();

 private:
  Meter();
  struct Inside;
  std::unique_ptr<Inside> inside_;
};

// ---- reading the accounts, daemon running or not

struct Ask {
  WallTime from = {}, to = {};             // widened to whole quarters of an hour
  std::optional<std::string> tenant = {};  // of its leases alone: nothing that tells of others
  bool by_day = false, by_lease = false, by_gpu = false;
  std::chrono::minutes offset{0};  // a day begins where the clock is so far before UTC's
};
// "2026-11-01", "2026-11-01T00:00:00Z", "2026-11-01T00:00+05:45"; a date alone begins in UTC, or where the
// offset behind it says: "2026-11-01+05:45".
struct Moment {
  WallTime at = {};
  std::chrono::minutes offset{0};
};
Result<Moment> parse_moment(std::string_view text);
// "day", "lease", "gpu", "tenant" (which is always told), with commas.
Status parse_by(std::string_view text, Ask& ask);
// The document of GET /usage (api/v1, "Usage"): lines with exact integers, and whether they are what passed.
Result<Json> report(const std::filesystem::path& state, const Ask& ask);

}  // namespace bulkhead::meter
