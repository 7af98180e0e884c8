// The walk through a BMC's records, and the readings of its sensors.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <set>

#include "base/clock.hpp"
#include "edge/bmc/bmc.hpp"

namespace bulkhead::bmc {
namespace {

constexpr std::uint8_t sensor_function = 0x04, app_function = 0x06, storage_function = 0x0a;
constexpr std::size_t most_records = 2048, most_restarts = 3;
constexpr std::uint16_t last_record = 0xffff;
// Larger pieces are fewer commands; 32 octets with their header fit the least interface that is in use.
constexpr std::size_t first_piece = 32, least_piece = 4, header_octets = 5;

Error short_answer(std::string_view what) {
  return Error(Errc::corrupt, fmt::format("{}: a short answer", what));
}

std::uint16_t word(const Octets& octets, std::size_t at) {
  return static_cast<std::uint16_t>(octets[at] | octets[at + 1] << 8U);
}

Result<Controller> controller(const Ask& ask, std::uint64_t until_ns) {
  BH_TRY(const auto answer, ask({.function = app_function, .command = 0x01}, until_ns));
  if (answer.size() < 11) return short_answer("get device id");
  Controller c;
  c.firmware = fmt::format("{}.{:02x}", answer[2] & 0x7fU, answer[3]);
  c.ipmi = fmt::format("{}.{}", answer[4] & 15U, answer[4] >> 4U);
  c.has_device_records = (answer[1] & 0x80U) != 0 || (answer[5] & 0x01U) != 0;
  c.has_repository = (answer[5] & 0x02U) != 0;
  c.manufacturer = static_cast<std::uint32_t>(answer[6] | answer[7] << 8U | (answer[8] & 0x0fU) << 16U);
  c.product = word(answer, 9);
  return c;
}

// Where records are kept: a repository for all controllers, or the controller's own.
struct Source {
  std::uint8_t function, reserve, get;
};
constexpr Source in_repository{storage_function, 0x22, 0x23}, in_device{sensor_function, 0x22, 0x21};

class Walk {
 public:
  Walk(const Ask& ask, Source source, std::uint64_t until_ns)
      : ask_(ask), source_(source), until_(until_ns) {}

  Status run(Repository& into) {
    for (std::size_t restart = 0;; ++restart) {
      auto ended = once(into);
      if (ended.ok() || ended.error().code() != Errc::conflict) return ended;
      if (restart == most_restarts) {
        return Error(Errc::conflict, fmt::format("the BMC's records changed {} times while they were read",
                                                 most_restarts + 1));
      }
      into.records.clear();
      into.notes.clear();
    }
  }

 private:
  Status once(Repository& into) {
    BH_CHECK(reserve());
    std::set<std::uint16_t> seen;
    std::uint16_t id = 0;  // the first, whatever its number
    while (id != last_record) {
      if (!seen.insert(id).second)
        return Error(Errc::corrupt, fmt::format("the BMC's records go in circles at {}", id));
      if (seen.size() > most_records)
        return Error(Errc::corrupt, fmt::format("the BMC has more than {} records", most_records));
      std::uint16_t next = last_record;
      auto got = record(id, next);
      // An empty repository has no first record.
      if (!got.ok() && seen.size() == 1 && got.error().code() == Errc::not_found) return ok_status();
      BH_TRY(const auto octets, std::move(got));
      auto sensors = parse_record(octets);
      if (sensors.ok()) {
        into.records.insert(into.records.end(), sensors->begin(), sensors->end());
      } else {
        into.notes.push_back(sensors.error().message());
      }
      // A record that names itself as the next would otherwise be asked for ever; 0 means "the first" and is
      // no successor.
      if (next == 0) return Error(Errc::corrupt, fmt::format("the BMC's records go in circles after {}", id));
      id = next;
    }
    return ok_status();
  }

  Status reserve() {
    reservation_ = 0;
    auto answer = ask_({.function = source_.function, .command = source_.reserve}, until_);
    if (!answer.ok()) {
      // A controller without reservations serves its records whole or in parts without one.
      if (answer.error().code() == Errc::unsupported) return ok_status();
      return std::move(answer).error().in("reserve the BMC's records");
    }
    if (answer->size() < 2) return short_answer("reserve the BMC's records");
    reservation_ = word(*answer, 0);
    return ok_status();
  }

  Result<Octets> part(std::uint16_t id, std::size_t offset, std::size_t count, std::uint16_t& next) {
    BH_TRY(auto answer,
           ask_({.function = source_.function,
                 .command = source_.get,
                 .data = {static_cast<std::uint8_t>(reservation_ & 0xffU),
                          static_cast<std::uint8_t>(reservation_ >> 8U),
                          static_cast<std::uint8_t>(id & 0xffU), static_cast<std::uint8_t>(id >> 8U),
                          static_cast<std::uint8_t>(offset), static_cast<std::uint8_t>(count)}},
                until_));
    if (answer.size() < 2) return short_answer(fmt::format("record {}", id));
    next = word(answer, 0);
    answer.erase(answer.begin(), answer.begin() + 2);
    // More than was asked for is not of this part.
    if (answer.size() > count) answer.resize(count);
    return answer;
  }

  Result<Octets> record(std::uint16_t id, std::uint16_t& next) {
    auto got = part(id, 0, header_octets, next);
    if (!got.ok()) return std::move(got).error().in(fmt::format("record {}", id));
    Octets whole = std::move(got).value();
    if (whole.size() < header_octets) return short_answer(fmt::format("header of record {}", id));
    const std::size_t length = header_octets + whole[4];
    std::uint16_t ignored = 0;
    while (whole.size() < length) {
      auto more = part(id, whole.size(), std::min(piece_, length - whole.size()), ignored);
      if (!more.ok()) {
        if (more.error().code() == Errc::no_capacity && piece_ > least_piece) {
          piece_ /= 2;  // kept for the records that follow
          continue;
        }
        return std::move(more).error().in(fmt::format("record {}", id));
      }
      if (more->empty()) return short_answer(fmt::format("record {}", id));
      whole.insert(whole.end(), more->begin(), more->end());
    }
    return whole;
  }

  const Ask& ask_;
  Source source_;
  std::uint64_t until_;
  std::uint16_t reservation_ = 0;
  std::size_t piece_ = first_piece;
};

// Table 42-3, as far as it is of interest; others say their number.
std::string kind_of(std::uint8_t type) {
  constexpr std::array<std::string_view, 0x2d> kinds = {"reserved",
                                                        "temperature",
                                                        "voltage",
                                                        "current",
                                                        "fan",
                                                        "physical security",
                                                        "platform security",
                                                        "processor",
                                                        "power supply",
                                                        "power unit",
                                                        "cooling device",
                                                        "other",
                                                        "memory",
                                                        "drive slot",
                                                        "memory resize",
                                                        "system firmware",
                                                        "event logging",
                                                        "watchdog 1",
                                                        "system event",
                                                        "critical interrupt",
                                                        "button",
                                                        "module",
                                                        "microcontroller",
                                                        "add-in card",
                                                        "chassis",
                                                        "chip set",
                                                        "other FRU",
                                                        "cable",
                                                        "terminator",
                                                        "boot initiated",
                                                        "boot error",
                                                        "OS boot",
                                                        "OS stop",
                                                        "slot",
                                                        "ACPI power state",
                                                        "watchdog 2",
                                                        "platform alert",
                                                        "entity presence",
                                                        "monitor chip",
                                                        "LAN",
                                                        "management subsystem",
                                                        "battery",
                                                        "session audit",
                                                        "version change",
                                                        "FRU state"};
  return type < kinds.size() ? std::string(kinds[type]) : fmt::format("type {}", type);
}

Request about(const Record& record, std::uint8_t command, Octets data) {
  return {.function = sensor_function,
          .command = command,
          .data = std::move(data),
          .owner = record.owner,
          .channel = record.channel,
          .lun = record.lun};
}

void name_threshold(Thresholds& into, std::size_t bit, double value) {
  std::optional<double>* const places[] = {&into.lower_non_critical,    &into.lower_critical,
                                           &into.lower_non_recoverable, &into.upper_non_critical,
                                           &into.upper_critical,        &into.upper_non_recoverable};
  *places[bit] = value;
}

void read_thresholds(const Ask& ask, const Record& record, const Conversion& conversion,
                     std::uint64_t until_ns, Sensor& into) {
  std::uint8_t mask = record.readable_thresholds;
  if (mask == 0 || conversion.format == Conversion::Format::none) return;
  std::array<std::uint8_t, 6> raw{};
  std::copy_n(record.thresholds, 6, raw.begin());
  into.thresholds_from_record = true;
  const auto answer = ask(about(record, 0x27, {record.number}), until_ns);
  if (answer.ok() && answer->size() >= 7) {
    mask = (*answer)[0] & 0x3fU;
    std::copy_n(answer->begin() + 1, 6, raw.begin());
    into.thresholds_from_record = false;
  }
  for (std::size_t bit = 0; bit < 6; ++bit) {
    if ((mask >> bit & 1U) == 0) continue;
    if (const auto value = convert(conversion, raw[bit])) name_threshold(into.thresholds, bit, *value);
  }
}

// Of a sensor whose curve is no formula the BMC tells the factors that hold at one reading.
Result<Conversion> factors_at(const Ask& ask, const Record& record, std::uint8_t raw,
                              std::uint64_t until_ns) {
  BH_TRY(const auto answer, ask(about(record, 0x23, {record.number, raw}), until_ns));
  if (answer.size() < 7) return short_answer("sensor reading factors");
  const auto ten = [](unsigned low, unsigned high) {
    const int value = static_cast<int>(low | (high & 0xc0U) << 2U);
    return value < 512 ? value : value - 1024;
  };
  const auto four = [](unsigned value) {
    return value < 8 ? static_cast<int>(value) : static_cast<int>(value) - 16;
  };
  Conversion c = record.conversion;
  c.m = ten(answer[1], answer[2]);
  c.b = ten(answer[3], answer[4]);
  c.r_exponent = four(answer[6] >> 4U);
  c.b_exponent = four(answer[6] & 15U);
  return c;
}

Sensor read_sensor(const Ask& ask, const Record& record, std::uint64_t until_ns) {
  Sensor s;
  s.name = record.name;
  s.number = record.number;
  s.type = record.type;
  s.kind = kind_of(record.type);
  s.unit = record.unit;
  const auto answer = ask(about(record, 0x2d, {record.number}), until_ns);
  Conversion conversion = record.conversion;
  if (!answer.ok()) {
    s.value = Reading<double>::missing(answer.error().message());
  } else if (answer->size() < 2) {
    s.value = Reading<double>::missing("a short answer");
  } else if (((*answer)[1] & 0x20U) != 0) {
    s.value = Reading<double>::missing("the BMC has no reading of it yet");
  } else if (((*answer)[1] & 0x40U) == 0) {
    s.value = Reading<double>::missing("the BMC does not scan it (the part is off or not there)");
  } else {
    if (answer->size() > 2) s.states = (*answer)[2];
    if (answer->size() > 3) s.states = static_cast<std::uint16_t>(s.states | ((*answer)[3] & 0x7fU) << 8U);
    if (!record.full || conversion.format == Conversion::Format::none) {
      s.value = Reading<double>::missing("it has states, not values");
    } else {
      if (conversion.linearisation >= 0x70) {
        auto factors = factors_at(ask, record, (*answer)[0], until_ns);
        if (!factors.ok()) {
          s.value = Reading<double>::missing(std::move(factors).error().in("its conversion").message());
          return s;
        }
        conversion = *factors;
      }
      const auto value = convert(conversion, (*answer)[0]);
      s.value = value ? Reading<double>(*value)
                      : Reading<double>::missing(fmt::format("raw {} converts to no number", (*answer)[0]));
    }
  }
  // A curve without a formula holds at its own point only.
  if (record.conversion.linearisation < 0x70) read_thresholds(ask, record, conversion, until_ns, s);
  return s;
}

}  // namespace

Result<Repository> repository(const Ask& ask, std::uint64_t until_ns) {
  Repository r;
  BH_TRY(r.controller, controller(ask, until_ns));
  if (!r.controller.has_repository && !r.controller.has_device_records) {
    return Error(Errc::unsupported, "the BMC keeps no sensor records");
  }
  BH_CHECK(Walk(ask, r.controller.has_repository ? in_repository : in_device, until_ns).run(r));
  return r;
}

Report readings(const Ask& ask, const Repository& repository, std::uint64_t until_ns) {
  Report report{.controller = repository.controller, .notes = repository.notes};
  // Some BMCs describe a sensor twice; the full record knows more.
  std::set<std::array<std::uint8_t, 4>> full;
  const auto key = [](const Record& r) { return std::array{r.owner, r.channel, r.lun, r.number}; };
  for (const auto& r : repository.records) {
    if (r.full) full.insert(key(r));
  }
  std::size_t deaf = 0;
  for (const auto& r : repository.records) {
    if (!r.full && full.count(key(r)) != 0) continue;
    Sensor s = read_sensor(ask, r, until_ns);
    if (monotonic_ns() >= until_ns && !s.value) ++deaf;
    report.sensors.push_back(std::move(s));
  }
  if (deaf != 0) report.notes.push_back(fmt::format("{} sensors were not read in the time there was", deaf));
  return report;
}

}  // namespace bulkhead::bmc
