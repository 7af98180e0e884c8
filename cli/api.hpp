// What the verbs that speak the API share. Internal to cli.
#pragma once

#include <signal.h>

#include <csignal>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "base/json.hpp"
#include "base/result.hpp"
#include "cli/cli.hpp"
#include "client/client.hpp"

namespace bulkhead::cli::api {

using bulkhead::client::Answer;
using bulkhead::client::Client;

void add_url(CLI::App& app, std::string& url);
Result<std::unique_ptr<Client>> connect(const std::string& url);

// The document of a 2xx answer; else the error of its problem, with a hint for who may not.
Result<Json> document(const Client& client, Result<Answer> answer);
Result<Json> get(Client& client, std::string_view path);
// All entries of a list, page after page, at most `most`.
Result<Json> all(Client& client, const std::string& path, std::size_t most = 100'000);

// Ends with `error`: 1 where the daemon refused for want of room or quota, else 2. With `json` the problem
// document goes to stdout as well.
int refused(const Context& context, std::string_view verb, const Error& error);

// Outside text of a document for a cell: "" where it is not there.
std::string text(const Json& object, const char* key);
std::int64_t number(const Json& object, const char* key);
// "2026-11-23T06:45:00Z" against now: "in 58m", "3h ago"; the text itself where it is no time.
std::string when(std::string_view rfc3339);
std::string span(std::int64_t seconds);  // "1h 5m"
std::string id_of_lease(const Json& lease);
bool over(std::string_view state_of_lease);
// "30s", "2h", "7d": seconds, at most 90 days.
Result<std::uint64_t> seconds_of(const std::string& text);

// While it lives, SIGINT and SIGTERM only ask.
class Asked {
 public:
  Asked();
  Asked(const Asked&) = delete;
  Asked& operator=(const Asked&) = delete;
  ~Asked();
  static volatile std::sig_atomic_t to_stop;  // the signal's number; 0: none came

 private:
  struct sigaction interrupt_ = {}, terminate_ = {};
};

// Asks on the terminal; false without one.
bool confirm(std::string_view question);
// 32 random hex digits: an idempotency key.
std::string fresh_key();

}  // namespace bulkhead::cli::api
