// Shared by the files of this folder: the parts of the table, and the small tools that rows are written with.
#pragma once

#include <functional>
#include <initializer_list>

#include "core/doctor/doctor.hpp"

namespace bulkhead::doctor {

std::vector<Check> iommu_rows();
std::vector<Check> boot_rows();
std::vector<Check> pci_rows();
std::vector<Check> driver_rows();
std::vector<Check> fabric_rows();
std::vector<Check> mig_rows();
std::vector<Check> access_rows();
std::vector<Check> heat_rows();
std::vector<Check> host_rows();

inline constexpr Purposes for_all{.mig = true, .passthrough = true, .share = true};
inline constexpr Purposes for_mig{.mig = true, .passthrough = false, .share = false};
inline constexpr Purposes for_passthrough{.mig = false, .passthrough = true, .share = false};
inline constexpr Purposes for_driver{.mig = true, .passthrough = false, .share = true};

Judgement ok(std::string says, std::vector<Source> evidence = {});
Judgement unknown(std::string says, std::vector<Source> evidence = {}, std::vector<std::string> mend = {});
Judgement warn(std::string says, std::vector<Source> evidence, std::vector<std::string> mend);
Judgement fail(std::string says, std::vector<Source> evidence, std::vector<std::string> mend);
// Unknown until `check` is mended.
Judgement waits(std::string_view check, std::string says);
// Unknown here, because the question belongs to the machine that runs this virtual machine.
Judgement ask_the_host(const Evidence& e, std::string says);

// ---- reading evidence
// {path, what was
// read}; {path, "(why it could not be)"} otherwise.
Source quote(const Evidence& e, const std::string& path);
// The first line of `text` that holds `needle`, trimmed.
std::optional<std::string> line_with(std::string_view text, std::string_view needle);
// The value of "key : value" or "key=value" in a line-oriented text; the last one wins.
std::optional<std::string> value_of(std::string_view text, std::string_view key, char separator);
bool has_word(std::string_view text, std::string_view word);  // among words separated by white space

struct Version {
  std::vector<unsigned> parts = {};
  static std::optional<Version> parse(std::string_view text);  // leading digits and dots of `text`
  unsigned major_part() const { return parts.empty() ? 0 : parts[0]; }
  friend auto operator<=>(const Version&, const Version&) = default;
};
// The first version number with at least one dot in the text.
std::optional<std::string> first_version(std::string_view text);

enum class CpuMaker { intel, amd, other };
CpuMaker cpu_maker(const Evidence& e);

// "GPU 3 (0000:1b:00.0)"
std::string name_of(const inventory::Gpu& gpu);
std::string sysfs(const inventory::PciDevice& device, std::string_view attribute);
// GPUs NVML shows, GPUs only PCI shows, accelerators of other makers.
std::vector<const inventory::PciDevice*> all_gpus(const Evidence& e);
bool on_vfio(const inventory::PciDevice& device);
std::string listed(const std::vector<std::string>& names);  // "a", "a and b", "a, b and 3 more"

// ---- mending
enum class Family { debian, rhel, suse, other };
Family family(const Evidence& e);
std::string sudo(const Evidence& e, std::string command);  // prefixed unless the caller is root
// Look again as root, where that would help.
inline std::vector<std::string> as_root(const Evidence& e) {
  if (e.caller.uid == 0) return {};
  return {"sudo bulkhead doctor"};
}
template <class T>
std::vector<std::string> as_root(const Evidence& e, const Reading<T>& reading) {
  return reading.why == "no such file" ? std::vector<std::string>{} : as_root(e);
}
std::vector<std::string> kernel_arguments(const Evidence& e, std::string_view arguments);
std::vector<std::string> without_kernel_argument(const Evidence& e, std::string_view argument);
std::vector<std::string> install(const Evidence& e, std::string_view debian, std::string_view rhel,
                                 std::string_view suse);
std::vector<std::string> operator+(std::vector<std::string> a, const std::vector<std::string>& b);

}  // namespace bulkhead::doctor
