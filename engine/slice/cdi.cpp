// CDI files (github.com/cncf-tags/container-device-interface): what a container runtime needs to give a lease
// to a container. Version 0.3.0, the oldest that holds all of it: podman 4.3 refuses what is above 0.5.
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <set>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/json.hpp"
#include "base/text.hpp"
#include "engine/slice/slice.hpp"

namespace bulkhead::slice {

namespace fs = std::filesystem;

namespace {

constexpr std::string_view kind = "bulkhead.dev/slice";
constexpr std::string_view version = "0.3.0";

fs::path directory_of(const Settings& settings) {
  return settings.access.root / settings.cdi.relative_path();
}
fs::path file_of(const Settings& settings, std::int64_t lease) {
  return directory_of(settings) / fmt::format("bulkhead.dev-slice-{}.json", lease);
}

// The part of "bulkhead.dev/slice=l7-0" behind '='; empty when it is no such name.
std::string_view name_in(std::string_view cdi) {
  if (!cdi.starts_with(kind) || cdi.size() <= kind.size() + 1 || cdi[kind.size()] != '=') return {};
  const auto name = cdi.substr(kind.size() + 1);
  const bool plain =
      name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") ==
      std::string_view::npos;
  return plain && name.size() <= 63 && name.front() != '-' && name.back() != '-' ? name : std::string_view{};
}

Json device(std::string_view name, const std::set<std::string>& nodes, const std::string& visible) {
  Json list = Json::array();
  for (const auto& node : nodes) list.push_back(Json{{"path", node}});
  return Json{
      {"name", name},
      {"containerEdits",
       {{"env", Json::array({"CUDA_VISIBLE_DEVICES=" + visible})}, {"deviceNodes", std::move(list)}}}};
}

}  // namespace

Status write_cdi(const Settings& settings, const lease::Lease& lease) {
  if (lease.ask.cls == lease::Class::share || lease.ask.cls == lease::Class::passthrough) {
    return Error(
        Errc::unsupported,
        lease.ask.cls == lease::Class::share
            ? "a container with a shared GPU's device files would have all of it: no CDI file is made"
            : "a GPU for a virtual machine is not given to containers: no CDI file is made",
        lease.ask.cls == lease::Class::share
            ? fmt::format("bulkhead share run --name {} PROGRAM", share_name(lease.id))
            : "");
  }
  Json devices = Json::array();
  std::set<std::string> all_nodes;
  std::string all_visible;
  for (const auto& part : lease.parts) {
    const auto name = name_in(part.cdi);
    if (name.empty() || part.device.text.empty() || part.device_nodes.empty()) {
      return Error(Errc::invalid,
                   fmt::format("lease {}: a part has no CDI name, no device or no device files", lease.id));
    }
    const std::set<std::string> nodes(part.device_nodes.begin(), part.device_nodes.end());
    devices.push_back(device(name, nodes, part.device.text));
    all_nodes.insert(nodes.begin(), nodes.end());
    all_visible += (all_visible.empty() ? "" : ",") + part.device.text;
  }
  if (devices.empty()) return Error(Errc::invalid, fmt::format("lease {} has no parts", lease.id));
  // One variable for each container: of two parts named side by side the last would win.
  if (devices.size() > 1) devices.push_back(device(fmt::format("l{}", lease.id), all_nodes, all_visible));
  const Json file{
      {"cdiVersion", version},
      {"kind", kind},
      {"devices", std::move(devices)},
      {"containerEdits",
       // "void" keeps NVIDIA's own container runtime from adding GPUs of its choice.
       {{"env", Json::array({"NVIDIA_VISIBLE_DEVICES=void", fmt::format("BULKHEAD_LEASE={}", lease.id),
                             fmt::format("BULKHEAD_CLASS={}", lease::name_of(lease.ask.cls))})}}}};
  std::error_code failed;
  fs::create_directories(directory_of(settings), failed);
  if (failed) return errno_error("create " + directory_of(settings).string(), failed.value());
  return write_file_atomic(file_of(settings, lease.id), dump(file) + "\n", 0644);
}

Status remove_cdi(const Settings& settings, std::int64_t lease) {
  const fs::path file = file_of(settings, lease);
  if (::unlink(file.c_str()) != 0 && errno != ENOENT && errno != ENOTDIR)
    return errno_error("remove " + file.string(), errno);
  return ok_status();
}

}  // namespace bulkhead::slice
