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
#include "core/yaml/yaml.hpp"
#include "engine/control/control.hpp"

namespace bulkhead::serve {

using yaml::Mistake;
using yaml::render;

// /etc/bulkhead/serve.yaml: one key for each member, names as here. Durations as "30s", sizes as "1MiB";
// unknown keys are mistakes.
struct Config {
  std::string listen = "0.0.0.0:443";  // empty ("none" in the file): the Unix socket alone
  std::string socket = "/run/bulkhead/api.sock";
  std::filesystem::path state = {};        // empty: BULKHEAD_STATE, or /var/lib/bulkhead
  std::filesystem::path node_file = {};    // pools
  std::string certificate = {}, key = {};  // PEM; empty: made on first start in the state directory
  std::vector<std::string> names = {};     // of the certificate made on first start, beside the host's own
  std::string client_ca = {};              // asks for client certificates (mTLS)
  struct Local {                           // who is who on the Unix socket; uid 0 is an admin
    std::string user = {}, group = {};     // one of the two; the first entry that fits counts
    std::string tenant = {};
    access::Role role = access::Role::tenant;
  };
  std::vector<Local> local = {};
  double requests_per_second = 50;                // of one caller; burst is four times it
  std::size_t streams = 64;                       // open at once, of one caller
  std::size_t connections = 4096;                 // open at once
  std::size_t connections_of_one = 256;           // of one address
  std::size_t body = 1 << 20;                     // bytes
  std::chrono::milliseconds answer_time{30'000};  // then a request that waits for the loop is told so
  std::chrono::milliseconds grace{10'000};        // of a drain on SIGTERM
  bool access_log = true;                         // a line a request, at most a hundred a second
  bool telemetry = true;                          // the GPUs are sampled, by a process of its own
  std::chrono::milliseconds sample_every{100};    // power and temperature; what is dearer is asked less often
  bool dcgm_names = false;          // /metrics has the names that dashboards for dcgm-exporter expect, too
  std::filesystem::path file = {};  // where it was read from, for SIGHUP; no key of the file
};
std::variant<Config, std::vector<Mistake>> parse(std::string_view yaml);
// "127.0.0.1:8443", "[::]:443", ":8443" (every address).
Result<std::pair<std::string, std::uint16_t>> parse_listen(std::string_view text);

// Serves until SIGTERM or SIGINT (graceful). SIGHUP reads the certificates and the node file again, and of
// config.file what can change while it runs: local, requests_per_second, streams, access_log. Takes sockets
// of systemd (LISTEN_FDS) and tells it how it is (NOTIFY_SOCKET, WATCHDOG_USEC). An Error: it could not
// begin.
Status run(const Config& config, const control::Settings& control);

}  // namespace bulkhead::serve
