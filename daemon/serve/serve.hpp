// The daemon: joins the control loop with the HTTP server. Who asks (token, certificate, uid), whether it
// may, which route it is, how often; idempotency keys, ETags, pages and watch streams; metrics and health.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/result.hpp"
#include "core/access/access.hpp"
#include "engine/control/control.hpp"

namespace bulkhead::serve {

struct Mistake {
  unsigned line = 0, column = 0;
  std::string path = {}, what = {}, suggestion = {};
};

// /etc/bulkhead/serve.yaml. Durations as "30s", sizes as "1MiB"; unknown keys are mistakes.
struct Config {
  std::string listen = "0.0.0.0:443";  // empty: the Unix socket alone
  std::string socket = "/run/bulkhead/api.sock";
  std::filesystem::path state = {};     // empty: BULKHEAD_STATE, or /var/lib/bulkhead
  std::filesystem::path node_file = {};  // pools
  std::string certificate = {}, key = {};  // PEM; empty: made on first start in the state directory
  std::string client_ca = {};              // asks for client certificates (mTLS)
  struct Local {  // who is who on the Unix socket; uid 0 is an admin
    std::string user = {}, group = {};  // one of the two
    std::string tenant = {};
    access::Role role = access::Role::tenant;
  };
  std::vector<Local> local = {};
  double requests_per_second = 50;  // of one caller; burst is four times it
  std::size_t most_streams = 64;    // of one caller
  std::size_t body = 1 << 20;       // bytes
  std::chrono::milliseconds grace{10'000};  // of a drain on SIGTERM
};
std::variant<Config, std::vector<Mistake>> parse(std::string_view yaml);
std::string render(const std::vector<Mistake>& mistakes, std::string_view file_name);

// Serves until SIGTERM or SIGINT (graceful), SIGHUP reads certificates and the node file again. Takes sockets
// of systemd (LISTEN_FDS) and tells it how it is (NOTIFY_SOCKET, WATCHDOG_USEC). An Error: it could not begin.
Status run(const Config& config, const control::Settings& control);

}  // namespace bulkhead::serve
