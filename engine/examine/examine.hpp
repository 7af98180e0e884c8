// Gathers what the doctor's checks read, below one root: the only part of the doctor that touches the
// machine. It reads and never writes; the one thing it does beyond reading files is to ask whether a TCP port
// on this host's loopback is open. What cannot be read is recorded with the reason.
#pragma once

#include "base/result.hpp"
#include "core/doctor/doctor.hpp"
#include "engine/observe/observe.hpp"

namespace bulkhead::examine {

// Observes the host, then looks at everything that any check names. An Error only when the host cannot be
// observed.
Result<doctor::Evidence> evidence(const observe::Access& access);

// The same for a Host that is known already. Paths are resolved inside `root` even where links point out of
// it (openat2 with RESOLVE_IN_ROOT), so a support bundle of another machine cannot make bulkhead read this
// one.
doctor::Evidence look(const std::filesystem::path& root, inventory::Host host);

}  // namespace bulkhead::examine
