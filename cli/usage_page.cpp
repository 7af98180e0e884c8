#include "cli/usage_page.hpp"

#include <algorithm>
#include <map>
#include <vector>

#include <fmt/format.h>

#include "base/markup.hpp"

namespace bulkhead::cli {

namespace {

constexpr std::string_view style = R"css(
:root{color-scheme:light;--ink:#1a1f24;--soft:#5b6670;--line:#dfe4e8;--tint:#f5f7f9;--a:#2f6f9f;--b:#c9d3db;--c:#d9a441}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:2.5rem 1.5rem;color:var(--ink);background:#fff;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:1.6rem;margin:0 0 .2rem}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p{margin:.4rem 0}.soft{color:var(--soft)}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.4rem 0}
.card{flex:1 1 10rem;background:var(--tint);border-radius:.5rem;padding:.8rem 1rem}
.card b{display:block;font-size:1.35rem;font-weight:600}.card span{color:var(--soft);font-size:.85rem}
table{border-collapse:collapse;width:100%}th,td{padding:.35rem .5rem;text-align:right;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);font-size:.82rem;border-bottom:2px solid var(--line)}
th.l,td.l{text-align:left}tfoot td{font-weight:600;border-bottom:none;border-top:2px solid var(--line)}
.bar{display:flex;height:.9rem;border-radius:.25rem;overflow:hidden;background:var(--tint);margin:.5rem 0}
.bar i{display:block}.leased{background:var(--a)}.free{background:var(--b)}.out{background:var(--c)}
.key i{display:inline-block;width:.8em;height:.8em;border-radius:.15em;margin:0 .35em 0 1em;vertical-align:-.05em}
.key i:first-child{margin-left:0}
table+table{margin-top:1.4rem}.id{font-size:.82em;white-space:nowrap}
ul{padding-left:1.1rem;margin:.4rem 0}.good{color:#1e7a44}.bad{color:#b3261e;font-weight:600}
@media print{body{padding:0;max-width:none;font-size:11px}.card,.bar,.bar i,.key i{-webkit-print-color-adjust:exact;print-color-adjust:exact}
tr,.card{break-inside:avoid}h2{break-after:avoid}@page{margin:16mm}}
)css";

std::string what(const bill::Line& line) {
  if (line.cls == "mig") return markup(line.profile);
  if (line.cls == "share") return fmt::format("share of {:.1f} %", line.units * 100.0 / usage::whole_gpu);
  return markup(line.cls);
}

std::string card(const std::string& value, std::string_view name) {
  return fmt::format("<div class=card><b>{}</b><span>{}</span></div>\n", value, name);
}

}  // namespace

std::vector<std::string> usage_notes(const bill::Statement& statement) {
  usage::Amounts sum;
  std::uint64_t lease_us = 0, blind = 0, unmetered = 0;
  for (const auto& line : statement.lines) {
    sum = sum + line.amounts;
    if (!line.leased() || line.units == 0) continue;
    lease_us += line.amounts.unit_us / line.units;
    blind += line.amounts.blind_us;
    unmetered += line.amounts.unmetered_us;
  }
  std::vector<std::string> out;
  const double kwh = bill::kwh(sum), error = bill::kwh_error(sum);
  out.push_back(
      fmt::format("The split of the energy between tenants may be off by {:.3f} kWh of {:.3f} ({:.1f} %); "
                  "its sum is the counters'.",
                  error, kwh, kwh > 0 ? error * 100 / kwh : 0.0));
  const auto part = [&](std::uint64_t us) {
    return lease_us == 0 ? 0.0
                         : std::min(100.0, static_cast<double>(us) * 100 / static_cast<double>(lease_us));
  };
  if (blind > 0)
    out.push_back(
        fmt::format("For {:.1f} % of the leases' time their own activity was not read: there a holder "
                    "counts by its size.",
                    part(blind)));
  if (unmetered > 0)
    out.push_back(
        fmt::format("For {:.1f} % of the leases' time no energy was read (the driver or host was started "
                    "anew, or the counter was silent): none is charged.",
                    part(unmetered)));
  return out;
}

std::string usage_page(const bill::Statement& statement) {
  const bool priced = !statement.currency.empty();
  const auto day = [](const std::string& time) { return time.substr(0, 16); };
  std::map<std::string, std::vector<const bill::Line*>> tenants;
  usage::Amounts leased, free, out_of_service;
  std::int64_t cents = 0;
  bool days = false, leases = false;
  for (const auto& line : statement.lines) {
    if (line.leased()) {
      tenants[line.tenant].push_back(&line);
      leased = leased + line.amounts;
      cents += line.cents.value_or(0);
      days = days || !line.day.empty();
      leases = leases || line.lease != 0;
    } else if (line.account == "unallocated") {
      free = free + line.amounts;
    } else {
      out_of_service = out_of_service + line.amounts;
    }
  }
  const auto all = leased + free + out_of_service;

  std::string title = "GPU use";
  if (!statement.tenant.empty()) title += " of " + markup(statement.tenant);
  std::string out = fmt::format(
      "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport "
      "content=\"width=device-width,initial-scale=1\">\n<meta http-equiv=Content-Security-Policy "
      "content=\"default-src 'none';style-src 'unsafe-inline'\">\n<title>{}, {} to "
      "{}</title>\n<style>{}</style></head>"
      "<body>\n<h1>{}</h1>\n<p class=soft>{} to {} UTC{}</p>\n",
      title, markup(day(statement.from)), markup(day(statement.to)), style, title,
      markup(day(statement.from)), markup(day(statement.to)),
      statement.written_until.empty() || statement.written_until >= statement.to
          ? ""
          : fmt::format("; counted until {}", markup(day(statement.written_until))));
  out += "<div class=cards>\n";
  if (priced) out += card(fmt::format("{} {}", markup(statement.currency), bill::money(cents)), "in all");
  out += card(fmt::format("{:.1f} h", bill::gpu_hours(leased)), "leased, in whole GPUs");
  out += card(fmt::format("{:.1f} kWh", bill::kwh(leased)), "used by leases");
  if (statement.tenant.empty())
    out += card(fmt::format("{}", tenants.size()), tenants.size() == 1 ? "tenant" : "tenants");
  out += "</div>\n";

  if (statement.adds_up) {
    const auto width = [&](const usage::Amounts& a) {
      return all.unit_us == 0 ? 0.0 : static_cast<double>(a.unit_us) * 100 / static_cast<double>(all.unit_us);
    };
    out += fmt::format(
        "<div class=bar><i class=leased style=\"width:{:.2f}%\"></i><i class=free "
        "style=\"width:{:.2f}%\"></i><i "
        "class=out style=\"width:{:.2f}%\"></i></div>\n<p class=\"soft key\"><i class=leased></i>leased "
        "{:.1f} %<i "
        "class=free></i>unallocated {:.1f} %<i class=out></i>out of service {:.1f} %</p>\n",
        width(leased), width(free), width(out_of_service), width(leased), width(free), width(out_of_service));
  }

  for (const auto& [tenant, lines] : tenants) {
    out += fmt::format("<h2>{}</h2>\n<table><thead><tr>", markup(tenant));
    if (days) out += "<th class=l>day</th>";
    if (leases) out += "<th class=l>lease</th>";
    out +=
        "<th "
        "class=l>slice</th><th>slice-hours</th><th>GPU-hours</th><th>busy</th><th>GiB-hours</th><th>kWh</th>"
        "<th>± kWh</th>";
    if (priced) out += fmt::format("<th>{}</th>", markup(statement.currency));
    out += "</tr></thead><tbody>\n";
    usage::Amounts sum;
    std::int64_t sum_cents = 0;
    const auto numbers = [&](const usage::Amounts& a) {
      return fmt::format(
          "<td>{:.3f}</td><td>{:.0f} %</td><td>{:.1f}</td><td>{:.3f}</td><td>{:.3f}</td>", bill::gpu_hours(a),
          a.unit_us == 0 ? 0.0 : static_cast<double>(a.used_unit_us) * 100 / static_cast<double>(a.unit_us),
          bill::gib_hours(a), bill::kwh(a), bill::kwh_error(a));
    };
    for (const auto* line : lines) {
      out += "<tr>";
      if (days) out += fmt::format("<td class=l>{}</td>", markup(line->day));
      if (leases)
        out += fmt::format("<td class=l>{}{}</td>", line->lease,
                           line->label.empty() ? "" : " <span class=soft>" + markup(line->label) + "</span>");
      out += fmt::format("<td class=l>{}</td><td>{:.3f}</td>{}", what(*line), bill::slice_hours(*line),
                         numbers(line->amounts));
      if (priced) out += fmt::format("<td>{}</td>", bill::money(line->cents.value_or(0)));
      out += "</tr>\n";
      sum = sum + line->amounts;
      sum_cents += line->cents.value_or(0);
    }
    out += fmt::format("</tbody><tfoot><tr><td class=l colspan={}>sum</td><td></td>{}", 1 + days + leases,
                       numbers(sum));
    if (priced) out += fmt::format("<td>{}</td>", bill::money(sum_cents));
    out += "</tr></tfoot></table>\n";
  }
  if (tenants.empty()) out += "<p>No lease in this time.</p>\n";

  if (statement.adds_up) {
    out +=
        "<h2>How it adds up</h2>\n<table><thead><tr><th class=l>GPU</th><th "
        "class=l></th><th>hours</th><th>kWh by its "
        "counter</th><th>hours without a reading</th></tr></thead><tbody>\n";
    std::uint64_t us = 0, mj = 0;
    for (const auto& gpu : statement.gpus) {
      out += fmt::format(
          "<tr><td class=\"l id\">{}</td><td class=\"l "
          "id\">{}</td><td>{:.3f}</td><td>{:.3f}</td><td>{:.3f}</td></tr>\n",
          markup(gpu.uuid), markup(gpu.name), static_cast<double>(gpu.us) / 3.6e9,
          static_cast<double>(gpu.counter_mj) / 3.6e9, static_cast<double>(gpu.unmetered_us) / 3.6e9);
      us += gpu.us, mj += gpu.counter_mj;
    }
    out += fmt::format(
        "</tbody><tfoot><tr><td class=l "
        "colspan=2>sum</td><td>{:.3f}</td><td>{:.3f}</td><td></td></tr></tfoot></table>\n",
        static_cast<double>(us) / 3.6e9, static_cast<double>(mj) / 3.6e9);
    out += "<table><thead><tr><th class=l></th><th>GPU-hours</th><th>kWh</th></tr></thead><tbody>\n";
    for (const auto& [name, amounts] : {std::pair<std::string_view, const usage::Amounts*>{"leases", &leased},
                                        {"unallocated, the operator's", &free},
                                        {"out of service, the operator's", &out_of_service}})
      out += fmt::format("<tr><td class=l>{}</td><td>{:.3f}</td><td>{:.3f}</td></tr>\n", name,
                         bill::gpu_hours(*amounts), bill::kwh(*amounts));
    out += fmt::format(
        "</tbody><tfoot><tr><td class=l>sum</td><td>{:.3f}</td><td>{:.3f}</td></tr></tfoot></table>\n",
        bill::gpu_hours(all), bill::kwh(all));
    out += *statement.adds_up
               ? "<p class=good>Both sums are equal, to the microsecond and the millijoule.</p>\n"
               : "<p class=bad>These sums differ: do not bill from this page.</p>\n";
  }
  out += "<h2>What the figures mean</h2>\n<ul>\n";
  for (const auto& note : usage_notes(statement)) out += fmt::format("<li>{}</li>\n", markup(note));
  out +=
      "<li>Slice-hours: how long a slice was held, from when it was ready to its end. Making and scrubbing "
      "it is the "
      "operator's.</li>\n"
      "<li>Energy: what the GPU draws idle is divided by size, and what nobody holds is the operator's; the "
      "rest by size "
      "times activity, with the weights fitted to this model of GPU. The sum is the counter's.</li>\n"
      "<li>Busy: the part of its own slice's time in which multiprocessors "
      "worked.</li>\n</ul>\n</body></html>\n";
  return out;
}

}  // namespace bulkhead::cli
