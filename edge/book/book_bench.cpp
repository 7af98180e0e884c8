// What a durable batch costs: commits of 1, 8 and 64 lease records, each with its audit line, against one
// bare SQLite transaction (WAL, synchronous=FULL, one row of the same bytes) on the same disk, turn by turn
// in the same run. Goals: a lease created and released (two batches of one record and one line) has a p99 of
// at most 3 times the bare transaction's; at least 2,000 records a second with 64 a batch.
//
//     bench_book [directory on the disk to measure, default: the current one] [rounds, default 2000]
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "bench/bare.hpp"
#include "edge/book/book.hpp"

namespace {

using namespace bulkhead;
using bench::Bare;
using bench::Times;
namespace fs = std::filesystem;

// A lease as the daemon writes it, about 900 bytes.
Json a_lease(std::int64_t id, const char* state) {
  return Json{{"id", id},
              {"tenant", "vision"},
              {"user", "ada"},
              {"ask",
               {{"class", "mig"},
                {"profile", "3g.40gb"},
                {"count", 1},
                {"topology", "any"},
                {"ttl_seconds", 3600},
                {"wait", true},
                {"priority", 0},
                {"preemptible", false},
                {"label", "training run 17"}}},
              {"state", state},
              {"parts",
               {{{"gpu", "GPU-3f1c2d4e-5a6b-7c8d-9e0f-112233445566"},
                 {"pci", "0000:3b:00.0"},
                 {"gpu_name", "NVIDIA H100 80GB HBM3"},
                 {"numa_node", 0},
                 {"cpus", "0-31,64-95"},
                 {"device", "MIG-6e3c1a2b-4d5f-5a6b-8c7d-aabbccddeeff"},
                 {"profile", "3g.40gb"},
                 {"start", 4},
                 {"gpu_instance", 2},
                 {"compute_instance", 0},
                 {"generation", id},
                 {"memory", 42'949'672'960},
                 {"device_nodes",
                  {"/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-caps/nvidia-cap30",
                   "/dev/nvidia-caps/nvidia-cap31"}},
                 {"cdi", "bulkhead.dev/slice=l7-0"},
                 {"made", true}}}},
              {"created", "2026-11-22T14:05:09.123Z"},
              {"active_since", "2026-11-22T14:05:09.456Z"},
              {"expires", "2026-11-22T15:05:09.456Z"},
              {"version", 3}};
}

book::Batch a_batch(std::int64_t first, int leases, const char* state, const char* verb) {
  book::Batch batch;
  for (int i = 0; i < leases; ++i) {
    batch.leases.push_back({.id = first + i, .body = a_lease(first + i, state)});
    batch.audit.push_back({.at = wall_now(),
                           .user = "ada",
                           .role = "tenant",
                           .tenant = "vision",
                           .from = "10.0.0.7",
                           .verb = verb,
                           .what = fmt::format("lease/{}", first + i),
                           .outcome = "done",
                           .detail = Json{{"class", "mig"}, {"profile", "3g.40gb"}, {"state", state}}});
  }
  return batch;
}

template <class F>
void timed(Times& times, F&& work) {
  const auto start = monotonic_ns();
  work();
  times.us.push_back(static_cast<double>(monotonic_ns() - start) / 1e3);
}

bool missed = false;
const char* goal(bool good) {
  missed = missed || !good;
  return good ? "PASS" : "MISSED";
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 2 ? std::max(10, std::atoi(argv[2])) : 2000;
  std::string where = fmt::format("{}/bench-book-XXXXXX", argc > 1 ? argv[1] : ".");
  if (::mkdtemp(where.data()) == nullptr) {
    std::perror(where.c_str());
    return 2;
  }
  {
    auto opened = book::Book::open(where, book::Book::Access::read_write);
    if (!opened.ok()) {
      std::fprintf(stderr, "%s\n", opened.error().message().c_str());
      return 2;
    }
    book::Book& ours = **opened;
    Bare bare(fs::path(where) / "bare.db");
    const auto commit = [&](book::Batch& batch) {
      if (const auto status = ours.commit(batch); !status.ok()) {
        std::fprintf(stderr, "%s\n", status.error().message().c_str());
        std::exit(2);
      }
    };
    // A WAL that still grows makes the file system write more at each fsync: both are grown beforehand to the
    // size at which they are brought into the file and begun again.
    const std::string large(1'000'000, 'x');
    for (int i = 0; i < 20; ++i) {
      bare.put(large);
      book::Batch batch;
      batch.settings = {{fmt::format("grown-{}", i), large}};
      commit(batch);
    }
    std::int64_t next = 1;
    std::printf("a lease record of %zu bytes and its audit line; times in microseconds\n",
                a_lease(1, "active").dump().size());
    std::printf("%-24s %9s %9s %9s %9s %12s\n", "", "p50", "p99", "x p50", "x p99", "leases/s");
    for (const int leases : {1, 8, 64}) {
      Times floor, create, release, pair;
      for (int round = 0; round < rounds / (leases == 64 ? 4 : 1); ++round) {
        const std::string body = a_lease(next, "active").dump();
        auto made = a_batch(next, leases, "active", "create");
        auto over = a_batch(next, leases, "ended", "release");
        next += leases;
        timed(floor, [&] { bare.put(body); });
        timed(create, [&] { commit(made); });
        timed(floor, [&] { bare.put(body); });
        timed(release, [&] { commit(over); });
        pair.us.push_back(create.us.back() + release.us.back());
      }
      const auto row = [&](const char* what, Times& times, int records) {
        std::printf("%-24s %9.0f %9.0f %9.2f %9.2f %12.0f", fmt::format("{} {}", what, records).c_str(),
                    times.at(0.5), times.at(0.99), times.at(0.5) / floor.at(0.5),
                    times.at(0.99) / floor.at(0.99),
                    records * static_cast<double>(times.us.size()) / times.sum() * 1e6);
      };
      row("bare transaction", floor, 1);
      std::printf("\n");
      row("create, batch of", create, leases);
      std::printf("\n");
      row("release, batch of", release, leases);
      std::printf("\n");
      row("create + release", pair, leases);
      const double rate = 2 * leases * static_cast<double>(pair.us.size()) / pair.sum() * 1e6;
      if (leases == 1) std::printf("  p99 at most 3x: %s", goal(pair.at(0.99) <= 3 * floor.at(0.99)));
      if (leases == 64) std::printf("  2,000 records/s: %s", goal(rate >= 2000));
      std::printf("\n");
      std::fflush(stdout);
    }
    Times walk;
    std::int64_t lines = 0;
    timed(walk, [&] { lines = ours.verify().value_or(-1); });
    std::printf("verify: %lld lines in %.0f ms\n", static_cast<long long>(lines), walk.sum() / 1e3);
    if (lines != 2 * (next - 1)) missed = true;
  }
  fs::remove_all(where);
  return missed ? 1 : 0;
}
