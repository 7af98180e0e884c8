#include "core/bill/bill.hpp"

#include <algorithm>
#include <set>

#include <fmt/format.h>

#include "base/fields.hpp"
#include "base/text.hpp"

namespace bulkhead::bill {

namespace {

__extension__ using Wide = __int128;

constexpr Nano unit = 1'000'000'000;
constexpr Nano highest = 1'000'000 * unit;
constexpr std::uint64_t us_of_hour = 3'600'000'000;
constexpr std::uint64_t mj_of_kwh = 3'600'000'000;
constexpr std::size_t most_lines = 200'000, most_gpus = 1024, most_prices = 256;

// "1.25" -> 1'250'000'000; no sign, no exponent, at most nine decimals.
std::optional<Nano> decimal(std::string_view text) {
  const auto dot = text.find('.');
  const auto whole = parse_u64(text.substr(0, dot));
  if (!whole || *whole > static_cast<std::uint64_t>(highest / unit)) return std::nullopt;
  Nano nano = static_cast<Nano>(*whole) * unit;
  if (dot == std::string_view::npos) return nano;
  const auto part = text.substr(dot + 1);
  if (part.empty() || part.size() > 9) return std::nullopt;
  Nano step = unit;
  for (const char c : part) {
    if (c < '0' || c > '9') return std::nullopt;
    step /= 10;
    nano += (c - '0') * step;
  }
  return nano;
}

Nano price_of(yaml::Reader& reader, const yaml::Node& node, const std::string& path) {
  const auto text = reader.text(node, path, 32);
  if (!text) return 0;
  const auto nano = decimal(*text);
  if (!nano) reader.mistake(node, path, fmt::format("{} is no price: 0.25", yaml::in_quotes(*text)));
  return nano.value_or(0);
}

}  // namespace

std::variant<Prices, std::vector<yaml::Mistake>> parse_prices(std::string_view text) {
  auto tree = yaml::parse_tree(text);
  if (auto* mistakes = std::get_if<std::vector<yaml::Mistake>>(&tree)) return std::move(*mistakes);
  const auto& root = std::get<yaml::Node>(tree);
  yaml::Reader reader;
  Prices out;
  const auto fields = reader.fields(root, "", {"currency", "slice-hour", "kwh", "gib-hour"});
  if (const auto* node = reader.required(fields, "currency", root, ""))
    out.currency = reader.text(*node, "currency", 8).value_or("");
  if (const auto at = fields.find("slice-hour"); at != fields.end()) {
    const auto& node = *at->second;
    if (node.kind != yaml::Node::Kind::map || node.items.size() > 2 * most_prices) {
      reader.mistake(node, "slice-hour", fmt::format("must be a map of at most {} prices", most_prices));
    } else {
      for (std::size_t i = 0; i + 1 < node.items.size(); i += 2) {
        const auto& key = node.items[i];
        const auto path = yaml::at_key("slice-hour", key.text);
        if (key.kind != yaml::Node::Kind::scalar || key.text.empty() || key.text.size() > 64) {
          reader.mistake(key, "slice-hour", "a profile, or mig, share, exclusive, passthrough");
          continue;
        }
        if (!out.slice_hour.emplace(key.text, price_of(reader, node.items[i + 1], path)).second)
          reader.mistake(key, path, "is there twice");
      }
    }
  }
  if (const auto at = fields.find("kwh"); at != fields.end()) out.kwh = price_of(reader, *at->second, "kwh");
  if (const auto at = fields.find("gib-hour"); at != fields.end())
    out.gib_hour = price_of(reader, *at->second, "gib-hour");
  if (!reader.mistakes.empty()) return reader.in_order();
  return out;
}

Result<Statement> parse(const Json& document) {
  const auto no = [](std::string_view what) {
    return Error(Errc::corrupt, fmt::format("this is no document of use: {}", what));
  };
  if (!document.is_object()) return no("no object");
  const auto text = [](const Json& object, const char* key) -> std::string {
    const auto at = object.find(key);
    return at != object.end() && at->is_string() ? printable(at->get_ref<const std::string&>(), 256) : "";
  };
  const auto whole = [](const Json& object, const char* key) -> std::uint64_t {
    const auto at = object.find(key);
    if (at == object.end() || !at->is_number_integer()) return 0;
    if (!at->is_number_unsigned() && at->get<std::int64_t>() < 0) return 0;
    return at->get<std::uint64_t>();
  };
  Statement out{.from = text(document, "from"),
                .to = text(document, "to"),
                .tenant = text(document, "tenant"),
                .begins = text(document, "begins"),
                .written_until = text(document, "writtenUntil")};
  const auto items = document.find("items");
  if (items == document.end() || !items->is_array() || items->size() > most_lines) return no("no items");
  for (const auto& item : *items) {
    if (!item.is_object()) return no("an item is no object");
    Line line{
        .account = text(item, "account"),
        .day = text(item, "day"),
        .gpu = text(item, "gpu"),
        .tenant = text(item, "tenant"),
        .cls = text(item, "class"),
        .profile = text(item, "profile"),
        .user = text(item, "user"),
        .label = text(item, "label"),
        .lease = static_cast<std::int64_t>(whole(item, "lease")),
        .units = static_cast<unsigned>(std::min<std::uint64_t>(whole(item, "units"), usage::whole_gpu))};
    line.amounts = {.unit_us = whole(item, "unitMicroseconds"),
                    .used_unit_us = whole(item, "usedUnitMicroseconds"),
                    .mib_us = whole(item, "mebibyteMicroseconds"),
                    .sm_us = whole(item, "smMicroseconds"),
                    .tensor_us = whole(item, "tensorMicroseconds"),
                    .dram_us = whole(item, "dramMicroseconds"),
                    .idle_mj = whole(item, "idleMillijoules"),
                    .dynamic_mj = whole(item, "dynamicMillijoules"),
                    .error_mj = whole(item, "errorMillijoules"),
                    .blind_us = whole(item, "blindMicroseconds"),
                    .unmetered_us = whole(item, "unmeteredMicroseconds")};
    out.lines.push_back(std::move(line));
  }
  if (const auto gpus = document.find("gpus"); gpus != document.end()) {
    if (!gpus->is_array() || gpus->size() > most_gpus) return no("its GPUs");
    for (const auto& gpu : *gpus)
      if (gpu.is_object())
        out.gpus.push_back({.uuid = text(gpu, "gpu"),
                            .name = text(gpu, "name"),
                            .us = whole(gpu, "microseconds"),
                            .counter_mj = whole(gpu, "counterMillijoules"),
                            .unmetered_us = whole(gpu, "unmeteredMicroseconds")});
  }
  if (const auto sums = document.find("addsUp"); sums != document.end() && sums->is_boolean()) {
    // Not believed: counted again.
    std::uint64_t us = 0, mj = 0;
    usage::Amounts sum;
    for (const auto& gpu : out.gpus) us += gpu.us, mj += gpu.counter_mj;
    for (const auto& line : out.lines) sum = sum + line.amounts;
    out.adds_up = sum.unit_us == us * usage::whole_gpu && sum.idle_mj + sum.dynamic_mj == mj;
  }
  return out;
}

Status price(Statement& statement, const Prices& prices) {
  std::set<std::string> missing;
  for (auto& line : statement.lines) {
    if (!line.leased()) continue;
    const bool whole = line.cls != "mig";  // prices are of a whole GPU
    auto at = prices.slice_hour.find(whole ? line.cls : line.profile);
    if (at == prices.slice_hour.end()) at = prices.slice_hour.find(line.cls);
    Wide nano = 0;
    if (at != prices.slice_hour.end()) {
      const std::uint64_t size = whole ? usage::whole_gpu : line.units;
      if (size > 0) nano += Wide{line.amounts.unit_us} * at->second / (Wide{size} * us_of_hour);
    } else if (!prices.slice_hour.empty()) {
      missing.insert(whole ? line.cls : line.profile);
    }
    nano += Wide{line.amounts.idle_mj + line.amounts.dynamic_mj} * prices.kwh / mj_of_kwh;
    nano += Wide{line.amounts.mib_us} * prices.gib_hour / (Wide{1024} * us_of_hour);
    constexpr Nano cent = unit / 100;
    line.cents = static_cast<std::int64_t>((nano + cent / 2) / cent);
  }
  if (!missing.empty())
    return Error(Errc::not_found, fmt::format("no price for {}", fmt::join(missing, ", ")),
                 "add them below slice-hour:, or `mig:` for every profile without one");
  statement.currency = prices.currency;
  return ok_status();
}

std::string money(std::int64_t cents) { return fmt::format("{}.{:02}", cents / 100, cents % 100); }

double gpu_hours(const usage::Amounts& amounts) {
  return static_cast<double>(amounts.unit_us) / usage::whole_gpu / static_cast<double>(us_of_hour);
}
double slice_hours(const Line& line) {
  return line.units == 0
             ? 0
             : static_cast<double>(line.amounts.unit_us) / line.units / static_cast<double>(us_of_hour);
}
double gib_hours(const usage::Amounts& amounts) {
  return static_cast<double>(amounts.mib_us) / 1024 / static_cast<double>(us_of_hour);
}
double kwh(const usage::Amounts& amounts) {
  return static_cast<double>(amounts.idle_mj + amounts.dynamic_mj) / static_cast<double>(mj_of_kwh);
}
double kwh_error(const usage::Amounts& amounts) {
  return static_cast<double>(amounts.error_mj) / static_cast<double>(mj_of_kwh);
}

}  // namespace bulkhead::bill
