// Writes files, directories and relative links below one root; the first failure wins and ends the rest.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>

#include "base/result.hpp"
#include "twin/tree/tree.hpp"

namespace bulkhead::twin {

class Writer {
 public:
  explicit Writer(std::filesystem::path root) : root_(std::move(root)) {}

  void file(const std::string& path, std::string_view content, unsigned mode = 0644);
  // An attribute: the value and a newline.
  void attribute(const std::string& path, std::string_view value, unsigned mode = 0444);
  void directory(const std::string& path);
  // `path` points to `target`, both below the root; the link is relative.
  void link(const std::string& path, const std::string& target);
  Status status() const;
  const std::filesystem::path& root() const { return root_; }

 private:
  std::filesystem::path root_;
  std::unordered_set<std::string> made_ = {};
  std::optional<Error> error_ = {};
};

// "ffff", "000000ff,ffffffff": as the kernel prints CPU masks.
std::string cpu_mask(const std::vector<unsigned>& cpus, unsigned total);

// CPUs of a NUMA node; of the whole host for -1.
std::vector<unsigned> cpus_of_node(const Host& host, int node);
unsigned cpu_total(const Host& host);

// "0000:1b:00.0"
std::string address_of(const PciFunction& f);
// "sys/devices/pci0000:15/0000:15:01.0/0000:1b:00.0"
std::string device_path(const Host& host, std::size_t index);

void write_pci(Writer& out, const Host& host, const State& state, std::string* iomem);
void write_cpus(Writer& out, const Host& host);
void write_dmi(Writer& out, const Host& host, const State& state);
void write_driver(Writer& out, const Host& host, const State& state);

}  // namespace bulkhead::twin
