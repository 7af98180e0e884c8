// A lease: a tenant's right to a slice until a moment, and its life as one table. Pure: the engine brings the
// time and carries out what a transition asks for.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.hpp"
#include "base/ids.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "base/units.hpp"

namespace bulkhead::lease {

enum class Class { mig, share, exclusive, passthrough };
enum class Topology { any, same_gpu, same_numa, same_node, spread };
std::string_view name_of(Class cls);          // "mig" ...
std::string_view name_of(Topology topology);  // "any", "same-gpu" ...

inline constexpr unsigned most_parts = 64;                                 // of one lease
inline constexpr std::chrono::seconds shortest{10}, longest{90 * 86'400};  // of a time to live
// Of a share: what `bulkhead share run` takes, for a program in less does not come up.
inline constexpr Bytes smallest_share = mebibytes(64);

struct Ask {
  Class cls = Class::mig;
  std::string profile = {};          // mig: "3g.40gb"
  std::optional<Bytes> memory = {};  // share: the cap, at least smallest_share
  unsigned weight = 0;               // share: thousandths of a GPU's time, 1..1000
  unsigned count = 1;                // slices or GPUs, 1..most_parts, all or none
  Topology topology = Topology::any;
  std::chrono::seconds ttl{3600};
  std::optional<WallTime> deadline = {};  // not granted by then: ends as `failed`
  bool wait = false;                      // false: refused at once instead of queued
  int priority = 0;                      // -100..100 among the tenant's own; above 0 only an operator may ask
  bool preemptible = false;              // may be ended, with notice, for a lease of higher priority
  std::vector<std::string> models = {};  // shell patterns over the GPU's name; empty: any
  std::string label = {};                // the tenant's own, at most 100 bytes
  friend bool operator==(const Ask&, const Ask&) = default;
};
// Every mistake in one Error, each with its key.
Result<Ask> parse_ask(const Json& json);
Json to_json(const Ask& ask);

// What it got, one a slice.
struct Part {
  Uuid gpu = {};  // the whole GPU
  std::string pci = {}, gpu_name = {};
  int numa_node = -1;
  std::string cpus = {};  // "0-31": cores near the GPU, as the kernel prints them
  Uuid device =
      {};  // what CUDA_VISIBLE_DEVICES takes: the GPU's or the MIG device's UUID; empty until prepared
  std::string profile = {};
  std::optional<unsigned> start = {};  // mig: memory slice
  std::optional<unsigned> gpu_instance = {}, compute_instance = {};
  std::int64_t generation = 0;  // of the instance, from the journal: MIG UUIDs come back, this does not
  Bytes memory = {};
  unsigned weight = 0;
  std::vector<std::string> device_nodes = {};  // "/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap30" ...
  std::string cdi = {};                        // "bulkhead.dev/slice=l7-0"
  bool made = false;                           // the instance was made for this lease, and goes with it
  friend bool operator==(const Part&, const Part&) = default;
};

enum class State {
  requested,  // accepted, not looked at yet
  queued,     // waits for room or for its turn
  preparing,  // its place is taken; instances are being made
  active,     // the tenant has it
  releasing,  // ended for the tenant; being scrubbed: no process, no memory, instance gone if it was made
  ended,
  failed,  // never became active
};
enum class Event {
  wait,      // no room, or not its turn
  place,     // a place was taken
  ready,     // prepared and read back
  cannot,    // refused, or the preparation failed and was taken back
  withdraw,  // the tenant or an operator, before it was active
  release,   // the tenant or an operator
  expire,    // its time is over
  deadline,  // not granted in time
  preempt,   // notice is over
  lost,      // the device is gone (driver, reset, hardware)
  scrubbed,  // nothing of the tenant is left
};
std::string_view name_of(State state);
std::string_view name_of(Event event);

struct Transition {
  State from;
  Event event;
  State to;
  std::string_view what;  // one sentence for the documentation and the audit log
};
std::span<const Transition> transitions();           // the whole life; docs print it
std::optional<State> next(State from, Event event);  // nullopt: this event means nothing there
bool holds(State state);                             // its parts are taken: preparing, active, releasing
bool over(State state);                              // ended, failed

struct Lease {
  std::int64_t id = 0;                 // counts up for ever
  std::string tenant = {}, user = {};  // who asked
  Ask ask = {};
  State state = State::requested;
  std::vector<Part> parts = {};
  WallTime created = {};
  std::optional<WallTime> active_since = {}, expires = {}, ended = {};
  std::optional<WallTime> notice = {};  // will be preempted then
  std::string reason = {};              // why it waits, failed or ended: one sentence
  std::vector<std::string> ways = {};   // what would help
  std::int64_t version = 1;             // counts changes; the API's ETag
};
Json to_json(const Lease& lease);  // the record; parse() takes it back exactly
Result<Lease> parse(const Json& json);

// What the class really promises, in words: memory, faults, bandwidth, time; and what is not isolated.
// Sources in the .cpp.
std::vector<std::string> guarantees(Class cls);
// The environment a program of the lease gets: CUDA_VISIBLE_DEVICES and our own names.
std::vector<std::pair<std::string, std::string>> environment(const Lease& lease);
// When the time `ttl` from `now` is over; a renewal never shortens. Error: outside shortest..longest.
Result<WallTime> renewed(const Lease& lease, std::chrono::seconds ttl, WallTime now);

}  // namespace bulkhead::lease
