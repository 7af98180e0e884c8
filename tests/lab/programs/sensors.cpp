// lab_sensors [--exchanges] [TIMEOUT_MS]: what edge/bmc reads of /dev/ipmi0, a line a sensor: name|value or
// why|unit|thresholds, upper non-recoverable first. --exchanges prints each command and its answer in hex
// instead, for unit tests.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/clock.hpp"
#include "edge/bmc/bmc.hpp"

namespace {

using namespace bulkhead;

int fail(const Error& e) {
  std::printf("error|%s|%s\n", e.message().c_str(), e.hint().c_str());
  return 2;
}

void print(const std::optional<double>& threshold) {
  if (threshold) {
    std::printf("|%g", *threshold);
  } else {
    std::printf("|na");
  }
}

void hex(const bmc::Octets& octets) {
  for (const auto o : octets) std::printf("%02x", o);
}

int exchanges() {
  auto channel = bmc::Channel::open();
  if (!channel.ok()) return fail(channel.error());
  const bmc::Ask ask = [&](const bmc::Request& request, std::uint64_t until) {
    auto answer = channel->ask(request, until);
    std::printf("%02x%02x", request.function, request.command);
    hex(request.data);
    if (answer.ok()) {
      std::printf(" 00");
      hex(*answer);
    } else {
      std::printf(" %02x", static_cast<unsigned>(answer.error().native()));
    }
    std::printf("\n");
    return answer;
  };
  const auto until = monotonic_ns() + 30'000'000'000U;
  const auto known = bmc::repository(ask, until);
  if (!known.ok()) return fail(known.error());
  (void)bmc::readings(ask, *known, until);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--exchanges") == 0) return exchanges();
  bmc::Access access;
  if (argc > 1) access.timeout_ms = static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10));
  const auto report = bmc::read(access);
  if (!report.ok()) return fail(report.error());
  for (const auto& s : report->sensors) {
    if (s.value) {
      std::printf("%s|%g|%s", s.name.c_str(), *s.value, s.unit.c_str());
    } else {
      std::printf("%s|%s|%s", s.name.c_str(), s.value.why.c_str(), s.unit.c_str());
    }
    const auto& t = s.thresholds;
    for (const auto& one : {t.upper_non_recoverable, t.upper_critical, t.upper_non_critical,
                            t.lower_non_critical, t.lower_critical, t.lower_non_recoverable}) {
      print(one);
    }
    std::printf("\n");
  }
  for (const auto& note : report->notes) std::printf("note|%s\n", note.c_str());
}
