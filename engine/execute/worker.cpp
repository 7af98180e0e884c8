#include "engine/execute/worker.hpp"

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"

namespace bulkhead::execute {

namespace {

constexpr std::uint32_t message_bytes = 16U << 20U;  // far above any file a node file can ask for

Status send(int fd, const Json& message) {
  const std::string text = message.dump(-1, ' ', false, Json::error_handler_t::replace);
  const auto size = static_cast<std::uint32_t>(text.size());
  std::string frame(sizeof size, '\0');
  std::memcpy(frame.data(), &size, sizeof size);
  frame += text;
  std::string_view rest = frame;
  while (!rest.empty()) {
    const ssize_t put = ::send(fd, rest.data(), rest.size(), MSG_NOSIGNAL);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return errno_error("speak to the worker", errno);
    rest.remove_prefix(static_cast<std::size_t>(put));
  }
  return ok_status();
}

// Errc::gone: the other side ended. Errc::timeout. deadline 0: none.
Status receive_bytes(int fd, char* into, std::size_t size, std::uint64_t deadline) {
  while (size > 0) {
    int wait = -1;
    if (deadline != 0) {
      const std::uint64_t now = monotonic_ns();
      if (now >= deadline) return Error(Errc::timeout, "no answer");
      wait = static_cast<int>(std::min<std::uint64_t>((deadline - now) / 1'000'000 + 1, 1'000'000));
    }
    pollfd poll_fd = {fd, POLLIN, 0};
    const int ready = ::poll(&poll_fd, 1, wait);
    if (ready < 0 && errno != EINTR) return errno_error("hear the worker", errno);
    if (ready <= 0) continue;
    const ssize_t got = ::recv(fd, into, size, 0);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got <= 0) return Error(Errc::gone, "the worker ended");
    into += got;
    size -= static_cast<std::size_t>(got);
  }
  return ok_status();
}

Result<Json> receive(int fd, std::uint64_t deadline) {
  std::uint32_t size = 0;
  BH_CHECK(receive_bytes(fd, reinterpret_cast<char*>(&size), sizeof size, deadline));
  if (size > message_bytes) return Error(Errc::corrupt, "the worker spoke nonsense");
  std::string text(size, '\0');
  BH_CHECK(receive_bytes(fd, text.data(), size, deadline));
  return parse_json(text);
}

Json json_of(const Error& error) {
  return {{"code", static_cast<int>(error.code())},
          {"message", error.message()},
          {"hint", error.hint()},
          {"native", error.native()}};
}
Error error_of(const Json& json) {
  return Error(static_cast<Errc>(json.value("code", 0)), json.value("message", ""), json.value("hint", ""),
               json.value("native", 0));
}
Json json_of(const Sight& sight) {
  Json json = {{"seen", static_cast<int>(sight.seen)}, {"words", sight.words}, {"note", sight.note}};
  if (sight.gpu_instance) json["gpu_instance"] = *sight.gpu_instance;
  return json;
}
Sight sight_of(const Json& json) {
  Sight sight{.seen = static_cast<Seen>(json.value("seen", 0)),
              .words = json.value("words", ""),
              .note = json.value("note", "")};
  if (json.contains("gpu_instance")) sight.gpu_instance = json["gpu_instance"].get<unsigned>();
  return sight;
}

void look(Hands& hands, const plan::Action& action, const Json& detail, Json& reply) {
  if (const auto sight = hands.inspect(action, detail); sight.ok()) {
    reply["sight"] = json_of(*sight);
  } else {
    reply["blind"] = json_of(sight.error());
  }
}

Json serve(Hands& hands, const Json& request) {
  const std::string what = request.value("do", "");
  Json reply = Json::object();
  if (what == "evict") {
    const inventory::Holder holder{.pid = request.value("pid", 0),
                                   .start_time = request.value("start_time", std::uint64_t{0}),
                                   .name = request.value("name", "")};
    if (const Status status = hands.evict(holder, request.value("grace_ms", 0U)); !status.ok())
      reply["error"] = json_of(status.error());
    return reply;
  }
  const auto action = plan::action_from_json(request.at("action"));
  if (!action.ok()) return {{"error", json_of(action.error())}};
  const Json detail = request.value("detail", Json::object());
  if (what == "prepare") {
    auto prepared = hands.prepare(*action);
    if (prepared.ok()) {
      reply["detail"] = std::move(*prepared);
    } else {
      reply["error"] = json_of(prepared.error());
    }
    return reply;
  }
  if (what == "act") {
    if (const Status status = hands.act(*action, detail); !status.ok())
      reply["error"] = json_of(status.error());
  }
  look(hands, *action, detail, reply);
  return reply;
}

// The child. It keeps standard error, its socket and the lock; it must not touch the parent's journal, whose
// file descriptors it closes (SQLite's locks belong to the process that took them, so closing here drops
// none).
[[noreturn]] void work(const observe::Access& access, int socket, int lock_fd, pid_t parent) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(0);
  ::prctl(PR_SET_NAME, "bulkhead-worker");
  ::signal(SIGINT, SIG_IGN);  // Ctrl-C is for the parent, which lets the step at hand end
  ::signal(SIGTERM, SIG_IGN);
  std::vector<unsigned> keep = {0, 1, 2, static_cast<unsigned>(socket), static_cast<unsigned>(lock_fd)};
  std::sort(keep.begin(), keep.end());
  for (std::size_t i = 0; i < keep.size(); ++i) {
    const unsigned first = keep[i] + 1;
    const unsigned last = i + 1 < keep.size() ? keep[i + 1] - 1 : ~0U;
    if (first <= last) ::syscall(SYS_close_range, first, last, 0U);
  }
  Hands hands(access);
  while (true) {
    const auto request = receive(socket, 0);
    if (!request.ok()) break;
    Json reply = serve(hands, *request);
    reply["driver_calls"] = hands.driver_calls();
    if (!send(socket, reply).ok()) break;
  }
  ::_exit(0);
}

}  // namespace

Worker::~Worker() { end(); }

Status Worker::start() {
  if (pid_ != 0) return ok_status();
  if (abandoned_ != 0 && ::waitpid(abandoned_, nullptr, WNOHANG) == 0) {
    return Error(Errc::timeout,
                 fmt::format("worker {} still hangs in the kernel and cannot be killed", abandoned_),
                 fmt::format("see where: cat /proc/{}/stack; when it has ended: bulkhead apply", abandoned_));
  }
  abandoned_ = 0;
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
    return errno_error("start the worker", errno);
  socket_.reset(ends[0]);
  const UniqueFd theirs(ends[1]);
  const pid_t parent = ::getpid();
  const pid_t child = ::fork();
  if (child < 0) return errno_error("start the worker", errno);
  if (child == 0) work(access_, theirs.get(), lock_.fd(), parent);
  pid_ = child;
  return lock_.name_worker(child);
}

void Worker::end() {
  calls_ += std::exchange(calls_now_, 0);
  socket_.reset();
  if (pid_ == 0) return;
  const pid_t pid = std::exchange(pid_, 0);
  ::kill(pid, SIGKILL);  // idle it has nothing to lose; hung it is given up
  for (int i = 0; i < 200; ++i) {
    const pid_t gone = ::waitpid(pid, nullptr, WNOHANG);
    if (gone == pid || (gone < 0 && errno != EINTR)) return;
    ::usleep(10'000);
  }
  abandoned_ = pid;
}

Result<Json> Worker::ask(const Json& request, const std::string& what, unsigned deadline_ms) {
  BH_CHECK(start());
  const std::uint64_t deadline = monotonic_ns() + std::uint64_t{deadline_ms} * 1'000'000;
  Status sent = send(socket_.get(), request);
  Result<Json> reply = sent.ok() ? receive(socket_.get(), deadline) : Result<Json>(std::move(sent).error());
  if (reply.ok()) {
    calls_now_ = reply->value("driver_calls", std::uint64_t{0});
    return reply;
  }
  const pid_t pid = pid_;
  const bool hung = reply.error().code() == Errc::timeout;
  end();
  if (!hung) return Error(Errc::gone, fmt::format("{}: the worker (pid {}) died", what, pid));
  std::string message =
      fmt::format("{}: no answer after {:.1f} s", what, static_cast<double>(deadline_ms) / 1000);
  if (abandoned_ != 0) {
    message +=
        fmt::format("; worker {} hangs in the kernel and cannot be killed, it keeps the lock", abandoned_);
    return Error(
        Errc::timeout, message,
        fmt::format("see where: cat /proc/{}/stack\nwhen it has ended, or after a reboot: bulkhead apply",
                    abandoned_));
  }
  return Error(
      Errc::timeout, message + "; the worker was killed",
      "look at the driver: dmesg | grep -i -e xid -e nvrm\nto allow more time: --step-timeout SECONDS");
}

Result<Json> Worker::prepare(const plan::Action& action, unsigned deadline_ms) {
  // Only these need the host's own words; the others are not worth a message.
  if (!std::holds_alternative<plan::SetGovernor>(action) && !std::holds_alternative<plan::SetFile>(action))
    return Json::object();
  BH_TRY(const Json reply,
         ask({{"do", "prepare"}, {"action", plan::to_json(action)}}, "prepare", deadline_ms));
  if (reply.contains("error")) return error_of(reply["error"]);
  return reply.value("detail", Json::object());
}

Worker::Done Worker::act(const plan::Action& action, const Json& detail, unsigned deadline_ms) {
  Done done;
  const Json request = {{"do", "act"}, {"action", plan::to_json(action)}, {"detail", detail}};
  const auto reply = ask(request, std::string(plan::kind_of(action)), deadline_ms);
  if (!reply.ok()) {
    done.failed = reply.error();
    if (auto sight = inspect(action, detail, deadline_ms); sight.ok()) {
      done.sight = std::move(*sight);
    } else {
      done.blind = sight.error().message();
    }
    return done;
  }
  if (reply->contains("error")) done.failed = error_of((*reply)["error"]);
  if (reply->contains("sight")) done.sight = sight_of((*reply)["sight"]);
  if (reply->contains("blind")) done.blind = error_of((*reply)["blind"]).message();
  return done;
}

Result<Sight> Worker::inspect(const plan::Action& action, const Json& detail, unsigned deadline_ms) {
  BH_TRY(const Json reply, ask({{"do", "inspect"}, {"action", plan::to_json(action)}, {"detail", detail}},
                               fmt::format("read back {}", plan::kind_of(action)), deadline_ms));
  if (reply.contains("error")) return error_of(reply["error"]);
  if (reply.contains("blind")) return error_of(reply["blind"]);
  return sight_of(reply.value("sight", Json::object()));
}

Status Worker::evict(const inventory::Holder& holder, unsigned grace_ms) {
  const Json request = {{"do", "evict"},
                        {"pid", holder.pid},
                        {"start_time", holder.start_time},
                        {"name", holder.name},
                        {"grace_ms", grace_ms}};
  BH_TRY(const Json reply, ask(request, fmt::format("end pid {}", holder.pid), grace_ms + 5'000));
  if (reply.contains("error")) return error_of(reply["error"]);
  return ok_status();
}

}  // namespace bulkhead::execute
