// What admission costs: 10,000 requests of 1,000 tenants wait for 10,000 GPUs. Beside each figure, in the
// same run, the floor: a look at every tenant's first request, which is what a plain scan would do for each
// turn.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/prng.hpp"
#include "core/fairness/fairness.hpp"

namespace {

using namespace bulkhead;
using namespace bulkhead::fairness;

constexpr unsigned kTenants = 1000, kRequests = 10'000;

Request request(Prng& random, std::uint64_t id, std::int64_t now) {
  Request q{.id = id, .tenant = static_cast<TenantId>(random.below(kTenants)), .enqueued_ms = now};
  const auto gpus = static_cast<std::int64_t>(1ULL << random.below(4));
  q.demand = {gpus, gpus * 80, gpus * static_cast<std::int64_t>(4 + random.below(12)),
              gpus * static_cast<std::int64_t>(300 + random.below(400))};
  return q;
}

struct Figures {
  double p50 = 0, p99 = 0;
};
Figures figures(std::vector<double> us) {
  std::sort(us.begin(), us.end());
  return {us[us.size() / 2], us[us.size() * 99 / 100]};
}

}  // namespace

int main() {
  Config config;
  config.resources = {{"GPUs", 10'000}, {"GiB", 800'000}, {"cores", 160'000}, {"watts", 7'000'000}};
  auto made = Book::make(config);
  if (!made.ok()) return 1;
  Book book = std::move(made).value();
  Prng random(1);
  for (unsigned i = 0; i < kTenants; ++i) {
    Tenant tenant{.name = fmt::format("t{}", i), .weight = static_cast<std::uint32_t>(1 + random.below(4))};
    tenant.nominal = {8, 640, 128, 5600};
    if (!book.add_tenant(tenant, 0).ok()) return 1;
  }
  std::uint64_t id = 1;
  std::int64_t now = 0;
  std::vector<std::uint64_t> running;
  const auto submit = [&] { return book.submit(request(random, id++, now), now).ok(); };
  while (book.pending() < kRequests || book.free(0) > 0) {  // full, and as many wait
    if (!submit()) return 1;
    if (const auto turn = book.next(now)) {
      if (!book.admit(turn->request, now).ok()) return 1;
      running.push_back(turn->request);
    }
    if (running.size() > 100'000) return 1;
  }
  std::vector<double> next_us, poll_us, turn_us;
  for (int round = 0; round < 20'000; ++round) {
    now += 20;  // a sample every 3,000 rounds: its cost is in the figures
    const auto which = random.below(running.size());
    const std::uint64_t ended = running[which];
    running[which] = running.back();
    running.pop_back();
    const auto t0 = monotonic_ns();
    if (!book.finish(ended, now).ok()) return 1;
    const auto t1 = monotonic_ns();
    auto turn = book.next(now);
    const auto t2 = monotonic_ns();
    next_us.push_back(static_cast<double>(t2 - t1) / 1000);
    double admitting = 0;
    while (turn) {
      const auto t3 = monotonic_ns();
      if (!book.admit(turn->request, now).ok()) return 1;
      admitting += static_cast<double>(monotonic_ns() - t3) / 1000;
      running.push_back(turn->request);
      const auto t4 = monotonic_ns();
      turn = book.next(now);
      const auto t5 = monotonic_ns();
      (turn ? next_us : poll_us).push_back(static_cast<double>(t5 - t4) / 1000);
    }
    turn_us.push_back(static_cast<double>(t2 - t0) / 1000 + admitting);
    while (book.pending() < kRequests) {
      if (!submit()) return 1;
    }
  }
  // The floor: 1,000 tenants' figures read and compared once.
  std::vector<Request> heads;
  for (unsigned i = 0; i < kTenants; ++i) heads.push_back(request(random, i, 0));
  std::vector<double> floor_us;
  std::int64_t sum = 0;
  for (int round = 0; round < 2000; ++round) {
    const auto start = monotonic_ns();
    const Request* best = heads.data();
    for (const auto& head : heads) {
      if (head.demand[0] + round % 3 < best->demand[0]) best = &head;
    }
    sum += best->demand[0];
    floor_us.push_back(static_cast<double>(monotonic_ns() - start) / 1000);
  }
  const Figures next = figures(next_us), poll = figures(poll_us), turn = figures(turn_us),
                floor = figures(floor_us);
  fmt::print("admission, {} requests of {} tenants wait, full cluster (sum {})\n", kRequests, kTenants,
             sum % 10);
  fmt::print("  next(), somebody goes    p50 {:.2f} us  p99 {:.2f} us  {:.2f} of a plain scan ({:.2f} us)\n",
             next.p50, next.p99, next.p50 / floor.p50, floor.p50);
  fmt::print("  next(), nobody fits      p50 {:.2f} us  p99 {:.2f} us\n", poll.p50, poll.p99);
  fmt::print("  finish + next + admit    p50 {:.2f} us  p99 {:.2f} us\n", turn.p50, turn.p99);
  return 0;
}
