// One code or line in words, and the JSON of incidents.
#include <fmt/format.h>

#include "base/text.hpp"
#include "core/diagnose/diagnose.hpp"

namespace bulkhead::diagnose {

namespace {

constexpr std::array<Claim, 3> table = {{
    {"xid 62", 62,
     "Guides say that Xid 62 points to a physical failure of memory integrity, DCGM calls it a thermal "
     "violation",
     "NVIDIA's catalogue says neither: PMU_HALT_ERROR, an internal micro-controller halted; reset the GPU, "
     "then "
     "support. Codes of memory integrity are 48, 63, 64, 92, 94, 95, 140, 156, 157, 171, 172"},
    {"IRQs not enabled", 0,
     "Guides name \"IRQs not enabled, cannot bind device\" as a message of passthrough",
     "no source and no public log that was searched has it. What QEMU says when interrupts cannot be set up "
     "is "
     "\"Failed to set up TRIGGER eventfd signaling for interrupt INTX-0: VFIO_DEVICE_SET_IRQS failure\" "
     "(rule qemu.irq_setup)"},
    {"Mismatched GPU types", 0,
     "Guides name \"Mismatched GPU types detected\" as a message of Fabric Manager",
     "no log or document of Fabric Manager that was searched has it. Its real message is \"detected number "
     "of NVSwitches don't "
     "match with any supported system topology, aborting fabric manager\" (rule fm.topology_mismatch), or "
     "NVML's fabric "
     "health INCORRECT_CONFIGURATION"},
}};

std::string bucket(std::string_view name) {
  if (name.empty()) return "not said";
  return fmt::format("{}: {}", name, xid::bucket_text(name));
}

void add_claims(Explanation& out, unsigned id, std::string_view line) {
  for (const auto& claim : table) {
    if (id != 0 ? claim.xid != id
                : claim.xid != 0 || lower(line).find(lower(claim.words)) == std::string::npos)
      continue;
    out.facts.emplace_back("It is said", claim.says);
    out.facts.emplace_back("What is found", claim.found);
  }
}

Json strings(const std::vector<std::string>& list) {
  Json out = Json::array();
  for (const auto& one : list) out.push_back(one);
  return out;
}

template <class T>
Json or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

}  // namespace

std::span<const Claim> claims() { return table; }

Explanation explain_xid(unsigned id) {
  Explanation out;
  const auto* row = xid::find(id);
  if (row == nullptr) {
    out.known = false;
    out.title = fmt::format("Xid {}: unknown to this catalogue", id);
    if (id == 999) out.facts.emplace_back("Note", "NVML reports 999 for an error whose Xid it does not know");
    out.facts.emplace_back("Look at", "https://docs.nvidia.com/deploy/xid-errors/");
    return out;
  }
  out.title = fmt::format("Xid {}: {}", id, row->description);
  out.facts.emplace_back("Driver's name", row->mnemonic);
  if (!row->boards.empty()) out.facts.emplace_back("Used by", row->boards);
  out.facts.emplace_back("NVIDIA: now", bucket(row->immediate));
  out.facts.emplace_back("NVIDIA: then", bucket(row->investigate));
  if (!row->category.empty()) {
    out.facts.emplace_back("Kind", row->category);
    out.facts.emplace_back("Severity", name_of(row->severity));
    out.facts.emplace_back("Reaches", name_of(row->scope));
    using enum xid::Attribution;
    const std::string_view who =
        row->attribution == channel  ? "channel: its channel faulted; usually its own doing"
        : row->attribution == caller ? "caller: it happened to call the driver; not the cause, never charged"
        : row->attribution == victim ? "victim: it lost its work by another's fault; never charged"
        : row->attribution == nobody ? "nobody: no process is meant"
                                     : "unknown: never charged";
    out.facts.emplace_back("The process named", who);
  }
  if (!row->note.empty()) out.facts.emplace_back("Note", row->note);
  add_claims(out, id, {});
  if (row->told_by_154)
    out.facts.emplace_back("With it",
                           "newer drivers say by Xid 154 what to do about it; that goes before this table");
  if (!row->example.empty()) out.facts.emplace_back("Example", row->example);
  out.facts.emplace_back("Sources", row->sources);
  return out;
}

Explanation explain_sxid(unsigned id) {
  Explanation out;
  const auto* row = xid::find_switch(id);
  out.known = row != nullptr;
  out.title = fmt::format("SXid {}: {}", id, row == nullptr ? "unknown to this catalogue" : row->name);
  if (row == nullptr) return out;
  out.facts.emplace_back("Class", fmt::format("{}: {}", name_of(row->kind), xid::text_of(row->kind)));
  if (!row->note.empty()) out.facts.emplace_back("Note", row->note);
  return out;
}

Explanation explain_line(const logs::Matcher& matcher, std::string_view line, WallTime now) {
  Explanation out;
  auto hit = matcher.match_line(line, now);
  if (!hit) {
    out.known = false;
    out.title = "No rule knows this line";
    add_claims(out, 0, line);
    if (!out.facts.empty())
      out.title = "A message that goes around, and is not found in what vendors publish";
    return out;
  }
  if (hit->rule != nullptr) {
    const auto& rule = *hit->rule;
    out.title = fmt::format("{} ({})", rule.id, logs::name_of(rule.kind));
    out.facts.emplace_back("Means", rule.cause);
    if (!rule.remedy.empty()) out.facts.emplace_back("Do", rule.remedy);
    out.facts.emplace_back("Said by", logs::name_of(rule.where));
    out.facts.emplace_back("Reaches", rule.scope);
    for (const auto& [name, value] : hit->fields) out.facts.emplace_back(name, printable(value, 160));
    out.facts.emplace_back("Known from", fmt::format("{}: {}", rule.how, rule.source));
    return out;
  }
  if (hit->sxid) out = explain_sxid(hit->sxid->id);
  if (hit->xid) {
    out = explain_xid(hit->xid->id);
    const auto shown = *hit->xid;
    std::vector<std::pair<std::string, std::string>> facts = {{"GPU", shown.gpu.str()}};
    if (shown.gpu_instance) facts.emplace_back("GPU instance", std::to_string(*shown.gpu_instance));
    if (shown.pid)
      facts.emplace_back("Process", fmt::format("{} ({})", *shown.pid, printable(shown.name, 64)));
    if (shown.previous) facts.emplace_back("Caused by", fmt::format("Xid {}", *shown.previous));
    if (const auto held = xid::containment(shown))
      facts.emplace_back(
          "The driver's flags",
          fmt::format("{}, reset {}, drain and reset {}", held->contained ? "contained" : "uncontained",
                      held->reset ? "yes" : "no", held->drain_and_reset ? "yes" : "no"));
    if (const auto change = xid::recovery(shown))
      facts.emplace_back("The driver asks for", printable(change->to_text, 64));
    if (const auto fault = xid::link_fault(shown)) {
      facts.emplace_back("Link", fault->link < 0 ? "none in particular" : std::to_string(fault->link));
      facts.emplace_back(
          "Decoded", fault->row == nullptr
                         ? "not in NVIDIA's table; follow Xid 154"
                         : fmt::format("{} {} ({}): now {}, then {}", fault->row->sub, fault->row->severity,
                                       fault->row->where, fault->row->immediate, fault->row->investigate));
    }
    if (const auto words = xid::nvlink4_words(shown); !words.empty()) facts.emplace_back("Registers", words);
    out.facts.insert(out.facts.begin(), facts.begin(), facts.end());
  }
  if (hit->forged)
    out.facts.emplace_back("Not believed", fmt::format("the words are the kernel's, but {} wrote the line",
                                                       printable(hit->program, 64)));
  return out;
}

Json to_json(const Incident& in) {
  Json out = {
      {"id", in.id}, {"title", in.title}, {"cause", in.cause}, {"severity", xid::name_of(in.severity)}};
  out["at"] = in.at ? Json(in.at->str()) : Json(nullptr);
  out["gpu_instance"] = or_null(in.gpu_instance);
  out["xid"] = or_null(in.xid);
  out["sxid"] = or_null(in.sxid);
  if (!in.rule.empty()) out["rule"] = in.rule;
  out["blame"] = {{"who", name_of(in.blame)},
                  {"why", in.blame_why},
                  {"charged", in.charged.empty() ? Json(nullptr) : Json(in.charged)}};
  out["tenants"] = strings(in.tenants);
  out["processes"] = strings(in.processes);
  out["blast"] = {{"radius", name_of(in.blast)}, {"why", in.blast_why}};
  out["confidence"] = {{"level", name_of(in.confidence)}, {"why", in.confidence_why}};
  out["remedy"] = {
      {"act", heal::name_of(in.remedy)}, {"advice", in.advice}, {"commands", strings(in.commands)}};
  out["nvidia"] = {{"immediate", in.immediate}, {"investigate", in.investigate}};
  if (!in.disputed.empty()) out["disputed"] = in.disputed;
  out["count"] = in.count;
  out["first_ms"] = or_null(in.first_ms);
  out["last_ms"] = or_null(in.last_ms);
  out["closed"] = in.closed;
  out["notes"] = strings(in.notes);
  Json evidence = Json::array();
  for (const auto& e : in.evidence)
    evidence.push_back(
        {{"source", name_of(e.source)}, {"file", e.file}, {"line", e.number}, {"text", e.line}});
  out["evidence"] = std::move(evidence);
  out["evidence_lines"] = in.evidence_lines;
  return out;
}

Json to_json(const Diagnosis& diagnosis) {
  Json incidents = Json::array();
  for (const auto& in : diagnosis.incidents) incidents.push_back(to_json(in));
  return {{"incidents", std::move(incidents)},
          {"notes", strings(diagnosis.notes)},
          {"evidence_lines", diagnosis.evidence}};
}

}  // namespace bulkhead::diagnose
