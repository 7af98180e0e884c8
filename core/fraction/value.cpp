#include "core/fraction/value.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>

#include "base/prng.hpp"

namespace bulkhead::fraction {
namespace {

// The part of a GPU that a task takes on nodes of this kind, rounded up; above kWhole when it does not fit.
std::int32_t size_of(const Task& task, const Kind& kind) {
  if (kind.gpu_memory_mib == 0 || task.gpu_memory_mib == 0) return task.gpu_milli;
  const std::int64_t of_memory =
      (task.gpu_memory_mib * kWhole + kind.gpu_memory_mib - 1) / kind.gpu_memory_mib;
  return std::max(task.gpu_milli, static_cast<std::int32_t>(std::min<std::int64_t>(of_memory, kWhole + 1)));
}

bool welcome(const Task& task, const Kind& kind) {
  return task.num_gpu != 0 && task.num_gpu <= kind.gpus && size_of(task, kind) <= kWhole &&
         (task.models == 0 || ((task.models >> kind.model) & 1U) != 0);
}

}  // namespace

Worth::Worth(const Kind& kind, std::span<const Typical> mix) : gpus_(kind.gpus), level_(kWhole + 1, 0) {
  std::vector<bool> reachable(kWhole + 1, false);
  reachable[0] = true;
  for (const auto& typical : mix) {
    if (!welcome(typical.task, kind)) continue;
    const auto size = static_cast<std::size_t>(size_of(typical.task, kind));
    for (std::size_t sum = size; sum <= kWhole; ++sum) {
      if (reachable[sum - size]) reachable[sum] = true;
    }
  }
  for (std::size_t milli = 1; milli <= kWhole; ++milli) {
    level_[milli] = reachable[milli] ? static_cast<std::int16_t>(milli) : level_[milli - 1];
  }

  // Any fixed order will do; the largest first puts the rare sets side by side, so that an even draw finds
  // them.
  std::vector<const Typical*> order;
  for (const auto& typical : mix) order.push_back(&typical);
  std::stable_sort(order.begin(), order.end(), [](const Typical* a, const Typical* b) {
    const auto key = [](const Task& t) {
      const auto milli = t.num_gpu == 0 ? 0 : t.gpu_milli;
      return std::tuple(static_cast<std::int64_t>(t.num_gpu) * milli, t.num_gpu, t.cpu_milli, t.memory_mib);
    };
    return key(a->task) > key(b->task);
  });
  std::vector<double> upto;
  double sum = 0;
  for (const auto* typical : order) upto.push_back(sum += typical->weight);

  // Draws come from a golden-ratio sequence: even over the mix in each batch, and over all batches together.
  const std::size_t draws = std::size_t{kDrawsPerGpu} * kind.gpus;
  std::size_t drawn = 0;
  for (unsigned b = 0; b < kBatches; ++b) {
    auto& batch = batches_[b].draws;
    std::int64_t cpu = 0;
    std::int64_t memory = 0;
    for (std::size_t d = 0; d < draws && !order.empty(); ++d) {
      const double turn = (static_cast<double>(drawn++) + 0.5) * 0.6180339887498949;
      const double at = (turn - std::floor(turn)) * sum;
      const auto hit = std::lower_bound(upto.begin(), upto.end(), at) - upto.begin();
      const auto& task = order[std::min(static_cast<std::size_t>(hit), order.size() - 1)]->task;
      // Tasks without a GPU would come last and sell nothing; drawing them leaves the fewer draws to the
      // others.
      if (!welcome(task, kind)) continue;
      batch.push_back({.cpu = static_cast<std::int32_t>(task.cpu_milli),
                       .memory = static_cast<std::int32_t>(task.memory_mib),
                       .size = static_cast<std::int16_t>(size_of(task, kind)),
                       .milli = static_cast<std::int16_t>(task.gpu_milli),
                       .num = static_cast<std::uint16_t>(task.num_gpu)});
      cpu += task.cpu_milli;
      memory += task.memory_mib;
    }
    // Of one size, any order: the hungriest for CPU first, or last, is measurably worse.
    Prng(b).shuffle(std::span<Draw>(batch));
    std::stable_sort(batch.begin(), batch.end(), [](const Draw& x, const Draw& y) {
      return std::pair(x.num > 1 ? x.num : 0, x.size) > std::pair(y.num > 1 ? y.num : 0, y.size);
    });
    most_cpu_ = static_cast<std::int32_t>(
        std::min<std::int64_t>(std::max<std::int64_t>(most_cpu_, cpu), kMostAmount));
    most_memory_ = static_cast<std::int32_t>(
        std::min<std::int64_t>(std::max<std::int64_t>(most_memory_, memory), kMostAmount));
    auto& from = batches_[b].from;
    std::size_t at = batch.size();
    for (std::int32_t size = 0; size <= kWhole; ++size) {
      while (at > 0 && batch[at - 1].num == 1 && batch[at - 1].size <= size) --at;
      from[static_cast<std::size_t>(size)] = static_cast<std::uint8_t>(at);
    }
  }
  std::int32_t largest_cpu = 0;
  std::int32_t largest_memory = 0;
  for (const auto& batch : batches_) {
    for (const auto& draw : batch.draws) {
      largest_cpu = std::max(largest_cpu, draw.cpu);
      largest_memory = std::max(largest_memory, draw.memory);
    }
  }
  while ((largest_cpu >> cpu_step_) >= kSteps) ++cpu_step_;
  while ((largest_memory >> memory_step_) >= kSteps) ++memory_step_;
  for (auto& batch : batches_) {
    for (std::size_t d = 0; d < batch.draws.size(); ++d) {
      const auto bit = std::uint64_t{1} << (d % 64);
      const auto& draw = batch.draws[d];
      for (auto step = static_cast<std::size_t>(draw.cpu >> cpu_step_); step < std::size_t{kSteps}; ++step) {
        batch.cpu[step][d / 64] |= bit;
      }
      for (auto step = static_cast<std::size_t>(draw.memory >> memory_step_); step < std::size_t{kSteps};
           ++step) {
        batch.memory[step][d / 64] |= bit;
      }
    }
  }
  set_caps();
}

void Worth::set_caps() {
  // The best that each batch can sell on one GPU, by the usual table for one knapsack. Sets are a whole GPU
  // each.
  alone_.assign(kWhole + 1, Caps{});
  for (unsigned b = 0; b < kBatches; ++b) {
    for (const auto& draw : batches_[b].draws) {
      for (auto room = std::size_t{kWhole}; room >= static_cast<std::size_t>(draw.size); --room) {
        const auto with = alone_[room - static_cast<std::size_t>(draw.size)][b] + draw.milli;
        alone_[room][b] = std::max(alone_[room][b], static_cast<std::int16_t>(with));
      }
    }
  }
  // Sizes of single GPUs, in as many groups as there are buckets.
  std::vector<std::int16_t> sizes;
  for (const auto& batch : batches_) {
    for (const auto& draw : batch.draws) {
      if (draw.num == 1 && draw.size < kWhole) sizes.push_back(draw.size);
    }
  }
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  // Bucket k lets in the first ends[k] sizes; the first bucket none.
  std::array<std::size_t, kSizes> ends{};
  for (std::size_t k = 0; k < kSizes; ++k) ends[k] = k * sizes.size() / (kSizes - 1);
  for (std::int16_t top = 0; top < kWhole; ++top) {
    const auto in =
        static_cast<std::size_t>(std::upper_bound(sizes.begin(), sizes.end(), top) - sizes.begin());
    std::uint8_t k = 0;
    while (ends[k] < in) ++k;
    bucket_[static_cast<std::size_t>(top)] = k;
  }
  const auto lets_in = [&](std::size_t bucket, const Draw& draw) {
    if (bucket >= kSizes) return draw.num < (2U << (bucket - kSizes));
    return draw.num == 1 && ends[bucket] > 0 && draw.size <= sizes[ends[bucket] - 1];
  };
  const auto fill = [&](std::vector<Caps>& caps, std::int32_t most, std::int32_t Draw::*amount) {
    const auto rows = row(most) + 1;
    caps.assign(rows * kBuckets, Caps{});
    for (unsigned b = 0; b < kBatches; ++b) {
      auto draws = batches_[b].draws;
      const auto earns = [](const Draw& draw) { return std::int64_t{draw.milli} * draw.num; };
      std::stable_sort(draws.begin(), draws.end(), [&](const Draw& x, const Draw& y) {
        return earns(x) * (y.*amount) > earns(y) * (x.*amount);
      });
      for (std::size_t bucket = 0; bucket < kBuckets; ++bucket) {
        std::size_t at = 0;
        std::int64_t used = 0;
        std::int64_t sold = 0;
        for (std::size_t r = 0; r < rows; ++r) {
          const auto shift = r < 32 ? 0U : static_cast<unsigned>(r / 16 - 1);
          const auto upto =
              ((static_cast<std::int64_t>(r) - 16 * static_cast<std::int64_t>(shift) + 1) << shift) - 1;
          for (; at < draws.size(); ++at) {
            if (!lets_in(bucket, draws[at])) continue;
            if (used + draws[at].*amount > upto) break;
            used += draws[at].*amount;
            sold += earns(draws[at]);
          }
          const auto part =
              at < draws.size() ? earns(draws[at]) * (upto - used) / (draws[at].*amount) : std::int64_t{0};
          caps[r * kBuckets + bucket][b] =
              static_cast<std::int16_t>(std::min<std::int64_t>(sold + part, std::int64_t{gpus_} * kWhole));
        }
      }
    }
  };
  fill(cpu_caps_, most_cpu_, &Draw::cpu);
  fill(memory_caps_, most_memory_, &Draw::memory);
}

std::int32_t Worth::of(const Left& left, std::int32_t enough) const {
  std::int32_t sold = 0;
  const unsigned n = gpus_;
  if (n == 0 || left.gpus[n - 1] == 0) return 0;
  const auto words = (kDrawsPerGpu * n + 63) / 64;
  Caps most = {};
  std::int32_t open = 0;  // what the batches not filled in yet may add
  if (enough > 0) {
    unsigned whole = 0;
    Caps alone_sold = {};
    for (unsigned g = 0; g < n; ++g) {
      whole += left.gpus[g] == kWhole ? 1 : 0;
      for (unsigned b = 0; b < kBatches; ++b)
        alone_sold[b] = static_cast<std::int16_t>(alone_sold[b] + alone(left.gpus[g])[b]);
    }
    most = caps(rows(left.cpu, left.memory), alone_sold, bucket_of(left.gpus[n - 1], whole));
    for (const auto cap : most) open += cap;
  }
  for (unsigned b = 0; b < kBatches; ++b) {
    if (sold + open < enough) return sold + open;
    open -= most[b];
    const auto& batch = batches_[b];
    auto gpus = left.gpus;
    std::int32_t cpu = left.cpu;
    std::int32_t memory = left.memory;
    for (unsigned w = 0; w < words; ++w) {
      // Draws that may fit now; what is left only shrinks, so a draw that is out stays out.
      const auto may = [&] {
        const unsigned from = gpus[n - 1] == kWhole ? 0 : batch.from[static_cast<std::size_t>(gpus[n - 1])];
        const auto cpus = batch.cpu[static_cast<std::size_t>(std::min(cpu >> cpu_step_, kSteps - 1))][w];
        const auto memories =
            batch.memory[static_cast<std::size_t>(std::min(memory >> memory_step_, kSteps - 1))][w];
        if (from >= 64 * w + 64) return std::uint64_t{0};
        return cpus & memories & (from > 64 * w ? ~std::uint64_t{0} << (from - 64 * w) : ~std::uint64_t{0});
      };
      for (auto mask = may(); mask != 0;) {
        const auto& draw = batch.draws[64 * w + static_cast<unsigned>(std::countr_zero(mask))];
        mask &= mask - 1;
        if (cpu < draw.cpu || memory < draw.memory) continue;
        if (draw.num == 1) {
          unsigned at = 0;
          while (gpus[at] < draw.size) ++at;
          const auto rest = level_[static_cast<std::size_t>(gpus[at] - draw.size)];
          for (; at > 0 && gpus[at - 1] > rest; --at) gpus[at] = gpus[at - 1];
          gpus[at] = rest;
        } else {
          if (gpus[n - draw.num] < draw.size) continue;
          // Sets take whole GPUs, the last ones, and leave nothing of them.
          for (unsigned at = n; at-- > 0;) gpus[at] = at >= draw.num ? gpus[at - draw.num] : std::int16_t{0};
        }
        cpu -= draw.cpu;
        memory -= draw.memory;
        sold += draw.num * draw.milli;
        mask &= may();
      }
    }
  }
  return sold;
}

}  // namespace bulkhead::fraction
