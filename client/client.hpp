// Speaks /api/v1: to the daemon of this host over its Unix socket (the kernel says who we are), or to any
// over HTTPS with a token. TLS 1.3 only. Every size and every wait is bounded: a server is a stranger too.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "api/v1/v1.hpp"
#include "base/json.hpp"
#include "base/result.hpp"

namespace bulkhead::client {

// Where and as whom. From, in this order: what the command line says, BULKHEAD_URL and BULKHEAD_TOKEN, the
// file `bulkhead login` wrote (~/.config/bulkhead/login.json, mode 0600), the Unix socket of this host. What
// login wrote (token, fingerprint) goes to the server it was written for and to no other.
struct Target {
  std::string url = {};    // "https://gpu7.example:443" or "unix:/run/bulkhead/api.sock"
  std::string token = {};  // never printed
  // SHA-256 of the server's certificate, hex, pinned by login; empty: the CAs of ca_file or the system
  // decide.
  std::string fingerprint = {};
  std::string ca_file = {}, certificate_file = {}, key_file = {};  // mTLS
};
// Beside those: BULKHEAD_FINGERPRINT and BULKHEAD_CA. An Error names the wrong one.
Result<Target> target(const std::optional<std::string>& url);
// The url as login writes it: "HTTPS://Host/" is "https://host:443". An Error says what one looks like.
Result<std::string> parse_url(std::string_view text);
// "ab:CD:..." or 64 hex digits, as openssl and curl print it: 64 lower hex digits.
Result<std::string> parse_fingerprint(std::string_view text);
std::string login_file();                 // where login writes; empty: no HOME
Status save_login(const Target& target);  // replaced as a whole, or left
Result<bool> forget_login();              // false: there was none
// What a server shows: the SHA-256 of its certificate. Nothing is sent but a TLS greeting.
Result<std::string> fingerprint_of(const Target& target,
                                   std::chrono::milliseconds timeout = std::chrono::seconds(30));
// One segment of a path, percent-encoded.
std::string segment(std::string_view text);

struct Answer {
  int status = 0;
  Json body = {};  // null: none came
  std::string etag = {};
};

inline constexpr std::size_t most_body = 64 << 20, most_header = 32 << 10, most_event = 1 << 20;

class Client {
 public:
  // Checks the target and its files; the connection is made by the first call, and again when it is gone.
  static Result<std::unique_ptr<Client>> connect(
      Target target, std::chrono::milliseconds timeout = std::chrono::seconds(30));
  virtual ~Client() = default;
  // `path` from the root: "/api/v1/leases". An Error: nothing came back (or not HTTP, not ours). A problem
  // document comes as an Answer with its status. A request is sent again only where that is harmless (GET, or
  // an Idempotency-Key) and a kept connection turned out to be closed.
  virtual Result<Answer> call(std::string_view method, std::string_view path, const std::optional<Json>& body,
                              const std::vector<std::pair<std::string, std::string>>& headers = {}) = 0;
  // Events from `after` on (negative: from now on), until `each` returns false or the connection ends (then
  // an Error with Errc::unavailable: come back with the last id). Each second in which nothing came, and
  // after a signal, `each` is called with id 0 and a null event. A connection of its own.
  virtual Status follow(std::string_view path, std::int64_t after,
                        const std::function<bool(std::int64_t id, const Json& event)>& each) = 0;
  virtual const Target& target() const = 0;
};

// An Error from a problem document, with reasons and ways in its message and hint.
Error problem_error(const Answer& answer);

}  // namespace bulkhead::client
