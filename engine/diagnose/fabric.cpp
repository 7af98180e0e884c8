#include "engine/diagnose/fabric.hpp"

#include <algorithm>
#include <array>
#include <ctime>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/json.hpp"
#include "base/text.hpp"

namespace bulkhead::diagnose {

namespace {

constexpr std::uint64_t second_ns = 1'000'000'000;
constexpr std::uint64_t again_ns = 10 * second_ns;  // a journal or file that is not there may come
constexpr std::uint64_t log_ns = second_ns / 4;
constexpr std::size_t most_notes = 32;

void note(std::vector<std::string>& notes, std::string text) {
  if (notes.size() < most_notes && std::ranges::find(notes, text) == notes.end())
    notes.push_back(std::move(text));
}

std::int64_t now_ms() { return wall_now().time_since_epoch().count(); }

// Its rules alone. What it quotes of the kernel the kernel says itself.
std::optional<Evidence> its_own(std::optional<logs::Hit> hit, std::string_view file) {
  if (!hit || hit->rule == nullptr || !hit->rule->id.starts_with("fm.")) return std::nullopt;
  auto one = from(std::move(*hit), file);
  one.vouched = true;
  return one;
}

// The file's times are the host's local ones and name no zone; they were read as UTC.
std::int64_t as_local(std::int64_t ms) {
  std::time_t seconds = ms / 1000;
  std::tm parts = {};
  if (::gmtime_r(&seconds, &parts) == nullptr) return ms;
  parts.tm_isdst = -1;
  const auto local = std::mktime(&parts);
  return local < 0 ? ms : std::int64_t{local} * 1000 + ms % 1000;
}

// LOG_FILE_NAME of its configuration; as shipped where that says nothing.
std::string log_of(const std::filesystem::path& root) {
  for (const char* const config :
       {"usr/share/nvidia/nvswitch/fabricmanager.cfg", "etc/nvidia-fabricmanager/fabricmanager.cfg"}) {
    const auto text = read_file(root / config, 1U << 20U);
    if (!text.ok()) continue;
    for (const auto line : split_lines(*text))
      if (const auto set = trim(line); set.starts_with("LOG_FILE_NAME="))
        if (const auto path = trim(set.substr(14)); path.starts_with('/') && path.size() < 1'000)
          return std::string(path);
  }
  return "/var/log/fabricmanager.log";
}

}  // namespace

Fabric::Fabric(std::filesystem::path root, std::string unit, Heard heard)
    : root_(std::move(root)), unit_(std::move(unit)), heard_(std::move(heard)) {}

std::vector<Evidence> Fabric::read(const logs::Matcher& matcher, std::vector<std::string>& notes) {
  std::vector<Evidence> out;
  if (unit_.empty()) return out;
  read_journal(matcher, out, notes);
  read_log(matcher, out, notes);
  return out;
}

void Fabric::read_journal(const logs::Matcher& matcher, std::vector<Evidence>& out,
                          std::vector<std::string>& notes) {
  if (journal_ == nullptr) {
    if (monotonic_ns() < journal_next_ns_) return;
    journal_next_ns_ = monotonic_ns() + again_ns;
    const auto boot = read_file(root_ / "proc/sys/kernel/random/boot_id");
    if (!boot.ok()) return note(notes, boot.error().message());
    auto opened = journal::Reader::open(root_, unit_, std::string(trim(*boot)), heard_.cursor);
    if (!opened.ok()) {
      // A host without systemd has no such unit either.
      if (opened.error().code() != Errc::not_found) note(notes, opened.error().message());
      return;
    }
    journal_ = std::move(*opened);
  }
  auto records = journal_->read();
  if (!records.ok()) {
    note(notes, records.error().message());
    journal_.reset();  // opened anew, behind the last record
    return;
  }
  for (const auto& record : *records) {
    const Json line{
        {"_TRANSPORT", "journal"}, {"SYSLOG_IDENTIFIER", record.program}, {"MESSAGE", record.message}};
    auto one = its_own(
        matcher.match_line(line.dump(-1, ' ', false, Json::error_handler_t::replace), wall_now()), "journal");
    if (!one) continue;
    one->wall_ms = std::min(record.realtime_us / 1000, now_ms());
    out.push_back(std::move(*one));
  }
  heard_.cursor = journal_->cursor();
}

void Fabric::read_log(const logs::Matcher& matcher, std::vector<Evidence>& out,
                      std::vector<std::string>& notes) {
  if (monotonic_ns() < log_next_ns_) return;
  log_next_ns_ = monotonic_ns() + log_ns;
  if (!log_) {
    log_path_ = log_of(root_);
    log_.emplace(root_ / log_path_.substr(1), heard_.log);
  }
  const auto text = log_->read();
  if (!text.ok()) {
    log_next_ns_ = monotonic_ns() + again_ns;
    if (text.error().code() != Errc::not_found) note(notes, text.error().message());
    return;
  }
  for (const auto line : split_lines(*text)) {
    auto one = its_own(matcher.match_line(line, wall_now()), log_path_);
    if (!one) continue;
    one->wall_ms = one->wall_ms ? std::min(as_local(*one->wall_ms), now_ms()) : now_ms();
    out.push_back(std::move(*one));
  }
  heard_.log = log_->place();
}

}  // namespace bulkhead::diagnose
