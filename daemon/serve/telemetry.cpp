#include "daemon/serve/telemetry.hpp"

#include <sys/prctl.h>

#include <chrono>

#include <fmt/format.h>

namespace bulkhead::serve {

namespace {

constexpr std::uint64_t second_ns = 1'000'000'000;
constexpr unsigned whole_gpu = ~0U;

}  // namespace

Telemetry::Telemetry(monitor::Monitor& monitor, const control::Control& control, Log& log)
    : monitor_(monitor),
      control_(control),
      log_(log),
      seen_(std::make_shared<const sample::Snapshot>(sample::Snapshot{.why = "starting"})) {}

void Telemetry::add(std::string name, Step step) {
  costs_.push_back({.name = name});
  steps_.emplace_back(std::move(name), std::move(step));
}

void Telemetry::begin() {
  thread_ = std::thread([this] { serve(); });
}

void Telemetry::end() {
  {
    const std::lock_guard hold(mutex_);
    ending_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::shared_ptr<const sample::Snapshot> Telemetry::seen() const {
  const std::lock_guard hold(mutex_);
  return seen_;
}

std::vector<Telemetry::Cost> Telemetry::costs() const {
  const std::lock_guard hold(mutex_);
  return costs_;
}

std::size_t Telemetry::history_bytes() const {
  const std::lock_guard hold(mutex_);
  return history_bytes_;
}

void Telemetry::serve() {
  ::prctl(PR_SET_NAME, "bh-telemetry");
  while (true) {
    look();
    std::unique_lock hold(mutex_);
    // On the second's grid: a beat that took long is followed by the next one due, not by those missed.
    const std::uint64_t now = monotonic_ns();
    const auto left = std::chrono::nanoseconds(second_ns - now % second_ns);
    if (wake_.wait_for(hold, left, [this] { return ending_; })) return;
  }
}

void Telemetry::look() {
  const auto seen = std::make_shared<const sample::Snapshot>(monitor_.snapshot());
  const auto leases = control_.now();
  {
    const std::lock_guard hold(mutex_);
    seen_ = seen;
  }
  if (seen->why != trouble_) {
    trouble_ = seen->why;
    log_.say(trouble_.empty() ? Log::Level::notice : Log::Level::warning,
             trouble_.empty() ? std::string("telemetry the GPUs are sampled")
                              : fmt::format("telemetry no values: {}", value(trouble_, 1000)));
  }
  hurry(*seen, *leases);
  const WallTime wall = wall_now();
  const std::uint64_t now = monotonic_ns();
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const std::uint64_t began = monotonic_ns();
    steps_[i].second(*seen, *leases, wall, now);
    const std::lock_guard hold(mutex_);
    ++costs_[i].steps;
    costs_[i].nanoseconds += monotonic_ns() - began;
  }
  if (beats_++ % 60 == 0) {
    const std::size_t bytes = monitor_.history_bytes();
    const std::lock_guard hold(mutex_);
    history_bytes_ = bytes;
  }
}

// A lease began or ended on a GPU: which slices there are, and the joules up to now, are asked at once.
void Telemetry::hurry(const sample::Snapshot& gpus, const control::Snapshot& leases) {
  for (const auto& pool : leases.gpus) {
    auto& had = had_[pool.gpu.text];
    if (had == pool.leases) continue;
    had = pool.leases;
    for (const auto& gpu : gpus.gpus)
      if (gpu.uuid == pool.gpu) {
        monitor_.hurry(gpu.index, sample::Tier::layout);
        monitor_.hurry(gpu.index, sample::Tier::energy);
      }
  }
}

Holders::Holders(const control::Snapshot& now) {
  for (const auto& gpu : now.gpus)
    for (const std::int64_t id : gpu.leases) {
      const auto at = now.leases.find(id);
      if (at == now.leases.end()) continue;
      const lease::Lease& lease = *at->second;
      if (lease.ask.cls == lease::Class::share) continue;
      for (const auto& part : lease.parts) {
        if (part.gpu != gpu.gpu) continue;
        if (lease.ask.cls == lease::Class::mig && !part.gpu_instance) continue;  // not made yet
        all_[{gpu.gpu.text, part.gpu_instance.value_or(whole_gpu)}] = {
            .lease = id, .tenant = lease.tenant, .profile = part.profile};
      }
    }
}

const Holder* Holders::of_gpu(const Uuid& gpu) const { return of_slice(gpu, whole_gpu); }

const Holder* Holders::of_slice(const Uuid& gpu, unsigned gpu_instance) const {
  const auto at = all_.find({gpu.text, gpu_instance});
  return at == all_.end() ? nullptr : &at->second;
}

}  // namespace bulkhead::serve
