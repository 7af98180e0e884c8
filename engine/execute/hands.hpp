// All that touches the host, one action at a time. Runs in the worker process only. Each act is idempotent
// and converges: begun from before, from half or from after, it ends in after, so recovery is doing it again.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/json.hpp"
#include "base/result.hpp"
#include "core/plan/plan.hpp"
#include "edge/nvml/nvml.hpp"
#include "engine/observe/observe.hpp"

namespace bulkhead::execute {

// What the host shows of an action.
enum class Seen {
  before,   // it has not happened
  after,    // it has
  half,     // begun: a GPU instance without its compute instances, one policy of many
  neither,  // somebody else made a third state
  unknown,  // the host cannot say (a clock lock): only doing it again makes sure
};

struct Sight {
  Seen seen = Seen::unknown;
  std::string words = {};                     // what was read, for the message
  std::string note = {};                      // what people should know although it went well
  std::optional<unsigned> gpu_instance = {};  // of a created instance
};

class Hands {
 public:
  explicit Hands(observe::Access access) : access_(std::move(access)) {}

  // What undo will need and the action does not hold; written with the intent.
  Result<Json> prepare(const plan::Action& action);
  Status act(const plan::Action& action, const Json& detail);
  Result<Sight> inspect(const plan::Action& action, const Json& detail);
  Status evict(const inventory::Holder& holder, unsigned grace_ms);
  std::uint64_t driver_calls() const { return calls_closed_ + (nvml_ ? nvml_->calls() : 0); }

 private:
  struct Acting;
  struct Looking;
  Result<nvml::Nvml*> nvml();
  Result<nvml::Device> device(const Uuid& gpu);
  // A step that was planned a moment ago knows ids; these do it with the fewest calls, and say no when the
  // host is not what the plan saw, for the careful way to take over.
  Result<bool> destroy_as_planned(nvml::Device gpu, const plan::DestroyInstance& a);
  bool stands_as_made(nvml::Device gpu, const plan::CreateInstance& a);
  std::filesystem::path below(const std::string& absolute) const;
  Status run(const std::vector<std::string>& command) const;
  // The driver counts an open library as a user of its GPUs, and then does not let one go.
  void close_driver();
  // Its address now; nullopt: a virtual function that is not made.
  Result<std::optional<PciAddress>> address_of(const passthrough::Target& target) const;
  Result<PciAddress> must_be_there(const passthrough::Target& target) const;

  observe::Access access_;
  std::unique_ptr<nvml::Nvml> nvml_;
  std::uint64_t calls_closed_ = 0;
  std::map<std::string, nvml::Device> devices_;  // by UUID, until a MIG mode changes
  struct Made {                                  // by the last CreateInstance of this process
    Uuid gpu = {};
    unsigned id = 0;
    std::map<unsigned, unsigned> compute = {};  // how many of each compute instance profile
  };
  std::optional<Made> made_;
  // By this process, and what it showed: a proof leaves nothing to read back.
  std::map<passthrough::Target, std::string> proved_ = {};
};

}  // namespace bulkhead::execute
