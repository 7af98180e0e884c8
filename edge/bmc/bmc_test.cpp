#include "edge/bmc/bmc.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "base/clock.hpp"

namespace bulkhead::bmc {
namespace {

Octets octets(std::string_view hex) {
  Octets out;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    out.push_back(static_cast<std::uint8_t>(std::stoul(std::string(hex.substr(i, 2)), nullptr, 16)));
  }
  return out;
}

std::string hex(const Octets& from) {
  std::string out;
  for (const auto o : from) {
    out += "0123456789abcdef"[o >> 4U];
    out += "0123456789abcdef"[o & 15U];
  }
  return out;
}

std::uint64_t soon() { return monotonic_ns() + 10'000'000'000U; }

Error refused(std::uint8_t completion, Errc code) { return Error(code, "refused", {}, completion); }

// What passed over /dev/ipmi0 of a QEMU BMC (lab_sensors --exchanges in the lab): function, command, data,
// then completion code and answer. Any other request fails the test.
Ask recorded() {
  const auto exchanges =
      std::make_shared<const std::map<std::string, std::string>>(std::map<std::string, std::string>{
          {"0601", "002000000002070000000000"},
          {"0a22", "000e00"},
          {"0a230e0000000005", "0001000000510134"},
          {"0a230e0000000520", "00010020000107017f6801010000000039390001000001000000000000000000ff0064"},
          {"0a230e0000002514", "0001005f5a0000050000000000c9435055302054656d70"},
          {"0a230e0001000005", "0002000100510224"},
          {"0a230e0001000520", "00020020000107017f68010100000000ffff0001000000000000000000c94350553020"},
          {"0a230e0001002504", "00020054656d70"},
          {"0a230e0002000005", "0003000200510134"},
          {"0a230e0002000520", "00030020000207027f6801010000000038388001000001000000000000000000ff005f"},
          {"0a230e0002002514", "0003005a550000000000000000c9475055302054656d70"},
          {"0a230e0003000005", "0004000300510224"},
          {"0a230e0003000520", "00040020000207027f68010100000000ffff0001000000000000000000c94750553020"},
          {"0a230e0003002504", "00040054656d70"},
          {"0a230e0004000005", "0005000400510135"},
          {"0a230e0004000520", "00050020000307037f680101000000001818000100000500d8c000f000000000ff0000"},
          {"0a230e0004002515", "000500aaa00000000000000000ca496e6c65742054656d70"},
          {"0a230e0005000005", "0006000500510225"},
          {"0a230e0005000520", "00060020000307037f68010100000000ffff0001000000000000000000ca496e6c6574"},
          {"0a230e0005002505", "0006002054656d70"},
          {"0a230e0006000005", "000700060051012f"},
          {"0a230e0006000520", "00070020000407047f6804010000000003030012000064000000000000000000ff0000"},
          {"0a230e000600250f", "00070000000005080000000000c446414e31"},
          {"0a230e0007000005", "00ffff070051021f"},
          {"0a230e000700051f", "00ffff20000407047f68040100000000ffff0012000000000000000000c446414e31"},
          {"042d01", "0037c000"},
          {"042701", "c1"},
          {"042d02", "00f6c000"},
          {"042702", "c1"},
          {"042d03", "0080c000"},
          {"042703", "c1"},
          {"042d04", "004bc000"},
          {"042704", "c1"},
      });
  return [exchanges](const Request& request, std::uint64_t) -> Result<Octets> {
    Octets key{request.function, request.command};
    key.insert(key.end(), request.data.begin(), request.data.end());
    const auto found = exchanges->find(hex(key));
    if (found == exchanges->end()) {
      ADD_FAILURE() << "never recorded: " << hex(key);
      return Error(Errc::timeout, "no answer");
    }
    auto answer = octets(found->second);
    if (answer[0] != 0) return refused(answer[0], Errc::unsupported);
    answer.erase(answer.begin());
    return answer;
  };
}

// A repository of whole records, which misbehaves as real ones do.
struct Keeper {
  std::vector<Octets> records = {};
  std::size_t most = 255;           // octets it returns at once
  int reservations_lost = 0;        // so often, in the middle
  std::map<int, int> next_of = {};  // a wrong successor
  bool with_reservations = true;
  int asked = 0, reservation = 1;

  Result<Octets> operator()(const Request& r, std::uint64_t) {
    ++asked;
    if (r.function == 0x06) return octets("2000000002020000000000");
    if (r.function == 0x0a && r.command == 0x22) {
      if (!with_reservations) return refused(0xc1, Errc::unsupported);
      ++reservation;
      return Octets{static_cast<std::uint8_t>(reservation), 0};
    }
    if (r.function == 0x0a && r.command == 0x23) {
      const std::size_t id = r.data[2] | r.data[3] << 8U, offset = r.data[4], count = r.data[5];
      if (offset > 0 && reservations_lost > 0) {
        --reservations_lost;
        return refused(0xc5, Errc::conflict);
      }
      if (with_reservations && r.data[0] != reservation) return refused(0xc5, Errc::conflict);
      if (id >= records.size()) return refused(0xcb, Errc::not_found);
      if (count > most) return refused(0xca, Errc::no_capacity);
      unsigned next = id + 1 < records.size() ? static_cast<unsigned>(id + 1) : 0xffff;
      if (const auto it = next_of.find(static_cast<int>(id)); it != next_of.end())
        next = static_cast<unsigned>(it->second);
      Octets answer{static_cast<std::uint8_t>(next & 0xffU), static_cast<std::uint8_t>(next >> 8U)};
      for (std::size_t i = offset; i < offset + count && i < records[id].size(); ++i)
        answer.push_back(records[id][i]);
      return answer;
    }
    return refused(0xc1, Errc::unsupported);
  }
};

Octets record_of(std::uint16_t id, std::string_view rest) {
  Octets r{static_cast<std::uint8_t>(id & 0xffU), static_cast<std::uint8_t>(id >> 8U)};
  const auto tail = octets(rest);
  r.insert(r.end(), tail.begin(), tail.end());
  return r;
}
// Captured: CPU0 Temp as a full record, FAN1 as a compact one.
constexpr std::string_view cpu_temp =
    "51013420000107017f6801010000000039390001000001000000000000000000ff00645f5a0000050000000000c9435055302054"
    "656d70";
constexpr std::string_view fan = "51021f20000407047f68040100000000ffff0012000000000000000000c446414e31";

TEST(BmcRecord, AFullRecordGivesNameUnitThresholdsAndConversion) {
  const auto sensors = parse_record(record_of(7, cpu_temp));
  ASSERT_TRUE(sensors.ok()) << sensors.error().message();
  ASSERT_EQ(sensors->size(), 1U);
  const auto& r = sensors->front();
  EXPECT_EQ(r.id, 7);
  EXPECT_EQ(r.name, "CPU0 Temp");
  EXPECT_EQ(r.unit, "degrees C");
  EXPECT_EQ(r.type, 1);
  EXPECT_EQ(r.readable_thresholds, 0x39);
  EXPECT_EQ(r.conversion.m, 1);
  EXPECT_EQ(convert(r.conversion, 55), 55.0);
  EXPECT_EQ(convert(r.conversion, r.thresholds[5]), 100.0);
}

TEST(BmcRecord, ACompactRecordMayStandForSeveralSensors) {
  auto one = record_of(1, fan);
  one[5 + 18] = 3;     // three sensors share it, told apart by numbers
  one[5 + 19] = 0x82;  // from 2 on; the entity's instance counts along
  const auto sensors = parse_record(one);
  ASSERT_TRUE(sensors.ok());
  ASSERT_EQ(sensors->size(), 3U);
  EXPECT_EQ((*sensors)[0].name, "FAN12");
  EXPECT_EQ((*sensors)[2].name, "FAN14");
  EXPECT_EQ((*sensors)[2].number, (*sensors)[0].number + 2);
  EXPECT_EQ((*sensors)[2].instance, (*sensors)[0].instance + 2);
  one[5 + 18] = 0x12;
  one[5 + 19] = 0;
  EXPECT_EQ(parse_record(one).value()[1].name, "FAN1B");
}

TEST(BmcRecord, NamesComeInFourCodings) {
  const auto named = [](std::string_view coded) {
    auto r = record_of(1, fan);
    r.resize(5 + 26);
    const auto name = octets(coded);
    r.insert(r.end(), name.begin(), name.end());
    r[4] = static_cast<std::uint8_t>(r.size() - 5);
    return parse_record(r).value().front().name;
  };
  EXPECT_EQ(named("c446414e31"), "FAN1");
  EXPECT_EQ(named("4212a3"), "12 3");
  EXPECT_EQ(named("8329dca6"), "IPMI");  // the specification's own example of packed letters
  EXPECT_EQ(named("c64641e94e2020"), "FA\\xe9N");
  EXPECT_EQ(named("c0"), "");
}

TEST(BmcRecord, WhatIsShorterThanItSaysIsCorrupt) {
  for (const auto text : {cpu_temp, fan}) {
    const auto whole = record_of(1, text);
    for (std::size_t n = 0; n < whole.size(); ++n) {
      const Octets part(whole.begin(), whole.begin() + static_cast<long>(n));
      const auto sensors = parse_record(part);
      ASSERT_FALSE(sensors.ok()) << n;
      EXPECT_EQ(sensors.error().code(), Errc::corrupt);
      // The same with a length that fits the part: too short for its kind, or its name is cut.
      if (n > 5) {
        auto shorter = part;
        shorter[4] = static_cast<std::uint8_t>(n - 5);
        EXPECT_FALSE(parse_record(shorter).ok()) << n;
      }
    }
  }
}

TEST(BmcRecord, OtherKindsOfRecordAreNoSensors) {
  EXPECT_TRUE(parse_record(record_of(1, "5111022000")).value().empty());
  EXPECT_TRUE(parse_record(record_of(1, "51c000")).value().empty());
}

TEST(BmcRecord, UnitsSayRatesModifiersAndPercentages) {
  auto r = record_of(1, fan);
  const auto unit = [&](std::uint8_t flags, std::uint8_t base, std::uint8_t modifier) {
    r[5 + 15] = flags;
    r[5 + 16] = base;
    r[5 + 17] = modifier;
    return parse_record(r).value().front().unit;
  };
  EXPECT_EQ(unit(0, 4, 0), "Volts");
  EXPECT_EQ(unit(1, 0, 0), "%");
  EXPECT_EQ(unit(1, 6, 0), "% Watts");
  EXPECT_EQ(unit(2, 7, 22), "Joules/second");
  EXPECT_EQ(unit(3U << 3U, 89, 0), "correctable error/s");
  EXPECT_EQ(unit(0, 200, 0), "unit 200");
}

TEST(BmcConversion, EveryLinearisationIsThatOfTheSpecification) {
  Conversion c{.format = Conversion::Format::binary, .m = 2, .b = 3, .b_exponent = 1, .r_exponent = -1};
  const double y = (2 * 10 + 3 * 10) * 0.1;
  const double want[] = {y,           std::log(y),     std::log10(y), std::log2(y),
                         std::exp(y), std::pow(10, y), std::exp2(y),  1 / y,
                         y * y,       y * y * y,       std::sqrt(y),  std::cbrt(y)};
  for (std::uint8_t l = 0; l < 12; ++l) {
    c.linearisation = l;
    ASSERT_TRUE(convert(c, 10));
    EXPECT_DOUBLE_EQ(*convert(c, 10), want[l]) << int(l);
  }
}

TEST(BmcConversion, SignedFormatsGoBelowZero) {
  Conversion c{.format = Conversion::Format::twos_complement, .m = 1};
  EXPECT_EQ(convert(c, 0x7f), 127.0);
  EXPECT_EQ(convert(c, 0x80), -128.0);
  EXPECT_EQ(convert(c, 0xff), -1.0);
  c.format = Conversion::Format::ones_complement;
  EXPECT_EQ(convert(c, 0x80), -127.0);
  EXPECT_EQ(convert(c, 0xff), 0.0);
  c.format = Conversion::Format::none;
  EXPECT_FALSE(convert(c, 1));
}

TEST(BmcConversion, NoNumberIsSaidNotPrinted) {
  Conversion c{.format = Conversion::Format::binary, .linearisation = 7, .m = 1};
  EXPECT_FALSE(convert(c, 0));
  c.linearisation = 1;
  EXPECT_FALSE(convert(c, 0));
}

TEST(BmcWalk, WhatQemuAnsweredGivesWhatIpmitoolRead) {
  const Ask ask = recorded();
  const auto known = repository(ask, soon());
  ASSERT_TRUE(known.ok()) << known.error().message();
  EXPECT_EQ(known->controller.ipmi, "2.0");
  EXPECT_EQ(known->records.size(), 8U);
  const auto report = readings(ask, *known, soon());
  ASSERT_EQ(report.sensors.size(), 4U) << "a sensor with a full record appears once";
  const auto& s = report.sensors;
  EXPECT_EQ(s[0].name, "CPU0 Temp");
  EXPECT_EQ(s[0].value.value_or(0), 55.0);
  EXPECT_EQ(s[1].value.value_or(0), -10.0);
  EXPECT_DOUBLE_EQ(s[2].value.value_or(0), 60.0);
  EXPECT_EQ(s[3].value.value_or(0), 7500.0);
  EXPECT_EQ(s[3].kind, "fan");
  EXPECT_EQ(s[3].unit, "RPM");
  EXPECT_TRUE(s[0].thresholds_from_record) << "this BMC knows no command for thresholds";
  EXPECT_EQ(s[0].thresholds.upper_critical, 95.0);
  EXPECT_EQ(s[0].thresholds.lower_non_critical, 5.0);
  EXPECT_FALSE(s[0].thresholds.lower_critical);
  EXPECT_DOUBLE_EQ(s[2].thresholds.upper_critical.value_or(0), 81.0);
  EXPECT_TRUE(report.notes.empty());
}

TEST(BmcWalk, ABmcWithSmallAnswersIsReadInSmallPieces) {
  for (const std::size_t most : {5U, 8U, 16U, 31U}) {
    Keeper keeper{.records = {record_of(0, cpu_temp), record_of(1, fan)}, .most = most};
    const auto known = repository(std::ref(keeper), soon());
    ASSERT_TRUE(known.ok()) << known.error().message();
    EXPECT_EQ(known->records.size(), 2U);
    EXPECT_EQ(known->records[0].name, "CPU0 Temp");
  }
}

TEST(BmcWalk, ARepositoryThatChangesIsBegunAgainButNotForEver) {
  Keeper twice{.records = {record_of(0, cpu_temp), record_of(1, fan)}, .reservations_lost = 2};
  auto known = repository(std::ref(twice), soon());
  ASSERT_TRUE(known.ok()) << known.error().message();
  EXPECT_EQ(known->records.size(), 2U);
  Keeper always{.records = {record_of(0, cpu_temp)}, .reservations_lost = 1'000'000};
  known = repository(std::ref(always), soon());
  ASSERT_FALSE(known.ok());
  EXPECT_EQ(known.error().code(), Errc::conflict);
  EXPECT_LT(always.asked, 40);
}

TEST(BmcWalk, RecordsInCirclesEndTheWalk) {
  for (const int back : {0, 1, 2}) {
    Keeper keeper{.records = {record_of(0, fan), record_of(1, fan), record_of(2, fan)},
                  .next_of = {{2, back}}};
    const auto known = repository(std::ref(keeper), soon());
    ASSERT_FALSE(known.ok()) << back;
    EXPECT_EQ(known.error().code(), Errc::corrupt);
  }
  std::vector<Octets> many;
  for (unsigned i = 0; i < 5000; ++i) many.push_back(record_of(static_cast<std::uint16_t>(i), fan));
  Keeper endless{.records = many};
  EXPECT_FALSE(repository(std::ref(endless), soon()).ok());
}

TEST(BmcWalk, AnEmptyRepositoryHasNoSensorsAndABrokenRecordIsNoted) {
  Keeper empty{};
  const auto none = repository(std::ref(empty), soon());
  ASSERT_TRUE(none.ok()) << none.error().message();
  EXPECT_TRUE(none->records.empty());
  Keeper broken{.records = {record_of(0, "51010120"), record_of(1, fan)}, .with_reservations = false};
  const auto some = repository(std::ref(broken), soon());
  ASSERT_TRUE(some.ok()) << some.error().message();
  EXPECT_EQ(some->records.size(), 1U);
  ASSERT_EQ(some->notes.size(), 1U);
  EXPECT_NE(some->notes[0].find("record 0"), std::string::npos);
}

TEST(BmcReadings, EachSensorSaysWhyItHasNoValue) {
  const auto report_of = [](const std::function<Result<Octets>()>& reading, std::uint8_t linearisation) {
    auto bytes = record_of(0, cpu_temp);
    bytes[5 + 18] = linearisation;
    Repository known{.records = parse_record(bytes).value()};
    const Ask ask = [&](const Request& r, std::uint64_t) -> Result<Octets> {
      if (r.command == 0x2d) return reading();
      return refused(0xc1, Errc::unsupported);
    };
    return readings(ask, known, soon()).sensors.at(0);
  };
  EXPECT_EQ(report_of([] { return octets("37c000"); }, 0).value.value_or(0), 55.0);
  EXPECT_NE(report_of([] { return octets("37e000"); }, 0).value.why.find("no reading"), std::string::npos);
  EXPECT_NE(report_of([] { return octets("378000"); }, 0).value.why.find("does not scan"), std::string::npos);
  EXPECT_NE(report_of([] { return octets("37"); }, 0).value.why.find("short answer"), std::string::npos);
  EXPECT_NE(report_of([] { return octets("00c000"); }, 7).value.why.find("no number"), std::string::npos);
  EXPECT_NE(report_of([] { return octets("37c000"); }, 0x70).value.why.find("conversion"), std::string::npos);
  EXPECT_EQ(report_of([]() -> Result<Octets> { return Error(Errc::timeout, "no answer"); }, 0).value.why,
            "no answer");
}

TEST(BmcReadings, ACurveWithoutAFormulaIsAskedForItsFactors) {
  auto bytes = record_of(0, cpu_temp);
  bytes[5 + 18] = 0x70;
  Repository known{.records = parse_record(bytes).value()};
  const Ask ask = [&](const Request& r, std::uint64_t) -> Result<Octets> {
    if (r.command == 0x2d) return octets("10c000");
    if (r.command == 0x23 && r.data == Octets{1, 0x10}) return octets("110300ffc000f0");  // m 3, b -1, 10^-1
    return refused(0xc1, Errc::unsupported);
  };
  const auto report = readings(ask, known, soon());
  EXPECT_DOUBLE_EQ(report.sensors.at(0).value.value_or(0), (3 * 16 - 1) * 0.1);
}

TEST(BmcReadings, TheBmcsOwnThresholdsComeBeforeThoseOfTheRecord) {
  Repository known{.records = parse_record(record_of(0, cpu_temp)).value()};
  const Ask ask = [&](const Request& r, std::uint64_t) -> Result<Octets> {
    if (r.command == 0x2d) return octets("37c001");
    if (r.command == 0x27) return octets("1801020304505a");  // upper non-critical and critical: 4, 0x50
    return refused(0xc1, Errc::unsupported);
  };
  const auto s = readings(ask, known, soon()).sensors.at(0);
  EXPECT_FALSE(s.thresholds_from_record);
  EXPECT_EQ(s.thresholds.upper_critical, 80.0);
  EXPECT_EQ(s.thresholds.upper_non_critical, 4.0);
  EXPECT_FALSE(s.thresholds.upper_non_recoverable);
  EXPECT_EQ(s.states, 1);
}

TEST(BmcReadings, WhenTheTimeIsUpTheRestIsSaid) {
  Repository known{.records = parse_record(record_of(0, cpu_temp)).value()};
  const Ask ask = [](const Request&, std::uint64_t) -> Result<Octets> {
    return Error(Errc::timeout, "not asked: no time left");
  };
  const auto report = readings(ask, known, monotonic_ns());
  ASSERT_EQ(report.notes.size(), 1U);
  EXPECT_EQ(report.notes[0], "1 sensors were not read in the time there was");
}

TEST(BmcChannel, AMissingNodeSaysWhatToLoadAndAnotherDeviceIsNone) {
  const auto missing = Channel::open("/dev/no-such-bmc");
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.error().code(), Errc::unavailable);
  EXPECT_NE(missing.error().hint().find("ipmi_devintf"), std::string::npos);
  const auto other = read({.device = "/dev/null", .timeout_ms = 1000});
  ASSERT_FALSE(other.ok());
  EXPECT_EQ(other.error().code(), Errc::unsupported);
}

}  // namespace
}  // namespace bulkhead::bmc
