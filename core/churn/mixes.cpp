#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <map>
#include <utility>

#include <fmt/format.h>

#include "core/churn/churn.hpp"
#include "core/churn/graph.hpp"

namespace bulkhead::churn {

namespace {

// clang-format off
constexpr std::array<MixRow, 7> mix_rows{{
    {"uniform",  {1, 1, 1, 1, 1, 1},             "every profile as often as any other"},
    {"small",    {40, 10, 25, 10, 10, 5},        "mostly inference: half of the jobs take an eighth or little more"},
    {"mid",      {10, 10, 30, 30, 10, 10},       "quarters and halves, few at either end"},
    {"bimodal",  {45, 5, 5, 5, 5, 35},           "the smallest and the whole, little between"},
    {"large",    {5, 5, 10, 25, 25, 30},         "mostly training: four jobs in five take half a GPU or more"},
    {"packed",   {30, 0, 20, 25, 25, 0},         "no whole GPUs and no double memory: what fits is all in how halves and quarters are laid"},
    {"skew",     {30, 25, 20, 10, 10, 5},        "many small ones and few large, as schedulers' papers have it"},
}};

constexpr std::array<PolicyRow, 8> policy_rows{{
    {"first-fit", {Rule::first_fit, 0}, "the lowest GPU that has a place"},
    {"best-fit",  {Rule::best_fit, 0},  "the fullest GPU that has a place"},
    {"mfi",       {Rule::mfi, 0},       "least growth of a fragmentation score, after arXiv 2511.18906"},
    {"ours",      {Rule::ours, 0},      "least growth of F, empty GPUs last"},
    {"ours+1",    {Rule::ours, 1},      "the same, and at most 1 move to make room for a job"},
    {"ours+3",    {Rule::ours, 3},      "the same, and at most 3 moves to make room for a job"},
    {"ours+3@5",  {Rule::ours, 3, 5},   "the same, and 5 moves at most for 100 accepted jobs"},
    {"repack",    {Rule::repack, 0},    "a bound: as if all jobs could be moved at any time for nothing"},
}};
// clang-format on

// The column of MixRow for a plain profile; `richest`: no plain profile of its size class has more compute.
std::size_t column_of(unsigned size_class, bool richest) {
  switch (size_class) {
    case 0:
      return 5;
    case 1:
      return richest ? 4 : 3;
    case 2:
      return richest ? 2 : 1;
    default:
      return 0;
  }
}

// 0: whole, 1: half, 2: quarter, 3: an eighth or less.
unsigned size_class_of(const mig::Geometry& geometry, const mig::Profile& profile) {
  const double part = static_cast<double>(geometry.memory_slices) / profile.size;
  return static_cast<unsigned>(std::clamp(std::lround(std::log2(part)), 0L, 3L));
}

std::string names_of_mixes() {
  std::string names;
  for (const auto& row : mix_rows) names += (names.empty() ? "" : ", ") + std::string(row.name);
  return names;
}

}  // namespace

std::span<const MixRow> mixes() { return mix_rows; }
std::span<const PolicyRow> policies() { return policy_rows; }

Result<Mix> named_mix(std::string_view name, const mig::Geometry& geometry) {
  const auto row =
      std::find_if(mix_rows.begin(), mix_rows.end(), [&](const MixRow& each) { return each.name == name; });
  if (row == mix_rows.end()) {
    return Error(Errc::not_found, fmt::format("no mix is called '{}'", name),
                 fmt::format("one of {}, or profiles with weights: 1g.10gb=3,3g.40gb=1", names_of_mixes()));
  }
  std::array<std::vector<const mig::Profile*>, 6> columns;
  for (const auto& profile : geometry.profiles) {
    if (!plain(profile) || profile.size == 0) continue;
    const auto size_class = size_class_of(geometry, profile);
    const bool richest =
        std::none_of(geometry.profiles.begin(), geometry.profiles.end(), [&](const auto& other) {
          return plain(other) && other.size != 0 && size_class_of(geometry, other) == size_class &&
                 other.compute_slices > profile.compute_slices;
        });
    columns[column_of(size_class, richest)].push_back(&profile);
  }
  Mix mix{std::string(name), {}};
  for (std::size_t column = 0; column < columns.size(); ++column) {
    for (const auto* profile : columns[column]) {
      if (row->weights[column] > 0)
        mix.shares.push_back(
            {profile->name, row->weights[column] / static_cast<double>(columns[column].size())});
    }
  }
  if (mix.shares.empty()) {
    return Error(Errc::invalid,
                 fmt::format("mix '{}' has no job for this GPU: it offers no profile of its sizes", name),
                 "name profiles with weights: 1g.10gb=3,3g.40gb=1");
  }
  return mix;
}

Result<Mix> parse_mix(std::string_view text, const mig::Geometry& geometry) {
  if (text.find('=') == std::string_view::npos) return named_mix(text, geometry);
  Mix mix{std::string(text), {}};
  for (std::string_view rest = text; !rest.empty();) {
    const auto comma = rest.find(',');
    const auto item = rest.substr(0, comma);
    rest = comma == std::string_view::npos ? std::string_view{} : rest.substr(comma + 1);
    const auto equals = item.find('=');
    const auto bad = [&](std::string_view why) {
      return Error(Errc::invalid, fmt::format("mix '{}': '{}' {}", text, item, why),
                   "write profiles with weights: 1g.10gb=3,3g.40gb=1");
    };
    if (equals == std::string_view::npos) return bad("has no weight");
    const auto name = item.substr(0, equals), number = item.substr(equals + 1);
    double weight = 0;
    const auto [end, code] = std::from_chars(number.data(), number.data() + number.size(), weight);
    if (code != std::errc{} || end != number.data() + number.size() || !std::isfinite(weight) || weight < 0 ||
        weight > 1e9) {
      return bad("needs a weight from 0 to 1e9");
    }
    const auto* profile = geometry.by_name(name);
    if (profile == nullptr)
      return bad(fmt::format("names no profile of this GPU ({})", fmt::join(geometry.names(), ", ")));
    if (std::any_of(mix.shares.begin(), mix.shares.end(),
                    [&](const auto& s) { return s.profile == profile->name; }))
      return bad("names a profile twice");
    mix.shares.push_back({profile->name, weight});
  }
  double sum = 0;
  for (const auto& share : mix.shares) sum += share.weight;
  if (sum <= 0) return Error(Errc::invalid, fmt::format("mix '{}': all weights are 0", text));
  return mix;
}

Result<Policy> named_policy(std::string_view name) {
  for (const auto& row : policy_rows)
    if (row.name == name) return row.policy;
  if (name.starts_with("ours+") && name.size() >= 6 && name[5] >= '1' && name[5] <= '3') {
    Policy policy{Rule::ours, static_cast<unsigned>(name[5] - '0'), 0};
    if (name.size() == 6) return policy;
    const auto budget = name.substr(7);
    const auto [end, code] =
        std::from_chars(budget.data(), budget.data() + budget.size(), policy.moves_per_100);
    if (name[6] == '@' && code == std::errc{} && end == budget.data() + budget.size() &&
        policy.moves_per_100 > 0 && policy.moves_per_100 <= 300) {
      return policy;
    }
  }
  std::string names;
  for (const auto& row : policy_rows) names += (names.empty() ? "" : ", ") + std::string(row.name);
  return Error(Errc::not_found, fmt::format("no policy is called '{}'", name), "one of " + names);
}

}  // namespace bulkhead::churn
