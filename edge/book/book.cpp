#include "edge/book/book.hpp"

#include <openssl/evp.h>

#include <algorithm>
#include <limits>
#include <map>

#include <fmt/format.h>

#include "base/text.hpp"
#include "edge/sqlite/sqlite.hpp"

namespace bulkhead::book {

namespace fs = std::filesystem;

namespace {

using sqlite::Statement;

constexpr std::int64_t application_id = 0x42484231;  // "BHB1"
constexpr int checkpoint_pages = 4096;               // 16 MiB of WAL: a commit that checkpoints stays rare
constexpr int row_bytes = 4 << 20;                   // a longer row in the file is damage, not data
constexpr int forget_at_once = 4096;

// One entry a schema version: migrations[n] turns version n into n + 1. Never edit an entry that was
// released.
constexpr const char* migrations[] = {
    R"sql(
CREATE TABLE tenants (
  name TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
) STRICT;
CREATE TABLE leases (
  id   INTEGER PRIMARY KEY,
  over INTEGER NOT NULL CHECK (over IN (0, 1)),
  body TEXT    NOT NULL
) STRICT;
CREATE INDEX leases_not_over ON leases (id) WHERE over = 0;
CREATE TABLE tokens (
  id          TEXT    NOT NULL PRIMARY KEY,
  secret      BLOB    NOT NULL CHECK (length(secret) = 32),
  user        TEXT    NOT NULL,
  role        TEXT    NOT NULL,
  tenant      TEXT    NOT NULL,
  certificate TEXT    NOT NULL,
  created_ms  INTEGER NOT NULL,
  expires_ms  INTEGER,
  revoked_ms  INTEGER,
  note        TEXT    NOT NULL
) STRICT;
CREATE TABLE keys (
  user    TEXT    NOT NULL,
  key     TEXT    NOT NULL,
  request BLOB    NOT NULL CHECK (length(request) = 32),
  status  INTEGER NOT NULL,
  body    TEXT    NOT NULL,
  at_ms   INTEGER NOT NULL,
  PRIMARY KEY (user, key)
) STRICT;
CREATE INDEX keys_by_age ON keys (at_ms);
CREATE TABLE settings (
  name  TEXT NOT NULL PRIMARY KEY,
  value TEXT NOT NULL
) STRICT;
CREATE TABLE audit (
  id      INTEGER PRIMARY KEY,
  at_ms   INTEGER NOT NULL,
  user    TEXT    NOT NULL,
  role    TEXT    NOT NULL,
  tenant  TEXT    NOT NULL,
  origin  TEXT    NOT NULL,
  verb    TEXT    NOT NULL,
  what    TEXT    NOT NULL,
  outcome TEXT    NOT NULL,
  detail  TEXT    NOT NULL,
  hash    BLOB    NOT NULL CHECK (length(hash) = 32)
) STRICT;
CREATE TABLE audit_head (
  one  INTEGER PRIMARY KEY CHECK (one = 1),
  id   INTEGER NOT NULL,
  hash BLOB    NOT NULL CHECK (length(hash) = 32)
) STRICT;
INSERT INTO audit_head (one, id, hash) VALUES (1, 0, zeroblob(32));
)sql",
};

constexpr const char* put_tenant =
    "INSERT INTO tenants (name, body) VALUES (?, ?) ON CONFLICT DO UPDATE SET body = excluded.body";
constexpr const char* drop_tenant = "DELETE FROM tenants WHERE name = ?";
constexpr const char* put_lease =
    "INSERT INTO leases (id, over, body) VALUES (?, ?, ?) "
    "ON CONFLICT DO UPDATE SET over = excluded.over, body = excluded.body";
constexpr const char* put_token =
    "INSERT OR REPLACE INTO tokens (id, secret, user, role, tenant, certificate, created_ms, expires_ms, "
    "revoked_ms, note) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
constexpr const char* put_key =
    "INSERT OR REPLACE INTO keys (user, key, request, status, body, at_ms) VALUES (?, ?, ?, ?, ?, ?)";
constexpr const char* put_setting =
    "INSERT INTO settings (name, value) VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value";
constexpr const char* put_line =
    "INSERT INTO audit (id, at_ms, user, role, tenant, origin, verb, what, outcome, detail, hash) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
constexpr const char* get_head = "SELECT id, hash FROM audit_head WHERE one = 1";
constexpr const char* put_head = "UPDATE audit_head SET id = ?, hash = ? WHERE one = 1";

constexpr const char* get_tenants = "SELECT name, body FROM tenants ORDER BY name";
constexpr const char* get_leases = "SELECT id, body FROM leases ORDER BY id";
constexpr const char* get_leases_not_over = "SELECT id, body FROM leases WHERE over = 0 ORDER BY id";
constexpr const char* get_lease = "SELECT id, body FROM leases WHERE id = ?";
constexpr const char* get_leases_page = "SELECT id, body FROM leases WHERE id < ? ORDER BY id DESC LIMIT ?";
constexpr const char* get_tokens =
    "SELECT id, secret, user, role, tenant, certificate, created_ms, expires_ms, revoked_ms, note "
    "FROM tokens ORDER BY id";
constexpr const char* get_key = "SELECT request, status, body, at_ms FROM keys WHERE user = ? AND key = ?";
constexpr const char* get_setting = "SELECT value FROM settings WHERE name = ?";
constexpr const char* get_last_lease = "SELECT coalesce(max(id), 0) FROM leases";
constexpr const char* get_last_line = "SELECT coalesce(max(id), 0) FROM audit";
constexpr const char* get_lines =
    "SELECT id, at_ms, user, role, tenant, origin, verb, what, outcome, detail, hash FROM audit "
    "WHERE id > ? ORDER BY id LIMIT ?";
constexpr const char* get_lines_back =
    "SELECT id, at_ms, user, role, tenant, origin, verb, what, outcome, detail, hash FROM audit "
    "WHERE id < ? ORDER BY id DESC LIMIT ?";
constexpr const char* drop_keys =
    "DELETE FROM keys WHERE rowid IN (SELECT rowid FROM keys WHERE at_ms < ? ORDER BY at_ms LIMIT ?)";

std::int64_t ms_of(WallTime time) { return time.time_since_epoch().count(); }
WallTime time_of(std::int64_t ms) { return WallTime(std::chrono::milliseconds(ms)); }
std::optional<std::int64_t> ms_of(const std::optional<WallTime>& time) {
  return time ? std::optional(ms_of(*time)) : std::nullopt;
}
std::optional<WallTime> time_of(const std::optional<std::int64_t>& ms) {
  return ms ? std::optional(time_of(*ms)) : std::nullopt;
}

std::string out_of_it(const fs::path& file) {
  return fmt::format(
      "it is left as it is; stop the daemon, and bring the last good copy back, or start with an empty one: "
      "mv {0} {0}.aside (tenants, tokens and leases are then unknown)",
      file.string());
}

// ---- bounds
bool deeper_than(const Json& value, unsigned depth) {
  if (!value.is_structured()) return false;
  if (depth == 0) return true;
  return std::any_of(value.begin(), value.end(),
                     [&](const Json& inner) { return deeper_than(inner, depth - 1); });
}

Status bounded(std::string_view text, std::size_t most, std::string_view what) {
  if (text.size() <= most) return ok_status();
  return Error(Errc::invalid, fmt::format("{} has {} bytes, the most is {}", what, text.size(), most));
}

// Compact; bytes that are no UTF-8 are replaced.
Result<std::string> text_of(const Json& value, std::size_t most, std::string_view what) {
  if (deeper_than(value, json_depth))
    return Error(Errc::invalid, fmt::format("{} is nested deeper than {} levels", what, json_depth));
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  BH_CHECK(bounded(text, most, what));
  return text;
}

// All but the JSON, which is measured when it is written out.
Status plain_fits(const Batch& batch) {
  const std::size_t entries = batch.tenants.size() + batch.leases.size() + batch.tenants_gone.size() +
                              batch.tokens.size() + batch.keys.size() + batch.audit.size() +
                              batch.settings.size();
  if (entries > most_in_batch)
    return Error(Errc::invalid, fmt::format("a batch of {} entries, the most is {}", entries, most_in_batch));
  for (const auto& tenant : batch.tenants) {
    BH_CHECK(bounded(tenant.name, name_bytes, "the name of a tenant"));
    if (tenant.name.empty()) return Error(Errc::invalid, "a tenant without a name");
  }
  for (const auto& name : batch.tenants_gone) BH_CHECK(bounded(name, name_bytes, "the name of a tenant"));
  for (const auto& lease : batch.leases) {
    if (lease.id <= 0) return Error(Errc::invalid, fmt::format("a lease with the id {}", lease.id));
  }
  for (const auto& token : batch.tokens) {
    if (token.id.empty()) return Error(Errc::invalid, "a token without an id");
    BH_CHECK(bounded(token.id, name_bytes, "the id of a token"));
    BH_CHECK(bounded(token.user, name_bytes, "the user of a token"));
    BH_CHECK(bounded(token.role, name_bytes, "the role of a token"));
    BH_CHECK(bounded(token.tenant, name_bytes, "the tenant of a token"));
    BH_CHECK(bounded(token.certificate, name_bytes, "the certificate of a token"));
    BH_CHECK(bounded(token.note, text_bytes, "the note of a token"));
  }
  for (const auto& key : batch.keys) {
    BH_CHECK(bounded(key.user, name_bytes, "the user of an idempotency key"));
    BH_CHECK(bounded(key.key, name_bytes, "an idempotency key"));
    BH_CHECK(bounded(key.body, body_bytes, "the answer of an idempotency key"));
  }
  for (const auto& line : batch.audit) {
    BH_CHECK(bounded(line.user, name_bytes, "the user of an audit line"));
    BH_CHECK(bounded(line.role, name_bytes, "the role of an audit line"));
    BH_CHECK(bounded(line.tenant, name_bytes, "the tenant of an audit line"));
    BH_CHECK(bounded(line.verb, name_bytes, "the verb of an audit line"));
    BH_CHECK(bounded(line.from, text_bytes, "the origin of an audit line"));
    BH_CHECK(bounded(line.what, text_bytes, "the object of an audit line"));
    BH_CHECK(bounded(line.outcome, text_bytes, "the outcome of an audit line"));
  }
  for (const auto& [name, value] : batch.settings)
    BH_CHECK(bounded(name, name_bytes, "the name of a setting"));
  return ok_status();
}

// ---- the chain
// The encoding that book.hpp documents.
class Link {
 public:
  explicit Link(const Hash& previous) {
    add({reinterpret_cast<const char*>(previous.data()), previous.size()});
  }
  void add(std::string_view field) {
    const std::uint64_t length = field.size();
    for (int shift = 56; shift >= 0; shift -= 8) bytes_ += static_cast<char>((length >> shift) & 0xffU);
    bytes_ += field;
  }
  Hash hash() const { return sha256(bytes_); }

 private:
  std::string bytes_ = {};
};

Hash chained(const Hash& previous, const Audit& line, std::string_view detail) {
  Link link(previous);
  link.add(std::to_string(line.id));
  link.add(std::to_string(ms_of(line.at)));
  for (const auto* field :
       {&line.user, &line.role, &line.tenant, &line.from, &line.verb, &line.what, &line.outcome})
    link.add(*field);
  link.add(detail);
  return link.hash();
}

std::optional<Hash> hash_of(std::span<const std::uint8_t> bytes) {
  Hash hash{};
  if (bytes.size() != hash.size()) return std::nullopt;
  std::copy(bytes.begin(), bytes.end(), hash.begin());
  return hash;
}

}  // namespace

Hash sha256(std::string_view bytes) {
  Hash hash{};
  unsigned length = 0;
  const int done = EVP_Digest(bytes.data(), bytes.size(), hash.data(), &length, EVP_sha256(), nullptr);
  BH_ASSERT(done == 1 && length == hash.size());
  return hash;
}

std::string hex(const Hash& hash) {
  std::string text;
  for (const auto byte : hash) text += fmt::format("{:02x}", byte);
  return text;
}

bool Batch::empty() const {
  return tenants.empty() && leases.empty() && tenants_gone.empty() && tokens.empty() && keys.empty() &&
         audit.empty() && settings.empty();
}

Status fits(const Batch& batch) {
  BH_CHECK(plain_fits(batch));
  for (const auto& tenant : batch.tenants) BH_CHECK(text_of(tenant.body, body_bytes, "a tenant"));
  for (const auto& lease : batch.leases) BH_CHECK(text_of(lease.body, body_bytes, "a lease"));
  for (const auto& line : batch.audit)
    BH_CHECK(text_of(line.detail, detail_bytes, "the detail of an audit line"));
  for (const auto& [name, value] : batch.settings) BH_CHECK(text_of(value, body_bytes, "a setting"));
  return ok_status();
}

// ---- the database
struct Book::Database {
  std::unique_ptr<sqlite::Database> sql = {};
  std::map<const char*, std::unique_ptr<Statement>> kept = {};  // by the constants above

  // A kept statement in use: reset afterwards, so that no read stays open; one that failed is made anew.
  class Use {
   public:
    Use(Database& database, const char* text) : database_(database), text_(text) {
      auto& slot = database.kept[text];
      if (!slot) slot = std::make_unique<Statement>(database.sql->handle(), text, true);
      statement_ = slot.get();
      statement_->reset();
    }
    ~Use() {
      if (code_ == SQLITE_ROW || code_ == SQLITE_DONE) {
        statement_->reset();
      } else {
        database_.kept.erase(text_);
      }
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    Statement* operator->() { return statement_; }
    Statement& operator*() { return *statement_; }
    int step() { return code_ = statement_->step(); }
    Status run(const char* what) {
      if (step() != SQLITE_DONE) return database_.sql->error(what, code_);
      return ok_status();
    }

   private:
    Database& database_;
    const char* text_;
    Statement* statement_ = nullptr;
    int code_ = SQLITE_DONE;
  };

  Error damaged(const std::string& what) const {
    return Error(Errc::corrupt, fmt::format("book {}: {}", sql->file().string(), what),
                 out_of_it(sql->file()));
  }

  Result<Json> json(const std::string& text, const std::string& what) const {
    auto value = parse_json(text, std::size_t{json_depth} * 2);
    if (!value.ok()) return damaged(fmt::format("{}: {}", what, value.error().message()));
    return value;
  }

  Result<std::vector<Record>> leases(Use& use) const {
    std::vector<Record> all;
    int code = 0;
    while ((code = use.step()) == SQLITE_ROW) {
      Record record{.id = use->integer(0)};
      BH_TRY(record.body, json(use->text(1), fmt::format("lease {}", record.id)));
      all.push_back(std::move(record));
    }
    if (code != SQLITE_DONE) return sql->error("read the leases", code);
    return all;
  }

  Result<std::int64_t> last(const char* text) {
    Use use(*this, text);
    if (const int code = use.step(); code != SQLITE_ROW) return sql->error("read the last id", code);
    return use->integer(0);
  }

  // Columns of get_lines, but the detail, which stays text.
  Result<Audit> line(const Statement& row) const {
    Audit line{.id = row.integer(0),
               .at = time_of(row.integer(1)),
               .user = row.text(2),
               .role = row.text(3),
               .tenant = row.text(4),
               .from = row.text(5),
               .verb = row.text(6),
               .what = row.text(7),
               .outcome = row.text(8)};
    const auto hash = hash_of(row.bytes(10));
    if (!hash) return damaged(fmt::format("audit line {} has no hash of 32 bytes", line.id));
    line.hash = *hash;
    return line;
  }

  struct Head {
    std::int64_t id = 0;
    Hash hash = {};
  };
  Result<Head> head() {
    Use use(*this, get_head);
    const int code = use.step();
    if (code == SQLITE_DONE) return damaged("the row that says where the audit log ends is missing");
    if (code != SQLITE_ROW) return sql->error("read the end of the audit log", code);
    const auto hash = hash_of(use->bytes(1));
    if (!hash) return damaged("the row that says where the audit log ends has no hash");
    return Head{.id = use->integer(0), .hash = *hash};
  }

  Status write(Batch& batch);
  Status write_audit(std::vector<Audit>& lines);
  Result<std::vector<Audit>> lines(const char* page, std::int64_t from, std::size_t most);
  Result<std::int64_t> walk();
};

Book::Book() : database_(std::make_unique<Database>()) {}
Book::~Book() = default;

Result<std::unique_ptr<Book>> Book::open(const fs::path& directory, Access access) {
  static constexpr sqlite::Kind kind{.application_id = application_id,
                                     .migrations = migrations,
                                     .noun = "book",
                                     .missing = "bulkhead serve has not run here",
                                     .migrate_by = "the daemon migrates it: bulkhead serve",
                                     .out_of_it = out_of_it};
  std::unique_ptr<Book> book(new Book());
  BH_TRY(book->database_->sql,
         sqlite::Database::open(kind, file_in(directory), access == Access::read_write));
  sqlite3* handle = book->database_->sql->handle();
  sqlite3_limit(handle, SQLITE_LIMIT_LENGTH, row_bytes);
  sqlite3_wal_autocheckpoint(handle, checkpoint_pages);
  return book;
}

Result<std::vector<Audit>> Book::Database::lines(const char* page, std::int64_t from, std::size_t most) {
  Use use(*this, page);
  use->bind(from).bind(static_cast<std::int64_t>(std::min(most, page_rows)));
  std::vector<Audit> all;
  int code = 0;
  while ((code = use.step()) == SQLITE_ROW) {
    BH_TRY(Audit one, line(*use));
    BH_TRY(one.detail, json(use->text(9), fmt::format("audit line {}", one.id)));
    all.push_back(std::move(one));
  }
  if (code != SQLITE_DONE) return sql->error("read the audit log", code);
  return all;
}

Status Book::Database::write_audit(std::vector<Audit>& lines) {
  if (lines.empty()) return ok_status();
  BH_TRY(Head end, head());
  for (auto& line : lines) {
    BH_TRY(const std::string detail, text_of(line.detail, detail_bytes, "the detail of an audit line"));
    line.id = end.id + 1;
    line.hash = chained(end.hash, line, detail);
    Use use(*this, put_line);
    use->bind(line.id).bind(ms_of(line.at)).bind(line.user).bind(line.role).bind(line.tenant).bind(line.from);
    use->bind(line.verb).bind(line.what).bind(line.outcome).bind(detail).bind_bytes(line.hash);
    const int code = use.step();
    if ((code & 0xff) == SQLITE_CONSTRAINT)
      return damaged(fmt::format("audit line {} is there already, behind the end: it was put in", line.id));
    if (code != SQLITE_DONE) return sql->error("write the audit log", code);
    end = {.id = line.id, .hash = line.hash};
  }
  Use use(*this, put_head);
  use->bind(end.id).bind_bytes(end.hash);
  return use.run("write the audit log");
}

Status Book::Database::write(Batch& batch) {
  for (const auto& tenant : batch.tenants) {
    BH_TRY(const std::string body, text_of(tenant.body, body_bytes, "a tenant"));
    Use use(*this, put_tenant);
    use->bind(tenant.name).bind(body);
    BH_CHECK(use.run("write a tenant"));
  }
  for (const auto& name : batch.tenants_gone) {
    Use use(*this, drop_tenant);
    use->bind(name);
    BH_CHECK(use.run("drop a tenant"));
  }
  for (const auto& lease : batch.leases) {
    BH_TRY(const std::string body, text_of(lease.body, body_bytes, "a lease"));
    const auto state = lease.body.is_object() ? lease.body.find("state") : lease.body.end();
    const bool over = state != lease.body.end() && (*state == "ended" || *state == "failed");
    Use use(*this, put_lease);
    use->bind(lease.id).bind(std::int64_t{over ? 1 : 0}).bind(body);
    BH_CHECK(use.run("write a lease"));
  }
  for (const auto& token : batch.tokens) {
    Use use(*this, put_token);
    use->bind(token.id).bind_bytes(token.secret);
    use->bind(token.user).bind(token.role).bind(token.tenant).bind(token.certificate);
    use->bind(ms_of(token.created)).bind(ms_of(token.expires)).bind(ms_of(token.revoked)).bind(token.note);
    BH_CHECK(use.run("write a token"));
  }
  for (const auto& key : batch.keys) {
    Use use(*this, put_key);
    use->bind(key.user).bind(key.key).bind_bytes(key.request);
    use->bind(std::int64_t{key.status}).bind(key.body).bind(ms_of(key.at));
    BH_CHECK(use.run("write an idempotency key"));
  }
  BH_CHECK(write_audit(batch.audit));
  for (const auto& [name, value] : batch.settings) {
    BH_TRY(const std::string text, text_of(value, body_bytes, "a setting"));
    Use use(*this, put_setting);
    use->bind(name).bind(text);
    BH_CHECK(use.run("write a setting"));
  }
  return ok_status();
}

Status Book::commit(Batch& batch) {
  if (batch.empty()) return ok_status();
  BH_CHECK(plain_fits(batch));
  Status status = database_->sql->transaction("commit", [&] { return database_->write(batch); });
  if (!status.ok()) {
    for (auto& line : batch.audit) {
      line.id = 0;
      line.hash = {};
    }
  }
  return status;
}

// ---- reading
Result<std::vector<Record>> Book::tenants() {
  Database::Use use(*database_, get_tenants);
  std::vector<Record> all;
  int code = 0;
  while ((code = use.step()) == SQLITE_ROW) {
    Record record{.name = use->text(0)};
    BH_TRY(record.body, database_->json(use->text(1), fmt::format("tenant {}", printable(record.name))));
    all.push_back(std::move(record));
  }
  if (code != SQLITE_DONE) return database_->sql->error("read the tenants", code);
  return all;
}

Result<std::vector<Record>> Book::leases(bool over_too) {
  Database::Use use(*database_, over_too ? get_leases : get_leases_not_over);
  return database_->leases(use);
}

Result<std::optional<Record>> Book::lease(std::int64_t id) {
  Database::Use use(*database_, get_lease);
  use->bind(id);
  BH_TRY(auto found, database_->leases(use));
  return found.empty() ? std::nullopt : std::optional(std::move(found.front()));
}

Result<std::vector<Record>> Book::leases_page(std::int64_t below_id, std::size_t most) {
  Database::Use use(*database_, get_leases_page);
  use->bind(below_id).bind(static_cast<std::int64_t>(std::min(most, page_rows)));
  return database_->leases(use);
}

Result<std::vector<Token>> Book::tokens() {
  Database::Use use(*database_, get_tokens);
  std::vector<Token> all;
  int code = 0;
  while ((code = use.step()) == SQLITE_ROW) {
    Token token{.id = use->text(0),
                .user = use->text(2),
                .role = use->text(3),
                .tenant = use->text(4),
                .certificate = use->text(5),
                .created = time_of(use->integer(6)),
                .expires = time_of(use->maybe(7)),
                .revoked = time_of(use->maybe(8)),
                .note = use->text(9)};
    const auto secret = hash_of(use->bytes(1));
    if (!secret) return database_->damaged(fmt::format("token {} has no hash", printable(token.id)));
    token.secret = *secret;
    all.push_back(std::move(token));
  }
  if (code != SQLITE_DONE) return database_->sql->error("read the tokens", code);
  return all;
}

Result<std::optional<Key>> Book::key(const std::string& user, const std::string& key) {
  Database::Use use(*database_, get_key);
  use->bind(user).bind(key);
  const int code = use.step();
  if (code == SQLITE_DONE) return std::optional<Key>();
  if (code != SQLITE_ROW) return database_->sql->error("read an idempotency key", code);
  const auto request = hash_of(use->bytes(0));
  if (!request) return database_->damaged("an idempotency key without the hash of its request");
  return std::optional(Key{.user = user,
                           .key = key,
                           .request = *request,
                           .status = static_cast<int>(use->integer(1)),
                           .body = use->text(2),
                           .at = time_of(use->integer(3))});
}

Result<Json> Book::setting(const std::string& name) {
  Database::Use use(*database_, get_setting);
  use->bind(name);
  const int code = use.step();
  if (code == SQLITE_DONE) return Json();
  if (code != SQLITE_ROW) return database_->sql->error("read a setting", code);
  return database_->json(use->text(0), fmt::format("setting {}", printable(name)));
}

Result<std::int64_t> Book::last_lease_id() { return database_->last(get_last_lease); }
Result<std::int64_t> Book::last_audit_id() { return database_->last(get_last_line); }

Result<std::vector<Audit>> Book::audit_after(std::int64_t id, std::size_t most) {
  return database_->lines(get_lines, id, most);
}
Result<std::vector<Audit>> Book::audit_before(std::int64_t id, std::size_t most) {
  return database_->lines(get_lines_back, id, most);
}

Status Book::forget_keys(WallTime before) {
  sqlite3* handle = database_->sql->handle();
  do {
    BH_CHECK(database_->sql->transaction("forget idempotency keys", [&] {
      Database::Use use(*database_, drop_keys);
      use->bind(ms_of(before)).bind(std::int64_t{forget_at_once});
      return use.run("forget idempotency keys");
    }));
  } while (sqlite3_changes(handle) == forget_at_once);
  // Passive: never waits for a reader; what it could not do is done another time.
  sqlite3_wal_checkpoint_v2(handle, nullptr, SQLITE_CHECKPOINT_PASSIVE, nullptr, nullptr);
  return ok_status();
}

// ---- the walk
Result<std::int64_t> Book::Database::walk() {
  BH_TRY(const Head end, head());
  Head at;
  Use use(*this, get_lines);
  use->bind(std::numeric_limits<std::int64_t>::min()).bind(std::int64_t{-1});
  int code = 0;
  while ((code = use.step()) == SQLITE_ROW) {
    BH_TRY(const Audit found, line(*use));
    const std::int64_t due = at.id + 1;
    if (found.id < due) return damaged(fmt::format("audit line {} was put in: lines count from 1", found.id));
    if (found.id > end.id && due > end.id) {
      return damaged(fmt::format("audit line {} was put in: the log ends at line {}", found.id, end.id));
    }
    if (found.id > due) {
      return damaged(
          fmt::format("audit line {} is missing: it was dropped, {} follows {}", due, found.id, at.id));
    }
    if (chained(at.hash, found, use->text(9)) != found.hash) {
      return damaged(fmt::format(
          "audit line {} does not fit: it was changed or put in{}", due,
          at.id == 0 ? "" : fmt::format(", or a line was dropped, or line {} was changed", at.id)));
    }
    at = {.id = found.id, .hash = found.hash};
  }
  if (code != SQLITE_DONE) return sql->error("read the audit log", code);
  if (at.id < end.id) {
    return damaged(fmt::format("audit line {} is missing: the end was cut off, the log went up to line {}",
                               at.id + 1, end.id));
  }
  if (at.hash != end.hash) {
    return damaged(fmt::format(
        "audit line {} does not fit: its hash is not the one that the end of the log is kept with: it, or "
        "the row of the end, was changed",
        at.id));
  }
  return at.id;
}

Result<std::int64_t> Book::verify() {
  Database& database = *database_;
  sqlite3* handle = database.sql->handle();
  BH_CHECK(database.sql->exec("verify", "BEGIN"));  // one snapshot of lines and head
  auto walked = database.walk();
  sqlite3_exec(handle, "ROLLBACK", nullptr, nullptr, nullptr);
  return walked;
}

}  // namespace bulkhead::book
