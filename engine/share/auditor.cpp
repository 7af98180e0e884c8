#include "engine/share/auditor.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/fd.hpp"
#include "edge/nvml/nvml.hpp"

namespace bulkhead::share {

struct Auditor::Inside {
  std::string library;
  UniqueFd done;
  std::mutex mutex;
  std::condition_variable wake;
  bool asked = false, with_busy = false, stop = false, running = false;
  std::optional<Seen> seen;
};

Auditor::Auditor(std::string nvml_library) : inside_(std::make_shared<Inside>()) {
  inside_->library = std::move(nvml_library);
  inside_->done.reset(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
}

Auditor::~Auditor() {
  {
    const std::lock_guard lock(inside_->mutex);
    inside_->stop = true;
  }
  inside_->wake.notify_one();
}

int Auditor::fd() const { return inside_->done.get(); }

void Auditor::look(bool with_busy) {
  if (!inside_->running) {
    try {
      std::thread([inside = inside_] { work(inside); }).detach();
      inside_->running = true;
    } catch (const std::system_error& failed) {  // a limit on processes, which the tenant may have used up
      {
        const std::lock_guard lock(inside_->mutex);
        inside_->seen.emplace().trouble = std::string("no thread to be had: ") + failed.what();
      }
      const std::uint64_t one = 1;
      (void)!::write(inside_->done.get(), &one, sizeof one);
      return;
    }
  }
  {
    const std::lock_guard lock(inside_->mutex);
    inside_->with_busy = inside_->with_busy || with_busy;
    inside_->asked = true;
  }
  inside_->wake.notify_one();
}

std::optional<Auditor::Seen> Auditor::take() {
  std::uint64_t count = 0;
  (void)!::read(inside_->done.get(), &count, sizeof count);
  const std::lock_guard lock(inside_->mutex);
  return std::exchange(inside_->seen, std::nullopt);
}

void Auditor::work(const std::shared_ptr<Inside>& inside) {
  std::unique_ptr<nvml::Nvml> nvml;
  std::vector<nvml::Device> devices;
  std::map<std::uint32_t, std::uint64_t> last_stamp;  // GPU -> newest utilisation sample seen, us
  for (;;) {
    bool with_busy = false;
    {
      std::unique_lock lock(inside->mutex);
      inside->wake.wait(lock, [&] { return inside->stop || inside->asked; });
      if (inside->stop) return;
      with_busy = std::exchange(inside->with_busy, false);
      inside->asked = false;
    }
    Seen seen;
    if (!nvml) {
      if (auto opened = nvml::Nvml::open(inside->library); opened.ok()) {
        nvml = std::move(*opened);
        if (auto found = nvml->devices(); found.ok()) {
          devices = std::move(*found);
        } else {
          seen.trouble = found.error().message();
          nvml.reset();  // again with the next look
        }
      } else {
        seen.trouble = opened.error().message();
      }
    }
    for (std::uint32_t index = 0; nvml && index < devices.size(); ++index) {
      if (auto processes = nvml->processes(devices[index]); processes.ok()) {
        seen.bytes[index];  // nobody's is an answer as well
        for (const auto& entry : *processes)
          if (entry.memory) seen.bytes[index][entry.pid] += entry.memory->count;
      } else {
        seen.trouble = processes.error().message();
      }
      if (!with_busy) continue;
      auto samples = nvml->process_utilization(devices[index], last_stamp[index]);
      if (!samples.ok()) {
        // Nothing sampled: nobody had work. A chip that has no such counter: busy stays unknown.
        if (samples.error().code() == Errc::not_found) seen.with_busy = true;
        continue;
      }
      seen.with_busy = true;
      std::map<int, std::pair<double, unsigned>> sums;
      for (const auto& sample : *samples) {
        last_stamp[index] = std::max(last_stamp[index], sample.timestamp_us);
        auto& [sum, count] = sums[sample.pid];
        sum += sample.sm_percent / 100.0;
        ++count;
      }
      for (const auto& [pid, sum] : sums) seen.busy[pid] += sum.first / sum.second;
    }
    {
      const std::lock_guard lock(inside->mutex);
      inside->seen = std::move(seen);
    }
    const std::uint64_t one = 1;
    (void)!::write(inside->done.get(), &one, sizeof one);
  }
}

}  // namespace bulkhead::share
