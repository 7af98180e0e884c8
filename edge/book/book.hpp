// What the daemon must not lose: tenants, tokens, leases, idempotency keys, and the audit log as a hash
// chain. One SQLite database (WAL, synchronous=FULL, STRICT tables) beside the journal; one writer. Changes
// come in batches: commit() makes all of a batch durable with one fsync, or none of it. A database that is
// damaged, foreign or newer is refused and left as it is.
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

// Records are JSON of the core nouns: the book keeps them and does not read them.
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

// One line of the audit log. hash = SHA-256(previous hash, then every field, each with its length before it),
// so that a line changed, dropped or put in breaks the chain.
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

// What one batch writes. In order; a record replaces the one with its id or name.
struct Batch {
  std::vector<Record> tenants = {}, leases = {};
  std::vector<std::string> tenants_gone = {};
  std::vector<Token> tokens = {};
  std::vector<Key> keys = {};
  std::vector<Audit> audit = {};                            // id and hash are given by commit()
  std::vector<std::pair<std::string, Json>> settings = {};  // small named values: month's use, month of it
  bool empty() const;
};

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

  // Durable when it returns; on an error nothing of it is. Fills in the ids and hashes of batch.audit.
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
  Result<std::vector<Audit>> audit_after(std::int64_t id, std::size_t most);
  Result<std::int64_t> last_audit_id();
  // Drops keys older than `before`; audit lines are never dropped.
  Status forget_keys(WallTime before);

  // Walks the chain. Errc::corrupt names the first line that does not fit and why.
  Result<std::int64_t> verify();  // lines read

 private:
  Book();
  struct Database;
  std::unique_ptr<Database> database_;
};

Hash sha256(std::string_view bytes);
std::string hex(const Hash& hash);

}  // namespace bulkhead::book
