// What the daemon must not lose: tenants, tokens, leases, idempotency keys, and the audit log as a hash
// chain. One SQLite database (WAL, synchronous=FULL, STRICT tables) beside the journal; one writer. Changes
// come in batches: commit() makes all of a batch durable with one fsync, or none of it. A database that is
// damaged, foreign or newer is refused and left as it is.
//
// The chain. hash(n) is the SHA-256 of eleven strings, each with its length in bytes before it as 8 bytes,
// most significant first: hash(n - 1) (32 bytes, all zero for n = 1), then the columns of table `audit` as
// they are stored: id and at_ms (milliseconds since 1970) as decimal digits, user, role, tenant, origin,
// verb, what, outcome, and detail (JSON, byte for byte). Table `audit_head` keeps the last id and hash. So,
// with nothing of ours:
//
//   import hashlib, sqlite3, sys
//   db = sqlite3.connect("file:" + sys.argv[1] + "?mode=ro", uri=True)
//   db.text_factory = bytes
//   db.execute("BEGIN")  # one moment, though the daemon goes on
//   last = (0, bytes(32))
//   for row in db.execute("SELECT id, at_ms, user, role, tenant, origin, verb, what, outcome, detail, hash "
//                         "FROM audit ORDER BY id"):
//       h = hashlib.sha256()
//       for field in (last[1], *row[:10]):
//           b = field if isinstance(field, bytes) else str(field).encode()
//           h.update(len(b).to_bytes(8, "big") + b)
//       if row[0] != last[0] + 1 or row[10] != h.digest():
//           sys.exit("line %d does not fit" % row[0])
//       last = (row[0], row[10])
//   if db.execute("SELECT id, hash FROM audit_head").fetchall() != [last]:
//       sys.exit("the end does not fit")
//   print(*last[:1], last[1].hex())
//
// What it proves: whoever changes, drops or puts in lines without computing anew every hash behind them and
// the head is found. What it cannot: no secret goes into it, so whoever may write the file can compute all
// of it anew, or cut off the end and set `audit_head` to match, and no look at this file alone will tell. A
// head that was written down elsewhere will: the chain proves every line up to a (id, hash) of which an
// operator keeps a copy (audit_after(id - 1, 1) returns it), and nothing behind it. Neither is anything
// proved of the other tables: the log says what was done, they are what is.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.hpp"
#include "base/json.hpp"
#include "base/result.hpp"

namespace bulkhead::book {

using Hash = std::array<std::uint8_t, 32>;  // SHA-256

// The bounds of what is kept. A batch beyond one of them is refused whole (Errc::invalid), so what comes from
// tenants is measured before it joins a batch: fits().
inline constexpr std::size_t most_in_batch = 16'384;  // entries of all kinds together
inline constexpr std::size_t name_bytes = 256;        // names, users, roles, keys, ids, verbs
inline constexpr std::size_t text_bytes = 4'096;      // notes; what, outcome and from of an audit line
inline constexpr std::size_t detail_bytes = 65'536;   // detail of an audit line
inline constexpr std::size_t body_bytes = 1U << 20U;  // a record, a setting, the answer of a key
inline constexpr unsigned json_depth = 32;            // containers in one another
inline constexpr std::size_t page_rows = 10'000;      // more are not returned at once, whatever is asked

// Records are JSON of the core nouns: the book keeps them and does not read them, but for one member of a
// lease: one whose "state" is "ended" or "failed" is over.
struct Record {
  std::int64_t id = 0;  // of a lease; 0 where the name is the key
  std::string name = {};
  Json body = {};
};

struct Token {
  std::string id = {};  // public part, 16 hex digits; the secret is never stored
  Hash secret = {};     // SHA-256 of the secret half (256 random bits: no salt or stretching needed)
  std::string user = {}, role = {}, tenant = {};  // tenant empty: of none
  std::string certificate = {};                   // instead of a secret: SHA-256 of a client certificate, hex
  WallTime created = {};
  std::optional<WallTime> expires = {}, revoked = {};
  std::string note = {};
};

// One line of the audit log.
struct Audit {
  std::int64_t id = 0;  // counts from 1 without a gap; also the id of the event streams
  WallTime at = {};
  std::string user = {}, role = {}, tenant = {}, from = {};  // from: address or "uid 1000"
  std::string verb = {}, what = {};                          // "create", "lease/17"
  std::string outcome = {};                                  // "done", "refused: quota"
  Json detail = {};                                          // never a secret
  Hash hash = {};
};

struct Key {  // an idempotency key and the answer it got
  std::string user = {}, key = {};
  Hash request = {};  // of method, path and body: the same key with another request is a conflict
  int status = 0;
  std::string body = {};
  WallTime at = {};
};

// What one batch writes, in this order; a record replaces the one with its id or name. A tenant in both lists
// is gone.
struct Batch {
  std::vector<Record> tenants = {}, leases = {};
  std::vector<std::string> tenants_gone = {};
  std::vector<Token> tokens = {};
  std::vector<Key> keys = {};
  std::vector<Audit> audit = {};                            // id and hash are given by commit()
  std::vector<std::pair<std::string, Json>> settings = {};  // small named values: month's use, month of it
  bool empty() const;
};

// Within the bounds? An Error names the entry and the bound.
Status fits(const Batch& batch);

// One thread at a time. Another thread or process that only reads opens a Book of its own.
class Book {
 public:
  enum class Access { read_only, read_write };
  static Result<std::unique_ptr<Book>> open(const std::filesystem::path& directory, Access access);
  ~Book();
  Book(const Book&) = delete;
  Book& operator=(const Book&) = delete;
  static std::filesystem::path file_in(const std::filesystem::path& directory) {
    return directory / "book.db";
  }

  // Durable when it returns; on an error nothing of it is (but see sqlite::Database::transaction), and batch
  // is as it was. Fills in the ids and hashes of batch.audit.
  Status commit(Batch& batch);

  Result<std::vector<Record>> tenants();
  Result<std::vector<Record>> leases(
      bool over_too);  // by id; without `over_too` only those that are not ended or failed
  Result<std::optional<Record>> lease(std::int64_t id);
  Result<std::vector<Record>> leases_page(std::int64_t below_id,
                                          std::size_t most);  // newest first, all states
  Result<std::vector<Token>> tokens();
  Result<std::optional<Key>> key(const std::string& user, const std::string& key);
  Result<Json> setting(const std::string& name);  // null: not there
  Result<std::int64_t> last_lease_id();
  Result<std::vector<Audit>> audit_after(std::int64_t id, std::size_t most);   // oldest first
  Result<std::vector<Audit>> audit_before(std::int64_t id, std::size_t most);  // newest first
  Result<std::int64_t> last_audit_id();
  // Drops keys older than `before`, and brings the WAL into the file, so that a commit need not: to be called
  // when there is little to do. Audit lines are never dropped.
  Status forget_keys(WallTime before);

  // Walks the chain, a line at a time in memory, on one snapshot: commits of another Book go on meanwhile.
  // Errc::corrupt names the first line that does not fit and why.
  Result<std::int64_t> verify();  // lines read

 private:
  Book();
  struct Database;
  std::unique_ptr<Database> database_;
};

Hash sha256(std::string_view bytes);
std::string hex(const Hash& hash);

}  // namespace bulkhead::book
