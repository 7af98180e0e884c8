// What use costs. Prices are decimals per slice-hour by profile, per kilowatt-hour and per GiB-hour; money is
// counted in whole cents (hundredths of the currency's unit), each line rounded once, half up, and totals are
// sums of lines: what a tenant adds up by hand is what the bill says.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/json.hpp"
#include "base/result.hpp"
#include "core/usage/usage.hpp"
#include "core/yaml/yaml.hpp"

namespace bulkhead::bill {

using Nano = std::int64_t;  // billionths of the currency's unit

struct Prices {
  std::string currency = {};  // as it is printed: "EUR"
  // By profile ("3g.40gb") or class: "exclusive" and "passthrough" are of a whole GPU, "share" too, of which
  // a tenth costs a tenth, "mig" of any profile that has no price of its own.
  std::map<std::string, Nano> slice_hour = {};
  Nano kwh = 0, gib_hour = 0;
};
// currency: EUR; slice-hour: {3g.40gb: 1.20, ...}; kwh: 0.28; gib-hour: 0.002. Every mistake at once.
std::variant<Prices, std::vector<yaml::Mistake>> parse_prices(std::string_view text);

// One line of use, as the document of GET /usage has it.
struct Line {
  std::string account = {}, day = {}, gpu = {};  // account: "lease", "unallocated", "out-of-service"
  std::string tenant = {}, cls = {}, profile = {}, user = {}, label = {};
  std::int64_t lease = 0;
  unsigned units = 0;
  usage::Amounts amounts = {};
  std::optional<std::int64_t> cents = {};
  bool leased() const { return account == "lease"; }
};
struct Gpu {
  std::string uuid = {}, name = {};
  std::uint64_t us = 0, counter_mj = 0, unmetered_us = 0;
};
struct Statement {
  std::string from = {}, to = {}, tenant = {}, begins = {}, written_until = {};
  std::vector<Line> lines = {};
  std::vector<Gpu> gpus = {};
  std::optional<bool> adds_up = {};  // empty: of one tenant, who is not told what the GPUs did
  std::string currency = {};         // empty: no prices
};
// Errc::corrupt: it is not such a document.
Result<Statement> parse(const Json& document);

// Puts a price on every line of a lease. Errc::not_found names profiles that have none.
Status price(Statement& statement, const Prices& prices);

std::string money(std::int64_t cents);  // "1234.05"

// Hours of a GPU, of a slice, GiB-hours, kWh; exact until here, of a page from here.
double gpu_hours(const usage::Amounts& amounts);
double slice_hours(const Line& line);
double gib_hours(const usage::Amounts& amounts);
double kwh(const usage::Amounts& amounts);
double kwh_error(const usage::Amounts& amounts);  // how far the split may be off

}  // namespace bulkhead::bill
