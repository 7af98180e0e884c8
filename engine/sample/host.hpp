// The host around the GPUs, internal to engine/sample: counters of links and PCIe that the kernel has,
// hwmon's sensors, and the BMC's. On threads of their own: a BMC takes seconds, a sensor on a slow bus may
// hang.
#pragma once

#include <condition_variable>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/sample/sample.hpp"

namespace bulkhead::sample {

// What the kernel tells, read once. Keeps the counts of the last minute, of which ratios are made.
class HostReader {
 public:
  explicit HostReader(std::filesystem::path root) : root_(std::move(root)) {}
  Host read(std::uint64_t now_ns);

 private:
  struct Counts {
    std::uint64_t at_ns = 0, packets = 0, lost = 0;
  };
  void ports(Host& out, std::uint64_t now_ns);
  void pcie(Host& out, std::uint64_t now_ns);
  void sensors(Host& out) const;

  const std::filesystem::path root_;
  std::map<std::string, std::deque<Counts>> window_ = {};
  std::vector<std::filesystem::path> functions_ = {};  // with error counters
  std::uint64_t found_ns_ = 0;
};

class HostLook {
 public:
  // Threads that end by themselves after stop(), when what they wait for answers.
  static std::shared_ptr<HostLook> start(const std::filesystem::path& root);
  void stop();
  Host seen() const;

 private:
  bool wait(std::uint64_t nanoseconds);  // false: stopped
  mutable std::mutex mutex_ = {};
  std::condition_variable wake_ = {};
  bool stop_ = false;
  Host kernel_ = {};
  std::vector<Sensor> bmc_sensors_ = {};
  std::string bmc_ = {};
};

}  // namespace bulkhead::sample
