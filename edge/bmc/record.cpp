// Sensor data records (IPMI 2.0, chapter 43) and the arithmetic of chapter 36.
#include <array>
#include <cmath>
#include <span>

#include "base/text.hpp"
#include "edge/bmc/bmc.hpp"

namespace bulkhead::bmc {
namespace {

// Table 43-15; what comes later is "unit N".
constexpr std::array<std::string_view, 93> units = {"unspecified",
                                                    "degrees C",
                                                    "degrees F",
                                                    "degrees K",
                                                    "Volts",
                                                    "Amps",
                                                    "Watts",
                                                    "Joules",
                                                    "Coulombs",
                                                    "VA",
                                                    "Nits",
                                                    "lumen",
                                                    "lux",
                                                    "Candela",
                                                    "kPa",
                                                    "PSI",
                                                    "Newton",
                                                    "CFM",
                                                    "RPM",
                                                    "Hz",
                                                    "microsecond",
                                                    "millisecond",
                                                    "second",
                                                    "minute",
                                                    "hour",
                                                    "day",
                                                    "week",
                                                    "mil",
                                                    "inches",
                                                    "feet",
                                                    "cu in",
                                                    "cu feet",
                                                    "mm",
                                                    "cm",
                                                    "m",
                                                    "cu cm",
                                                    "cu m",
                                                    "liters",
                                                    "fluid ounce",
                                                    "radians",
                                                    "steradians",
                                                    "revolutions",
                                                    "cycles",
                                                    "gravities",
                                                    "ounce",
                                                    "pound",
                                                    "ft-lb",
                                                    "oz-in",
                                                    "gauss",
                                                    "gilberts",
                                                    "henry",
                                                    "millihenry",
                                                    "farad",
                                                    "microfarad",
                                                    "ohms",
                                                    "siemens",
                                                    "mole",
                                                    "becquerel",
                                                    "PPM",
                                                    "reserved",
                                                    "Decibels",
                                                    "DbA",
                                                    "DbC",
                                                    "gray",
                                                    "sievert",
                                                    "color temp deg K",
                                                    "bit",
                                                    "kilobit",
                                                    "megabit",
                                                    "gigabit",
                                                    "byte",
                                                    "kilobyte",
                                                    "megabyte",
                                                    "gigabyte",
                                                    "word",
                                                    "dword",
                                                    "qword",
                                                    "line",
                                                    "hit",
                                                    "miss",
                                                    "retry",
                                                    "reset",
                                                    "overflow",
                                                    "underrun",
                                                    "collision",
                                                    "packets",
                                                    "messages",
                                                    "characters",
                                                    "error",
                                                    "correctable error",
                                                    "uncorrectable error",
                                                    "fatal error",
                                                    "grams"};
constexpr std::array<std::string_view, 7> rates = {"", "/us", "/ms", "/s", "/min", "/hour", "/day"};

std::string unit_name(std::uint8_t code) {
  return code < units.size() ? std::string(units[code]) : "unit " + std::to_string(code);
}

std::string unit_text(std::uint8_t flags, std::uint8_t base, std::uint8_t modifier) {
  std::string text = unit_name(base);
  const unsigned joined = (flags >> 1U) & 3U, rate = (flags >> 3U) & 7U;
  if (joined == 1) text += "/" + unit_name(modifier);
  if (joined == 2) text += " * " + unit_name(modifier);
  if (rate < rates.size()) text += rates[rate];
  return (flags & 1U) != 0U ? (base == 0 ? "%" : "% " + text) : text;
}

// Ten, six or four bits, the highest of which is a sign.
int signed_bits(unsigned value, unsigned bits) {
  const auto limit = 1U << (bits - 1U);
  return value < limit ? static_cast<int>(value) : static_cast<int>(value) - static_cast<int>(limit << 1U);
}

// Type and length octet, then text in one of four codings (43.15).
Result<std::string> identity(std::span<const std::uint8_t> from) {
  if (from.empty()) return Error(Errc::corrupt, "the record ends before its name");
  const unsigned coding = from[0] >> 6U;
  const std::size_t length = from[0] & 0x1fU;
  if (from.size() - 1 < length) return Error(Errc::corrupt, "the record's name is longer than the record");
  const auto octets = from.subspan(1, length);
  std::string text;
  switch (coding) {
    case 1:  // BCD plus
      for (const auto o : octets) {
        text += "0123456789 -.:,_"[o >> 4U];
        text += "0123456789 -.:,_"[o & 15U];
      }
      break;
    case 2: {  // six bits a letter, packed from the lowest bit up
      unsigned held = 0, bits = 0;
      for (const auto o : octets) {
        held |= static_cast<unsigned>(o) << bits;
        bits += 8;
        while (bits >= 6) {
          text += static_cast<char>((held & 0x3fU) + 0x20U);
          held >>= 6U;
          bits -= 6;
        }
      }
      break;
    }
    default:  // ASCII with Latin-1, and what is declared to be some other eight-bit text
      text.assign(octets.begin(), octets.end());
  }
  // Fixed-width names are filled with spaces or zeros.
  while (!text.empty() && (text.back() == ' ' || text.back() == '\0')) text.pop_back();
  return printable(text, 64);
}

constexpr std::size_t header_octets = 5, full_octets = 43, compact_octets = 27;

Conversion conversion_of(std::span<const std::uint8_t> body) {
  Conversion c;
  c.format = static_cast<Conversion::Format>(body[15] >> 6U);
  c.linearisation = body[18] & 0x7fU;
  c.m = signed_bits(body[19] | (body[20] & 0xc0U) << 2U, 10);
  c.b = signed_bits(body[21] | (body[22] & 0xc0U) << 2U, 10);
  c.r_exponent = signed_bits(body[24] >> 4U, 4);
  c.b_exponent = signed_bits(body[24] & 15U, 4);
  return c;
}

}  // namespace

std::optional<double> convert(const Conversion& conversion, std::uint8_t raw) {
  int x = raw;
  switch (conversion.format) {
    case Conversion::Format::none:
      return std::nullopt;
    case Conversion::Format::binary:
      break;
    case Conversion::Format::ones_complement:
      x = raw < 0x80 ? raw : raw - 0xff;
      break;
    case Conversion::Format::twos_complement:
      x = signed_bits(raw, 8);
      break;
  }
  const double y = (conversion.m * x + conversion.b * std::pow(10.0, conversion.b_exponent)) *
                   std::pow(10.0, conversion.r_exponent);
  double z = y;
  switch (conversion.linearisation) {
    case 1:
      z = std::log(y);
      break;
    case 2:
      z = std::log10(y);
      break;
    case 3:
      z = std::log2(y);
      break;
    case 4:
      z = std::exp(y);
      break;
    case 5:
      z = std::pow(10.0, y);
      break;
    case 6:
      z = std::exp2(y);
      break;
    case 7:
      z = 1.0 / y;
      break;
    case 8:
      z = y * y;
      break;
    case 9:
      z = y * y * y;
      break;
    case 10:
      z = std::sqrt(y);
      break;
    case 11:
      z = std::cbrt(y);
      break;
    default:
      break;  // linear; and 0x70..: the factors were asked for this very value
  }
  if (!std::isfinite(z)) return std::nullopt;
  return z;
}

Result<std::vector<Record>> parse_record(const Octets& octets) {
  if (octets.size() < header_octets) return Error(Errc::corrupt, "a record shorter than its header");
  const auto id = static_cast<std::uint16_t>(octets[0] | octets[1] << 8U);
  const std::uint8_t kind = octets[3];
  const auto whole = std::span(octets).subspan(header_octets);
  if (whole.size() < octets[4])
    return Error(Errc::corrupt, "a record shorter than it says").in("record " + std::to_string(id));
  const auto body = whole.first(octets[4]);
  if (kind != 1 && kind != 2) return std::vector<Record>();
  const bool full = kind == 1;
  if (body.size() < (full ? full_octets : compact_octets)) {
    return Error(Errc::corrupt, "a sensor record without all of its fields")
        .in("record " + std::to_string(id));
  }
  Record r;
  r.id = id;
  r.full = full;
  r.owner = body[0];
  r.channel = body[1] >> 4U;
  r.lun = body[1] & 3U;
  r.number = body[2];
  r.entity = body[3];
  r.instance = body[4];
  r.type = body[7];
  r.event_type = body[8];
  r.unit = unit_text(body[15], body[16], body[17]);
  auto name = identity(body.subspan(full ? 42 : 26));
  if (!name.ok()) return std::move(name).error().in("record " + std::to_string(id));
  r.name = *name;
  if (full) {
    r.conversion = conversion_of(body);
    // Only a sensor that is about thresholds has them; of others the same octets are masks of states.
    if (r.event_type == 1 && ((body[6] >> 2U) & 3U) != 0) r.readable_thresholds = body[13] & 0x3fU;
    // On the wire: upper non-recoverable, critical, non-critical, then the lower ones. By bit: the other way
    // round.
    const std::size_t place[6] = {36, 35, 34, 33, 32, 31};
    for (std::size_t i = 0; i < 6; ++i) r.thresholds[i] = body[place[i]];
    return std::vector<Record>{r};
  }
  // A compact record may stand for several sensors with numbers in a row: "FAN" 1, 2, 3 or A, B, C.
  const unsigned count = std::max(1U, body[18] & 15U), first = body[19] & 0x7fU;
  std::vector<Record> all;
  for (unsigned i = 0; i < count && r.number + i <= 0xff; ++i) {
    Record one = r;
    one.number = static_cast<std::uint8_t>(r.number + i);
    if ((body[19] & 0x80U) != 0) one.instance = static_cast<std::uint8_t>(r.instance + i);
    if (count > 1) {
      const unsigned n = first + i;
      one.name +=
          (body[18] & 0x30U) == 0x10 ? std::string(1, static_cast<char>('A' + n % 26)) : std::to_string(n);
    }
    all.push_back(std::move(one));
  }
  return all;
}

}  // namespace bulkhead::bmc
