// MIG: can the chips do it, is the mode in force, and does every instance work?
#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/doctor/rows.hpp"

namespace bulkhead::doctor {

namespace {

Judgement capable(const Evidence& e) {
  if (e.host.gpus.empty()) return waits("driver.loaded", "no GPU answers");
  std::vector<Source> without;
  for (const auto& gpu : e.host.gpus) {
    if (!gpu.mig_capable)
      without.push_back({"NVML", fmt::format("{} {}: {}", name_of(gpu), gpu.model,
                                             gpu.mig_why.empty() ? "no MIG" : gpu.mig_why)});
  }
  if (without.empty())
    return ok(fmt::format("all {} GPUs can be partitioned", e.host.gpus.size()),
              {{"NVML", e.host.gpus.front().model}});
  const std::vector<std::string> other{
      "# without MIG these GPUs offer software shares, passthrough and exclusive use: in the node file",
      "#   mode: share        # or exclusive"};
  return warn(fmt::format("{} of {} GPUs have no MIG: it is a property of the chip (L40 and L40S have none)",
                          without.size(), e.host.gpus.size()),
              without, other);
}

Judgement cuda(const Evidence& e) {
  if (!e.host.cuda_version) return waits("driver.loaded", "no driver tells its CUDA version");
  const auto version = Version::parse(*e.host.cuda_version);
  const Source source{"NVML", "CUDA " + *e.host.cuda_version};
  if (!version) return unknown("the driver's CUDA version cannot be understood", {source});
  if (version->major_part() >= 12)
    return ok(fmt::format("the driver supports CUDA {}", *e.host.cuda_version), {source});
  return warn(fmt::format("the driver supports CUDA {}: 12 or newer is wanted", *e.host.cuda_version),
              {source},
              install(e, "nvidia-driver", "nvidia-driver", "nvidia-open-driver-G06-signed-kmp-default"));
}

Judgement pending(const Evidence& e) {
  std::vector<Source> evidence;
  std::vector<std::string> mend;
  for (const auto& gpu : e.host.gpus) {
    if (!gpu.mig_capable || gpu.mig_now == gpu.mig_pending) continue;
    evidence.push_back({"NVML", fmt::format("{}: MIG {} now, {} pending", name_of(gpu),
                                            gpu.mig_now ? "on" : "off", gpu.mig_pending ? "on" : "off")});
    for (const auto& holder : gpu.holders)
      evidence.push_back({fmt::format("/proc/{}", holder.pid), fmt::format("{} holds the GPU", holder.name)});
    mend.push_back(sudo(e, fmt::format("nvidia-smi -i {} --gpu-reset", gpu.index)));
  }
  if (evidence.empty()) return ok("no MIG mode change is pending");
  mend.insert(mend.begin(), "# stop the processes on the GPU (and nvidia-persistenced, dcgm), then");
  return warn("a MIG mode change waits for the GPU to be reset", evidence, mend);
}

Judgement empty_instances(const Evidence& e) {
  std::vector<Source> evidence;
  std::vector<std::string> mend;
  for (const auto& gpu : e.host.gpus) {
    for (const auto& instance : gpu.instances) {
      if (!instance.compute.empty()) continue;
      evidence.push_back({"NVML", fmt::format("{}: GPU instance {} ({}) has no compute instance",
                                              name_of(gpu), instance.id, instance.name)});
      mend.push_back(sudo(e, fmt::format("nvidia-smi mig -i {} -gi {} -cci", gpu.index, instance.id)));
    }
  }
  if (evidence.empty()) return ok("every GPU instance has a compute instance");
  return fail(fmt::format("{} 0 MB: a GPU instance without compute instance makes no device",
                          evidence.size() == 1 ? std::string("1 GPU instance shows")
                                               : fmt::format("{} GPU instances show", evidence.size())),
              evidence, mend);
}

Judgement no_instances(const Evidence& e) {
  std::vector<Source> evidence;
  std::vector<std::string> mend;
  for (const auto& gpu : e.host.gpus) {
    if (!gpu.mig_now || !gpu.instances.empty()) continue;
    evidence.push_back({"NVML", fmt::format("{}: MIG on, no GPU instance", name_of(gpu))});
    mend.push_back(
        sudo(e, fmt::format("nvidia-smi -i {} -mig 0   # or cut it: bulkhead plan -f NODE_FILE", gpu.index)));
  }
  if (evidence.empty()) return ok("no GPU is in MIG mode without instances");
  return warn("a GPU in MIG mode has no instance: CUDA does not see it at all", evidence, mend);
}

Judgement monitors(const Evidence& e) {
  // What opens GPU instances and keeps them: DCGM issues 95 and 276, gpu-operator issue 118.
  constexpr std::string_view known[] = {"nv-hostengine", "dcgm-exporter", "nvidia_gpu_expor", "gpud",
                                        "nvtop"};
  std::vector<Source> running;
  for (const auto& [path, text] : e.matching("/proc/*/comm")) {
    const auto name = trim(text);
    if (std::find(std::begin(known), std::end(known), name) != std::end(known))
      running.push_back({path, std::string(name)});
  }
  const bool sliced = std::any_of(e.host.gpus.begin(), e.host.gpus.end(),
                                  [](const auto& gpu) { return gpu.mig_now || gpu.mig_pending; });
  if (running.empty()) return ok("no monitor holds GPU instances");
  if (!sliced) return ok("monitors run; no GPU is in MIG mode", running);
  return warn("a monitor may hold GPU instances: a re-cut then ends in \"In use by another client\"", running,
              {"# before a change of layout:", sudo(e, "systemctl stop nvidia-dcgm dcgm-exporter"),
               "# and start them again after it"});
}

}  // namespace

std::vector<Check> mig_rows() {
  return {
      {.id = "mig.capable",
       .title = "The GPUs can be partitioned",
       .requirements = {"R3"},
       .purposes = for_mig,
       .reads = {},
       .why = "MIG is in the silicon of A30, A100, H100, H200 and their successors; no setting adds it to "
              "another chip.",
       .judge = capable},
      {.id = "mig.cuda",
       .title = "The driver supports CUDA 12",
       .requirements = {"R3"},
       .purposes = for_mig,
       .reads = {},
       .why = "Profiles of Hopper and later chips come with CUDA 12 drivers.",
       .judge = cuda},
      {.id = "mig.pending",
       .title = "No MIG mode change is pending",
       .requirements = {"R3", "R18"},
       .purposes = for_mig,
       .reads = {},
       .why = "The command succeeds and changes nothing until the reset: what is pending is not what is.",
       .judge = pending},
      {.id = "mig.empty-instance",
       .title = "Every GPU instance has a compute instance",
       .requirements = {"R37"},
       .purposes = for_mig,
       .reads = {},
       .why = "This is the MIG instance that shows 0 MB: its memory is reserved and no program can use it.",
       .judge = empty_instances},
      {.id = "mig.no-instance",
       .title = "No GPU idles in MIG mode without instances",
       .requirements = {"R18", "R37"},
       .purposes = for_mig,
       .reads = {},
       .why = "MIG on with nothing cut takes the GPU away from everybody.",
       .judge = no_instances},
      {.id = "mig.monitors",
       .title = "No monitor stands in the way of a re-cut",
       .requirements = {"R18"},
       .purposes = for_mig,
       .reads = {{How::text, "/proc/*/comm"}},
       .why = "Instances held by a monitor cannot be destroyed, and the driver does not say by whom.",
       .judge = monitors},
  };
}

}  // namespace bulkhead::doctor
