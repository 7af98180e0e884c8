#include <algorithm>
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

namespace {

// Builds the value as nlohmann's own reader does, but for three things: a key that is there twice is an
// error, for two readers would take two different values; depth is bounded while it is read; and an object of
// n keys costs n log n. Their ordered object looks for each new key among all before it: a body of one
// mebibyte with 100,000 keys took 18 seconds.
class Builder final : public nlohmann::json_sax<Json> {
 public:
  explicit Builder(std::size_t depth) : depth_(depth) {}

  std::string mistake = {};
  Json value = {};

  bool null() override { return put(nullptr); }
  bool boolean(bool val) override { return put(val); }
  bool number_integer(number_integer_t val) override { return put(val); }
  bool number_unsigned(number_unsigned_t val) override { return put(val); }
  bool number_float(number_float_t val, const string_t&) override { return put(val); }
  bool string(string_t& val) override { return put(std::move(val)); }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool key(string_t& val) override {
    open_.back().key = std::move(val);
    return true;
  }
  bool end_object() override {
    const auto& object = open_.back().value.get_ref<const Json::object_t&>();
    keys_.clear();
    for (const auto& [name, item] : object) keys_.push_back(name);
    std::sort(keys_.begin(), keys_.end());
    if (const auto twice = std::adjacent_find(keys_.begin(), keys_.end()); twice != keys_.end()) {
      mistake =
          fmt::format("not valid JSON: the key '{}' is there twice in one object", printable(*twice, 64));
      return false;
    }
    return close();
  }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_array() override { return close(); }
  bool parse_error(std::size_t position, const std::string&, const Json::exception&) override {
    mistake = fmt::format("not valid JSON (at byte {})", position);
    return false;
  }

 private:
  struct Open {
    Json value = {};
    std::string key = {};  // of the value that comes next
  };

  bool put(Json item) {
    if (open_.empty()) {
      value = std::move(item);
    } else if (Open& in = open_.back(); in.value.is_array()) {
      in.value.get_ref<Json::array_t&>().push_back(std::move(item));
    } else {
      using Pairs = std::vector<std::pair<const std::string, Json>>;
      static_cast<Pairs&>(in.value.get_ref<Json::object_t&>())
          .emplace_back(std::move(in.key), std::move(item));
    }
    return true;
  }
  bool open(Json container) {
    if (open_.size() >= depth_) {
      mistake = fmt::format("JSON nested deeper than {} levels", depth_);
      return false;
    }
    open_.push_back({std::move(container), {}});
    return true;
  }
  bool close() {
    Json whole = std::move(open_.back().value);
    open_.pop_back();
    return put(std::move(whole));
  }

  const std::size_t depth_;
  std::vector<Open> open_ = {};
  std::vector<std::string_view> keys_ = {};
};

}  // namespace

Result<Json> parse_json(std::string_view text, std::size_t depth) {
  // The library takes a NUL for the end and never looks behind it; JSON has none, in strings neither.
  if (const auto nul = text.find('\0'); nul != std::string_view::npos)
    return Error(Errc::invalid, fmt::format("not valid JSON (at byte {}): a NUL byte", nul + 1));
  Builder builder(depth);
  if (!Json::sax_parse(text, &builder)) return Error(Errc::invalid, std::move(builder.mistake));
  return std::move(builder.value);
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
