// Speaks /api/v1: to the daemon of this host over its Unix socket (the kernel says who we are), or to any
// over HTTPS with a token.
#pragma once

#include <chrono>
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
// file `bulkhead login` wrote
// (~/.config/bulkhead/login.json, mode 0600), the Unix socket of this host.
struct Target {
  std::string url = {};    // "https://gpu7.example:443" or "unix:/run/bulkhead/api.sock"
  std::string token = {};  // never printed
  std::string fingerprint =
      {};  // SHA-256 of the server's certificate, hex, pinned by login; empty: the system's CAs decide
  std::string ca_file = {}, certificate_file = {}, key_file = {};  // mTLS
};
Result<Target> target(const std::optional<std::string>& url);
Status save_login(const Target& target);  // replaced as a whole, or left
Status forget_login();

struct Answer {
  int status = 0;
  Json body = {};
  std::string etag = {};
};

class Client {
 public:
  static Result<std::unique_ptr<Client>> connect(
      Target target, std::chrono::milliseconds timeout = std::chrono::seconds(30));
  virtual ~Client() = default;
  // An Error: nothing came back (or not HTTP, not ours). A problem document comes as an Answer with its
  // status.
  virtual Result<Answer> call(std::string_view method, std::string_view path, const std::optional<Json>& body,
                              const std::vector<std::pair<std::string, std::string>>& headers = {}) = 0;
  // Events from `after` on, until `each` returns false or the connection ends (then an Error with
  // Errc::unavailable: come back with the last id).
  virtual Status follow(std::string_view path, std::int64_t after,
                        const std::function<bool(std::int64_t id, const Json& event)>& each) = 0;
  virtual const Target& target() const = 0;
};

// An Error from a problem document, with reasons and ways in its message and hint.
Error problem_error(const Answer& answer);

}  // namespace bulkhead::client
