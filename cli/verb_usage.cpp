// bulkhead usage: who used what, and what it costs.
#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "cli/api.hpp"
#include "cli/usage_page.hpp"
#include "core/bill/bill.hpp"
#include "engine/meter/meter.hpp"

namespace bulkhead::cli {

namespace {

using namespace std::chrono;

struct Options {
  std::string url = {}, state = {}, tenant = {}, from = {}, to = {}, month = {}, format = {}, prices = {};
  std::vector<std::string> by = {};
  bool json = false;
};

// A moment as the API takes it.
std::string query_of(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_' ||
        c == '.' || c == '~')
      out += c;
    else
      out += fmt::format("%{:02X}", static_cast<unsigned char>(c));
  }
  return out;
}

struct Asked {
  std::string from = {}, to = {};
  meter::Ask ask = {};
};

Result<Asked> asked(const Options& o) {
  Asked out{.from = o.from, .to = o.to};
  if (!o.month.empty()) {
    // "2026-11", with an offset behind it where the month does not begin in UTC: "2026-11+05:45".
    const std::string month = o.month.substr(0, 7), zone = o.month.size() > 7 ? o.month.substr(7) : "";
    const auto first = meter::parse_moment(month + "-01" + zone);
    if (!first.ok() || !o.from.empty() || !o.to.empty())
      return Error(Errc::invalid,
                   fmt::format("--month: '{}' is no month, or there is a --from or --to beside it",
                               printable(o.month, 20)),
                   "bulkhead usage --month 2026-11");
    const auto date = year_month_day(floor<days>(first->at + first->offset));
    const auto next = date.year() / date.month() / 1 + months(1);
    out.from = month + "-01" + zone;
    out.to = fmt::format("{:04}-{:02}-01{}", int(next.year()), unsigned(next.month()), zone);
  }
  const WallTime now = wall_now();
  const year_month_day today{floor<days>(now)};
  out.ask.from = time_point_cast<milliseconds>(sys_days(today.year() / today.month() / 1));
  out.ask.to = now;
  if (!out.from.empty()) {
    BH_TRY(const auto moment, meter::parse_moment(out.from));
    out.ask.from = moment.at;
    out.ask.offset = moment.offset;
  }
  if (!out.to.empty()) {
    BH_TRY(const auto moment, meter::parse_moment(out.to));
    out.ask.to = moment.at;
  }
  BH_CHECK(meter::parse_by(join(o.by, ","), out.ask));
  if (!o.tenant.empty()) out.ask.tenant = o.tenant;
  return out;
}

Result<Json> document(const Context& context, const Options& o, const Asked& what) {
  if (o.state.empty()) {
    auto client = api::connect(o.url);
    if (client.ok()) {
      std::string path = "/api/v1/usage?by=" + query_of(join(o.by, ","));
      if (!what.from.empty()) path += "&from=" + query_of(what.from);
      if (!what.to.empty()) path += "&to=" + query_of(what.to);
      if (!o.tenant.empty()) path += "&tenant=" + query_of(o.tenant);
      auto said = api::get(**client, path);
      if (said.ok() || !o.url.empty() || said.error().code() != Errc::unavailable) return said;
    } else if (!o.url.empty()) {
      return std::move(client).error();
    }
  }
  // Without a daemon, the file itself.
  auto report = meter::report(o.state.empty() ? context.state_dir : std::filesystem::path(o.state), what.ask);
  if (!report.ok() && report.error().code() == Errc::not_found)
    return Error(report.error())
        .with_hint("the daemon counts: bulkhead serve\nor ask another: bulkhead usage --url https://HOST");
  return report;
}

std::string percent(std::uint64_t part, std::uint64_t whole) {
  return whole == 0 ? "-"
                    : fmt::format("{:.0f} %", static_cast<double>(part) * 100 / static_cast<double>(whole));
}

std::string slice_of(const bill::Line& line) {
  if (!line.leased()) return "-";
  if (line.cls == "share") return fmt::format("share {:.1f} %", line.units * 100.0 / usage::whole_gpu);
  return line.cls == "mig" ? line.profile : line.cls;
}

int table(const Context& context, const bill::Statement& statement, const meter::Ask& ask) {
  std::vector<std::string> header;
  if (ask.by_day) header.push_back("DAY");
  if (ask.by_gpu) header.push_back("GPU");
  header.push_back("TENANT");
  if (ask.by_lease) header.push_back("LEASE");
  for (const char* name : {"SLICE", "SLICE-H", "GPU-H", "BUSY", "GIB-H", "KWH", "+-"})
    header.emplace_back(name);
  const bool priced = !statement.currency.empty();
  if (priced) header.push_back(statement.currency);
  Table rows(header);
  usage::Amounts sum;
  std::int64_t cents = 0;
  const auto line_of = [&](const bill::Line& line, bool total) {
    const auto& a = line.amounts;
    std::vector<std::string> cells;
    if (ask.by_day) cells.push_back(line.day);
    if (ask.by_gpu) cells.push_back(line.gpu);
    cells.push_back(total ? "sum" : line.leased() ? line.tenant : line.account);
    if (ask.by_lease) cells.push_back(line.lease == 0 ? "" : std::to_string(line.lease));
    cells.push_back(total ? "" : slice_of(line));
    cells.push_back(line.leased() && !total ? fmt::format("{:.4f}", bill::slice_hours(line)) : "");
    cells.push_back(fmt::format("{:.4f}", bill::gpu_hours(a)));
    cells.push_back(line.leased() && !total ? percent(a.used_unit_us, a.unit_us) : "");
    cells.push_back(fmt::format("{:.2f}", bill::gib_hours(a)));
    cells.push_back(fmt::format("{:.4f}", bill::kwh(a)));
    cells.push_back(fmt::format("{:.4f}", bill::kwh_error(a)));
    if (priced) cells.push_back(line.cents ? bill::money(*line.cents) : "");
    std::vector<Tone> tones(cells.size(), total ? Tone::bold : line.leased() ? Tone::plain : Tone::dim);
    rows.row(std::move(cells), std::move(tones));
  };
  for (const auto& line : statement.lines) {
    line_of(line, false);
    sum = sum + line.amounts;
    cents += line.cents.value_or(0);
  }
  bill::Line last{.amounts = sum};
  if (priced) last.cents = cents;
  line_of(last, true);
  std::string out = fmt::format("{} to {}\n", statement.from, statement.to) + rows.str(context);
  for (const auto& note : usage_notes(statement)) out += paint(context, Tone::dim, note) + "\n";
  if (statement.adds_up && !*statement.adds_up)
    out += paint(context, Tone::bad,
                 "The lines are not what the GPUs' time and counters say: do not bill from this.") +
           "\n";
  return print(out);
}

std::string csv_cell(std::string_view text) {
  std::string safe(text);
  // What a spreadsheet would take for a formula is text.
  if (!safe.empty() && std::string_view("=+-@\t\r").find(safe[0]) != std::string_view::npos)
    safe.insert(0, "'");
  if (safe.find_first_of(",\"\n") == std::string::npos) return safe;
  std::string out = "\"";
  for (const char c : safe) out += c == '"' ? std::string("\"\"") : std::string(1, c);
  return out + "\"";
}

int csv(const bill::Statement& statement) {
  std::string out =
      "from,to,day,gpu,account,tenant,lease,user,label,class,profile,units,slice_seconds,gpu_seconds,busy_"
      "gpu_seconds,"
      "gib_seconds,sm_seconds,tensor_seconds,dram_seconds,idle_joules,dynamic_joules,error_joules,blind_"
      "seconds,"
      "unmetered_seconds,price,currency\n";
  for (const auto& line : statement.lines) {
    const auto& a = line.amounts;
    const auto s = [](std::uint64_t us) { return fmt::format("{}.{:06}", us / 1'000'000, us % 1'000'000); };
    const auto j = [](std::uint64_t mj) { return fmt::format("{}.{:03}", mj / 1000, mj % 1000); };
    out += fmt::format(
        "{},{},{},{},{},{},{},{},{},{},{},{},{},{:.6f},{:.6f},{:.6f},{},{},{},{},{},{},{},{},{},{}\n",
        statement.from, statement.to, line.day, csv_cell(line.gpu), line.account, csv_cell(line.tenant),
        line.lease == 0 ? "" : std::to_string(line.lease), csv_cell(line.user), csv_cell(line.label),
        csv_cell(line.cls), csv_cell(line.profile), line.units,
        line.units == 0 ? "" : s(a.unit_us / line.units), bill::gpu_hours(a) * 3600,
        static_cast<double>(a.used_unit_us) / usage::whole_gpu / 1e6, bill::gib_hours(a) * 3600, s(a.sm_us),
        s(a.tensor_us), s(a.dram_us), j(a.idle_mj), j(a.dynamic_mj), j(a.error_mj), s(a.blind_us),
        s(a.unmetered_us), line.cents ? bill::money(*line.cents) : "",
        csv_cell(line.cents ? statement.currency : ""));
  }
  return print(out);
}

int usage(const Context& context, const Options& o) {
  const auto failed = [&](const Error& error) { return fail(context, Error(error).in("usage")); };
  const std::string format = o.json ? "json" : o.format.empty() ? "table" : o.format;
  const auto what = asked(o);
  if (!what.ok()) return failed(what.error());
  std::optional<bill::Prices> prices;
  if (!o.prices.empty()) {
    const auto text = read_file(o.prices, 1U << 20U);
    if (!text.ok()) return failed(text.error());
    auto parsed = bill::parse_prices(*text);
    if (const auto* mistakes = std::get_if<std::vector<yaml::Mistake>>(&parsed))
      return failed(Error(Errc::invalid, yaml::render(*mistakes, o.prices)));
    prices = std::get<bill::Prices>(std::move(parsed));
  }
  auto said = document(context, o, *what);
  if (!said.ok()) return failed(said.error());
  auto statement = bill::parse(*said);
  if (!statement.ok()) return failed(statement.error());
  if (prices) {
    if (const auto done = bill::price(*statement, *prices); !done.ok()) return failed(done.error());
  }
  int code = exit_ok;
  if (format == "json") {
    if (prices) {
      std::int64_t cents = 0;
      for (std::size_t i = 0; i < statement->lines.size(); ++i) {
        if (!statement->lines[i].cents) continue;
        (*said)["items"][i]["price"] = bill::money(*statement->lines[i].cents);
        cents += *statement->lines[i].cents;
      }
      (*said)["currency"] = statement->currency;
      (*said)["price"] = bill::money(cents);
    }
    code = print(dump(*said) + "\n");
  } else if (format == "csv") {
    code = csv(*statement);
  } else if (format == "html") {
    code = print(usage_page(*statement));
  } else {
    code = table(context, *statement, what->ask);
  }
  if (code != exit_ok) return code;
  return statement->adds_up.value_or(true) ? exit_ok : exit_findings;
}

}  // namespace

std::function<int(const Context&)> bind_usage(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  app.add_option("--tenant", o->tenant, "Of this one alone");
  app.add_option("--from", o->from, "A date or RFC 3339 (default: the begin of this month)")
      ->type_name("TIME");
  app.add_option("--to", o->to, "The same; not in it (default: now)")->type_name("TIME");
  app.add_option("--month", o->month, "A whole month: 2026-11; 2026-11+01:00 where days begin before UTC's")
      ->type_name("MONTH");
  app.add_option("--by", o->by, "One line for each: day, lease, gpu, tenant; with commas")
      ->delimiter(',')
      ->check(CLI::IsMember({"day", "lease", "gpu", "tenant"}));
  app.add_option("--format", o->format, "table, csv, json or html (table)")
      ->check(CLI::IsMember({"table", "csv", "json", "html"}));
  app.add_option("--prices", o->prices, "YAML: currency, slice-hour by profile, kwh, gib-hour")
      ->type_name("FILE");
  app.add_flag("--json", o->json, "The same as --format json");
  app.add_option("--state", o->state, "Read the file in this directory instead of asking the daemon")
      ->type_name("DIR");
  api::add_url(app, o->url);
  return [o](const Context& context) { return usage(context, *o); };
}

}  // namespace bulkhead::cli
