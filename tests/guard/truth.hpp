// What the test's driver knows for certain, shared by all processes of a test: bytes held, by process.
#pragma once

#include <atomic>
#include <cstdint>

struct Truth {
  struct Process {
    std::atomic<std::uint32_t> pid;
    std::atomic<std::uint64_t> bytes;
  };
  static constexpr unsigned max_processes = 4096;
  std::atomic<std::uint32_t> high;
  std::atomic<std::uint64_t> peak;  // the most that all processes ever held together
  Process processes[max_processes];

  Process* of(std::uint32_t pid) {
    for (unsigned i = 0; i < high.load() && i < max_processes; ++i) {
      if (processes[i].pid.load() == pid) return &processes[i];
    }
    for (unsigned i = 0; i < max_processes; ++i) {
      std::uint32_t none = 0;
      std::uint32_t top = high.load();
      while (top < i + 1 && !high.compare_exchange_weak(top, i + 1)) {
      }
      if (processes[i].pid.compare_exchange_strong(none, pid)) return &processes[i];
    }
    return nullptr;
  }
  std::uint64_t sum() const {
    std::uint64_t total = 0;
    for (unsigned i = 0; i < high.load() && i < max_processes; ++i) total += processes[i].bytes.load();
    return total;
  }
  void took(std::uint64_t bytes, Process& process) {
    process.bytes.fetch_add(bytes);
    const std::uint64_t now = sum();
    std::uint64_t most = peak.load();
    while (most < now && !peak.compare_exchange_weak(most, now)) {
    }
  }
  void died(std::uint32_t pid) {  // the kernel frees what a process held
    for (auto& process : processes) {
      if (process.pid.load() != pid) continue;
      process.bytes.store(0);
      process.pid.store(0);
    }
  }
};
