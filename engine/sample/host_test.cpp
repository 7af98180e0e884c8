// Links, PCIe errors and sensors, read from trees of files as the kernel shows them.
#include "engine/sample/host.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

namespace bulkhead::sample {
namespace {

namespace fs = std::filesystem;
constexpr std::uint64_t second = 1'000'000'000;

class HostReaderTest : public testing::Test {
 protected:
  HostReaderTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-host-XXXXXX").string();
    root_ = ::mkdtemp(pattern.data());
  }
  ~HostReaderTest() override { fs::remove_all(root_); }
  void write(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text << '\n';
  }
  void port(std::uint64_t packets, std::uint64_t errors) {
    const std::string at = "sys/class/infiniband/mlx5_0/ports/1/";
    write(at + "state", "4: ACTIVE");
    write(at + "rate", "400 Gb/sec (4X NDR)");
    write(at + "counters/port_rcv_packets", std::to_string(packets));
    write(at + "counters/port_xmit_packets", "0");
    write(at + "counters/port_rcv_errors", std::to_string(errors));
    write(at + "counters/port_xmit_discards", "0");
    write(at + "counters/symbol_error", "12");
  }
  fs::path root_ = {};
};

TEST_F(HostReaderTest, AnEmptyHostHasNothingAndIsNoError) {
  HostReader reader(root_);
  const Host seen = reader.read(5 * second);
  EXPECT_EQ(seen.at_ns, 5 * second);
  EXPECT_TRUE(seen.ports.empty() && seen.pcie.empty() && seen.sensors.empty());
}

TEST_F(HostReaderTest, LossAboveAHundredthOfAPercentIsAnAlarmAndBelowIsNone) {
  HostReader reader(root_);
  port(1'000'000, 500);  // old ones: of before it looked
  EXPECT_FALSE(reader.read(second).ports.at(0).loss.has_value());
  port(2'000'000, 550);  // 50 of a million: half of the bound
  const Port below = reader.read(11 * second).ports.at(0);
  EXPECT_NEAR(below.loss.value(), 5e-5, 1e-6);
  EXPECT_FALSE(below.alarm);
  EXPECT_EQ(below.state, "ACTIVE");
  EXPECT_EQ(below.symbol_errors, 12U);
  port(3'000'000, 950);
  const Port above = reader.read(21 * second).ports.at(0);
  EXPECT_NEAR(above.loss.value(), 2.25e-4, 1e-5);
  EXPECT_TRUE(above.alarm);
}

TEST_F(HostReaderTest, AnAlarmEndsAMinuteAfterItsLosses) {
  HostReader reader(root_);
  port(0, 0);
  (void)reader.read(second);
  port(1'000'000, 900);
  EXPECT_TRUE(reader.read(11 * second).ports.at(0).alarm);
  Port last;
  for (std::uint64_t i = 2; i <= 9; ++i) {
    port(i * 1'000'000, 900);
    last = reader.read(i * 10 * second + second).ports.at(0);
  }
  EXPECT_FALSE(last.alarm);
  EXPECT_EQ(last.loss, std::optional(0.0));
}

TEST_F(HostReaderTest, OfFewPacketsNothingIsSaidAndCountsThatWereResetBeginAnew) {
  HostReader reader(root_);
  port(1'000, 0);
  (void)reader.read(second);
  port(2'000, 900);
  EXPECT_FALSE(reader.read(11 * second).ports.at(0).loss.has_value());
  port(50'000, 0);  // reset meanwhile
  const Port again = reader.read(21 * second).ports.at(0);
  EXPECT_FALSE(again.loss.has_value());
  EXPECT_FALSE(again.alarm);
}

TEST_F(HostReaderTest, ErrorsOfGpusAndOfThePortsAboveThemAreCounted) {
  const std::string bridge = "sys/devices/pci0000:00/0000:00:01.0", gpu = bridge + "/0000:1b:00.0";
  for (const auto& at : {bridge, gpu}) {
    write(at + "/aer_dev_correctable", "RxErr 0\nBadTLP 7\nTOTAL_ERR_COR 7");
    write(at + "/aer_dev_nonfatal", "TOTAL_ERR_NONFATAL 2");
    write(at + "/aer_dev_fatal", "TOTAL_ERR_FATAL nonsense");
  }
  write(gpu + "/class", "0x030200");
  write(bridge + "/class", "0x060400");
  fs::create_directories(root_ / "sys/bus/pci/devices");
  fs::create_symlink(root_ / gpu, root_ / "sys/bus/pci/devices/0000:1b:00.0");
  fs::create_symlink(root_ / bridge, root_ / "sys/bus/pci/devices/0000:00:01.0");
  HostReader reader(root_);
  const auto seen = reader.read(second).pcie;
  ASSERT_EQ(seen.size(), 2U);
  EXPECT_EQ(seen[0].address.str(), "0000:1b:00.0");
  EXPECT_EQ(seen[1].address.str(), "0000:00:01.0");
  EXPECT_EQ(seen[0].correctable, 7U);
  EXPECT_EQ(seen[0].nonfatal, 2U);
  EXPECT_EQ(seen[0].fatal, 0U);
}

TEST_F(HostReaderTest, SensorsHaveTheirUnitsNamesAndBounds) {
  const std::string at = "sys/class/hwmon/hwmon3/";
  write(at + "name", "nct6798");
  write(at + "in0_input", "11200");
  write(at + "in0_label", "+12V");
  write(at + "in0_min", "11400");
  write(at + "fan1_input", "0");
  write(at + "temp1_input", "-5000");
  write(at + "temp1_crit", "95000");
  write(at + "temp2_input", "no number");
  write(at + "intrusion0_alarm", "1");
  HostReader reader(root_);
  const auto seen = reader.read(second).sensors;
  ASSERT_EQ(seen.size(), 3U);
  EXPECT_EQ(seen[0].kind, "fan");
  EXPECT_EQ(seen[0].value, 0);
  EXPECT_EQ(seen[1].name, "+12V");
  EXPECT_EQ(seen[1].source, "hwmon nct6798");
  EXPECT_NEAR(seen[1].value, 11.2, 1e-9);
  EXPECT_NEAR(seen[1].low.value(), 11.4, 1e-9);
  EXPECT_NEAR(seen[2].value, -5, 1e-9);
  EXPECT_NEAR(seen[2].high.value(), 95, 1e-9);
}

}  // namespace
}  // namespace bulkhead::sample
