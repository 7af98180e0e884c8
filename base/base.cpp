#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <ctime>

#include "base/check.hpp"
#include "base/clock.hpp"
#include "base/ids.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "base/text.hpp"

#include <fmt/format.h>

namespace bulkhead {

void assertion_failed(const char* expression, const char* file, int line) {
  std::fprintf(stderr, "bulkhead: internal error: %s at %s:%d (please report this)\n", expression, file,
               line);
  std::abort();
}

std::string_view name_of(Errc code) {
  switch (code) {
    case Errc::invalid:
      return "invalid";
    case Errc::not_found:
      return "not-found";
    case Errc::unsupported:
      return "unsupported";
    case Errc::in_use:
      return "in-use";
    case Errc::permission:
      return "permission";
    case Errc::no_capacity:
      return "no-capacity";
    case Errc::io:
      return "io";
    case Errc::timeout:
      return "timeout";
    case Errc::gone:
      return "gone";
    case Errc::conflict:
      return "conflict";
    case Errc::corrupt:
      return "corrupt";
    case Errc::unavailable:
      return "unavailable";
  }
  return "unknown";
}

namespace {
Errc code_of_errno(int err) {
  switch (err) {
    case ENOENT:
    case ENODEV:
    case ENXIO:
    case ENOTDIR:
      return Errc::not_found;
    case EACCES:
    case EPERM:
    case EROFS:
      return Errc::permission;
    case EBUSY:
    case ETXTBSY:
      return Errc::in_use;
    case ENOSPC:
    case EDQUOT:
    case ENOMEM:
      return Errc::no_capacity;
    case EINVAL:
    case ERANGE:
    case EFBIG:
      return Errc::invalid;
    case ETIMEDOUT:
      return Errc::timeout;
    case ENOSYS:
    case EOPNOTSUPP:
      return Errc::unsupported;
    default:
      return Errc::io;
  }
}
}  // namespace

Error errno_error(std::string_view what, int err) {
  return Error(code_of_errno(err), fmt::format("{}: {}", what, std::strerror(err)), {}, err);
}

Result<PciAddress> PciAddress::parse(std::string_view text) {
  const std::string shown = printable(text, 40);
  const auto bad = [&] {
    return Error(Errc::invalid, fmt::format("'{}' is not a PCI address", shown),
                 "write it like 0000:1b:00.0");
  };
  const auto parts = split(text, ':');
  if (parts.size() != 2 && parts.size() != 3) return bad();
  const auto tail = split(parts.back(), '.');
  if (tail.size() != 2) return bad();
  const auto domain = parts.size() == 3 ? parse_u64(parts[0], 16) : 0;
  const auto bus = parse_u64(parts[parts.size() - 2], 16);
  const auto device = parse_u64(tail[0], 16);
  const auto function = parse_u64(tail[1], 16);
  if (!domain || !bus || !device || !function) return bad();
  if (*domain > 0xffffffffU || *bus > 0xff || *device > 0x1f || *function > 7) return bad();
  return PciAddress{static_cast<std::uint32_t>(*domain), static_cast<std::uint8_t>(*bus),
                    static_cast<std::uint8_t>(*device), static_cast<std::uint8_t>(*function)};
}

std::string PciAddress::str() const {
  return fmt::format("{:04x}:{:02x}:{:02x}.{:x}", domain, bus, device, function);
}

Result<Json> parse_json(std::string_view text, std::size_t depth) {
  bool too_deep = false;
  Json value = Json::parse(
      text,
      [&](int at, Json::parse_event_t, Json&) {
        if (static_cast<std::size_t>(at) > depth) too_deep = true;
        return !too_deep;
      },
      false);
  if (too_deep) return Error(Errc::invalid, fmt::format("JSON nested deeper than {} levels", depth));
  if (value.is_discarded()) return Error(Errc::invalid, "not valid JSON");
  return value;
}

std::string dump(const Json& value) { return value.dump(2, ' ', false, Json::error_handler_t::replace); }

WallTime wall_now() {
  return std::chrono::time_point_cast<std::chrono::milliseconds>(std::chrono::system_clock::now());
}

std::string rfc3339(WallTime time) {
  const auto since_epoch = time.time_since_epoch().count();
  const std::time_t seconds = static_cast<std::time_t>(since_epoch / 1000);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z", utc.tm_year + 1900, utc.tm_mon + 1,
                     utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec, since_epoch % 1000);
}

std::uint64_t monotonic_ns() {
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                        std::chrono::steady_clock::now().time_since_epoch())
                                        .count());
}

}  // namespace bulkhead
