#include "cli/top_look.hpp"

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/limits.hpp"
#include "base/text.hpp"
#include "cli/api.hpp"
#include "engine/observe/observe.hpp"

namespace bulkhead::cli::top {

namespace {

using Lock = std::unique_lock<std::mutex>;
using sample::Signal;

constexpr std::uint64_t ms_ns = 1'000'000, second_ns = 1'000'000'000;
constexpr auto observe_every = std::chrono::seconds(3), ask_every = std::chrono::seconds(1);
// A look that ended in a hung driver call left a thread there: the next one is not at once.
constexpr auto after_hang = std::chrono::seconds(30);
constexpr std::size_t most_leases = 2000, most_alarms = 200, most_slices = 64;

struct TheirAlarm {
  Alarm alarm = {};
  std::string gpu = {};  // UUID
};

// What the daemon said, as a whole.
struct Said {
  std::uint64_t at_ns = 0;
  std::string url = {};
  Json host = {}, leases = Json::array();
  std::optional<sample::Snapshot> telemetry = {};
  std::optional<std::vector<TheirAlarm>> alarms = {};
};
struct Seen {
  std::uint64_t at_ns = 0;
  inventory::Host host = {};
  std::vector<share::Tenant> shares = {};
};

double real(const Json& object, const char* key, double otherwise) {
  const auto at = object.find(key);
  return at != object.end() && at->is_number() ? at->get<double>() : otherwise;
}

sample::Values values_of(const Json& document, std::uint64_t now) {
  sample::Values out;
  const auto values = document.find("values");
  if (values == document.end() || !values->is_object()) return out;
  for (const auto& row : sample::rows()) {
    const auto at = values->find(std::string(row.name));
    if (at == values->end() || !at->is_object()) continue;
    sample::Value& value = out[static_cast<std::size_t>(row.signal)];
    const double number = real(*at, "value", row.most + 1), age_ms = real(*at, "ageMs", 0);
    if (number >= row.least && number <= row.most && age_ms >= 0 && age_ms < 1e9) {
      value.number = number;
      value.at_ns = now - std::min(now - 1, static_cast<std::uint64_t>(age_ms * 1e6));
    }
    if (at->contains("unavailable")) value.refused = Errc::unsupported;
  }
  return out;
}

// Those that are open. A daemon that does not look after its GPUs (mode off) has no opinion: nothing.
std::optional<std::vector<TheirAlarm>> alarms_from(const Json& document) {
  const auto open = document.find("open");
  if (open == document.end() || !open->is_array() || api::text(document, "mode") == "off")
    return std::nullopt;
  std::vector<TheirAlarm> out;
  for (const auto& item : *open) {
    if (!item.is_object() || out.size() == most_alarms) continue;
    TheirAlarm one{.alarm = {.what = api::text(item, "what"), .since = api::text(item, "since")},
                   .gpu = api::text(item, "gpu")};
    one.alarm.level = api::text(item, "severity") == "critical" ? Level::critical : Level::warning;
    out.push_back(std::move(one));
  }
  return out;
}

}  // namespace

// ---- what the threads share
struct Look::Inside {
  Context context;
  std::string url;
  bool quick = false;
  bool asked_for = false;  // the user named a daemon: that it is not there is worth a line

  std::mutex mutex;
  std::condition_variable wake;
  bool stop = false;
  unsigned running = 0;
  std::vector<Uuid> only = {};  // the GPUs to look at, while others hang; empty: all
  std::shared_ptr<const Seen> seen = {};
  std::string seen_why = {};  // why the last look failed
  bool observed = false, asked = false;
  std::shared_ptr<const Said> said = {};
  std::string said_why = {};

  bool wait(std::chrono::milliseconds time) {  // false: stop
    Lock lock(mutex);
    wake.wait_for(lock, time, [&] { return stop; });
    return !stop;
  }

  void observe() {
    unsigned hangs = 0;  // in a row
    for (;;) {
      observe::Access access{.root = context.root,
                             .nvml_library = context.nvml_library,
                             .state_dir = context.state_dir,
                             .detail = observe::Detail::brief,
                             .driver_timeout_ms = std::min(context.driver_timeout_ms, quick ? 2500U : 5000U)};
      std::shared_ptr<const Seen> before;
      {
        const Lock lock(mutex);
        access.only = only;
        before = seen;
      }
      auto host = observe::host(access);
      auto shares = share::list({.root = context.root, .nvml_library = context.nvml_library});
      std::chrono::milliseconds pause = observe_every;
      {
        const Lock lock(mutex);
        if (host.ok()) {
          hangs = 0;
          auto next = std::make_shared<Seen>();
          next->at_ns = monotonic_ns();
          next->host = std::move(host).value();
          if (shares.ok()) next->shares = std::move(shares).value();
          // Of those that were left out because they hang, what was known stays.
          if (before && !access.only.empty()) {
            for (const auto& gpu : before->host.gpus)
              if (std::find(access.only.begin(), access.only.end(), gpu.uuid) == access.only.end())
                next->host.gpus.push_back(gpu);
          }
          seen = std::move(next);
          seen_why.clear();
        } else {
          seen_why = host.error().message();
          // The sampler knows by now which GPU it is: once more without that one. Each look that ends so
          // leaves a thread behind, so there are not many.
          if (host.error().code() == Errc::timeout)
            pause = ++hangs == 1 && !only.empty() && access.only.empty()
                        ? std::chrono::milliseconds(1)
                        : std::chrono::milliseconds(after_hang);
        }
        observed = pause > std::chrono::milliseconds(1);
        wake.notify_all();
      }
      if (!wait(pause)) return;
    }
  }

  void ask() {
    std::unique_ptr<api::Client> client;
    std::uint64_t no_telemetry_until = 0, no_alarms_until = 0;
    do {
      auto next = std::make_shared<Said>();
      const auto error = ask_once(client, *next, no_telemetry_until, no_alarms_until);
      const Lock lock(mutex);
      if (error.empty()) {
        said = std::move(next);
        said_why.clear();
      } else {
        client.reset();
        said_why = error;
      }
      asked = true;
      wake.notify_all();
    } while (wait(said_why.empty() ? std::chrono::milliseconds(ask_every) : std::chrono::seconds(5)));
  }

  // Why not, or empty.
  std::string ask_once(std::unique_ptr<api::Client>& client, Said& out, std::uint64_t& no_telemetry_until,
                       std::uint64_t& no_alarms_until) const {
    if (!client) {
      auto target = client::target(url.empty() ? std::nullopt : std::optional(url));
      if (!target.ok()) return target.error().message();
      auto made = client::Client::connect(std::move(*target), std::chrono::seconds(5));
      if (!made.ok()) return made.error().message();
      client = std::move(*made);
    }
    out.url = client->target().url;
    // Who may not see the whole host sees his own leases all the same.
    if (auto host = api::get(*client, "/api/v1/host"); host.ok()) {
      out.host = std::move(*host);
    } else if (host.error().code() != Errc::permission) {
      return host.error().message();
    }
    auto leases = api::all(*client, "/api/v1/leases", most_leases);
    if (!leases.ok()) return leases.error().message();
    out.leases = std::move(*leases);
    const std::uint64_t now = monotonic_ns();
    // Older daemons have neither: they are asked again once in a while.
    const auto maybe = [&](const char* path, std::uint64_t& not_until) -> std::optional<Json> {
      if (now < not_until) return std::nullopt;
      auto answer = client->call("GET", path, std::nullopt);
      if (answer.ok() && answer->status == 200 && answer->body.is_object()) return std::move(answer->body);
      not_until = now + 30 * second_ns;
      return std::nullopt;
    };
    if (auto telemetry = maybe("/api/v1/telemetry", no_telemetry_until)) {
      auto snapshot = snapshot_of(*telemetry, monotonic_ns());
      if (!snapshot.gpus.empty()) out.telemetry = std::move(snapshot);
    }
    if (auto alarms = maybe("/api/v1/alarms", no_alarms_until)) out.alarms = alarms_from(*alarms);
    out.at_ns = monotonic_ns();
    return {};
  }
};

Look::Look(const Context& context, const std::string& url, bool quick) : inside_(std::make_shared<Inside>()) {
  inside_->context = context;
  inside_->url = url;
  inside_->quick = quick;
  inside_->asked_for = !url.empty() || std::getenv("BULKHEAD_URL") != nullptr;
  inside_->running = 2;
  const auto start = [inside = inside_](void (Inside::*run)(), const char* name) {
    std::thread([inside, run, name] {
      ::prctl(PR_SET_NAME, name);
      ((*inside).*run)();
      const Lock lock(inside->mutex);
      --inside->running;
      inside->wake.notify_all();
    }).detach();
  };
  start(&Inside::observe, "bh-observe");
  start(&Inside::ask, "bh-ask");
  // A daemon on this host samples already; a moment to hear so spares the driver a second asker.
  Lock lock(inside_->mutex);
  inside_->wake.wait_for(lock, std::chrono::milliseconds(300), [&] { return inside_->asked; });
}

Look::~Look() { end(); }

bool Look::end() {
  sampler_.reset();
  Lock lock(inside_->mutex);
  inside_->stop = true;
  inside_->wake.notify_all();
  return inside_->wake.wait_for(lock, std::chrono::milliseconds(500), [&] { return inside_->running == 0; });
}

void Look::wait_ready(unsigned milliseconds) {
  const std::uint64_t until = monotonic_ns() + milliseconds * ms_ns;
  for (;;) {
    const View now = view();
    bool ready = false;
    {
      const Lock lock(inside_->mutex);
      ready = inside_->observed && inside_->asked;
    }
    // Rates need two looks at the driver.
    const bool sampled = std::all_of(now.gpus.begin(), now.gpus.end(), [](const Gpu& gpu) {
      if (gpu.seen.state == sample::State::starting) return false;
      if (gpu.seen.state != sample::State::sampling || !gpu.seen.gpm.value_or(false)) return true;
      const auto done = [](const sample::Value& value) { return value.known() || value.refused; };
      return done(gpu.seen[Signal::sm]) &&
             std::all_of(gpu.seen.slices.begin(), gpu.seen.slices.end(), [&](const sample::Slice& slice) {
               return done(slice.values[static_cast<std::size_t>(Signal::sm)]);
             });
    });
    const bool starting = now.gpus.empty() && now.why == "starting";
    if ((ready && sampled && !starting) || monotonic_ns() >= until) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

View Look::view() {
  std::shared_ptr<const Seen> seen;
  std::shared_ptr<const Said> said;
  std::string seen_why, said_why;
  {
    const Lock lock(inside_->mutex);
    seen = inside_->seen;
    said = inside_->said;
    seen_why = inside_->seen_why;
    said_why = inside_->said_why;
  }
  const Context& context = inside_->context;
  View view;
  view.now_ns = monotonic_ns();
  view.time = rfc3339(wall_now());

  // What the daemon samples is taken while it comes; its host is this one, or the only one asked for.
  sample::Snapshot snapshot;
  const bool theirs = said && said->telemetry && view.now_ns - said->at_ns < 10 * second_ns;
  if (theirs) {
    snapshot = *said->telemetry;
    view.from = said->url.starts_with("https") ? said->url : "";
  } else {
    if (!sampler_) {
      sample::Settings settings;
      settings.library = context.nvml_library;
      settings.gpm_ms = inside_->quick ? 200 : 1000;
      settings.deadline_ms = std::min(context.driver_timeout_ms, 2000U);
      settings.history.most_bytes = 1U << 20U;  // the last minute is kept elsewhere
      // In a process of its own: a crash in the driver takes that one, and the host is looked at from here,
      // which needs to know its own driver calls from the sampler's.
      sampler_ = std::make_unique<monitor::Monitor>(settings, monitor::Program{.answer_ms = 300});
    }
    snapshot = sampler_->snapshot();
    view.now_ns = std::max(view.now_ns, snapshot.at_ns);
  }
  view.why = snapshot.why;
  for (auto& gpu : snapshot.gpus) {
    Gpu one;
    one.seen = std::move(gpu);
    view.gpus.push_back(std::move(one));
  }

  const bool far = theirs && !view.from.empty();
  if (!far) {
    std::vector<Uuid> well;
    for (const Gpu& gpu : view.gpus)
      if (gpu.seen.state == sample::State::sampling) well.push_back(gpu.seen.uuid);
    const bool hung = std::any_of(view.gpus.begin(), view.gpus.end(),
                                  [](const Gpu& gpu) { return gpu.seen.state == sample::State::hung; });
    const Lock lock(inside_->mutex);
    inside_->only = hung ? well : std::vector<Uuid>();
  }
  Sources sources;
  // Processes of this host are none of a far one's GPUs: join() goes by UUID, so a far one's find nothing.
  if (seen) {
    sources.host = &seen->host;
    sources.shares = &seen->shares;
    view.processes_known = !far;
    view.driver = seen->host.driver_version.value_or("");
    view.host = seen->host.hostname;
  }
  if (said && view.now_ns - std::min(view.now_ns, said->at_ns) < 30 * second_ns) {
    sources.daemon_host = said->host;
    sources.leases = said->leases;
    view.tenants_known = true;
  }
  join(view, sources);
  if (far) {
    view.host = view.from;
    view.from.clear();
    view.driver.clear();
  }

  for (Gpu& gpu : view.gpus) {
    const auto keep = [&](const std::string& key, const sample::Value& value) {
      if (value.known()) trails_.add(key, value.at_ns, value.number);
      return trails_.get(key, view.now_ns);
    };
    const std::string& uuid = gpu.seen.uuid.text;
    gpu.power = keep("power " + uuid, gpu.seen[Signal::power]);
    gpu.sm = keep("sm " + uuid, gpu.seen[Signal::sm].known() ? gpu.seen[Signal::sm] : gpu.seen[Signal::busy]);
    for (const auto& slice : gpu.seen.slices)
      gpu.slices[slice.gpu_instance] = keep(fmt::format("slice {} {}", uuid, slice.gpu_instance),
                                            slice.values[static_cast<std::size_t>(Signal::sm)]);
  }

  if (said && said->alarms && view.tenants_known) {
    for (const auto& [alarm, uuid] : *said->alarms) {
      view.alarms.push_back(alarm);
      for (const Gpu& gpu : view.gpus)
        if (!uuid.empty() && gpu.seen.uuid.text == uuid) view.alarms.back().gpu = gpu.seen.index;
    }
  } else {
    for (const Gpu& gpu : view.gpus) {
      auto more = alarms_of(gpu.seen, view.now_ns);
      view.alarms.insert(view.alarms.end(), more.begin(), more.end());
    }
    if (seen) {
      for (const auto& lost : seen->host.lost) {
        if (lost.pci.driver && lost.pci.driver->starts_with("vfio")) continue;  // a virtual machine's
        view.alarms.push_back(
            {Level::critical, {}, fmt::format("{}: {}", lost.pci.address.str(), lost.why), {}});
      }
    }
  }
  std::stable_sort(view.alarms.begin(), view.alarms.end(),
                   [](const Alarm& a, const Alarm& b) { return a.level > b.level; });

  if (!seen_why.empty() && !theirs)
    view.notes.push_back(fmt::format("slices and processes{}: {}",
                                     seen ? fmt::format(" are {} old", age(seen->at_ns, view.now_ns)) : "",
                                     seen_why));
  if (!said_why.empty() && (inside_->asked_for || said))
    view.notes.push_back(fmt::format(
        "tenants{}: {}", said ? fmt::format(" are {} old", age(said->at_ns, view.now_ns)) : "", said_why));
  return view;
}

sample::Snapshot snapshot_of(const Json& document, std::uint64_t now) {
  sample::Snapshot out;
  out.at_ns = now;
  out.why = api::text(document, "why");
  const auto gpus = document.find("gpus");
  if (gpus == document.end() || !gpus->is_array()) return out;
  for (const auto& one : *gpus) {
    if (!one.is_object() || out.gpus.size() == limits::gpus) continue;
    sample::Gpu gpu;
    const auto small = [](std::int64_t number) {
      return static_cast<unsigned>(std::clamp<std::int64_t>(number, 0, 9999));
    };
    gpu.index = small(api::number(one, "index"));
    gpu.uuid = {api::text(one, "gpu")};
    if (auto pci = PciAddress::parse(api::text(one, "pci")); pci.ok()) gpu.pci = *pci;
    gpu.name = api::text(one, "name");
    const auto state = api::text(one, "state");
    for (const auto known : {sample::State::starting, sample::State::sampling, sample::State::hung,
                             sample::State::lost, sample::State::resting})
      if (name_of(known) == state) gpu.state = known;
    gpu.call = api::text(one, "call");
    const double hung = real(one, "hungMs", 0);
    if (hung >= 0 && hung < 1e12) gpu.since_ns = now - std::min(now, static_cast<std::uint64_t>(hung * 1e6));
    gpu.why = api::text(one, "why");
    gpu.values = values_of(one, now);
    if (gpu[Signal::sm].known()) gpu.gpm = true;
    if (const auto slices = one.find("slices"); slices != one.end() && slices->is_array()) {
      for (const auto& slice : *slices) {
        if (!slice.is_object() || gpu.slices.size() == most_slices) continue;
        gpu.slices.push_back({.gpu_instance = small(api::number(slice, "gpuInstance")),
                              .uuid = {api::text(slice, "device")},
                              .values = values_of(slice, now)});
      }
    }
    gpu.mig = !gpu.slices.empty();
    out.gpus.push_back(std::move(gpu));
  }
  return out;
}

namespace {

Process process_of(const inventory::Holder& holder) {
  Process out{.pid = holder.pid, .name = holder.name.empty() ? "?" : holder.name};
  if (holder.memory) out.memory = holder.memory->count;
  return out;
}

void add_process(Part& part, Process process) {  // a process may hold several compute instances
  if (std::none_of(part.processes.begin(), part.processes.end(),
                   [&](const Process& other) { return other.pid == process.pid; }))
    part.processes.push_back(std::move(process));
}

// The parts of one GPU, before any lease is put onto them.
std::vector<Part> parts_of_hardware(const Gpu& gpu, std::size_t place, const inventory::Gpu* known) {
  std::vector<Part> out;
  if (known != nullptr) {
    for (const auto& instance : known->instances) {
      Part part{.gpu = place, .instance = instance.id, .profile = instance.name};
      for (const auto& holder : instance.holders()) add_process(part, process_of(holder));
      out.push_back(std::move(part));
    }
  }
  // Instances that were cut since the host was last looked at, or are a far host's.
  for (const auto& slice : gpu.seen.slices) {
    const auto at = std::find_if(out.begin(), out.end(),
                                 [&](const Part& part) { return part.instance == slice.gpu_instance; });
    Part& part = at != out.end() ? *at : out.emplace_back(Part{.gpu = place, .instance = slice.gpu_instance});
    part.values = slice.values;
  }
  return out;
}

Part* find_part(std::vector<Part>& parts, const Gpu& gpu, const inventory::Gpu* known, const Json& device) {
  const auto uuid = api::text(device, "device");
  std::optional<unsigned> instance;
  if (uuid.starts_with("MIG-")) {
    for (const auto& slice : gpu.seen.slices)
      if (slice.uuid.text == uuid) instance = slice.gpu_instance;
  }
  if (known != nullptr && !instance) {
    const auto start = device.find("start");
    for (const auto& one : known->instances) {
      for (const auto& compute : one.compute)
        if (!uuid.empty() && compute.uuid && compute.uuid->text == uuid) instance = one.id;
      // Not the number of the instance: that is given anew after each cut.
      if (!instance && uuid.empty() && start != device.end() && start->is_number_unsigned() &&
          start->get<std::uint64_t>() == one.place.start && one.name == api::text(device, "profile"))
        instance = one.id;
    }
  }
  if (!instance) return nullptr;
  const auto at =
      std::find_if(parts.begin(), parts.end(), [&](const Part& part) { return part.instance == instance; });
  return at != parts.end() ? &*at : nullptr;
}

}  // namespace

void join(View& view, const Sources& sources) {
  for (std::size_t i = 0; i < view.gpus.size(); ++i) {
    Gpu& gpu = view.gpus[i];
    const std::string& uuid = gpu.seen.uuid.text;
    const inventory::Gpu* known = nullptr;
    if (sources.host != nullptr) {
      for (const auto& one : sources.host->gpus)
        if (!uuid.empty() && one.uuid.text == uuid) known = &one;
    }
    if (known != nullptr) {
      gpu.memory_total = known->memory.count;
      gpu.pool = name_of(known->pool);
    }
    if (const auto of_daemon = sources.daemon_host.find("gpus");
        sources.daemon_host.is_object() && of_daemon != sources.daemon_host.end() && of_daemon->is_array()) {
      for (const auto& one : *of_daemon) {
        if (uuid.empty() || api::text(one, "gpu") != uuid) continue;
        gpu.pool = api::text(one, "pool");
        if (const auto cordon = one.find("cordon"); cordon != one.end())
          gpu.cordon = api::text(*cordon, "why");
      }
    }
    auto parts = parts_of_hardware(gpu, i, known);
    const bool cut = !parts.empty();
    std::set<int> placed;
    const auto whole_processes = [&](Part& part) {
      if (known == nullptr) return;
      for (const auto& holder : known->holders)
        if (placed.insert(holder.pid).second) add_process(part, process_of(holder));
    };

    for (const auto& lease : sources.leases) {
      const auto state = api::text(lease, "state");
      const auto devices = lease.find("devices");
      if ((state != "active" && state != "preparing" && state != "releasing") || devices == lease.end() ||
          !devices->is_array())
        continue;
      for (const auto& device : *devices) {
        if (!device.is_object() || uuid.empty() || api::text(device, "gpu") != uuid) continue;
        Part* part = find_part(parts, gpu, known, device);
        if (part == nullptr) {
          const auto cls = api::text(lease, "class");
          Part more{.gpu = i};
          more.profile = cls == "share" ? fmt::format("share {}", api::number(device, "weight"))
                         : cls == "mig" ? api::text(device, "profile")
                                        : cls;
          part = &parts.emplace_back(std::move(more));
          if (cls == "exclusive") part->values = gpu.seen.values;
        }
        if (part->profile.empty()) part->profile = api::text(device, "profile");
        part->tenant = api::text(lease, "tenant");
        part->lease = api::number(lease, "id");
        part->expires = api::text(lease, "expires");
        if (state != "active") part->state = state;
      }
    }

    if (sources.shares != nullptr) {
      for (const auto& tenant : *sources.shares) {
        if (!tenant.alive || uuid.empty() || tenant.asked.gpu != uuid) continue;
        Part part{
            .gpu = i, .profile = fmt::format("share {}", tenant.asked.weight), .tenant = tenant.asked.name};
        if (tenant.now) {
          for (const int pid : tenant.now->processes) {
            Process process{.pid = pid, .name = "?"};
            if (known != nullptr)
              for (const auto& holder : known->holders)
                if (holder.pid == pid) process = process_of(holder);
            placed.insert(pid);
            add_process(part, std::move(process));
          }
          auto& sm = part.values[static_cast<std::size_t>(Signal::sm)];
          if (tenant.now->busy) sm = {.number = *tenant.now->busy * 100, .at_ns = view.now_ns};
          part.values[static_cast<std::size_t>(Signal::memory_used)] = {
              .number = static_cast<double>(tenant.now->used.count), .at_ns = view.now_ns};
        }
        parts.push_back(std::move(part));
      }
    }

    if (!cut) {
      // Who is on the GPU without a share belongs to its one lease, or stands alone.
      const auto whole = std::find_if(parts.begin(), parts.end(),
                                      [](const Part& part) { return part.profile == "exclusive"; });
      if (whole != parts.end()) {
        whole_processes(*whole);
      } else {
        Part rest{.gpu = i, .profile = "whole"};
        rest.values = gpu.seen.values;
        whole_processes(rest);
        if (parts.empty() || !rest.processes.empty()) parts.push_back(std::move(rest));
      }
    }
    std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
      return a.instance.value_or(~0U) < b.instance.value_or(~0U);
    });
    std::move(parts.begin(), parts.end(), std::back_inserter(view.parts));
  }
}

}  // namespace bulkhead::cli::top
