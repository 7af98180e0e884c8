// What a durable lease costs, on a twin of a DGX H100 whose 56 slices of 1g.10gb are there already. A lease
// is created and released, each answered when it is durable; every released slice is scrubbed beside it (four
// lanes), which takes CPU time from what is measured. The floor is one bare SQLite transaction (WAL,
// synchronous=FULL, one row of a lease's bytes) on the same disk, turn by turn in the same run. Then the rate
// with 64 requests outstanding, and both again while 200 readers look at now().
// Goals: p99 of create + release at most 3 times the bare transaction's; at least 2,000 leases a second.
//
//     bench_control [directory on the disk to measure, default: the current one] [rounds, default 1000]
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <future>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "bench/bare.hpp"
#include "engine/control/control.hpp"
#include "twin/control/control.hpp"

namespace {

using namespace bulkhead;
using bench::Bare;
using bench::Times;
namespace fs = std::filesystem;
using control::Answer;
using control::Refusal;

[[noreturn]] void stop(const std::string& why) {
  std::fprintf(stderr, "bench_control: %s\n", why.c_str());
  std::exit(2);
}

template <class F>
double timed(F&& work) {
  const auto start = monotonic_ns();
  work();
  return static_cast<double>(monotonic_ns() - start) / 1e3;
}

bool missed = false;
const char* goal(bool good) {
  missed = missed || !good;
  return good ? "PASS" : "MISSED";
}

const control::Caller operator_{.user = "bench", .role = access::Role::admin, .from = "bench"};
const control::Caller tenant_{
    .user = "ada", .tenant = "vision", .role = access::Role::tenant, .from = "bench"};

lease::Ask slice() { return {.cls = lease::Class::mig, .profile = "1g.10gb"}; }
lease::Ask share() { return {.cls = lease::Class::share, .memory = mebibytes(16), .weight = 1}; }

lease::Lease create(control::Control& control, const lease::Ask& ask) {
  std::promise<Answer<lease::Lease>> promise;
  control.create_lease(tenant_, ask, {},
                       [&](Answer<lease::Lease> answer) { promise.set_value(std::move(answer)); });
  auto answer = promise.get_future().get();
  if (const auto* no = std::get_if<Refusal>(&answer))
    stop(no->what + (no->reasons.empty() ? "" : ": " + no->reasons.front()));
  return std::get<lease::Lease>(std::move(answer));
}
void release(control::Control& control, std::int64_t id) {
  std::promise<bool> promise;
  control.release_lease(tenant_, id, std::nullopt, [&](Answer<lease::Lease> answer) {
    promise.set_value(std::holds_alternative<lease::Lease>(answer));
  });
  if (!promise.get_future().get()) stop("a release was refused");
}
std::uint64_t held(control::Control& control) {
  const auto now = control.now();
  const auto at = now->held.find("vision");
  return at == now->held.end() ? 0 : at->second.leases;
}
double drained(control::Control& control, std::uint64_t to = 0) {
  return timed([&] {
    while (held(control) > to) std::this_thread::sleep_for(std::chrono::microseconds(200));
  });
}

// `outstanding` chains of create, release, create ... until `count` leases were had; leases a second.
double rate(control::Control& control, unsigned outstanding, std::int64_t count) {
  struct Shared {
    std::mutex mutex = {};
    std::condition_variable ready = {};
    std::atomic<std::int64_t> left = 0;
    unsigned running = 0;
    std::function<void()> next = {};
  } shared;
  shared.left = count;
  shared.running = outstanding;
  shared.next = [&] {
    if (shared.left.fetch_sub(1) <= 0) {
      const std::lock_guard hold(shared.mutex);
      --shared.running;
      shared.ready.notify_all();
      return;
    }
    control.create_lease(tenant_, share(), {}, [&](Answer<lease::Lease> made) {
      if (const auto* no = std::get_if<Refusal>(&made))
        stop(no->what + (no->reasons.empty() ? "" : ": " + no->reasons.front()));
      control.release_lease(tenant_, std::get<lease::Lease>(made).id, std::nullopt,
                            [&](Answer<lease::Lease>) { shared.next(); });
    });
  };
  const double us = timed([&] {
    for (unsigned i = 0; i < outstanding; ++i) shared.next();
    std::unique_lock hold(shared.mutex);
    shared.ready.wait(hold, [&] { return shared.running == 0; });
  });
  return static_cast<double>(count) / us * 1e6;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 2 ? std::max(10, std::atoi(argv[2])) : 1000;
  std::string where = fmt::format("{}/bench-control-XXXXXX", argc > 1 ? argv[1] : ".");
  if (::mkdtemp(where.data()) == nullptr) stop(where);
  // The twin's own files are the pretend machine: in memory, so that the disk serves the book alone.
  std::string machine = "/dev/shm/bench-control-XXXXXX";
  if (::mkdtemp(machine.data()) == nullptr) stop(machine);
  {
    const auto start = [&](const std::string& state, std::string_view pools) {
      const fs::path twin = fs::path(machine) / state;
      const auto up = twin::up({.profile = "dgx-h100", .directory = twin, .realtime = false, .init = false});
      if (!up.ok()) stop(up.error().message());
      std::ofstream(fs::path(where) / "node.yaml") << "apiVersion: bulkhead/v1\nkind: Node\ngpus:\n" << pools;
      auto made =
          control::Control::start({.access = {.root = twin / "root",
                                              .nvml_library = (twin / "lib/libnvidia-ml.so.1").string(),
                                              .state_dir = twin / "root/var/lib/bulkhead"},
                                   .state = fs::path(where) / state,
                                   .node_file = fs::path(where) / "node.yaml"});
      if (!made.ok()) stop(made.error().message());
      std::promise<void> there;
      (*made)->put_tenant(operator_, {.name = "vision"}, std::nullopt,
                          [&](Answer<tenant::Tenant>) { there.set_value(); });
      there.get_future().get();
      return std::move(*made);
    };
    Bare bare(fs::path(where) / "bare.db");
    const std::string large(1'000'000, 'x');
    for (int i = 0; i < 20; ++i) bare.put(large);  // its WAL grown to where it begins anew
    std::string body;

    auto control = start("slices", "  - select: {all: true}\n    mode: mig\n    layout: dynamic\n");
    std::vector<std::int64_t> ids;
    const double cutting = timed([&] {
      for (int i = 0; i < 56; ++i) ids.push_back(create(*control, slice()).id);
      for (const auto id : ids)
        while (control->now()->leases.find(id)->second->state != lease::State::active)
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    std::printf("56 slices cut in %.1f s\n", cutting / 1e6);
    body = lease::to_json(*control->now()->leases.find(ids.front())->second).dump();
    for (const auto id : ids) release(*control, id);
    const double scrubbing = drained(*control);
    std::printf("56 slices scrubbed in %.1f s; a lease record of %zu bytes; times in microseconds\n",
                scrubbing / 1e6, body.size());

    const auto pairs = [&](const char* what, int count, bool judged) {
      Times floor, made, ended, pair;
      for (int round = 0; round < count; ++round) {
        drained(*control, 40);
        floor.us.push_back(timed([&] { bare.put(body); }));
        lease::Lease lease;
        made.us.push_back(timed([&] { lease = create(*control, slice()); }));
        if (lease.state != lease::State::active) stop("a slice that is there was not granted at once");
        floor.us.push_back(timed([&] { bare.put(body); }));
        ended.us.push_back(timed([&] { release(*control, lease.id); }));
        pair.us.push_back(made.us.back() + ended.us.back());
      }
      if (what == nullptr) return;
      const auto row = [&](const char* name, Times& times) {
        std::printf("%-34s %9.0f %9.0f %9.2f %9.2f", name, times.at(0.5), times.at(0.99),
                    times.at(0.5) / floor.at(0.5), times.at(0.99) / floor.at(0.99));
      };
      std::printf("%-34s %9s %9s %9s %9s\n", what, "p50", "p99", "x p50", "x p99");
      row("bare transaction", floor);
      std::printf("\n");
      row("create", made);
      std::printf("\n");
      row("release", ended);
      std::printf("\n");
      row("create + release", pair);
      if (judged) std::printf("  p99 at most 3x: %s", goal(pair.at(0.99) <= 3 * floor.at(0.99)));
      std::printf("\n");
      std::fflush(stdout);
    };
    // The book's WAL grows until it is brought into the file once: not measured.
    pairs(nullptr, 300, false);
    pairs("one after another", rounds, true);
    drained(*control);
    Times quiet, alone;
    for (int i = 0; i < std::min(rounds, 40); ++i) {
      alone.us.push_back(timed([&] { bare.put(body); }));
      quiet.us.push_back(timed([&] { (void)create(*control, slice()); }));
    }
    std::printf("%-34s %9.0f %9.0f %9.2f\n", "create, nothing being scrubbed", quiet.at(0.5), quiet.at(0.99),
                quiet.at(0.5) / alone.at(0.5));

    // Readers.
    const double one = timed([&] {
      for (int i = 0; i < 1'000'000; ++i)
        if (control->now()->batch < 0) stop("?");
    });
    std::printf("now(): %.0f ns\n", one / 1e6 * 1e3);
    control.reset();

    control = start("shares", "  - select: {all: true}\n    mode: share\n");
    (void)rate(*control, 64, 1000);
    drained(*control);
    double per_second = 0;
    for (int i = 0; i < 3; ++i) {
      const double now = rate(*control, 64, 4000);
      per_second = std::max(per_second, now);
      const double left = static_cast<double>(held(*control));
      const double after = drained(*control);
      std::printf("64 outstanding: %.0f leases/s created and released (%.0f left to scrub, in %.2f s)\n", now,
                  left, after / 1e6);
    }
    std::printf("64 outstanding, best of three: %.0f leases/s  2,000/s: %s\n", per_second,
                goal(per_second >= 2000));

    std::atomic<bool> over = false;
    std::atomic<std::uint64_t> looks = 0;
    std::vector<std::thread> readers;
    for (int i = 0; i < 200; ++i)
      readers.emplace_back([&] {
        while (!over) {
          const auto now = control->now();
          std::uint64_t leases = 0;
          for (const auto& [id, lease] : now->leases) leases += lease->parts.size();
          looks += leases > 0 ? 1 : 1;
          std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
      });
    const double busy = rate(*control, 64, 4000);
    over = true;
    for (auto& reader : readers) reader.join();
    std::printf("64 outstanding beside 200 readers of every lease, 50/s each: %.0f leases/s\n", busy);
    drained(*control);
    const auto report = (control.reset(), control::verify_audit(fs::path(where) / "shares"));
    if (!report.ok() || !report->broken.empty()) stop("the audit chain is broken");
    std::printf("audit chain: %lld lines, whole\n", static_cast<long long>(report->lines));
  }
  fs::remove_all(where);
  fs::remove_all(machine);
  return missed ? 1 : 0;
}
