#include "core/doctor/doctor.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/doctor/rows.hpp"

namespace bulkhead::doctor {

namespace {

template <class Map, class Value>
const Value& look_up(const Map& map, const std::string& path, const Value& absent) {
  const auto found = map.find(path);
  return found == map.end() ? absent : found->second;
}

template <class T>
const Reading<T>& not_looked_at() {
  static const Reading<T> absent = Reading<T>::missing("no such file");
  return absent;
}

}  // namespace

const Reading<std::string>& Evidence::text(const std::string& path) const {
  return look_up(texts, path, not_looked_at<std::string>());
}

const Reading<std::vector<std::string>>& Evidence::list(const std::string& path) const {
  return look_up(names, path, not_looked_at<std::vector<std::string>>());
}

const Reading<std::string>& Evidence::link(const std::string& path) const {
  return look_up(links, path, not_looked_at<std::string>());
}

const Reading<Node>& Evidence::node(const std::string& path) const {
  return look_up(nodes, path, not_looked_at<Node>());
}

std::vector<std::pair<std::string, std::string>> Evidence::matching(std::string_view pattern) const {
  std::vector<std::pair<std::string, std::string>> found;
  for (const auto& [path, reading] : texts) {
    if (reading && path_matches(pattern, path)) found.emplace_back(path, *reading);
  }
  return found;
}

std::string_view name_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::ok:
      return "ok";
    case Verdict::unknown:
      return "unknown";
    case Verdict::warn:
      return "warn";
    case Verdict::fail:
      return "fail";
  }
  return "unknown";
}

const std::vector<Check>& checks() {
  static const std::vector<Check> table = [] {
    std::vector<Check> all;
    for (auto rows : {iommu_rows, boot_rows, pci_rows, driver_rows, fabric_rows, mig_rows, access_rows,
                      heat_rows, host_rows}) {
      for (Check& row : rows()) all.push_back(std::move(row));
    }
    return all;
  }();
  return table;
}

std::vector<Finding> examine(const Evidence& evidence, const Purposes& purposes) {
  std::vector<Finding> findings;
  for (const Check& check : checks()) {
    if (!check.purposes.meets(purposes)) continue;
    Judgement judgement = check.judge(evidence);
    Finding finding{.id = std::string(check.id),
                    .title = std::string(check.title),
                    .verdict = judgement.verdict,
                    .says = printable(judgement.says),
                    .evidence = std::move(judgement.evidence),
                    .why = std::string(check.why),
                    .mend = std::move(judgement.mend),
                    .waits_on = std::move(judgement.waits_on),
                    .ask_host = judgement.ask_host};
    for (Source& source : finding.evidence) {
      source.where = printable(source.where);
      source.words = printable(trim(source.words), 240);
    }
    for (std::string& line : finding.mend) line = printable(line, 2000);
    for (const auto requirement : check.requirements) finding.requirements.emplace_back(requirement);
    findings.push_back(std::move(finding));
  }
  return findings;
}

void sort_worst_first(std::vector<Finding>& findings) {
  std::stable_sort(findings.begin(), findings.end(),
                   [](const Finding& a, const Finding& b) { return a.verdict > b.verdict; });
}

Json to_json(const Finding& finding) {
  Json evidence = Json::array();
  for (const Source& source : finding.evidence)
    evidence.push_back(Json{{"where", source.where}, {"words", source.words}});
  Json json{{"id", finding.id},
            {"title", finding.title},
            {"verdict", name_of(finding.verdict)},
            {"says", finding.says},
            {"evidence", evidence},
            {"why", finding.why},
            {"mend", finding.mend},
            {"requirements", finding.requirements}};
  if (!finding.waits_on.empty()) json["waits_on"] = finding.waits_on;
  if (finding.ask_host) json["ask_host"] = true;
  return json;
}

std::optional<Source> virtual_machine(const Evidence& e) {
  if (const auto& cpus = e.text("/proc/cpuinfo")) {
    if (const auto flags = line_with(*cpus, "flags"); flags && has_word(*flags, "hypervisor")) {
      return Source{"/proc/cpuinfo", "flags: ... hypervisor ..."};
    }
  }
  // SMBIOS type 0, extension byte 2, bit 4: "the SMBIOS table describes a virtual machine"
  // (DSP0134, 7.1.2.2).
  if (const auto& dmi = e.text("/sys/firmware/dmi/tables/DMI"); dmi && dmi->size() >= 0x14) {
    const auto byte = [&](std::size_t at) { return static_cast<unsigned char>((*dmi)[at]); };
    if (byte(0) == 0 && byte(1) >= 0x14 && (byte(0x13) & 0x10U) != 0) {
      return Source{"/sys/firmware/dmi/tables/DMI", "BIOS information: describes a virtual machine"};
    }
  }
  for (const char* path : {"/sys/class/dmi/id/sys_vendor", "/sys/class/dmi/id/product_name"}) {
    if (const auto& vendor = e.text(path)) {
      for (const char* name :
           {"QEMU", "KVM", "VMware", "Xen", "Firecracker", "VirtualBox", "Amazon EC2",
            "Google Compute Engine", "OpenStack", "Virtual Machine", "Bochs", "Alibaba Cloud ECS"}) {
        if (vendor->find(name) != std::string::npos) return Source{path, std::string(trim(*vendor))};
      }
    }
  }
  for (const inventory::Gpu& gpu : e.host.gpus) {
    if (gpu.virtualization && gpu.virtualization->find("pass") == 0) {
      return Source{"NVML", fmt::format("{}: virtualization mode {}", name_of(gpu), *gpu.virtualization)};
    }
  }
  return std::nullopt;
}

}  // namespace bulkhead::doctor
