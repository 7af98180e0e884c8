#include "edge/accounts/accounts.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <utility>

#include <fmt/format.h>

#include "base/json.hpp"
#include "base/text.hpp"
#include "edge/sqlite/sqlite.hpp"

namespace bulkhead::accounts {

namespace fs = std::filesystem;

namespace {

using sqlite::Statement;

constexpr std::int64_t application_id = 0x42485531;  // "BHU1"
constexpr int checkpoint_pages = 1024;
constexpr int row_bytes = 1 << 20;           // a longer row in the file is damage, not data
constexpr std::size_t most_known = 20'000;   // holders whose row is remembered
constexpr std::int64_t forget_at_once = 96;  // quarters
constexpr std::size_t most_samples = 1024;   // of a fit
constexpr std::int64_t us_of_quarter = quarter_s * 1'000'000;

// One entry a schema version: migrations[n] turns version n into n + 1. Never edit an entry that was
// released.
constexpr const char* migrations[] = {
    R"sql(
CREATE TABLE gpus (
  id   INTEGER PRIMARY KEY,
  uuid TEXT NOT NULL UNIQUE,
  name TEXT NOT NULL
) STRICT;
CREATE TABLE holders (
  id         INTEGER PRIMARY KEY,
  kind       INTEGER NOT NULL CHECK (kind IN (0, 1, 2)),  -- a lease's, unallocated, out of service
  lease      INTEGER NOT NULL,
  part       INTEGER NOT NULL,
  generation INTEGER NOT NULL,
  units      INTEGER NOT NULL,
  tenant     TEXT    NOT NULL,
  user       TEXT    NOT NULL,
  class      TEXT    NOT NULL,
  profile    TEXT    NOT NULL,
  label      TEXT    NOT NULL,
  last       INTEGER NOT NULL,  -- the quarter it was last in
  UNIQUE (lease, kind, part, generation, units, tenant, user, class, profile, label)
) STRICT;
CREATE TABLE epochs (
  id       INTEGER PRIMARY KEY,
  boot_id  TEXT    NOT NULL,
  driver   TEXT    NOT NULL,
  since_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE used (
  quarter      INTEGER NOT NULL,
  gpu          INTEGER NOT NULL REFERENCES gpus (id),
  holder       INTEGER NOT NULL REFERENCES holders (id),
  epoch        INTEGER NOT NULL,
  unit_us      INTEGER NOT NULL CHECK (unit_us >= 0),
  used_unit_us INTEGER NOT NULL CHECK (used_unit_us >= 0),
  mib_us       INTEGER NOT NULL CHECK (mib_us >= 0),
  sm_us        INTEGER NOT NULL CHECK (sm_us >= 0),
  tensor_us    INTEGER NOT NULL CHECK (tensor_us >= 0),
  dram_us      INTEGER NOT NULL CHECK (dram_us >= 0),
  idle_mj      INTEGER NOT NULL CHECK (idle_mj >= 0),
  dynamic_mj   INTEGER NOT NULL CHECK (dynamic_mj >= 0),
  error_mj     INTEGER NOT NULL CHECK (error_mj >= 0),
  blind_us     INTEGER NOT NULL CHECK (blind_us >= 0),
  unmetered_us INTEGER NOT NULL CHECK (unmetered_us >= 0),
  PRIMARY KEY (quarter, gpu, holder, epoch)
) STRICT, WITHOUT ROWID;
CREATE TABLE passed (
  quarter      INTEGER NOT NULL,
  gpu          INTEGER NOT NULL REFERENCES gpus (id),
  epoch        INTEGER NOT NULL,
  us           INTEGER NOT NULL CHECK (us >= 0),
  energy_mj    INTEGER NOT NULL CHECK (energy_mj >= 0),
  unmetered_us INTEGER NOT NULL CHECK (unmetered_us >= 0),
  PRIMARY KEY (quarter, gpu, epoch)
) STRICT, WITHOUT ROWID;
CREATE TABLE marks (
  gpu          INTEGER PRIMARY KEY REFERENCES gpus (id),
  until_us     INTEGER NOT NULL,
  monotonic_ns INTEGER NOT NULL,
  epoch        INTEGER NOT NULL,
  counter_mj   INTEGER,
  counter_ns   INTEGER NOT NULL
) STRICT;
CREATE TABLE fits (
  model TEXT NOT NULL PRIMARY KEY,
  body  TEXT NOT NULL
) STRICT;
)sql",
};

std::string out_of_it(const fs::path& file) {
  return fmt::format(
      "it is left as it is; stop the daemon, and bring the last good copy back, or begin anew: mv {0} "
      "{0}.aside "
      "(what was used before is then in the copy aside alone)",
      file.string());
}

Error beyond(std::string what) { return Error(Errc::invalid, std::move(what)); }

// SQLite's integers are signed.
bool fits_in(std::uint64_t value) {
  return value <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
}
std::int64_t stored(std::uint64_t value) { return static_cast<std::int64_t>(value); }
std::uint64_t read_back(std::int64_t value) { return value < 0 ? 0 : static_cast<std::uint64_t>(value); }

constexpr std::array amounts_of{
    &usage::Amounts::unit_us,  &usage::Amounts::used_unit_us, &usage::Amounts::mib_us,
    &usage::Amounts::sm_us,    &usage::Amounts::tensor_us,    &usage::Amounts::dram_us,
    &usage::Amounts::idle_mj,  &usage::Amounts::dynamic_mj,   &usage::Amounts::error_mj,
    &usage::Amounts::blind_us, &usage::Amounts::unmetered_us};

Status within(const Batch& batch) {
  if (batch.rows.size() + batch.passed.size() + batch.marks.size() + batch.epochs.size() + batch.fits.size() >
      most_rows)
    return beyond(fmt::format("more than {} rows in one commit", most_rows));
  const auto text = [](std::string_view value, std::string_view what) -> Status {
    if (value.size() <= text_bytes) return ok_status();
    return beyond(fmt::format("{} has {} bytes, the most is {}", what, value.size(), text_bytes));
  };
  for (const auto& row : batch.rows) {
    const Holder& holder = row.holder;
    if ((holder.kind == Kind::lease) != (holder.lease > 0))
      return beyond("a row of a lease without its number");
    for (const auto* one : {&holder.tenant, &holder.user, &holder.cls, &holder.profile, &holder.label})
      BH_CHECK(text(*one, "a name in the accounts"));
    BH_CHECK(text(row.gpu.text, "a GPU's UUID"));
    for (const auto member : amounts_of)
      if (!fits_in(row.amounts.*member)) return beyond("an amount is beyond 63 bits");
  }
  for (const auto& one : batch.passed) {
    BH_CHECK(text(one.gpu.text, "a GPU's UUID"));
    if (!fits_in(one.us) || !fits_in(one.energy_mj) || !fits_in(one.unmetered_us))
      return beyond("an amount is beyond 63 bits");
  }
  for (const auto& one : batch.marks) {
    BH_CHECK(text(one.gpu.text, "a GPU's UUID"));
    BH_CHECK(text(one.name, "a GPU's name"));
    if (!fits_in(one.monotonic_ns) || !fits_in(one.counter_ns) ||
        (one.counter_mj && !fits_in(*one.counter_mj)))
      return beyond("a mark is beyond 63 bits");
  }
  for (const auto& one : batch.epochs) {
    BH_CHECK(text(one.boot_id, "a boot id"));
    BH_CHECK(text(one.driver, "a load of the driver"));
  }
  for (const auto& one : batch.fits) {
    BH_CHECK(text(one.model, "a GPU's name"));
    if (one.samples.size() > most_samples) return beyond("a fit has too many samples");
  }
  return ok_status();
}

Json body_of(const Fit& fit) {
  Json samples = Json::array();
  for (const auto& one : fit.samples)
    samples.push_back({one.activity.sm, one.activity.tensor, one.activity.dram, one.watts});
  return {{"idle", fit.power.idle},       {"sm", fit.power.sm},       {"tensor", fit.power.tensor},
          {"dram", fit.power.dram},       {"error", fit.power.error}, {"fitted", fit.fitted},
          {"samples", std::move(samples)}};
}

// nullopt: nonsense. A fit is an estimate that is made anew, so it is dropped rather than complained about.
std::optional<Fit> fit_of(std::string model, const Json& body) {
  const auto number = [&](const char* key) -> double {
    const auto at = body.find(key);
    return at != body.end() && at->is_number() ? at->get<double>() : -1;
  };
  if (!body.is_object()) return std::nullopt;
  Fit out{.model = std::move(model),
          .power = {.idle = number("idle"),
                    .sm = number("sm"),
                    .tensor = number("tensor"),
                    .dram = number("dram"),
                    .error = number("error")}};
  for (const double value : {out.power.idle, out.power.sm, out.power.tensor, out.power.dram, out.power.error})
    if (!(value >= 0 && value < 1e6)) return std::nullopt;
  const auto fitted = body.find("fitted");
  out.fitted = fitted != body.end() && fitted->is_boolean() && fitted->get<bool>();
  const auto samples = body.find("samples");
  if (samples == body.end() || !samples->is_array() || samples->size() > most_samples) return std::nullopt;
  for (const auto& one : *samples) {
    if (!one.is_array() || one.size() != 4) return std::nullopt;
    std::array<double, 4> row{};
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (!one[i].is_number()) return std::nullopt;
      row[i] = one[i].get<double>();
      if (!(row[i] >= 0 && row[i] < 1e6)) return std::nullopt;
    }
    out.samples.push_back({{.sm = row[0], .tensor = row[1], .dram = row[2]}, row[3]});
  }
  return out;
}

}  // namespace

struct Accounts::Database {
  std::unique_ptr<sqlite::Database> sql = {};
  // Rows of things that were written before; the quarter is the one the row says it was last in.
  std::map<std::string, std::int64_t> gpus = {};
  struct Known {
    std::int64_t id = 0, last = 0;
  };
  std::map<Holder, Known> holders = {};

  Status run(Statement& statement, const char* what) const {
    const int code = statement.step();
    if (code == SQLITE_CONSTRAINT || (code & 0xff) == SQLITE_CONSTRAINT)
      return beyond(fmt::format("{}: a sum is beyond 63 bits, or below nothing", what));
    if (code != SQLITE_DONE) return sql->error(what, code);
    statement.reset();
    return ok_status();
  }
  Result<std::int64_t> gpu_of(const Uuid& gpu);
  Result<std::int64_t> holder_of(const Holder& holder, std::int64_t quarter);
  Status write(const Batch& batch);
  Result<Answer> ask(const Query& query);
};

Accounts::Accounts() : database_(std::make_unique<Database>()) {}
Accounts::~Accounts() = default;

Result<std::unique_ptr<Accounts>> Accounts::open(const fs::path& directory, Access access) {
  static constexpr sqlite::Kind kind{.application_id = application_id,
                                     .migrations = migrations,
                                     .noun = "accounts",
                                     .missing = "bulkhead serve has counted nothing here yet",
                                     .migrate_by = "the daemon migrates it: bulkhead serve",
                                     .out_of_it = out_of_it};
  std::unique_ptr<Accounts> accounts(new Accounts());
  BH_TRY(accounts->database_->sql,
         sqlite::Database::open(kind, file_in(directory), access == Access::read_write));
  sqlite3* handle = accounts->database_->sql->handle();
  sqlite3_limit(handle, SQLITE_LIMIT_LENGTH, row_bytes);
  sqlite3_wal_autocheckpoint(handle, checkpoint_pages);
  return accounts;
}

Result<std::int64_t> Accounts::Database::gpu_of(const Uuid& gpu) {
  if (const auto at = gpus.find(gpu.text); at != gpus.end()) return at->second;
  Statement put(sql->handle(), "INSERT INTO gpus (uuid, name) VALUES (?, '') ON CONFLICT DO NOTHING");
  put.bind(gpu.text);
  BH_CHECK(run(put, "write a GPU"));
  Statement get(sql->handle(), "SELECT id FROM gpus WHERE uuid = ?");
  get.bind(gpu.text);
  if (const int code = get.step(); code != SQLITE_ROW) return sql->error("read a GPU", code);
  return gpus[gpu.text] = get.integer(0);
}

Result<std::int64_t> Accounts::Database::holder_of(const Holder& holder, std::int64_t quarter) {
  const auto known = holders.find(holder);
  if (known != holders.end() && known->second.last >= quarter) return known->second.id;
  const auto bind = [&](Statement& statement) {
    statement.bind(static_cast<std::int64_t>(holder.kind)).bind(holder.lease).bind(std::int64_t{holder.part});
    statement.bind(holder.generation).bind(std::int64_t{holder.units}).bind(holder.tenant).bind(holder.user);
    statement.bind(holder.cls).bind(holder.profile).bind(holder.label);
  };
  Statement put(
      sql->handle(),
      "INSERT INTO holders (kind, lease, part, generation, units, tenant, user, class, profile, label, "
      "last) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
      "ON CONFLICT DO UPDATE SET last = max(last, excluded.last)");
  bind(put);
  put.bind(quarter);
  BH_CHECK(run(put, "write a holder"));
  Statement get(sql->handle(),
                "SELECT id, last FROM holders WHERE kind = ? AND lease = ? AND part = ? AND generation = ? "
                "AND units = ? AND tenant = ? AND user = ? AND class = ? AND profile = ? AND label = ?");
  bind(get);
  if (const int code = get.step(); code != SQLITE_ROW) return sql->error("read a holder", code);
  if (holders.size() >= most_known) holders.clear();
  holders[holder] = {get.integer(0), get.integer(1)};
  return get.integer(0);
}

Status Accounts::Database::write(const Batch& batch) {
  sqlite3* handle = sql->handle();
  Statement epoch(handle,
                  "INSERT INTO epochs (id, boot_id, driver, since_ms) VALUES (?, ?, ?, ?) "
                  "ON CONFLICT DO UPDATE SET boot_id = excluded.boot_id, driver = excluded.driver");
  for (const auto& one : batch.epochs) {
    epoch.bind(one.id).bind(one.boot_id).bind(one.driver);
    epoch.bind(std::int64_t{one.since.time_since_epoch().count()});
    BH_CHECK(run(epoch, "write an epoch"));
  }
  Statement used(
      handle,
      "INSERT INTO used (quarter, gpu, holder, epoch, unit_us, used_unit_us, mib_us, sm_us, tensor_us, "
      "dram_us, "
      "idle_mj, dynamic_mj, error_mj, blind_us, unmetered_us) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, "
      "?, ?) "
      "ON CONFLICT DO UPDATE SET unit_us = unit_us + excluded.unit_us, "
      "used_unit_us = used_unit_us + excluded.used_unit_us, mib_us = mib_us + excluded.mib_us, "
      "sm_us = sm_us + excluded.sm_us, tensor_us = tensor_us + excluded.tensor_us, "
      "dram_us = dram_us + excluded.dram_us, idle_mj = idle_mj + excluded.idle_mj, "
      "dynamic_mj = dynamic_mj + excluded.dynamic_mj, error_mj = error_mj + excluded.error_mj, "
      "blind_us = blind_us + excluded.blind_us, unmetered_us = unmetered_us + excluded.unmetered_us");
  for (const auto& row : batch.rows) {
    BH_TRY(const auto gpu, gpu_of(row.gpu));
    BH_TRY(const auto holder, holder_of(row.holder, row.quarter));
    used.bind(row.quarter).bind(gpu).bind(holder).bind(row.epoch);
    for (const auto member : amounts_of) used.bind(stored(row.amounts.*member));
    BH_CHECK(run(used, "write the accounts"));
  }
  Statement passed(
      handle,
      "INSERT INTO passed (quarter, gpu, epoch, us, energy_mj, unmetered_us) "
      "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET us = us + excluded.us, "
      "energy_mj = energy_mj + excluded.energy_mj, unmetered_us = unmetered_us + excluded.unmetered_us");
  for (const auto& one : batch.passed) {
    BH_TRY(const auto gpu, gpu_of(one.gpu));
    passed.bind(one.quarter).bind(gpu).bind(one.epoch).bind(stored(one.us));
    passed.bind(stored(one.energy_mj)).bind(stored(one.unmetered_us));
    BH_CHECK(run(passed, "write what passed"));
  }
  Statement name(handle, "UPDATE gpus SET name = ? WHERE id = ? AND name <> ?1");
  Statement mark(handle,
                 "INSERT OR REPLACE INTO marks (gpu, until_us, monotonic_ns, epoch, counter_mj, counter_ns) "
                 "VALUES (?, ?, ?, ?, ?, ?)");
  for (const auto& one : batch.marks) {
    BH_TRY(const auto gpu, gpu_of(one.gpu));
    name.bind(one.name).bind(gpu);
    BH_CHECK(run(name, "write a GPU's name"));
    mark.bind(gpu).bind(one.until_us).bind(stored(one.monotonic_ns)).bind(one.epoch);
    mark.bind(one.counter_mj ? std::optional(stored(*one.counter_mj)) : std::nullopt)
        .bind(stored(one.counter_ns));
    BH_CHECK(run(mark, "write a mark"));
  }
  Statement fit(
      handle, "INSERT INTO fits (model, body) VALUES (?, ?) ON CONFLICT DO UPDATE SET body = excluded.body");
  for (const auto& one : batch.fits) {
    fit.bind(one.model).bind(body_of(one).dump());
    BH_CHECK(run(fit, "write a fit"));
  }
  return ok_status();
}

Status Accounts::commit(const Batch& batch) {
  if (batch.empty()) return ok_status();
  BH_CHECK(within(batch));
  const auto status = database_->sql->transaction("commit", [&] { return database_->write(batch); });
  if (!status.ok()) database_->gpus.clear(), database_->holders.clear();  // rows that were taken back
  return status;
}

Result<std::vector<Mark>> Accounts::marks() {
  Statement get(
      database_->sql->handle(),
      "SELECT g.uuid, g.name, m.until_us, m.monotonic_ns, m.epoch, m.counter_mj, m.counter_ns FROM marks m "
      "JOIN gpus g ON g.id = m.gpu ORDER BY g.id");
  std::vector<Mark> out;
  int code = 0;
  while ((code = get.step()) == SQLITE_ROW) {
    Mark mark{.gpu = {get.text(0)},
              .name = get.text(1),
              .until_us = get.integer(2),
              .monotonic_ns = read_back(get.integer(3)),
              .epoch = get.integer(4)};
    if (const auto counter = get.maybe(5)) mark.counter_mj = read_back(*counter);
    mark.counter_ns = read_back(get.integer(6));
    out.push_back(std::move(mark));
  }
  if (code != SQLITE_DONE) return database_->sql->error("read the marks", code);
  return out;
}

Result<std::vector<Epoch>> Accounts::epochs() {
  Statement get(database_->sql->handle(), "SELECT id, boot_id, driver, since_ms FROM epochs ORDER BY id");
  std::vector<Epoch> out;
  int code = 0;
  while ((code = get.step()) == SQLITE_ROW)
    out.push_back({.id = get.integer(0),
                   .boot_id = get.text(1),
                   .driver = get.text(2),
                   .since = WallTime(std::chrono::milliseconds(get.integer(3)))});
  if (code != SQLITE_DONE) return database_->sql->error("read the epochs", code);
  return out;
}

Result<std::vector<Fit>> Accounts::fits() {
  Statement get(database_->sql->handle(), "SELECT model, body FROM fits ORDER BY model");
  std::vector<Fit> out;
  int code = 0;
  while ((code = get.step()) == SQLITE_ROW) {
    const auto body = parse_json(get.text(1), 4);
    if (!body.ok()) continue;
    if (auto fit = fit_of(get.text(0), *body)) out.push_back(std::move(*fit));
  }
  if (code != SQLITE_DONE) return database_->sql->error("read the fits", code);
  return out;
}

Result<Answer> Accounts::Database::ask(const Query& query) {
  sqlite3* handle = sql->handle();
  Answer out;
  // Which columns are grouped by is ours to say; what is asked for is bound.
  const std::string day = query.by_day ? "((u.quarter * 900 + ?3) / 86400) * 86400 - ?3" : "NULL";
  const std::string lease = query.by_lease
                                ? "h.lease, h.part, h.user, h.label"
                                : "CASE h.kind WHEN 0 THEN -1 ELSE 0 END AS l, 0 AS p, '' AS us, '' AS la";
  const std::string text = fmt::format(
      "SELECT {} AS day, {} AS gpu, h.kind, {}, h.tenant, h.class, h.profile, h.units, min(h.generation), "
      "max(h.generation), sum(unit_us), sum(used_unit_us), sum(mib_us), sum(sm_us), sum(tensor_us), "
      "sum(dram_us), "
      "sum(idle_mj), sum(dynamic_mj), sum(error_mj), sum(blind_us), sum(unmetered_us) FROM used u "
      "JOIN holders h ON h.id = u.holder JOIN gpus g ON g.id = u.gpu WHERE u.quarter >= ?1 AND u.quarter < "
      "?2 "
      "AND (?4 IS NULL OR (h.kind = 0 AND h.tenant = ?4)) "
      "GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 ORDER BY 1, 2, 3, 8, 4, 5, 9, 10, 11 LIMIT {}",
      day, query.by_gpu ? "g.uuid" : "''", lease, most_answers + 1);
  {
    Statement get(handle, text.c_str());
    get.bind(query.from).bind(query.to).bind(query.day_offset_s);
    if (query.tenant) get.bind(*query.tenant);
    int code = 0;
    while ((code = get.step()) == SQLITE_ROW) {
      if (out.sums.size() == most_answers)
        return Error(Errc::no_capacity, fmt::format("more than {} lines", most_answers),
                     "ask for a shorter time, or for less detail (without --by lease)");
      Sum sum{.day = get.maybe(0), .gpu = {get.text(1)}};
      sum.holder.kind = static_cast<Kind>(get.integer(2));
      sum.holder.lease = std::max<std::int64_t>(0, get.integer(3));
      sum.holder.part = get.small(4);
      sum.holder.user = get.text(5);
      sum.holder.label = get.text(6);
      sum.holder.tenant = get.text(7);
      sum.holder.cls = get.text(8);
      sum.holder.profile = get.text(9);
      sum.holder.units = get.small(10);
      if (get.integer(11) == get.integer(12)) sum.holder.generation = get.integer(11);
      int column = 13;
      for (const auto member : amounts_of) sum.amounts.*member = read_back(get.integer(column++));
      out.sums.push_back(std::move(sum));
    }
    if (code != SQLITE_DONE) return sql->error("read the accounts", code);
  }
  if (!query.tenant) {
    Statement get(
        handle,
        "SELECT g.uuid, g.name, sum(us), sum(energy_mj), sum(unmetered_us) FROM passed p "
        "JOIN gpus g ON g.id = p.gpu WHERE quarter >= ? AND quarter < ? GROUP BY g.id ORDER BY g.id");
    get.bind(query.from).bind(query.to);
    int code = 0;
    while ((code = get.step()) == SQLITE_ROW)
      out.gpus.push_back({.gpu = {get.text(0)},
                          .name = get.text(1),
                          .us = read_back(get.integer(2)),
                          .energy_mj = read_back(get.integer(3)),
                          .unmetered_us = read_back(get.integer(4))});
    if (code != SQLITE_DONE) return sql->error("read what passed", code);
    Statement epochs(
        handle,
        "SELECT id, boot_id, driver, since_ms FROM epochs WHERE id IN (SELECT DISTINCT epoch FROM "
        "passed WHERE quarter >= ? AND quarter < ?) ORDER BY id LIMIT 10000");
    epochs.bind(query.from).bind(query.to);
    while ((code = epochs.step()) == SQLITE_ROW)
      out.epochs.push_back({.id = epochs.integer(0),
                            .boot_id = epochs.text(1),
                            .driver = epochs.text(2),
                            .since = WallTime(std::chrono::milliseconds(epochs.integer(3)))});
    if (code != SQLITE_DONE) return sql->error("read the epochs", code);
  }
  Statement ends(handle, "SELECT (SELECT min(quarter) FROM passed), (SELECT min(until_us) FROM marks)");
  if (const int code = ends.step(); code != SQLITE_ROW) return sql->error("read the marks", code);
  if (const auto first = ends.maybe(0)) out.first_us = *first * us_of_quarter;
  out.written_us = ends.maybe(1);
  return out;
}

Result<Answer> Accounts::ask(const Query& query) {
  Database& database = *database_;
  BH_CHECK(database.sql->exec("ask", "BEGIN"));  // one snapshot
  auto answer = database.ask(query);
  sqlite3_exec(database.sql->handle(), "ROLLBACK", nullptr, nullptr, nullptr);
  return answer;
}

Result<bool> Accounts::forget(std::int64_t before_quarter) {
  Database& database = *database_;
  BH_TRY(
      const auto first,
      database.sql->number("forget old accounts",
                           "SELECT coalesce(min(q), 9223372036854775807) FROM (SELECT min(quarter) AS q FROM "
                           "used UNION ALL SELECT min(quarter) FROM passed)"));
  if (first >= before_quarter) return true;
  const std::int64_t below = std::min(before_quarter, first + forget_at_once);
  BH_CHECK(database.sql->transaction("forget old accounts", [&]() -> Status {
    for (const char* text : {"DELETE FROM used WHERE quarter < ?", "DELETE FROM passed WHERE quarter < ?",
                             "DELETE FROM holders WHERE last < ?"}) {
      Statement drop(database.sql->handle(), text);
      drop.bind(below);
      BH_CHECK(database.run(drop, "forget old accounts"));
    }
    return ok_status();
  }));
  database.holders.clear();
  return below >= before_quarter;
}

}  // namespace bulkhead::accounts
