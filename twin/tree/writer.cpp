#include "twin/tree/writer.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include <fmt/format.h>

#include "base/fd.hpp"

namespace bulkhead::twin {

void Writer::directory(const std::string& path) {
  if (error_ || path.empty() || made_.contains(path)) return;
  const auto slash = path.rfind('/');
  if (slash != std::string::npos) directory(path.substr(0, slash));
  if (error_) return;
  if (::mkdir((root_ / path).c_str(), 0755) != 0 && errno != EEXIST) {
    error_ = errno_error(fmt::format("make directory {}", (root_ / path).string()), errno);
    return;
  }
  made_.insert(path);
}

void Writer::file(const std::string& path, std::string_view content, unsigned mode) {
  if (error_) return;
  const auto slash = path.rfind('/');
  if (slash != std::string::npos) directory(path.substr(0, slash));
  if (error_) return;
  const auto full = root_ / path;
  const UniqueFd fd(::open(full.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) {
    error_ = errno_error(fmt::format("create {}", full.string()), errno);
    return;
  }
  while (!content.empty()) {
    const auto n = ::write(fd.get(), content.data(), content.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      error_ = errno_error(fmt::format("write {}", full.string()), errno);
      return;
    }
    content.remove_prefix(static_cast<std::size_t>(n));
  }
  if (mode != 0600 && ::fchmod(fd.get(), mode) != 0)
    error_ = errno_error(fmt::format("chmod {}", full.string()), errno);
}

void Writer::attribute(const std::string& path, std::string_view value, unsigned mode) {
  file(path, std::string(value) + "\n", mode);
}

void Writer::link(const std::string& path, const std::string& target) {
  if (error_) return;
  const auto slash = path.rfind('/');
  if (slash != std::string::npos) directory(path.substr(0, slash));
  if (error_) return;
  const auto relative =
      std::filesystem::path(target).lexically_relative(std::filesystem::path(path).parent_path());
  if (::symlink(relative.c_str(), (root_ / path).c_str()) != 0 && errno != EEXIST) {
    error_ = errno_error(fmt::format("link {}", (root_ / path).string()), errno);
  }
}

Status Writer::status() const {
  if (error_) return Error(*error_);
  return ok_status();
}

std::string cpu_mask(const std::vector<unsigned>& cpus, unsigned total) {
  std::vector<std::uint32_t> words((total + 31) / 32, 0);
  for (const unsigned cpu : cpus) words[cpu / 32] |= 1U << (cpu % 32);
  std::string out;
  for (std::size_t i = words.size(); i-- > 0;) {
    const unsigned digits = i + 1 == words.size() && total % 32 != 0 ? (total % 32 + 3) / 4 : 8;
    out += fmt::format("{}{:0{}x}", out.empty() ? "" : ",", words[i], digits);
  }
  return out;
}

unsigned cpu_total(const Host& host) {
  return host.cpu.sockets * host.cpu.cores_per_socket * host.cpu.threads_per_core;
}

// Linux numbers the first thread of every core first, then the second threads; nodes share their socket's
// cores.
std::vector<unsigned> cpus_of_node(const Host& host, int node) {
  std::vector<unsigned> out;
  const unsigned cores = host.cpu.sockets * host.cpu.cores_per_socket;
  const auto nodes = static_cast<unsigned>(host.numa_memory_kib.size());
  for (unsigned thread = 0; thread < host.cpu.threads_per_core; ++thread) {
    for (unsigned core = 0; core < cores; ++core) {
      if (node < 0 || core * nodes / cores == static_cast<unsigned>(node))
        out.push_back(thread * cores + core);
    }
  }
  return out;
}

std::string address_of(const PciFunction& f) {
  return fmt::format("{:04x}:{:02x}:{:02x}.{:x}", f.domain, f.bus, f.device, f.function);
}

std::string device_path(const Host& host, std::size_t index) {
  const PciFunction& f = host.pci[index];
  const std::string above = f.parent < 0 ? fmt::format("sys/devices/pci{:04x}:{:02x}", f.domain, f.bus)
                                         : device_path(host, static_cast<std::size_t>(f.parent));
  return above + "/" + address_of(f);
}

}  // namespace bulkhead::twin
