// What /metrics says of GPUs, slices and leases: a page of two snapshots, pure.
#pragma once

#include <cstdint>

#include "daemon/serve/page.hpp"
#include "daemon/serve/telemetry.hpp"

namespace bulkhead::serve {

// `now`: monotonic; ages are told as of it. With `dcgm_names` also under the names and labels of
// dcgm-exporter.
void gpu_metrics(Page& page, const sample::Snapshot& seen, const control::Snapshot& leases, bool dcgm_names,
                 std::uint64_t now);

}  // namespace bulkhead::serve
