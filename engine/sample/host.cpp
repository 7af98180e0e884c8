#include "engine/sample/host.hpp"

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "edge/bmc/bmc.hpp"

namespace bulkhead::sample {

namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t second_ns = 1'000'000'000;
constexpr std::uint64_t kernel_every_ns = 10 * second_ns, bmc_every_ns = 60 * second_ns;
constexpr std::uint64_t window_ns = 60 * second_ns;      // of a ratio
constexpr std::uint64_t found_for_ns = 600 * second_ns;  // which functions there are is looked up so often
constexpr std::size_t most = 512;                        // of each kind

std::uint64_t count_of(const fs::path& file) {
  const auto text = read_trimmed(file);
  return text.ok() ? parse_u64(*text).value_or(0) : 0;
}
std::optional<double> number_of(const fs::path& file, double scale) {
  const auto text = read_trimmed(file);
  if (!text.ok()) return std::nullopt;
  std::string_view digits = *text;
  const bool minus = digits.starts_with('-');
  if (minus) digits.remove_prefix(1);
  const auto number = parse_u64(digits);
  if (!number) return std::nullopt;
  return (minus ? -1.0 : 1.0) * static_cast<double>(*number) * scale;
}
std::string text_of(const fs::path& file) {
  const auto text = read_trimmed(file);
  return text.ok() ? printable(*text, 96) : std::string();
}
std::vector<std::string> names_in(const fs::path& folder) {
  auto names = list_directory(folder);
  return names.ok() ? std::move(names).value() : std::vector<std::string>{};
}

// "TOTAL_ERR_COR 17", the last line of aer_dev_*.
std::uint64_t total_of(const fs::path& file) {
  const auto text = read_file(file, 64U << 10U);
  if (!text.ok()) return 0;
  for (const auto line : split_lines(*text))
    if (line.starts_with("TOTAL_ERR_")) {
      const auto space = line.rfind(' ');
      if (space != std::string_view::npos) return parse_u64(line.substr(space + 1)).value_or(0);
    }
  return 0;
}

}  // namespace

Host HostReader::read(std::uint64_t now_ns) {
  Host out;
  ports(out, now_ns);
  pcie(out, now_ns);
  sensors(out);
  out.at_ns = now_ns;
  return out;
}

void HostReader::ports(Host& out, std::uint64_t now_ns) {
  const fs::path all = root_ / "sys/class/infiniband";
  for (const auto& device : names_in(all))
    for (const auto& number : names_in(all / device / "ports")) {
      const auto port_number = parse_u64(number);
      if (!port_number || out.ports.size() == most) continue;
      const fs::path at = all / device / "ports" / number;
      Port port{.device = printable(device, 64), .port = static_cast<unsigned>(*port_number)};
      port.state = text_of(at / "state");  // "4: ACTIVE"
      if (const auto colon = port.state.find(": "); colon != std::string::npos)
        port.state.erase(0, colon + 2);
      port.rate = text_of(at / "rate");
      const auto count = [&](const char* name) { return count_of(at / "counters" / name); };
      port.packets = count("port_rcv_packets") + count("port_xmit_packets");
      // Bit errors are not packets, and forward error correction mends them: told apart.
      port.lost = count("port_rcv_errors") + count("port_xmit_discards");
      port.symbol_errors = count("symbol_error");
      port.recoveries = count("link_error_recovery");
      port.downed = count("link_downed");
      auto& window = window_[fmt::format("{}/{}", device, number)];
      if (!window.empty() && (port.packets < window.back().packets || port.lost < window.back().lost))
        window.clear();  // somebody reset them, or the driver did
      while (window.size() > 1 && now_ns > window[1].at_ns + window_ns) window.pop_front();
      if (!window.empty()) {
        const auto lost = port.lost - window.front().lost;
        const auto sent = port.packets - window.front().packets + lost;
        if (sent >= least_packets) {
          port.loss = static_cast<double>(lost) / static_cast<double>(sent);
          port.alarm = *port.loss > most_loss;
        }
      }
      window.push_back({now_ns, port.packets, port.lost});
      out.ports.push_back(std::move(port));
    }
}

void HostReader::pcie(Host& out, std::uint64_t now_ns) {
  if (found_ns_ == 0 || now_ns > found_ns_ + found_for_ns) {
    found_ns_ = now_ns;
    functions_.clear();
    const fs::path all = root_ / "sys/bus/pci/devices";
    const auto add = [&](const fs::path& at) {
      std::error_code failed;
      if (functions_.size() < most && fs::exists(at / "aer_dev_correctable", failed) &&
          std::find(functions_.begin(), functions_.end(), at) == functions_.end())
        functions_.push_back(at);
    };
    for (const auto& name : names_in(all)) {
      const auto kind = text_of(all / name / "class");
      // Display and accelerators, InfiniBand and Ethernet: what tenants' data goes through.
      if (!kind.starts_with("0x03") && !kind.starts_with("0x12") && !kind.starts_with("0x02")) continue;
      add(all / name);
      // The other end of its link.
      std::error_code failed;
      const auto real = fs::canonical(all / name, failed);
      if (!failed && PciAddress::parse(real.parent_path().filename().string()).ok())
        add(all / real.parent_path().filename());
    }
  }
  for (const auto& at : functions_) {
    const auto address = PciAddress::parse(at.filename().string());
    if (!address.ok()) continue;
    out.pcie.push_back({.address = *address,
                        .correctable = total_of(at / "aer_dev_correctable"),
                        .nonfatal = total_of(at / "aer_dev_nonfatal"),
                        .fatal = total_of(at / "aer_dev_fatal")});
  }
}

void HostReader::sensors(Host& out) const {
  struct Kind {
    std::string_view prefix, kind;
    double scale;
  };
  static constexpr Kind kinds[] = {{"temp", "temperature", 1e-3},
                                   {"fan", "fan", 1},
                                   {"in", "voltage", 1e-3},
                                   {"curr", "current", 1e-3},
                                   {"power", "power", 1e-6}};
  const fs::path all = root_ / "sys/class/hwmon";
  for (const auto& chip : names_in(all)) {
    const fs::path at = all / chip;
    const std::string source = fmt::format("hwmon {}", text_of(at / "name"));
    for (const auto& file : names_in(at)) {
      if (!file.ends_with("_input") || out.sensors.size() == most) continue;
      const std::string base = file.substr(0, file.size() - 6);
      for (const auto& kind : kinds) {
        if (!base.starts_with(kind.prefix) ||
            base.find_first_not_of("0123456789", kind.prefix.size()) != std::string::npos)
          continue;
        const auto value = number_of(at / file, kind.scale);
        if (!value) continue;
        Sensor sensor{.source = source,
                      .name = text_of(at / (base + "_label")),
                      .kind = std::string(kind.kind),
                      .value = *value};
        if (sensor.name.empty()) sensor.name = printable(base, 32);
        const auto bound = [&](const char* first, const char* second) {
          const auto found = number_of(at / (base + first), kind.scale);
          return found ? found : number_of(at / (base + second), kind.scale);
        };
        sensor.low = bound("_lcrit", "_min");
        sensor.high = bound("_crit", "_max");
        out.sensors.push_back(std::move(sensor));
      }
    }
  }
}

std::shared_ptr<HostLook> HostLook::start(const fs::path& root) {
  auto look = std::make_shared<HostLook>();
  std::thread([look, root] {
    ::prctl(PR_SET_NAME, "bh-host");
    HostReader reader(root);
    do {
      Host now = reader.read(monotonic_ns());
      const std::lock_guard hold(look->mutex_);
      look->kernel_ = std::move(now);
    } while (look->wait(kernel_every_ns));
  }).detach();
  std::thread([look, root] {
    ::prctl(PR_SET_NAME, "bh-bmc");
    do {
      const auto report = bmc::read({.device = root / "dev/ipmi0"});
      std::vector<Sensor> sensors;
      if (report.ok())
        for (const auto& one : report->sensors) {
          // IPMI 2.0, table 42-1: 1 temperature, 2 voltage, 3 current, 4 fan, 8 power supply.
          static constexpr std::string_view names[] = {"", "temperature", "voltage", "current", "fan"};
          if (sensors.size() == most) break;
          Sensor sensor{.source = "bmc", .name = printable(one.name, 64)};
          if (one.type == 8 && !one.value) {
            sensor.kind = "supply";  // bit 0: it is there; others: what is wrong
            sensor.value = one.states;
          } else if (one.value && one.type < std::size(names) && one.type > 0) {
            sensor.kind = names[one.type];
            sensor.value = *one.value;
          } else if (one.value && one.unit == "Watts") {
            sensor.kind = "power";
            sensor.value = *one.value;
          } else {
            continue;
          }
          sensor.low = one.thresholds.lower_critical;
          sensor.high = one.thresholds.upper_critical;
          sensors.push_back(std::move(sensor));
        }
      const std::lock_guard hold(look->mutex_);
      look->bmc_ = report.ok() ? "" : report.error().message();
      if (report.ok())
        look->bmc_sensors_ = std::move(sensors);
      else
        look->bmc_sensors_.clear();
    } while (look->wait(bmc_every_ns));
  }).detach();
  return look;
}

void HostLook::stop() {
  const std::lock_guard hold(mutex_);
  stop_ = true;
  wake_.notify_all();
}

bool HostLook::wait(std::uint64_t nanoseconds) {
  std::unique_lock hold(mutex_);
  return !wake_.wait_for(hold, std::chrono::nanoseconds(nanoseconds), [this] { return stop_; });
}

Host HostLook::seen() const {
  const std::lock_guard hold(mutex_);
  Host out = kernel_;
  out.sensors.insert(out.sensors.end(), bmc_sensors_.begin(), bmc_sensors_.end());
  out.bmc = bmc_;
  return out;
}

}  // namespace bulkhead::sample
