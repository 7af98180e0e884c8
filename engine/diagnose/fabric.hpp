// What the Fabric Manager says, and systemd of it: the journal, and its own log file. Neither reaches the
// kernel's log.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/diagnose/diagnose.hpp"
#include "edge/journal/journal.hpp"
#include "edge/logfile/logfile.hpp"
#include "engine/diagnose/diagnose.hpp"

namespace bulkhead::diagnose {

class Fabric {
 public:
  Fabric(std::filesystem::path root, std::string unit, Heard heard);

  // What came since; `notes`: what cannot be read, said once each. Cheap while nothing is said.
  std::vector<Evidence> read(const logs::Matcher& matcher, std::vector<std::string>& notes);
  const Heard& heard() const { return heard_; }

 private:
  void read_journal(const logs::Matcher& matcher, std::vector<Evidence>& out,
                    std::vector<std::string>& notes);
  void read_log(const logs::Matcher& matcher, std::vector<Evidence>& out, std::vector<std::string>& notes);

  std::filesystem::path root_;
  std::string unit_;
  Heard heard_;
  std::unique_ptr<journal::Reader> journal_ = {};
  std::optional<logfile::Tail> log_ = {};
  std::string log_path_ = {};
  std::uint64_t journal_next_ns_ = 0, log_next_ns_ = 0;
};

}  // namespace bulkhead::diagnose
