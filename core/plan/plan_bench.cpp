// What a plan costs: eight H100s, one instance changed on each, and the same with nothing to do. Beside it,
// in the same run, the smallest thing that a plan decides about: one read of a small file, which stands for
// one driver call.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "core/mig/models_for_tests.hpp"
#include "core/plan/plan.hpp"

namespace {

using namespace bulkhead;

inventory::Host dgx() {
  inventory::Host host;
  for (unsigned index = 0; index < 8; ++index) {
    inventory::Gpu gpu;
    gpu.index = index;
    gpu.uuid = {fmt::format("GPU-{}", index)};
    gpu.mig_capable = gpu.mig_now = gpu.mig_pending = true;
    gpu.geometry = mig::h100();
    unsigned id = 1;
    for (const auto& [profile, start] :
         std::vector<std::pair<unsigned, unsigned>>{{9, 4}, {14, 0}, {19, 2}, {19, 3}}) {
      inventory::GpuInstance instance;
      instance.id = id++;
      instance.profile = profile;
      instance.place = {start, gpu.geometry.by_id(profile)->size};
      instance.compute = {{0, profile == 9 ? 2U : profile == 14 ? 1U : 0U, {}}};
      instance.ours = true;
      gpu.instances.push_back(instance);
    }
    host.gpus.push_back(gpu);
  }
  return host;
}

spec::NodeFile wish(const char* layout) {
  const auto parsed =
      spec::parse(fmt::format("apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {{all: true}}\n    "
                              "mode: mig\n    layout: {}\n",
                              layout));
  return std::get<spec::NodeFile>(parsed);
}

template <class Work>
double median_us(unsigned rounds, const Work& work) {
  std::vector<double> times;
  for (unsigned i = 0; i < rounds; ++i) {
    const auto start = monotonic_ns();
    work();
    times.push_back(static_cast<double>(monotonic_ns() - start) / 1000);
  }
  std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
  return times[rounds / 2];
}

}  // namespace

int main() {
  const auto host = dgx();
  const auto change = wish("[3g.40gb, 1g.20gb, 1g.10gb, 1g.10gb]"),
             same = wish("[3g.40gb, 2g.20gb, 1g.10gb, 1g.10gb]");
  std::size_t steps = 0, none = 0;
  const double recut =
      median_us(2000, [&] { steps = std::get<plan::Plan>(plan::make(change, host, {}, {})).steps.size(); });
  const double nothing =
      median_us(2000, [&] { none = std::get<plan::Plan>(plan::make(same, host, {}, {})).steps.size(); });
  std::string text;
  const double read = median_us(2000, [&] { text = read_file("/proc/version").value_or(""); });
  const double parse =
      median_us(500, [&] { text = spec::to_yaml(wish("[3g.40gb, 2g.20gb, 1g.10gb, 1g.10gb]")); });
  std::printf(
      "plan of 8 GPUs, one instance changed on each (%zu steps): median %.1f us, wanted below 1000 us\n",
      steps, recut);
  std::printf("plan of 8 GPUs, nothing to do (%zu steps):                median %.1f us\n", none, nothing);
  std::printf("parse and write of a node file:                        median %.1f us\n", parse);
  std::printf(
      "one read of /proc/version, the floor of one look:      median %.1f us; the plan costs %.1f such "
      "reads\n",
      read, recut / read);
  return recut < 1000 && steps == 16 && none == 0 ? 0 : 1;
}
