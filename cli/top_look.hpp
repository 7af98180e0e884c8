// Where `bulkhead top` gets its view from: samples (the daemon's, or taken here), the host as observed
// (slices and who is in them), and what the daemon knows (tenants, leases, alarms). Each is asked by a thread
// of its own; view() waits for none of them. Internal to cli.
#pragma once

#include <memory>
#include <string>

#include "base/json.hpp"
#include "cli/cli.hpp"
#include "cli/top_page.hpp"
#include "engine/monitor/monitor.hpp"
#include "engine/sample/sample.hpp"
#include "engine/share/share.hpp"

namespace bulkhead::cli::top {

class Look {
 public:
  // `url`: a daemon's; empty: whichever answers, and none is none. `quick`: for one page alone.
  Look(const Context& context, const std::string& url, bool quick);
  ~Look();
  Look(const Look&) = delete;
  Look& operator=(const Look&) = delete;

  // Until every source has spoken, or said that it cannot.
  void wait_ready(unsigned milliseconds);
  View view();

  // Ends the asking. False: a thread sits in a driver call, so the process must end with _exit().
  bool end();

 private:
  struct Inside;
  std::shared_ptr<Inside> inside_;
  std::unique_ptr<monitor::Monitor> sampler_;
  Trails trails_;
};

// A snapshot from a daemon's GET /api/v1/telemetry; ages count from `now_ns`. What makes no sense is left
// out.
sample::Snapshot snapshot_of(const Json& document, std::uint64_t now_ns);

// What of a host and of a daemon's documents belongs to each GPU and slice. Pure.
struct Sources {
  const inventory::Host* host = nullptr;
  Json daemon_host = {};                               // GET /api/v1/host
  Json leases = Json::array();                         // GET /api/v1/leases
  const std::vector<share::Tenant>* shares = nullptr;  // of the host's software slices
};
void join(View& view, const Sources& sources);

}  // namespace bulkhead::cli::top
