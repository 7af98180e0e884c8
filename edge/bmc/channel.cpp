// /dev/ipmi0: the kernel's message interface (linux/ipmi.h), and reading it all with a deadline.
#include <fcntl.h>
#include <fmt/format.h>
#include <linux/ipmi.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "base/clock.hpp"
#include "edge/bmc/bmc.hpp"

namespace bulkhead::bmc {
namespace {

constexpr std::uint64_t ns_in_ms = 1'000'000;
// One command of a healthy BMC takes at most some hundred milliseconds; the kernel's own patience is twenty
// seconds.
constexpr std::uint64_t command_ns = 5'000 * ns_in_ms;

Error refusal(std::uint8_t completion) {
  const auto made = [&](Errc code, std::string_view words) {
    return Error(code, fmt::format("the BMC refuses: {} (completion code 0x{:02x})", words, completion), {},
                 completion);
  };
  switch (completion) {
    case 0xc0:
      return made(Errc::unavailable, "busy");
    case 0xc1:
    case 0xc2:
      return made(Errc::unsupported, "no such command");
    case 0xc3:
      return made(Errc::timeout, "it timed out itself");
    case 0xc5:
      return made(Errc::conflict, "reservation lost");
    case 0xc7:
    case 0xc8:
    case 0xca:
      return made(Errc::no_capacity, "cannot return so many octets");
    case 0xcb:
      return made(Errc::not_found, "no such sensor or record");
    case 0xcd:
      return made(Errc::unsupported, "not for this sensor");
    case 0xd4:
      return made(Errc::permission, "not allowed");
    default:
      return made(Errc::unavailable, "no further word");
  }
}

struct Address {
  ipmi_system_interface_addr own{};
  ipmi_ipmb_addr bus{};
  unsigned char* of(const Request& r, unsigned& length) {
    if (r.owner == 0x20) {
      own.addr_type = IPMI_SYSTEM_INTERFACE_ADDR_TYPE;
      own.channel = IPMI_BMC_CHANNEL;
      own.lun = r.lun;
      length = sizeof own;
      return reinterpret_cast<unsigned char*>(&own);
    }
    bus.addr_type = IPMI_IPMB_ADDR_TYPE;
    bus.channel = r.channel;
    bus.slave_addr = r.owner;
    bus.lun = r.lun;
    length = sizeof bus;
    return reinterpret_cast<unsigned char*>(&bus);
  }
};

}  // namespace

Result<Channel> Channel::open(const std::filesystem::path& device) {
  UniqueFd fd(::open(device.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!fd) {
    const int err = errno;
    if (err == ENOENT || err == ENXIO || err == ENODEV) {
      return Error(Errc::unavailable, fmt::format("open {}: no BMC driver is there", device.string()),
                   "modprobe -a ipmi_si ipmi_devintf", err);
    }
    return errno_error(fmt::format("open {}", device.string()), err);
  }
  // Asked again by the kernel once, not four times: the deadline is ours.
  ipmi_timing_parms timing{.retries = 1, .retry_time_ms = 1000};
  if (::ioctl(fd.get(), IPMICTL_SET_TIMING_PARMS_CMD, &timing) != 0 && errno == ENOTTY) {
    return Error(Errc::unsupported, fmt::format("{} is no IPMI device", device.string()), {}, ENOTTY);
  }
  return Channel(std::move(fd));
}

Result<Octets> Channel::ask(const Request& request, std::uint64_t until_ns) {
  if (request.data.size() > IPMI_MAX_MSG_LENGTH)
    return Error(Errc::invalid, "a request longer than IPMI allows");
  const std::uint64_t end = std::min(until_ns, monotonic_ns() + command_ns);
  if (monotonic_ns() >= end) return Error(Errc::timeout, "not asked: no time left");
  Octets data = request.data;
  Address address;
  ipmi_req sent{};
  sent.addr = address.of(request, sent.addr_len);
  sent.msgid = next_++;
  sent.msg.netfn = request.function;
  sent.msg.cmd = request.command;
  sent.msg.data = data.data();
  sent.msg.data_len = static_cast<unsigned short>(data.size());
  if (::ioctl(fd_.get(), IPMICTL_SEND_COMMAND, &sent) != 0) {
    const int err = errno;
    // The kernel says ENODEV, later EIO, when its driver was taken away.
    if (err == ENODEV || err == ESHUTDOWN) return Error(Errc::gone, "the kernel lost its BMC", {}, err);
    return errno_error("send to the BMC", err);
  }
  for (;;) {
    const std::uint64_t now = monotonic_ns();
    if (now >= end) {
      return Error(Errc::timeout,
                   fmt::format("no answer to command 0x{:02x}/0x{:02x}", request.function, request.command));
    }
    pollfd waiting{.fd = fd_.get(), .events = POLLIN, .revents = 0};
    const int ready =
        ::poll(&waiting, 1, static_cast<int>(std::min<std::uint64_t>((end - now) / ns_in_ms + 1, 60'000)));
    if (ready < 0 && errno != EINTR) return errno_error("wait for the BMC", errno);
    if (ready <= 0) continue;
    if ((waiting.revents & (POLLERR | POLLHUP)) != 0 && (waiting.revents & POLLIN) == 0)
      return Error(Errc::gone, "the kernel lost its BMC");
    ipmi_addr from{};
    Octets answer(IPMI_MAX_MSG_LENGTH);
    ipmi_recv received{};
    received.addr = reinterpret_cast<unsigned char*>(&from);
    received.addr_len = sizeof from;
    received.msg.data = answer.data();
    received.msg.data_len = static_cast<unsigned short>(answer.size());
    if (::ioctl(fd_.get(), IPMICTL_RECEIVE_MSG_TRUNC, &received) != 0) {
      if (errno == EAGAIN || errno == EINTR) continue;
      if (errno != EMSGSIZE) return errno_error("receive from the BMC", errno);
    }
    // Events, commands for us, and answers to what was given up are not what is waited for.
    if (received.recv_type != IPMI_RESPONSE_RECV_TYPE || received.msgid != sent.msgid) continue;
    answer.resize(std::min<std::size_t>(received.msg.data_len, answer.size()));
    if (answer.empty()) return Error(Errc::corrupt, "the BMC answers without a completion code");
    if (answer[0] != 0) return refusal(answer[0]);
    answer.erase(answer.begin());
    return answer;
  }
}

Result<Report> read(const Access& access) {
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    std::string doing = "open";
    std::optional<Result<Report>> report;
  };
  const auto shared = std::make_shared<Shared>();
  const std::uint64_t until = monotonic_ns() + access.timeout_ms * ns_in_ms;
  const auto work = [shared, until, device = access.device] {
    const auto doing = [&](std::string what) {
      const std::lock_guard lock(shared->mutex);
      shared->doing = std::move(what);
    };
    const auto all = [&]() -> Result<Report> {
      BH_TRY(auto channel, Channel::open(device));
      const Ask ask = [&](const Request& request, std::uint64_t end) {
        doing(fmt::format("command 0x{:02x}/0x{:02x}", request.function, request.command));
        return channel.ask(request, end);
      };
      BH_TRY(const auto known, repository(ask, until));
      auto report = readings(ask, known, until);
      doing("close");
      return report;
    };
    auto result = all();
    const std::lock_guard lock(shared->mutex);
    shared->report = std::move(result);
    shared->changed.notify_all();
  };
  try {
    std::thread(work).detach();
  } catch (const std::system_error& e) {
    return Error(Errc::unavailable, fmt::format("start a thread: {}", e.what()));
  }
  std::unique_lock lock(shared->mutex);
  // What sees its deadline by itself gets a moment to say so.
  const auto patience = std::chrono::milliseconds(access.timeout_ms + 500);
  if (!shared->changed.wait_for(lock, patience, [&] { return shared->report.has_value(); })) {
    return Error(Errc::timeout,
                 fmt::format("{}: the BMC's driver hangs in {}", access.device.string(), shared->doing));
  }
  return std::move(*shared->report);
}

}  // namespace bulkhead::bmc
