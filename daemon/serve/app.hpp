// What answers a request: who asks, whether they may, how often, and the routes of the API.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "api/v1/v1.hpp"
#include "daemon/http/http.hpp"
#include "daemon/serve/bucket.hpp"
#include "daemon/serve/hub.hpp"
#include "daemon/serve/log.hpp"
#include "daemon/serve/rest.hpp"
#include "daemon/serve/serve.hpp"
#include "daemon/serve/telemetry.hpp"
#include "daemon/serve/threads.hpp"
#include "engine/heal/heal.hpp"
#include "engine/incidents/incidents.hpp"
#include "engine/protect/protect.hpp"

namespace bulkhead::serve {

// Requests as /metrics counts them. Any thread.
class Tally {
 public:
  static constexpr std::array<double, 12> bounds{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
                                                 0.05,   0.1,   0.25,   1,     5,    30};  // seconds
  void count(std::string_view operation, int status, std::uint64_t ns);
  void limit(std::string_view why);
  std::string text() const;  // Prometheus

 private:
  mutable std::mutex mutex_ = {};
  std::map<std::pair<std::string_view, int>, std::uint64_t> requests_ = {};
  std::map<std::string_view, std::uint64_t> limited_ = {};
  std::array<std::uint64_t, bounds.size() + 1> times_{};
  double seconds_ = 0;
};

// One request until its answer, which comes once: late ones and second ones are dropped.
class Exchange {
 public:
  Exchange(http::Request asked, std::shared_ptr<http::Reply> reply, Log& log, Tally& tally, bool access_log);
  void answer(http::Response response);
  std::shared_ptr<http::Stream> stream();  // nullptr: it was answered
  bool answered() const { return answered_.load(std::memory_order_acquire); }

  http::Request request;
  control::Caller caller = {};
  std::string_view operation = "none";  // of the table of routes, or ours

 private:
  void account(int status, std::size_t bytes);
  std::shared_ptr<http::Reply> reply_;
  Log& log_;
  Tally& tally_;
  const bool access_log_;
  const std::uint64_t began_;
  std::atomic<bool> answered_{false};
};
using Asked = std::shared_ptr<Exchange>;

class App {
 public:
  // `telemetry` may be none.
  App(const Config& config, control::Control& control, std::filesystem::path state, Log& log,
      Telemetry* telemetry = nullptr);
  ~App();
  App(const App&) = delete;
  App& operator=(const App&) = delete;

  void handle(http::Request request, std::shared_ptr<http::Reply> reply);  // on the server's thread
  void turn();                                                             // there too, each quarter second
  void reload(const Config& config);                                       // there too: what may change
  void end();  // no more reads of the control: before it goes
  void hears(const incidents::Watcher* incidents) { incidents_ = incidents; }  // the same
  void heals(const heal::Healer* healer) { healer_ = healer; }                        // the same
  void guards(const protect::Guardian* guardian) { guardian_ = guardian; }  // before serving; may be none
  void rests(Rest* rest) { rest_ = rest; }                                  // the same
  void draining();                                                          // readyz says so
  bool turning() const { return turning_.load(); }                          // the control loop does
  void serves(const http::Server& server) { server_ = &server; }

 private:
  struct Rule {  // a route with its right
    const api::v1::Route* route = nullptr;
    access::Verb verb = access::Verb::read;
    access::Resource resource = access::Resource::leases;
    void (App::*run)(const Asked& asked, const Rule& rule,
                     std::map<std::string, std::string>& values) = nullptr;
  };
  struct Who {
    control::Caller caller = {};
    std::string bearer = {}, certificate = {};
    bool root = false;  // uid 0 on the Unix socket
  };

  std::variant<Who, http::Response> who(const http::Request& request);
  std::optional<Who> local(std::uint32_t uid);
  bool admit(const Asked& asked, Who& who);  // false: answered
  void route(const Asked& asked);
  std::optional<http::Response> denied(const Exchange& asked, const Rule& rule, const std::string& owner,
                                       const std::string& what) const;
  void refuse(const Asked& asked, std::string_view verb, const std::string& why);
  bool later(const Asked& asked, Worker& worker, std::function<void()> job);
  void wait_for(const Asked& asked);
  template <class T, class F>
  control::Then<T> then(const Asked& asked, F render);

  void get_openapi(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void whoami(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void list_leases(const Asked&, const Rule&, std::map<std::string, std::string>&);
  bool once_of(const Asked& asked, control::Once& once);  // false: answered
  void create_lease(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void get_lease_place(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void get_lease(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void renew_lease(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void release_lease(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void watch(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void list_tenants(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void create_tenant(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void get_tenant(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void put_tenant(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void end_tenant(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void get_quota(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void put_quota(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void list_tokens(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void create_token(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void revoke_token(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void get_host(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void drain(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void cordon(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void uncordon(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void list_incidents(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void get_healing(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void list_alarms(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void evict(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void list_audit(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void get_usage(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void verify_audit(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void get_telemetry(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void get_telemetry_history(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void put_rest(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void end_rest(const Asked&, const Rule&, std::map<std::string, std::string>&);
  void metrics(const Asked& asked);
  void health(const Asked& asked, bool ready);

  void change_tenant(const Asked& asked, const Rule& rule, const std::string& name,
                     std::function<void(tenant::Tenant&)> change, unsigned tries);
  // The version to change, as If-Match has it; false: answered.
  bool matches(const Asked& asked, std::int64_t present, std::optional<std::int64_t>& version);
  control::Then<lease::Lease> lease_then(const Asked& asked, int status,
                                         std::optional<std::int64_t> version = {});
  void answer_lease(const Asked& asked, const lease::Lease& lease, int status);
  std::string metrics_text() const;

  Config config_;
  control::Control& control_;
  const std::filesystem::path state_;
  Log& log_;
  Telemetry* const telemetry_;
  const protect::Guardian* guardian_ = nullptr;
  const heal::Healer* healer_ = nullptr;
  const incidents::Watcher* incidents_ = nullptr;
  Rest* rest_ = nullptr;
  Tally tally_ = {};
  const http::Server* server_ = nullptr;
  std::unordered_map<std::string_view, Rule> rules_ = {};  // by operation
  const std::string openapi_;
  const std::uint64_t began_;

  // Of the server's thread.
  Buckets callers_, strangers_, failures_, told_;
  struct Known {
    std::optional<Who> who = {};
    std::uint64_t until = 0;
  };
  std::unordered_map<std::uint32_t, Known> uids_ = {};
  struct Rendered {
    std::shared_ptr<const lease::Lease> lease = {};
    std::string body = {}, tag = {};
  };
  std::unordered_map<std::int64_t, Rendered> rendered_ = {};
  std::deque<std::pair<std::uint64_t, Asked>> waiting_ = {};
  std::int64_t last_batch_ = -1;
  std::uint64_t last_turn_ = 0;
  const std::uint64_t still_turns_ns_;

  std::atomic<bool> turning_{true}, draining_{false};
  std::mutex verdict_mutex_ = {};
  std::vector<Asked> verdicts_ = {};
  bool verifying_ = false;
  Hub hub_;
  Worker lists_, reads_, verifier_;
};

http::Response problem(int status, std::string_view code, std::string detail, std::string hint = {});
http::Response problem(const control::Refusal& refusal);

}  // namespace bulkhead::serve
