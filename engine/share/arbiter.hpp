// One tenant's arbiter: a process that holds the tenant, computes the host's plan and carries out its own
// line.
#pragma once

#include "base/fd.hpp"
#include "engine/hold/hold.hpp"
#include "engine/share/registry.hpp"
#include "guard/wire/wire.hpp"

namespace bulkhead::share {

struct Duty {
  Place place;
  Asked asked;
  Entry entry;
  UniqueFd listener;  // none: the guard caps and gates, see Asked::held
  guard::Page* page = nullptr;
  void* inflight = nullptr;  // hold::Settings::inflight
  int program = 0;           // pid of the tenant's first process
  UniqueFd program_gone;     // pidfd of it
};

// Runs until the tenant has no process left; then the registry's files are gone. An error: what made it
// impossible.
Status arbitrate(Duty duty);

// What both sides of a plan do with a group whose tenant has nobody left: back on the GPU with the driver's
// own slice.
void set_free(const Tenant& dead);

}  // namespace bulkhead::share
