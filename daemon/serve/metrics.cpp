// /metrics: Prometheus text, version 0.0.4.
#include <dirent.h>
#include <unistd.h>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "daemon/serve/app.hpp"
#include "daemon/serve/metrics_gpus.hpp"

namespace bulkhead::serve {

namespace {

constexpr std::size_t most_tenants = 1000;  // with series of their own

std::size_t open_files() {
  std::size_t count = 0;
  DIR* directory = ::opendir("/proc/self/fd");
  if (directory == nullptr) return 0;
  while (::readdir(directory) != nullptr) ++count;
  ::closedir(directory);
  return count > 3 ? count - 3 : 0;  // ".", ".." and this one
}

}  // namespace

std::string App::metrics_text() const {
  const auto now = control_.now();
  Page page;
  page.reserve(512U << 10U);
  page.one("batches_total", "counter", "Turns of the control loop.", now->batch);
  page.one("audit_lines_total", "counter", "Lines of the audit log.", now->last_event);
  page.one("draining", "gauge", "1: nothing new is granted, by an operator's word.", now->draining ? 1 : 0);
  page.one("trouble", "gauge", "1: the host cannot be changed now; `bulkhead lease` says why.",
           now->trouble.empty() ? 0 : 1);
  page.one("uptime_seconds", "gauge", "Since the daemon began.",
           static_cast<double>(monotonic_ns() - began_) * 1e-9);

  std::map<std::pair<std::string_view, std::string_view>, std::uint64_t> leases;
  for (const auto state : {lease::State::requested, lease::State::queued, lease::State::preparing,
                           lease::State::active, lease::State::releasing})
    for (const auto cls :
         {lease::Class::mig, lease::Class::share, lease::Class::exclusive, lease::Class::passthrough})
      leases[{lease::name_of(cls), lease::name_of(state)}] = 0;
  for (const auto& [id, lease] : now->leases)
    if (!lease::over(lease->state)) ++leases[{lease::name_of(lease->ask.cls), lease::name_of(lease->state)}];
  page.family("leases", "gauge", "Leases that are not over.");
  for (const auto& [key, count] : leases)
    page.value(fmt::format("class=\"{}\",state=\"{}\"", key.first, key.second), count);

  page.one("tenants", "gauge", "Tenants.", now->tenants.size());
  const auto of_tenants = [&](std::string_view name, std::string_view type, std::string_view help,
                              auto number) {
    page.family(name, type, help);
    std::size_t count = 0;
    for (const auto& [tenant, record] : now->tenants) {
      if (++count > most_tenants) break;
      page.value(fmt::format("tenant=\"{}\"", label(tenant)), number(tenant));
    }
  };
  const auto held = [&](const std::string& tenant) {
    const auto at = now->held.find(tenant);
    return at == now->held.end() ? tenant::Amount{} : at->second;
  };
  of_tenants("tenant_leases", "gauge", "Leases a tenant holds or waits for.",
             [&](const auto& name) { return held(name).leases; });
  of_tenants("tenant_slices", "gauge", "MIG instances a tenant holds.",
             [&](const auto& name) { return held(name).slices; });
  of_tenants("tenant_shares", "gauge", "Software shares a tenant holds.",
             [&](const auto& name) { return held(name).shares; });
  of_tenants("tenant_gpus", "gauge", "Whole GPUs a tenant holds.",
             [&](const auto& name) { return held(name).gpus; });
  of_tenants("tenant_memory_bytes", "gauge", "GPU memory a tenant holds.",
             [&](const auto& name) { return held(name).memory.count; });
  of_tenants("tenant_watts", "gauge", "Parts of power limits a tenant holds.",
             [&](const auto& name) { return held(name).watts; });
  of_tenants("tenant_gpu_seconds_month", "gauge", "GPU-seconds of this calendar month (UTC).",
             [&](const auto& name) {
               const auto at = now->gpu_seconds_month.find(name);
               return at == now->gpu_seconds_month.end() ? std::uint64_t{0} : at->second;
             });

  page.family("gpu_free_ratio", "gauge", "The part of a GPU that nobody has.");
  for (const auto& gpu : now->gpus)
    page.value(
        fmt::format("gpu=\"{}\",index=\"{}\",pool=\"{}\"", label(gpu.gpu.text), gpu.index, label(gpu.pool)),
        gpu.free);
  page.family("gpu_leases", "gauge", "Leases on a GPU.");
  for (const auto& gpu : now->gpus)
    page.value(
        fmt::format("gpu=\"{}\",index=\"{}\",pool=\"{}\"", label(gpu.gpu.text), gpu.index, label(gpu.pool)),
        gpu.leases.size());

  page.one("streams", "gauge", "Watch streams that are open.", hub_.open());
  page.one("events_total", "counter", "Events told to watch streams since the start.", hub_.told());
  if (server_ != nullptr) {
    const auto counts = server_->counts();
    page.one("connections_total", "counter", "Connections taken.", counts.connections);
    page.one("connections_open", "gauge", "Connections that are open.", counts.open);
    page.one("connections_refused_total", "counter",
             "Connections and requests refused by the server's bounds.", counts.refused);
    page.one("connections_timed_out_total", "counter", "Connections that were too slow.", counts.timed_out);
  }
  page.one("open_files", "gauge", "Descriptors of the daemon.", open_files());
  if (const auto statm = read_file("/proc/self/statm"); statm.ok()) {
    const auto words = split(*statm, ' ');
    if (words.size() > 1)
      page.one("resident_bytes", "gauge", "Memory of the daemon.",
               parse_u64(words[1]).value_or(0) * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)));
  }
  timespec cpu{};
  if (::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu) == 0)
    page.one("cpu_seconds_total", "counter", "CPU time of the daemon.",
             static_cast<double>(cpu.tv_sec) + static_cast<double>(cpu.tv_nsec) * 1e-9);
  if (telemetry_ != nullptr) {
    const auto seen = telemetry_->seen();
    gpu_metrics(page, *seen, *now, config_.dcgm_names, monotonic_ns());
    page.one("sampler_restarts_total", "counter",
             "How often the process that asks the driver had to be started again.",
             telemetry_->monitor().restarts());
    page.one("history_bytes", "gauge", "Memory of the values that are kept.", telemetry_->history_bytes());
    page.family("telemetry_seconds_total", "counter", "Time that those who live by the second's beat took.");
    for (const auto& cost : telemetry_->costs())
      page.value(fmt::format("of=\"{}\"", cost.name), static_cast<double>(cost.nanoseconds) * 1e-9);
  }
  if (guardian_ != nullptr) page.append(guardian_->metrics());
  if (incidents_ != nullptr) page.append(incidents_->metrics(wall_now()));
  if (healer_ != nullptr) page.append(healer_->metrics());
  page.append(tally_.text());
  return std::move(page).text();
}

}  // namespace bulkhead::serve
