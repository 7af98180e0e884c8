// Any bytes: a list of nodes, a zero byte, a list of pods. Both parse or say what is wrong, with at most so
// many words; what parses is run for a while.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "core/replay/replay.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead::replay;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const std::size_t cut = text.find('\0');
  const auto nodes = parse_nodes(text.substr(0, cut));
  const auto pods = parse_pods(cut == std::string_view::npos ? text : text.substr(cut + 1));
  for (const auto* error : {nodes.ok() ? nullptr : &nodes.error(), pods.ok() ? nullptr : &pods.error()})
    if (error != nullptr && (error->message().empty() || error->message().size() > 10'000)) std::abort();
  if (!nodes.ok() || !pods.ok() || nodes->nodes.size() > 64 || pods->pods.size() > 16) return 0;
  const Policy policy = kPolicies[size % std::size(kPolicies)];
  const auto a_while = [](std::uint64_t done, std::uint64_t total) { return done < 1000 || done == total; };
  for (const auto& outcome :
       {sample(*nodes, *pods, policy, {.seed = size, .arrived_percent = 30, .points = 5}, a_while),
        replay_times(*nodes, *pods, policy, {.seed = size, .arrived_percent = 30, .points = 5})}) {
    if (!outcome.ok()) continue;
    if (!(outcome->allocated_percent >= 0 && outcome->allocated_percent <= 100.001) ||
        outcome->failed > outcome->arrivals || outcome->curve.size() > 6)
      std::abort();
  }
  return 0;
}
