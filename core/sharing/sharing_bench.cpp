// What one plan costs: every arbiter makes it anew when a tenant comes, goes or changes. Beside it, in the
// same run, one read of a small file, which is the least that learning of the change costs.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "core/sharing/sharing.hpp"

namespace {

using namespace bulkhead;

std::vector<sharing::Tenant> table(unsigned count, bool ceilings, bool interactive) {
  std::vector<sharing::Tenant> out;
  for (unsigned i = 0; i < count; ++i) {
    sharing::Tenant t;
    t.id = i;
    t.weight = 1 + (i * 37) % 400;
    t.running = true;
    if (interactive && i == 0) t.cls = sharing::Class::interactive;
    if (ceilings && i % 2 == 1) t.ceiling = 5 + i % 60;
    out.push_back(t);
  }
  return out;
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
  double largest = 0;
  std::size_t lines = 0;
  std::printf("one plan, median us:  slices   slices with ceilings   turns beside an interactive tenant\n");
  for (const unsigned count : {2U, 8U, 64U}) {
    double us[3];
    int column = 0;
    for (const auto& tenants :
         {table(count, false, false), table(count, true, false), table(count, false, true)}) {
      us[column] = median_us(1000, [&] { lines += sharing::decide(tenants, {}).lines.size(); });
      largest = std::max(largest, us[column++]);
    }
    std::printf("%2u tenants            %7.1f   %20.1f   %34.1f\n", count, us[0], us[1], us[2]);
  }
  const auto tenants = table(64, false, true);
  const auto plan = sharing::decide(tenants, {});
  std::uint64_t now = 0, on = 0;
  const double moment = median_us(1000, [&] {
    for (unsigned i = 0; i < 100; ++i) on += sharing::at(plan, 63, now += 1'000'003).on ? 1 : 0;
  });
  std::printf("one look at the schedule, 64 tenants: %.3f us\n", moment / 100);
  std::string text;
  const double read = median_us(1000, [&] { text = read_file("/proc/version").value_or(""); });
  std::printf(
      "one read of /proc/version: %.1f us; the dearest plan costs %.1f such reads, wanted below 2000 us\n",
      read, largest / read);
  return largest < 2000 && lines > 0 && on > 0 ? 0 : 1;
}
