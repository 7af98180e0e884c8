#include "twin/control/control.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <map>
#include <set>
#include <thread>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "twin/tree/tree.hpp"

namespace bulkhead::twin {
namespace {

namespace fs = std::filesystem;

// A twin in a directory of its own. The library is only linked to here, never loaded: any file will do.
class Twin : public testing::Test {
 protected:
  void SetUp() override {
    // In memory where there is any: a tree is a thousand small files.
    const fs::path place = ::access("/dev/shm", W_OK) == 0 ? fs::path("/dev/shm") : fs::temp_directory_path();
    std::string pattern = (place / "bulkhead-twin-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    base_ = pattern;
    directory_ = base_ / "d";
  }
  void TearDown() override { fs::remove_all(base_); }
  void bring_up(const std::string& profile, bool realtime = false) {
    const auto made = up({.profile = profile,
                          .directory = directory_,
                          .library = "/proc/self/exe",
                          .realtime = realtime,
                          .init = false});
    ASSERT_TRUE(made.ok()) << made.error().message();
  }
  std::string text(const std::string& path) const {
    return read_trimmed(directory_ / "root" / path).value_or("(unreadable: " + path + ")");
  }
  void edit(const std::function<void(State&)>& change) {
    auto file = open_twin(directory_);
    ASSERT_TRUE(file.ok());
    ASSERT_TRUE((*file)->write([&](State& s) {
      change(s);
      return true;
    }));
    (*file)->read([&](const State& s) { ASSERT_TRUE(refresh_tree(directory_ / "root", s).ok()); });
  }
  Json state() {
    auto s = twin::status(directory_);
    EXPECT_TRUE(s.ok());
    return s.ok() ? *s : Json();
  }
  fs::path base_, directory_;
};

TEST_F(Twin, ComesUpAndGoesDownLeavingNothing) {
  bring_up("h100-vm");
  EXPECT_TRUE(fs::exists(directory_ / "state.bin"));
  EXPECT_TRUE(fs::is_symlink(directory_ / "lib/libnvidia-ml.so.1"));
  EXPECT_EQ(state()["gpus"].size(), 1U);
  const auto again =
      up({.profile = "h100-vm", .directory = directory_, .library = "/proc/self/exe", .init = false});
  ASSERT_FALSE(again.ok());
  EXPECT_EQ(again.error().code(), Errc::conflict);
  ASSERT_TRUE(down(directory_).ok());
  EXPECT_FALSE(fs::exists(directory_));
  EXPECT_FALSE(down(directory_).ok());
}

TEST_F(Twin, DownNeverRemovesADirectoryThatIsNoTwin) {
  fs::create_directories(directory_ / "root");
  std::ofstream(directory_ / "thesis.txt") << "years of work";
  EXPECT_FALSE(down(directory_).ok());
  EXPECT_TRUE(fs::exists(directory_ / "thesis.txt"));
  const auto made =
      up({.profile = "h100-vm", .directory = directory_, .library = "/proc/self/exe", .init = false});
  ASSERT_FALSE(made.ok());
  EXPECT_TRUE(fs::exists(directory_ / "thesis.txt"));
}

TEST_F(Twin, TheVirtualMachineShowsTheFilesThatWereRead) {
  bring_up("h100-vm");
  const std::string gpu = "sys/bus/pci/devices/0000:00:06.0/";
  // hosts/h100-sxm-80gb.json, "sysfs" and "proc".
  const std::map<std::string, std::string> read = {
      {"vendor", "0x10de"},
      {"device", "0x2330"},
      {"subsystem_vendor", "0x10de"},
      {"subsystem_device", "0x16c1"},
      {"class", "0x030200"},
      {"revision", "0xa1"},
      {"numa_node", "-1"},
      {"local_cpulist", "0-15"},
      {"local_cpus", "ffff"},
      {"irq", "41"},
      {"enable", "1"},
      {"power_state", "D0"},
      {"max_link_speed", "32.0 GT/s PCIe"},
      {"current_link_width", "16"},
      {"driver_override", "(null)"},
      {"d3cold_allowed", "1"},
      {"reset_method", "flr"},
      {"ari_enabled", "0"},
      {"msi_bus", "1"},
      {"broken_parity_status", "0"},
      {"dma_mask_bits", "52"},
      {"consistent_dma_mask_bits", "52"},
      {"modalias", "pci:v000010DEd00002330sv000010DEsd000016C1bc03sc02i00"},
      {"resource",
       "0x0000102002000000 0x0000102002ffffff 0x000000000014220c\n0x0000000000000000 0x0000000000000000 "
       "0x0000000000000000\n"
       "0x0000100000000000 0x0000101fffffffff 0x000000000014220c\n0x0000000000000000 0x0000000000000000 "
       "0x0000000000000000\n"
       "0x0000102000000000 0x0000102001ffffff 0x000000000014220c\n0x0000000000000000 0x0000000000000000 "
       "0x0000000000000000\n"
       "0x0000000000000000 0x0000000000000000 0x0000000000000000"}};
  for (const auto& [file, value] : read) EXPECT_EQ(text(gpu + file), value) << file;
  EXPECT_FALSE(fs::exists(directory_ / "root" / (gpu + "iommu_group")));
  EXPECT_FALSE(fs::exists(directory_ / "root" / (gpu + "sriov_totalvfs")));
  const auto information = text("proc/driver/nvidia/gpus/0000:00:06.0/information");
  EXPECT_NE(information.find("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 41\n"), std::string::npos)
      << information;
  EXPECT_NE(information.find("Video BIOS: \t 96.00.da.00.0c\n"), std::string::npos);
  EXPECT_NE(text("proc/driver/nvidia/params").find("NvLinkDisable: 1"), std::string::npos);
  EXPECT_EQ(text("proc/driver/nvidia/capabilities/mig/config"),
            "DeviceFileMinor: 1\nDeviceFileMode: 256\nDeviceFileModify: 1");
  EXPECT_EQ(text("proc/driver/nvidia/capabilities/fabric-imex-mgmt"),
            "DeviceFileMinor: 4323\nDeviceFileMode: 256\nDeviceFileModify: 1");
}

TEST_F(Twin, AddressesOverlapNowhereAndBridgesForwardWhatIsBehindThem) {
  for (const auto& profile : profiles()) {
    const auto machine = load_profile(profile.name, 1);
    ASSERT_TRUE(machine.ok());
    auto host = machine->host;
    host.cpu.sockets = 1;  // thousands of CPU files are not this test's matter
    host.cpu.cores_per_socket = static_cast<unsigned>(host.numa_memory_kib.size());
    host.cpu.threads_per_core = 1;
    const fs::path root = base_ / profile.name;
    ASSERT_TRUE(make_tree(root, host, *machine->state).ok());
    const fs::path devices = root / "sys/bus/pci/devices";
    std::vector<std::pair<std::uint64_t, std::uint64_t>> taken;
    const auto names = list_directory(devices);
    ASSERT_TRUE(names.ok());
    EXPECT_EQ(names->size(), host.pci.size());
    const auto ranges_of = [&](const fs::path& device) {
      std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
      const auto resource = read_file(device / "resource").value_or("");
      for (const auto line : split_lines(resource)) {
        const auto words = split(line, ' ');
        const auto first = parse_u64(words[0].substr(2), 16), last = parse_u64(words[1].substr(2), 16);
        if (first && last && *last > 0) ranges.emplace_back(*first, *last);
      }
      return ranges;
    };
    for (const auto& name : *names) {
      const fs::path real = fs::canonical(devices / name);
      const bool bridge = read_trimmed(real / "class").value_or("").starts_with("0x0604");
      const auto ranges = ranges_of(real);
      const fs::path above = real.parent_path();
      const bool has_bridge = above.filename().string().starts_with("0000:");
      for (const auto& [first, last] : ranges) {
        if (!bridge) taken.emplace_back(first, last);
        if (!has_bridge) continue;
        bool forwarded = false;
        for (const auto& [low, high] : ranges_of(above))
          forwarded = forwarded || (low <= first && last <= high);
        EXPECT_TRUE(forwarded) << profile.name << " " << name << " outside the windows of "
                               << above.filename();
      }
      // Whoever has a driver is listed there, and the group knows its member.
      if (fs::exists(real / "driver")) {
        EXPECT_TRUE(fs::exists(real / "driver" / name)) << name;
      }
      if (fs::exists(real / "iommu_group")) {
        EXPECT_EQ(fs::canonical(real / "iommu_group/devices" / name), real);
      }
    }
    std::sort(taken.begin(), taken.end());
    for (std::size_t i = 1; i < taken.size(); ++i)
      EXPECT_GT(taken[i].first, taken[i - 1].second) << profile.name;
  }
}

TEST_F(Twin, InstancesAppearAmongTheCapabilitiesWithTheirMinorsAndGoAgain) {
  bring_up("h100-vm");
  edit([](State& s) {
    s.gpus[0].mig_current = 1;
    GpuInstance& gi = s.gpus[0].instances[3];
    gi.used = 1;
    gi.id = 9;
    gi.compute[0].used = 1;
    gi.compute[0].id = 2;
  });
  const std::string gi = "proc/driver/nvidia/capabilities/gpu0/mig/gi9/";
  EXPECT_EQ(text(gi + "access"),
            "DeviceFileMinor: 84\nDeviceFileMode: 292\nDeviceFileModify: 1");  // 3 + 9 * 9
  EXPECT_EQ(text(gi + "ci2/access"), "DeviceFileMinor: 87\nDeviceFileMode: 292\nDeviceFileModify: 1");
  EXPECT_NE(text("proc/driver/nvidia-caps/mig-minors").find("gpu0/gi9/ci2/access 87\n"), std::string::npos);
  edit([](State& s) { s.gpus[0].instances[3].compute[0].used = 0; });
  EXPECT_FALSE(fs::exists(directory_ / "root" / (gi + "ci2")));
  EXPECT_TRUE(fs::exists(directory_ / "root" / (gi + "access")));
  edit([](State& s) { s.gpus[0].mig_current = 0; });
  EXPECT_FALSE(fs::exists(directory_ / "root/proc/driver/nvidia/capabilities/gpu0"));
}

TEST_F(Twin, ManyRefreshesAtOnceEndInTheSameTree) {
  bring_up("h100-vm");
  auto file = open_twin(directory_);
  ASSERT_TRUE(file.ok());
  (*file)->write([](State& s) {
    s.gpus[0].mig_current = 1;
    for (std::uint32_t i = 0; i < 7; ++i) {
      s.gpus[0].instances[i].used = 1;
      s.gpus[0].instances[i].id = 7 + i;
      s.gpus[0].instances[i].compute[0].used = 1;
    }
    return true;
  });
  std::vector<pid_t> children;
  for (int p = 0; p < 6; ++p) {
    const pid_t child = ::fork();
    if (child == 0) {
      bool good = true;
      (*file)->read([&](const State& s) { good = refresh_tree(directory_ / "root", s).ok(); });
      ::_exit(good ? 0 : 1);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int result = 0;
    ::waitpid(child, &result, 0);
    EXPECT_EQ(result, 0);
  }
  const auto names = list_directory(directory_ / "root/proc/driver/nvidia/capabilities/gpu0/mig");
  ASSERT_TRUE(names.ok());
  EXPECT_EQ(names->size(), 7U);
}

TEST_F(Twin, LoadAndTimeWarmAGpuAndStatusShowsIt) {
  bring_up("h100-vm");
  const double before = state()["gpus"][0]["temperature_c"].get<double>();
  ASSERT_TRUE(load(directory_, 0, {.watts = 600}).ok());
  ASSERT_TRUE(step(directory_, 60'000'000'000).ok());
  const Json gpu = state()["gpus"][0];
  EXPECT_GT(gpu["temperature_c"].get<double>(), before + 10);
  EXPECT_NEAR(gpu["watts"].get<double>(), 600, 1);
  EXPECT_FALSE(load(directory_, 1, {.watts = 600}).ok());
  EXPECT_FALSE(load(directory_, 0, {.busy = 1.5}).ok());
  EXPECT_FALSE(load(directory_, 0, {.watts = std::nan("")}).ok());
}

TEST_F(Twin, ASteppedClockMovesOnlyByStepsAndARealtimeOneByItself) {
  bring_up("h100-vm", false);
  const double start = state()["clock"]["seconds_since_boot"].get<double>();
  ASSERT_TRUE(load(directory_, 0, {.busy = 0.5}).ok());
  EXPECT_EQ(state()["clock"]["seconds_since_boot"].get<double>(), start);
  ASSERT_TRUE(step(directory_, 10'000'000'000).ok());
  EXPECT_EQ(state()["clock"]["seconds_since_boot"].get<double>(), start + 10);
}

TEST_F(Twin, ASimulatedProcessHasTheFilesAHolderIsNamedByAndLosesThem) {
  bring_up("h100-vm");
  const auto pid =
      attach(directory_, {.gpu = 0, .name = "train (x) y", .memory_bytes = 1U << 30U, .busy = 0.5});
  ASSERT_TRUE(pid.ok()) << pid.error().message();
  EXPECT_GT(*pid, 4194304U) << "a number some real process could have";
  const std::string proc = fmt::format("proc/{}/", *pid);
  EXPECT_EQ(text(proc + "comm"), "train (x) y");
  EXPECT_TRUE(text(proc + "stat").starts_with(fmt::format("{} (train (x) y) S 1 ", *pid)));
  EXPECT_TRUE(text(proc + "cgroup").starts_with("0::/"));
  ASSERT_TRUE(detach(directory_, *pid).ok());
  EXPECT_FALSE(fs::exists(directory_ / "root" / proc));
  EXPECT_FALSE(detach(directory_, *pid).ok());
}

TEST_F(Twin, ARealProcessIsLinkedToItsOwnFiles) {
  bring_up("h100-vm");
  const auto pid = attach(directory_, {.gpu = 0, .pid = static_cast<std::uint32_t>(::getpid())});
  ASSERT_TRUE(pid.ok()) << pid.error().message();
  EXPECT_EQ(text(fmt::format("proc/{}/comm", *pid)), read_trimmed("/proc/self/comm").value_or(""));
  EXPECT_FALSE(attach(directory_, {.gpu = 0, .pid = 4194303}).ok());
}

TEST_F(Twin, AProcessOnAMigGpuNeedsAnInstanceThatIsThere) {
  bring_up("h100-vm");
  EXPECT_FALSE(attach(directory_, {.gpu = 0, .gpu_instance = 1, .compute_instance = 0}).ok());
  edit([](State& s) {
    s.gpus[0].mig_current = 1;
    s.gpus[0].instances[0].used = 1;
    s.gpus[0].instances[0].id = 1;
    s.gpus[0].instances[0].compute[0].used = 1;
  });
  EXPECT_FALSE(attach(directory_, {.gpu = 0}).ok());
  EXPECT_FALSE(attach(directory_, {.gpu = 0, .gpu_instance = 2, .compute_instance = 0}).ok());
  EXPECT_TRUE(attach(directory_, {.gpu = 0, .gpu_instance = 1, .compute_instance = 0}).ok());
}

TEST_F(Twin, AGpuOffTheBusReadsAllOnesLogsXid79AndComesBackByteForByte) {
  bring_up("h100-vm");
  const fs::path device = directory_ / "root/sys/bus/pci/devices/0000:00:06.0";
  const auto config = read_file(device / "config");
  ASSERT_TRUE(config.ok());
  ASSERT_TRUE(break_it(directory_, {.name = "off-the-bus", .gpu = 0}).ok());
  EXPECT_EQ(*read_file(device / "config"), std::string(4096, '\xff'));
  EXPECT_EQ(read_trimmed(device / "current_link_speed").value_or(""), "Unknown");
  EXPECT_NE(
      text("var/log/kern.log")
          .find(
              "NVRM: Xid (PCI:0000:00:06): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."),
      std::string::npos);
  EXPECT_NE(text("dev/kmsg").find("Xid (PCI:0000:00:06): 79"), std::string::npos);
  ASSERT_TRUE(mend(directory_, "", none).ok());
  EXPECT_EQ(*read_file(device / "config"), *config);
  EXPECT_EQ(read_trimmed(device / "current_link_speed").value_or(""), "32.0 GT/s PCIe");
  EXPECT_TRUE(state()["faults"].empty());
}

TEST_F(Twin, EveryFaultIsTakenBackByMend) {
  bring_up("h100-vm");
  const auto before = state();
  for (const auto& fault : fault_names()) {
    if (fault.name == "ecc") continue;  // its totals stay, as on a real board
    FaultRequest request{.name = std::string(fault.name), .gpu = 0};
    if (fault.name.ends_with("-call") || fault.name.starts_with("kill-")) {
      EXPECT_FALSE(break_it(directory_, request).ok()) << fault.name << " without a function";
      request.function = "nvmlDeviceGetTemperature";
    }
    ASSERT_TRUE(break_it(directory_, request).ok()) << fault.name;
    EXPECT_EQ(state()["faults"][0]["kind"], fault.name);
    if (fault.name ==
        "no-systemd") {  // mending it starts the pretend systemd: the twin itself does that elsewhere
      edit([](State& s) { s.faults[0] = Fault{}; });
      continue;
    }
    ASSERT_TRUE(mend(directory_, std::string(fault.name), none).ok()) << fault.name;
    EXPECT_TRUE(state()["faults"].empty()) << fault.name;
  }
  auto after = state();
  EXPECT_EQ(after["gpus"][0]["on_pci"], before["gpus"][0]["on_pci"]);
  EXPECT_EQ(after["gpus"][0]["in_nvml"], before["gpus"][0]["in_nvml"]);
  EXPECT_FALSE(break_it(directory_, {.name = "of-the-bus", .gpu = 0}).ok());
}

TEST_F(Twin, AnXidNamesItsProcessInTheKernelLog) {
  bring_up("h100-vm");
  const auto pid = attach(directory_, {.gpu = 0, .name = "train"});
  ASSERT_TRUE(pid.ok());
  ASSERT_TRUE(xid(directory_, 0, 31, *pid).ok());
  EXPECT_NE(text("var/log/kern.log")
                .find(fmt::format("NVRM: Xid (PCI:0000:00:06): 31, pid={}, name=train, Ch ", *pid)),
            std::string::npos);
  EXPECT_FALSE(xid(directory_, 0, 31, 1).ok());
  EXPECT_FALSE(xid(directory_, 5, 31, std::nullopt).ok());
}

TEST_F(Twin, UpdateGrubWritesTheBootMenuBelowItsOwnRoot) {
  bring_up("h100-vm");
  const fs::path root = directory_ / "root";
  std::ofstream(root / "etc/default/grub.d/50-bulkhead.cfg")
      << "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX intel_iommu=on iommu=pt\"\n";
  ASSERT_EQ(std::system(fmt::format("'{}' 2>/dev/null", (root / "usr/sbin/update-grub").string()).c_str()),
            0);
  EXPECT_NE(text("boot/grub/grub.cfg").find(" intel_iommu=on iommu=pt"), std::string::npos);
  EXPECT_EQ(text("proc/cmdline").find("intel_iommu"), std::string::npos) << "not before a reboot";
}

TEST_F(Twin, ARunProgramSeesTheTwinAndItsExitCodeComesBack) {
  bring_up("h100-vm");
  const fs::path seen = base_ / "seen";
  auto code =
      run(directory_,
          {"sh", "-c", fmt::format("echo $BULKHEAD_TWIN $BULKHEAD_ROOT > {}; exit 7", seen.string())});
  ASSERT_TRUE(code.ok()) << code.error().message();
  EXPECT_EQ(*code, 7);
  EXPECT_EQ(read_trimmed(seen).value_or(""),
            fmt::format("{} {}", directory_.string(), (directory_ / "root").string()));
  code = run(directory_, {"sh", "-c", "kill -9 $$"});
  ASSERT_TRUE(code.ok());
  EXPECT_EQ(*code, 128 + SIGKILL);
  const auto missing = run(directory_, {"no-such-program"});
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.error().code(), Errc::not_found);
  EXPECT_FALSE(run(directory_, {}).ok());
}

TEST_F(Twin, AsRootAProgramSeesTheTwinsFilesUnderTheirRealNamesAndNobodyElseDoes) {
  if (::geteuid() != 0) GTEST_SKIP() << "mount namespaces need root";
  bring_up("h100-vm");
  const fs::path seen = base_ / "seen";
  const std::string before = read_trimmed("/proc/cmdline").value_or("");
  const auto code = run(
      directory_,
      {"sh", "-c",
       fmt::format(
           "cat /proc/cmdline /sys/bus/pci/devices/0000:00:06.0/device > {}; ls /dev/nvidia0 /dev/null >> {}",
           seen.string(), seen.string())});
  ASSERT_TRUE(code.ok()) << code.error().message();
  if (*code != 0) GTEST_SKIP() << "this container may not mount";
  EXPECT_EQ(read_trimmed(seen).value_or(""),
            "console=hvc0 root=/dev/vda ro\n0x2330\n/dev/null\n/dev/nvidia0");
  EXPECT_EQ(read_trimmed("/proc/cmdline").value_or(""), before);
}

}  // namespace
}  // namespace bulkhead::twin
