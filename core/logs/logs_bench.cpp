// The one pass over unrelated logs, beside grep -F and ripgrep with the same words on the same bytes.
// Usage: bench_logs [MEGABYTES]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <unistd.h>

#include "core/logs/logs.hpp"

namespace {

using namespace bulkhead;

std::string noise(std::size_t bytes) {
  const std::vector<std::string> lines = {
      "usb 1-1: new high-speed USB device number 7 using xhci_hcd",
      "EXT4-fs (sda1): mounted filesystem with ordered data mode. Quota mode: none.",
      "mlx5_core 0000:ab:00.0 mlx5_5: Port: 1 Link ACTIVE",
      "audit: type=1400 audit(1438180376.667:12391): apparmor=\"ALLOWED\" operation=\"open\" "
      "profile=\"snap.x\"",
      "eth0: renamed from veth3f2a91c",
      "br-2c0c90b2e92b: port 1(veth77d2a0e) entered forwarding state",
      "workqueue: ib_cache_event_task hogged CPU for >10000us 4 times, consider switching to WQ_UNBOUND",
      "systemd[1]: Started Session c12 of user worker.",
      "nfs: server filer7 not responding, still trying",
      "python3[2211]: step 1200 loss 2.1934 lr 3.0e-04 tokens/s 18234 memory 61.2 GiB"};
  std::mt19937 random(1);
  std::string out;
  out.reserve(bytes + 256);
  char head[32];
  for (unsigned i = 0; out.size() < bytes; ++i) {
    (void)std::snprintf(head, sizeof head, "[%12.6f] ", i * 0.001);
    out += head;
    out += lines[random() % lines.size()];
    out += '\n';
  }
  return out;
}

double seconds(const std::function<void()>& work) {
  std::vector<double> times;
  for (int i = 0; i < 5; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::ranges::sort(times);
  return times[2];
}

}  // namespace

int main(int argc, char** argv) {
  const auto megabytes = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 256;
  const auto text = noise(megabytes << 20U);
  const logs::Matcher matcher;
  std::size_t hits = 0;
  const double ours = seconds([&] { hits = matcher.match(text, WallTime{}).hits.size(); });
  std::size_t plain = 0;
  const double scalar =
      seconds([&] { matcher.filter().scan_plainly(text, [&](std::size_t, std::size_t) { ++plain; }); });
  const double gb = static_cast<double>(text.size()) / 1e9;
  std::printf("%-34s %7.2f GB/s   (%zu hits, %.0f MB, one thread)\n", "bulkhead, all rules", gb / ours, hits,
              gb * 1000);
  std::printf("%-34s %7.2f GB/s\n", "the same without wide instructions", gb / scalar);

  const auto room = std::filesystem::temp_directory_path() / ("bench_logs." + std::to_string(getpid()));
  std::filesystem::create_directory(room);
  std::ofstream(room / "log") << text;
  std::ofstream words(room / "words");
  words << "NVRM: Xid (\n: SXid (PCI:\n";
  for (const auto& rule : logs::rules())
    for (const auto needle : rule.needles)
      if (!needle.empty()) words << needle << '\n';
  words.close();
  const auto peer = [&](const char* name, const std::string& command) {
    const auto whole = "cd " + room.string() + " && LC_ALL=C " + command + " >/dev/null 2>&1";
    if (std::system(("command -v " + command.substr(0, command.find(' ')) + " >/dev/null").c_str()) != 0) {
      std::printf("%-34s not installed\n", name);
      return;
    }
    const double took = seconds([&] { (void)!std::system(whole.c_str()); });
    std::printf("%-34s %7.2f GB/s   ours is %.1f times as fast\n", name, gb / took, took / ours);
  };
  peer("grep -F -f words", "grep -F -c -f words log");
  peer("grep -F 'NVRM: Xid (' (one word)", "grep -F -c 'NVRM: Xid (' log");
  peer("rg -F -f words, one thread", "rg -j1 -F -c -f words log");
  peer("rg -F 'NVRM: Xid (' (one word)", "rg -j1 -F -c 'NVRM: Xid (' log");
  std::filesystem::remove_all(room);
  return gb / ours >= 1.0 ? 0 : 1;
}
