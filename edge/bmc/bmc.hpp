// The host's baseboard management controller (BMC), asked in band through the kernel's /dev/ipmi0: which
// sensors it has (its repository of sensor data records) and what they read. Fans, inlet air, rails and
// supplies are seen nowhere else. Thin: it sends the IPMI 2.0 commands that only read, and turns raw bytes
// into units.
//
// A BMC is slow (milliseconds a command) and sometimes deaf. Every wait ends at a deadline, every count is
// bounded, and what a single sensor cannot tell says why.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "base/reading.hpp"
#include "base/result.hpp"

namespace bulkhead::bmc {

using Octets = std::vector<std::uint8_t>;

// ---- one command

struct Request {
  std::uint8_t function = 0;  // network function: 0x04 sensors, 0x06 application, 0x0a storage
  std::uint8_t command = 0;
  Octets data = {};
  // Who is asked: the BMC itself, or a satellite controller behind it on the given channel of its bus.
  std::uint8_t owner = 0x20, channel = 0, lun = 0;
};

// Sends a request and returns the answer without its completion code. `until_ns` is a monotonic_ns(). An
// answer that is a refusal is an Error whose native() is the completion code: unsupported (0xc1: no such
// command), not_found (0xcb: no such sensor or record), conflict (0xc5: reservation lost), no_capacity (0xca,
// 0xc7, 0xc8: cannot return so many bytes), unavailable (the rest). Errc::timeout: no answer. Errc::gone: the
// driver lost its BMC.
using Ask = std::function<Result<Octets>(const Request&, std::uint64_t until_ns)>;

// /dev/ipmi0, open. Answers to commands that were given up are recognised and dropped.
class Channel {
 public:
  // Errc::unavailable: no such node (hint: the modules to load). Errc::permission.
  static Result<Channel> open(const std::filesystem::path& device = "/dev/ipmi0");
  Result<Octets> ask(const Request& request, std::uint64_t until_ns);

 private:
  explicit Channel(UniqueFd fd) : fd_(std::move(fd)) {}
  UniqueFd fd_;
  long next_ = 1;
};

// ---- the repository

struct Thresholds {  // in the sensor's unit; empty: the sensor has none
  std::optional<double> upper_non_recoverable = {}, upper_critical = {}, upper_non_critical = {};
  std::optional<double> lower_non_critical = {}, lower_critical = {}, lower_non_recoverable = {};
};

// How a raw octet becomes a value: y = L((m x + b 10^b_exponent) 10^r_exponent).
struct Conversion {
  enum class Format : std::uint8_t { binary, ones_complement, twos_complement, none };
  Format format = Format::none;  // none: the sensor has states, not values
  std::uint8_t linearisation =
      0;  // 0 none, 1 ln ... 11 cube root; 0x70 and more: factors are asked for each value
  int m = 0, b = 0, b_exponent = 0, r_exponent = 0;
};
// nullopt: the result is no number (the logarithm of nothing, one over nothing).
std::optional<double> convert(const Conversion& conversion, std::uint8_t raw);

struct Record {  // one sensor of a record; a compact record may stand for several
  std::uint16_t id = 0;
  std::string name = {};  // printable
  std::uint8_t number = 0, owner = 0x20, channel = 0, lun = 0;
  std::uint8_t entity = 0, instance = 0;
  std::uint8_t type = 0;  // IPMI 2.0, table 42-3: 1 temperature, 2 voltage, 3 current, 4 fan, 8 power supply
  std::uint8_t event_type = 0;  // 1: thresholds
  bool full = false;            // a full record; a compact one has no conversion
  std::string unit = {};        // "degrees C", "RPM", "Volts"; "% " in front of a percentage
  Conversion conversion = {};
  std::uint8_t readable_thresholds = 0;  // bit 0 lower non-critical ... bit 5 upper non-recoverable
  std::uint8_t thresholds[6] = {};       // raw, in the order of those bits
};
// One record as it came, header and all. Other kinds of record (locators, FRU) are no sensors: an empty
// answer. Errc::corrupt: shorter than its kind, or than its own length says.
Result<std::vector<Record>> parse_record(const Octets& octets);

struct Controller {
  std::uint32_t manufacturer = 0;  // IANA enterprise number
  std::uint16_t product = 0;
  std::string firmware = {}, ipmi = {};  // "2.5", "2.0"
  bool has_repository = false, has_device_records = false;
};

struct Repository {
  Controller controller = {};
  std::vector<Record> records = {};
  std::vector<std::string> notes = {};  // records that could not be read, and why
};

// ---- what is read

struct Sensor {
  std::string name = {};
  std::uint8_t number = 0, type = 0;
  std::string kind = {};  // "temperature", "fan", ...
  std::string unit = {};
  Reading<double> value = {};
  std::uint16_t states = 0;  // as the BMC tells them: threshold comparisons or discrete states
  Thresholds thresholds = {};
  bool thresholds_from_record = false;  // the BMC does not tell them; these are what it was delivered with
};

struct Report {
  Controller controller = {};
  std::vector<Sensor> sensors = {};  // in the repository's order; a sensor with a full record appears once
  std::vector<std::string> notes = {};
};

// The walk through the repository. At most 2048 records; a repository that changes meanwhile is begun again,
// three times; one that goes in circles is Errc::corrupt.
Result<Repository> repository(const Ask& ask, std::uint64_t until_ns);
// What the sensors of a repository read now. Never fails as a whole: each sensor says why it has no value.
Report readings(const Ask& ask, const Repository& repository, std::uint64_t until_ns);

struct Access {
  std::filesystem::path device = "/dev/ipmi0";
  unsigned timeout_ms = 30'000;  // for all of it; a large server takes 10 s
};
// Opens, walks and reads on a thread of its own, because a driver that waits for a dead BMC can hold open(2)
// itself. Errc::timeout says what it was doing; the thread stays behind.
Result<Report> read(const Access& access = {});

}  // namespace bulkhead::bmc
