// The stages of an act, each of which may be begun again.
#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <future>
#include <set>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/limits.hpp"
#include "base/text.hpp"
#include "edge/process/process.hpp"
#include "edge/systemd/systemd.hpp"
#include "engine/execute/execute.hpp"
#include "engine/heal/heal.hpp"

namespace bulkhead::heal {

namespace {

constexpr std::string_view mark = "healing: ";
constexpr std::size_t output_bytes = 16U << 10U;
constexpr unsigned answer_s = 60;
constexpr std::string_view persistence_daemon = "nvidia-persiste";  // as comm cuts its name off

control::Caller caller() {
  return {.user = "bulkhead", .tenant = {}, .role = access::Role::admin, .from = "healing"};
}

bool is_ours(const std::optional<control::Cordon>& cordon) {
  return cordon && cordon->by == "bulkhead" && cordon->why.starts_with(mark);
}

std::string reason(const Task& task) {
  std::string out =
      printable(fmt::format("{}{} after {}", mark, name_of(task.act), task.cause), control::most_why);
  if (out.size() > control::most_why) out.resize(control::most_why);
  return out;
}

// Asks the control and waits for its answer.
template <class T, class Ask>
Status answered(const Ask& ask) {
  auto promise = std::make_shared<std::promise<control::Answer<T>>>();
  auto answer = promise->get_future();
  ask([promise](control::Answer<T> given) { promise->set_value(std::move(given)); });
  if (answer.wait_for(std::chrono::seconds(answer_s)) != std::future_status::ready)
    return Error(Errc::timeout, "the daemon's loop does not answer");
  const auto given = answer.get();
  if (const auto* refusal = std::get_if<control::Refusal>(&given))
    return Error(Errc::conflict, refusal->what);
  return ok_status();
}

const control::PoolGpu* find(const control::Snapshot& now, const Uuid& gpu) {
  for (const auto& one : now.gpus)
    if (one.gpu == gpu) return &one;
  return nullptr;
}

// Leases that are not over on the place the act reaches.
std::vector<std::shared_ptr<const lease::Lease>> there(const control::Snapshot& now, const Task& task,
                                                       const std::set<std::string>& fabric) {
  std::vector<std::shared_ptr<const lease::Lease>> out;
  const Reach reach = row_of(task.act).reach;
  for (const auto& [id, lease] : now.leases) {
    if (lease::over(lease->state)) continue;
    const bool hit = std::any_of(lease->parts.begin(), lease->parts.end(), [&](const lease::Part& part) {
      if (reach == Reach::fabric) return fabric.contains(part.gpu.text);
      if (reach == Reach::node) return true;
      if (part.gpu != task.gpu) return false;
      return reach != Reach::slice || !task.gpu_instance || part.gpu_instance == task.gpu_instance;
    });
    if (hit) out.push_back(lease);
  }
  return out;
}

// Runs a program, without a shell, and returns what it said. The environment is as small as a root's; `own`
// keeps the daemon's.
struct Ran {
  int status = -1;
  bool late = false;
  std::string output = {};
};
Result<Ran> command(const std::vector<std::string>& words, const std::filesystem::path& root, bool own,
                    unsigned deadline_ms) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("pipe", errno);
  const UniqueFd out(ends[0]);
  UniqueFd in(ends[1]);
  // All memory before the fork: there are threads.
  std::vector<std::string> copies = words,
                           set = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                                  "LC_ALL=C.UTF-8", "BULKHEAD_ROOT=" + root.string()};
  std::vector<char*> argv, environment;
  for (auto& word : copies) argv.push_back(word.data());
  argv.push_back(nullptr);
  for (auto& word : set) environment.push_back(word.data());
  environment.push_back(nullptr);
  char** const given = own ? environ : environment.data();
  const pid_t parent = ::getpid();
  const pid_t child = ::fork();
  if (child < 0) return errno_error("fork", errno);
  if (child == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(127);
    const sigset_t none{};
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    for (const int one : {SIGINT, SIGTERM, SIGPIPE, SIGHUP, SIGCHLD}) ::signal(one, SIG_DFL);
    const int null = ::open("/dev/null", O_RDONLY);
    ::dup2(null, 0);
    ::dup2(in.get(), 1);
    ::dup2(in.get(), 2);
    ::execve(argv[0], argv.data(), given);
    ::_exit(127);
  }
  in.reset();
  Ran ran;
  const std::uint64_t until = monotonic_ns() + std::uint64_t{deadline_ms} * 1'000'000;
  char block[4096];
  while (true) {
    const std::uint64_t now = monotonic_ns();
    if (now >= until) {
      ran.late = true;
      break;
    }
    pollfd waits{out.get(), POLLIN, 0};
    const int ready =
        ::poll(&waits, 1, static_cast<int>(std::min<std::uint64_t>((until - now) / 1'000'000 + 1, 1000)));
    if (ready < 0 && errno != EINTR) break;
    if (ready <= 0) continue;
    const ssize_t got = ::read(out.get(), block, sizeof block);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    if (ran.output.size() < output_bytes) ran.output.append(block, static_cast<std::size_t>(got));
  }
  if (ran.late) ::kill(child, SIGKILL);
  // In the kernel's hands it may not die: it is not waited for beyond a second, and is reaped by init.
  for (unsigned i = 0; i < 100; ++i) {
    const pid_t gone = ::waitpid(child, &ran.status, ran.late ? WNOHANG : 0);
    if (gone == child || (gone < 0 && errno != EINTR)) break;
    if (ran.late) ::usleep(10'000);
  }
  return ran;
}

std::string lines_of(const std::string& output) {
  std::vector<std::string> lines;
  for (const auto line : split_lines(output))
    if (!trim(line).empty()) lines.push_back(printable(trim(line), 200));
  if (lines.size() > 4) lines.erase(lines.begin(), lines.end() - 4);
  return join(lines, "; ");
}

// The node file as it is, or nothing: with a mistake in it, or unread, a GPU that came back stays as it came.
std::optional<spec::NodeFile> node_of(const std::filesystem::path& node_file) {
  if (node_file.empty()) return std::nullopt;
  const auto text = read_file(node_file, limits::node_file_bytes);
  if (!text.ok()) return std::nullopt;
  auto parsed = spec::parse(*text);
  auto* node = std::get_if<spec::NodeFile>(&parsed);
  return node == nullptr ? std::nullopt : std::optional(std::move(*node));
}

// Its word on this GPU alone.
Result<execute::Wanted> word_on(spec::NodeFile node, const Uuid& gpu, const inventory::Host& host) {
  execute::Wanted out;
  for (const auto& its : host.gpus) {
    if (its.uuid != gpu) continue;
    for (auto& rule : node.gpus) {
      if (!plan::selects(rule.select, its)) continue;
      rule.select = {};
      rule.select.uuid = {gpu};
      out.node.gpus.push_back(std::move(rule));
    }
  }
  out.text = spec::to_yaml(out.node);
  return out;
}

Status said_of(const Result<execute::Outcome>& outcome) {
  if (!outcome.ok()) return Error(outcome.error());
  switch (outcome->verdict) {
    case execute::Verdict::nothing_to_do:
    case execute::Verdict::applied:
      return ok_status();
    case execute::Verdict::refused: {
      std::vector<std::string> whys;
      if (outcome->proposal && outcome->proposal->refusal() != nullptr)
        for (const auto& one : outcome->proposal->refusal()->reasons)
          whys.push_back(fmt::format("{}: {}", one.subject, one.why));
      return Error(Errc::conflict, join(whys, "; "));
    }
    default:
      return Error(outcome->code.value_or(Errc::conflict),
                   outcome->failure.empty() ? "it reads back otherwise: " + join(outcome->remaining, "; ")
                                            : outcome->failure);
  }
}

}  // namespace

void Healer::away(bool out) {
  if (!place_.let_go || away_ == out) return;
  (void)place_.let_go(out);
  away_ = out;
}

Status Healer::shut(Task& task) {
  const auto now = control_.now();
  if (row_of(task.act).reach >= Reach::fabric) {
    // A drain is a person's, or ours from before a kill: the record says which.
    if (now->draining) return ok_status();
    task.ours = true;
    if (!put(task)) return Error(Errc::io, "it could not be written down");
    return answered<bool>([&](auto then) { control_.drain(caller(), true, std::move(then)); });
  }
  const auto* gpu = find(*now, task.gpu);
  if (gpu == nullptr) return Error(Errc::gone, "the host has no such GPU any more");
  // Somebody else's word stays after ours would be taken back.
  task.ours = !gpu->cordon || is_ours(gpu->cordon);
  if (gpu->cordon) return ok_status();
  if (!put(task)) return Error(Errc::io, "it could not be written down");
  return answered<control::PoolGpu>(
      [&](auto then) { control_.cordon(caller(), task.gpu, reason(task), std::move(then)); });
}

Status Healer::evict(Task& task) {
  auto leases = there(*control_.now(), task, fabric_);
  for (const auto& lease : leases) {
    if (std::find(task.leases.begin(), task.leases.end(), lease->id) == task.leases.end())
      task.leases.push_back(lease->id);
    if (task.act != Act::recreate_slice) continue;
    for (const auto& part : lease->parts) {
      if (part.gpu != task.gpu || part.gpu_instance != task.gpu_instance || !part.start) continue;
      const slice::Place place{.gpu = part.gpu, .profile = part.profile, .start = *part.start};
      if (std::find(task.destroyed.begin(), task.destroyed.end(), place) != task.destroyed.end()) continue;
      task.destroyed.push_back(place);
      if (!part.made) task.again.push_back(place);  // one made for a lease goes with it
    }
  }
  if (!put(task)) return Error(Errc::io, "it could not be written down");
  for (const auto& lease : leases) {
    if (lease->state == lease::State::releasing) continue;
    const auto asked = answered<lease::Lease>(
        [&](auto then) { control_.evict(caller(), lease->id, reason(task), std::move(then)); });
    // It may have ended by itself meanwhile; what matters is whether it is over.
    if (!asked.ok()) task.said.push_back(fmt::format("lease {}: {}", lease->id, asked.error().message()));
  }
  const std::uint64_t until = monotonic_ns() + (std::uint64_t{place_.grace_ms} + place_.check_ms) * 1'000'000;
  while (!(leases = there(*control_.now(), task, fabric_)).empty()) {
    if (ending()) return ok_status();
    if (monotonic_ns() > until)
      return Error(Errc::in_use, fmt::format("lease {} could not be ended: {}", leases.front()->id,
                                             printable(leases.front()->reason, 300)));
    pause(100);
  }
  return ok_status();
}

// A reset needs the GPU alone, and nvidia-smi would only say that somebody has it. nvidia-persistenced is
// asked to let go by nvidia-smi itself.
Status Healer::nobody_has(Task& task) {
  std::filesystem::path node;
  {
    const std::lock_guard hold(mutex_);
    const auto at = nodes_.find(task.gpu.text);
    if (at == nodes_.end()) return ok_status();
    node = at->second;
  }
  std::vector<std::string> who;
  // Those of the leases that have just ended may be on their way out.
  for (int look = 0; look < 4; ++look) {
    if (look > 0) pause(500);
    // No reset without the look: the next daemon does this stage again.
    if (ending()) return Error(Errc::unavailable, "the daemon ends");
    const auto found = openers({&node, 1});
    if (!found.ok()) {
      task.said.push_back("who else has it open is not known: " + found.error().message());
      return ok_status();
    }
    who.clear();
    for (const auto& one : found->front())
      if (one.who.name != persistence_daemon) who.push_back(words_of(one));
    if (who.empty()) return ok_status();
  }
  return Error(
      Errc::in_use,
      fmt::format("{}: {}; a reset needs it alone, and none was tried: when they are gone, nvidia-smi "
                  "--gpu-reset -i {}, then bulkhead gpus uncordon {}",
                  node.string(), join(who, ", "), task.index, task.index));
}

Status Healer::act(Task& task) {
  const auto deadline = place_.check_ms;
  execute::Options options{.access = place_.access, .verb = "heal", .lock_wait_ms = 30'000};
  options.access.only = {task.gpu};
  const auto alone = [&](const auto& apply) {
    std::optional<Result<execute::Outcome>> done;
    control_.alone([&] { done.emplace(apply()); });
    return said_of(*done);
  };
  switch (task.act) {
    case Act::none:
    case Act::reboot:
    case Act::drain_slice:  // its lease's end scrubbed it, and proved that nothing is left
    case Act::quarantine:
      return ok_status();

    case Act::end_process: {
      if (task.pid <= 1) return Error(Errc::not_found, "the lines name no process");
      const auto who = process::look(place_.access.root, task.pid);
      if (!who.ok()) {
        task.said.push_back(fmt::format("pid {} is gone already", task.pid));
        return ok_status();
      }
      if (task.start_time == 0) {
        task.start_time = who->start_time;
        const auto began = process::started(*who);
        if (began.ok() &&
            std::chrono::duration_cast<std::chrono::seconds>(began->time_since_epoch()).count() > task.at_s)
          return Error(Errc::conflict, fmt::format("pid {} is another process by now", task.pid));
        if (!put(task)) return Error(Errc::io, "it could not be written down");
      }
      // The line's pid may be somebody's who was never there: the driver has the word.
      auto where = place_.access;
      where.only = {task.gpu};
      std::optional<Result<inventory::Host>> host;
      control_.alone([&] { host.emplace(observe::host(where)); });
      if (!host->ok()) return std::move(*host).error();
      bool there = false;
      for (const auto& gpu : (*host)->gpus) {
        const auto is_it = [&](const inventory::Holder& one) { return one.pid == task.pid; };
        there = there || std::any_of(gpu.holders.begin(), gpu.holders.end(), is_it);
        for (const auto& instance : gpu.instances) {
          const auto all = instance.holders();
          there = there || std::any_of(all.begin(), all.end(), is_it);
        }
      }
      if (!there) {
        task.said.push_back(fmt::format("pid {} is not on the GPU any more", task.pid));
        return ok_status();
      }
      inventory::Holder holder;
      holder.pid = task.pid;
      holder.start_time = task.start_time;
      BH_CHECK(process::terminate(place_.access.root, holder, place_.grace_ms));
      task.said.push_back(fmt::format("pid {} ({}) was ended", task.pid, who->name));
      return ok_status();
    }

    case Act::recreate_slice: {
      slice::Settings slices{.access = place_.access};
      if (task.destroyed.empty()) {  // nobody has it: as it stands
        auto where = place_.access;
        where.only = {task.gpu};
        std::optional<Result<inventory::Host>> host;
        control_.alone([&] { host.emplace(observe::host(where)); });
        if (!host->ok()) return std::move(*host).error();
        for (const auto& gpu : (*host)->gpus) {
          const auto* instance = task.gpu_instance ? gpu.instance(*task.gpu_instance) : nullptr;
          if (instance == nullptr) continue;
          const slice::Place place{
              .gpu = gpu.uuid, .profile = instance->name, .start = instance->place.start};
          task.destroyed.push_back(place);
          task.again.push_back(place);
        }
        if (task.destroyed.empty()) {
          task.said.push_back("the instance is gone already");
          return ok_status();
        }
        if (!put(task)) return Error(Errc::io, "it could not be written down");
      }
      std::optional<Result<std::vector<slice::Device>>> done;
      control_.alone([&] { done.emplace(slice::change(slices, {.destroy = task.destroyed})); });
      if (!done->ok()) return std::move(*done).error().in("destroy");
      if (!task.again.empty()) {
        control_.alone([&] { done.emplace(slice::change(slices, {.create = task.again})); });
        if (!done->ok()) return std::move(*done).error().in("create");
      }
      for (const auto& place : task.destroyed)
        task.said.push_back(
            fmt::format("{} at {} was {}", place.profile, place.start,
                        task.again.empty() ? "destroyed: the next lease gets a new one" : "made anew"));
      return ok_status();
    }

    case Act::reset_gpu: {
      std::string tool;
      for (const char* directory : {"usr/bin", "bin", "usr/sbin"}) {
        const auto at = place_.access.root / directory / "nvidia-smi";
        if (tool.empty() && ::access(at.c_str(), X_OK) == 0) tool = at.string();
      }
      if (tool.empty())
        return Error(Errc::not_found, fmt::format("there is no nvidia-smi below {}: it alone resets a GPU",
                                                  place_.access.root.string()));
      BH_CHECK(nobody_has(task));
      std::optional<Result<Ran>> ran;
      control_.alone([&] {
        ran.emplace(command({tool, "--gpu-reset", "-i", task.gpu.text}, place_.access.root, false, deadline));
      });
      if (!ran->ok()) return std::move(*ran).error();
      const auto& its = **ran;
      if (its.late)
        return Error(Errc::timeout,
                     fmt::format("nvidia-smi --gpu-reset gave no answer in {} s", deadline / 1000));
      if (!WIFEXITED(its.status) || WEXITSTATUS(its.status) != 0)
        return Error(Errc::in_use, "nvidia-smi --gpu-reset: " + lines_of(its.output));
      task.said.push_back(lines_of(its.output));
      break;
    }

    case Act::rescan: {
      spec::NodeFile node;
      node.devices.push_back({.pci = {task.pci}, .purpose = spec::DevicePurpose::host, .vfs = {}, .line = 1});
      auto how = options;
      how.access.only.clear();
      how.plan.rescan = true;
      BH_CHECK(alone([&] { return execute::apply(how, node, spec::to_yaml(node)); }));
      task.said.push_back(task.pci.str() + " was taken off the bus and found again");
      break;
    }

    case Act::restart_fabric_manager: {
      const auto unit = fabric_unit(place_.node_file);
      BH_TRY(const auto systemd, systemd::Systemd::connect(place_.access.root));
      BH_CHECK(systemd->stop(unit, deadline));
      BH_CHECK(systemd->start(unit, deadline));
      // The unit is up before its GPUs are registered, and a program that starts between ends with CUDA's
      // 802.
      const std::uint64_t until = monotonic_ns() + std::uint64_t{deadline} * 1'000'000;
      while (true) {
        std::optional<Result<inventory::Host>> host;
        control_.alone([&] { host.emplace(observe::host(place_.access)); });
        if (!host->ok()) return std::move(*host).error();
        std::vector<std::string> missing;
        for (const auto& gpu : (*host)->gpus)
          if (fabric_.contains(gpu.uuid.text) && gpu.nvlink.fabric_state.value_or("") != "completed")
            missing.push_back(
                fmt::format("gpu {} ({})", gpu.index, gpu.nvlink.fabric_state.value_or("unknown")));
        if (missing.empty()) break;
        if (ending()) return ok_status();
        if (monotonic_ns() > until)
          return Error(Errc::timeout, fmt::format("{} was restarted, but not registered with the fabric: {}",
                                                  unit, join(missing, ", ")));
        pause(500);
      }
      task.said.push_back(fmt::format("{} was restarted; {} GPUs are on the fabric", unit, fabric_.size()));
      return ok_status();
    }
  }
  // A GPU that came back new: its layout, limits and clocks as the node file has them.
  if (const auto node = node_of(place_.node_file)) {
    BH_CHECK(alone([&] {
      return execute::alter(options, [&](const inventory::Host& host, const plan::Remembered&) {
        return word_on(*node, task.gpu, host);
      });
    }));
  }
  return ok_status();
}

Status Healer::check(Task& task) {
  std::string cuda = "libcuda.so.1";
  const std::filesystem::path nvml = place_.access.nvml_library;
  if (nvml.has_parent_path() && std::filesystem::exists(nvml.parent_path() / cuda))
    cuda = (nvml.parent_path() / cuda).string();
  const auto ask = [&](std::vector<std::string> more) -> Result<Json> {
    std::vector<std::string> words{place_.program.string(), "--root", place_.access.root.string()};
    if (!place_.access.nvml_library.empty()) {
      words.emplace_back("--nvml");
      words.push_back(place_.access.nvml_library);
    }
    words.emplace_back("check-gpu");
    words.insert(words.end(), more.begin(), more.end());
    std::optional<Result<Ran>> ran;
    control_.alone([&] { ran.emplace(command(words, place_.access.root, true, place_.check_ms)); });
    if (!ran->ok()) return std::move(*ran).error();
    if ((*ran)->late) return Error(Errc::timeout, fmt::format("no answer in {} s", place_.check_ms / 1000));
    auto json = parse_json((*ran)->output);
    if (!json.ok() || !json->is_object() || !json->contains("ok") || !(*json)["ok"].is_boolean() ||
        !json->contains("said") || !(*json)["said"].is_array())
      return Error(Errc::io, "the check ended without a verdict: " + lines_of((*ran)->output));
    return json;
  };
  const auto take = [&](const Json& json) -> Status {
    std::vector<std::string> said;
    for (const auto& one : json["said"])
      if (one.is_string()) said.push_back(printable(one.get<std::string>(), 300));
    if (!json["ok"].get<bool>()) return Error(Errc::conflict, join(said, "; "));
    task.said.insert(task.said.end(), said.begin(), said.end());
    return ok_status();
  };
  BH_TRY(const auto health, ask({"--gpu", task.gpu.text}));
  BH_CHECK(take(health));
  if (!health.contains("devices") || !health["devices"].is_array()) return ok_status();
  for (const auto& device : health["devices"]) {
    if (!device.is_string()) continue;
    // A neighbour's slice is not ours to compute on.
    const auto now = control_.now();
    const bool taken = std::any_of(now->leases.begin(), now->leases.end(), [&](const auto& one) {
      return !lease::over(one.second->state) &&
             std::any_of(one.second->parts.begin(), one.second->parts.end(), [&](const lease::Part& part) {
               return part.device.text == device.template get<std::string>();
             });
    });
    if (taken) continue;
    BH_TRY(const auto computed, ask({"--device", device.get<std::string>(), "--cuda", cuda}));
    BH_CHECK(take(computed));
  }
  return ok_status();
}

Status Healer::open(const Task& task) {
  if (row_of(task.act).reach >= Reach::fabric) {
    if (!task.ours) return ok_status();
    return answered<bool>([&](auto then) { control_.drain(caller(), false, std::move(then)); });
  }
  const auto now = control_.now();
  const auto* gpu = find(*now, task.gpu);
  if (gpu == nullptr) return Error(Errc::gone, "the host has no such GPU any more");
  if (!gpu->cordon || !is_ours(gpu->cordon)) return ok_status();
  return answered<control::PoolGpu>(
      [&](auto then) { control_.uncordon(caller(), task.gpu, std::move(then)); });
}

std::string fabric_unit(const std::filesystem::path& node_file) {
  if (const auto node = node_of(node_file); node && node->host.fabric_manager)
    return node->host.fabric_manager->unit;
  return "nvidia-fabricmanager.service";
}

}  // namespace bulkhead::heal
