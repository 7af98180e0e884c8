// From a fault to the mildest action that mends it: who loses what by it, what holds it back, and what comes
// next when it does not help. Pure: the host, what was done before and the time are arguments.
//
// The order of every action is the same, so that nobody is surprised: no new leases where it acts, those whom
// it touches are told why and end, everybody lets go, the act, a check of the hardware, and the door is open
// again. What cannot be mended from here stays shut until a person opens it.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.hpp"
#include "base/json.hpp"
#include "base/result.hpp"

namespace bulkhead::heal {

// Mildest first: what an act destroys contains what those before it destroy, but for the last two.
enum class Act : std::uint8_t {
  none,
  end_process,
  drain_slice,     // its lease ends; the instance stays
  recreate_slice,  // the instance is destroyed and made again
  reset_gpu,
  rescan,  // taken off the bus and found again
  restart_fabric_manager,
  quarantine,  // shut until a person says otherwise
  reboot,      // never done from here: asked of a person
};
inline constexpr std::size_t acts = static_cast<std::size_t>(Act::reboot) + 1;
std::string_view name_of(Act act);  // "reset-gpu"
std::optional<Act> parse_act(std::string_view text);

// How much of the host an act takes out of service while it is under way.
enum class Reach : std::uint8_t { process, slice, gpu, fabric, node };
struct Row {  // of the table of acts
  Act act = Act::none;
  Reach reach = Reach::process;
  bool gate = false;           // the hardware is checked before the next tenant gets it
  Act next = Act::none;        // when it did not help, or did not help for long
  std::string_view does = {};  // "resets gpu {}": what it does to whom it touches
};
const Row& row_of(Act act);

enum class Mode : std::uint8_t { observe, suggest, act };
std::string_view name_of(Mode mode);
std::optional<Mode> parse_mode(std::string_view text);

struct Settings {
  Mode mode = Mode::suggest;
  unsigned most_an_hour = 4;        // acts of the whole host; the circuit breaker
  unsigned keep_healthy = 1;        // GPUs that serve: an act that would leave fewer waits for a person
  std::int64_t relapse_s = 86'400;  // the same fault again within this time: the act before did not help
};

struct Fault {
  std::string id = {};     // of the incident
  std::string cause = {};  // one line
  Act remedy = Act::none;  // what the incident asks for
  Uuid gpu = {};           // empty: the node's
  std::optional<unsigned> gpu_instance = {};
  int pid = 0;  // of end_process
  std::uint64_t start_time = 0;
  // The program's own doing. It may fail as often as it likes: ending it is all there is to do, and neither its
  // lease nor the host's breaker is touched by it.
  bool own = false;
  bool sure = true;  // false: the cause is a guess; nothing that ends a lease is done on a guess
};

struct Lease {
  std::int64_t id = 0;
  std::string tenant = {};
  std::optional<unsigned> gpu_instance = {};
};
struct Gpu {
  Uuid uuid = {};
  unsigned index = 0;
  bool serves = true;  // not cordoned, not lost
  bool mig = false;
  bool on_fabric = false;  // of an NVSwitch system: peers lose their links while it is reset
  std::vector<Lease> leases = {};
  std::vector<std::string> holders = {};  // beside the leases' own: "pid 4711 (dcgm)"
};
struct Host {
  std::vector<Gpu> gpus = {};
};

struct Done {  // an act that was taken, newest last
  std::int64_t at_s = 0;
  Act act = Act::none;
  Uuid gpu = {};
  std::optional<unsigned> gpu_instance = {};
  bool helped = false;  // the check afterwards was passed
};

enum class Step : std::uint8_t { cordon, evict, let_go, act, gate, uncordon };
std::string_view name_of(Step step);

struct Victim {
  std::int64_t lease = 0;
  std::string tenant = {}, loses = {};  // "its lease 7 on gpu 3: gpu 3 is reset"
};

struct Decision {
  Act act = Act::none;
  bool now = false;      // false: said, not done; `held` says why
  std::string why = {};  // one sentence: the fault, and why this act
  std::vector<std::string> held = {};
  std::vector<Step> steps = {};
  std::vector<Victim> victims = {};
  std::vector<std::string> disturbed = {};  // others who notice it: holders, peers on the fabric
  std::vector<std::string> commands = {};   // for a person to do the same by hand
  Act next = Act::none;                     // if it does not help
};

// What to do about `fault`, the time being `now_s`. An act of a GPU that the host does not have: quarantine
// of nothing, that is none, with the reason.
Decision decide(const Fault& fault, const Host& host, std::span<const Done> before, const Settings& settings,
                std::int64_t now_s);

Json to_json(const Decision& decision);

}  // namespace bulkhead::heal
