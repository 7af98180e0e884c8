// What a node is worth: how many GPU milli the fleet may still expect to sell on it. The mix is drawn into a
// few batches of tasks, each about several times what the node can hold; a batch is filled in with the
// largest task first, each on the GPU it fits tightest, as CPU, memory and GPUs allow; the worth is the sum
// over the batches of the milli that found room. So it prices all at once: holes nothing fits in, GPUs
// without the CPU to use them, and whole nodes kept for sets. It costs a task what it takes from the worth of
// its node.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include "core/fraction/fraction.hpp"

namespace bulkhead::fraction {

// Batches, and draws for each GPU of the node. On openb's mixes 4 to 16 batches and 6 to 12 draws sell the
// same within 0.2 points, where CPU is not scarce; more draws sell less of many small shares, fewer miss the
// large sets.
inline constexpr unsigned kBatches = 4;
inline constexpr unsigned kDrawsPerGpu = 6;

// The part of a node's state that its worth depends on. `gpus` ascending, as Kind::level gives them, zeros
// first.
struct Left {
  std::int32_t cpu = 0;
  std::int32_t memory = 0;
  std::array<std::int16_t, kMostGpus> gpus = {};
  friend bool operator==(const Left&, const Left&) = default;
};

// Nodes that differ only in what is free: same GPU count, model and memory of a GPU.
struct Kind {
  unsigned gpus = 0;
  unsigned model = 0;
  std::int64_t gpu_memory_mib = 0;
  friend bool operator==(const Kind&, const Kind&) = default;
};

// The mix as nodes of one kind see it.
class Worth {
 public:
  struct Draw {
    std::int32_t cpu = 0;
    std::int32_t memory = 0;
    std::int16_t size = 0;   // of each GPU: milli, or the share of its memory if that is more
    std::int16_t milli = 0;  // of each GPU: what is sold
    std::uint16_t num = 0;
  };

  Worth(const Kind& kind, std::span<const Typical> mix);  // every weight above 0

  // Free milli (the scarcer of milli and memory) -> the largest sum of shares of the mix that fits in. Two
  // GPUs of one level are worth the same in every future, so that states are few.
  std::int16_t level(std::int32_t milli) const { return level_[static_cast<std::size_t>(milli)]; }
  // More CPU or memory than the hungriest batch wants is worth no more.
  std::int32_t most_cpu() const { return most_cpu_; }
  std::int32_t most_memory() const { return most_memory_; }

  // In the order in which they are tried.
  std::span<const Draw> batch(unsigned b) const { return batches_[b].draws; }

  std::int32_t of(const Left& left) const { return of(left, 0); }  // 0 .. kBatches * 16 * kWhole
  // The same when it is at least `enough`; else it may stop early, with some figure below `enough` that of()
  // does not exceed.
  std::int32_t of(const Left& left, std::int32_t enough) const;

  // What of() cannot exceed, for the price of a few look-ups: a batch sells no more than it could on each GPU
  // by itself (`sold`, the sum of alone() over the levels), nor than the draws that the fullest GPU lets in
  // earn when they share out the CPU, or the memory, alone and may be cut to size. `top` is the largest
  // level, `whole` (16 at most) at least the number of GPUs of level kWhole.
  using Caps = std::array<std::int16_t, kBatches>;
  struct Rows {
    const Caps* cpu;
    const Caps* memory;
  };
  Rows rows(std::int32_t cpu, std::int32_t memory) const {
    return {cpu_caps_.data() + kBuckets * row(std::min(cpu, most_cpu_)),
            memory_caps_.data() + kBuckets * row(std::min(memory, most_memory_))};
  }
  const Caps& alone(std::int16_t level) const { return alone_[static_cast<std::size_t>(level)]; }
  std::int32_t at_most(const Rows& rows, const Caps& sold, std::int16_t top, unsigned whole) const {
    const auto bucket = bucket_of(top, whole);
    std::int32_t sum = 0;
    for (const auto cap : caps(rows, sold, bucket)) sum += cap;
    return sum;
  }

 private:
  // Buckets of what the GPUs let in: by the size of the largest, then by the number of whole ones in octaves.
  static constexpr unsigned kSizes = 11;
  static constexpr unsigned kBuckets = kSizes + 5;
  // Amounts in steps of a sixteenth: exact below 32.
  static std::size_t row(std::int32_t amount) {
    const auto x = static_cast<std::uint32_t>(amount);
    if (x < 16) return x;
    const auto shift = static_cast<unsigned>(std::bit_width(x)) - 5;
    return (std::size_t{shift} << 4U) + (x >> shift);
  }
  unsigned bucket_of(std::int16_t top, unsigned whole) const {
    return top == kWhole ? kSizes + static_cast<unsigned>(std::bit_width(whole | 1U)) - 1
                         : bucket_[static_cast<std::size_t>(top)];
  }
  static Caps caps(const Rows& rows, const Caps& sold, unsigned bucket) {
    Caps least;
    for (unsigned b = 0; b < kBatches; ++b)
      least[b] = std::min(sold[b], std::min(rows.cpu[bucket][b], rows.memory[bucket][b]));
    return least;
  }
  void set_caps();

  static constexpr unsigned kWords = (kDrawsPerGpu * kMostGpus + 63) / 64;
  static constexpr std::int32_t kSteps = 64;
  using Bits = std::array<std::uint64_t, kWords>;  // bit d: draw d
  struct Batch {
    std::vector<Draw> draws;
    // Draws that may be met from so much CPU or memory, in steps up to the largest draw.
    std::array<Bits, kSteps> cpu = {};
    std::array<Bits, kSteps> memory = {};
    // The first draw that is no set and whose size is at most the index.
    std::array<std::uint8_t, kWhole + 1> from = {};
  };
  unsigned gpus_;
  std::vector<std::int16_t> level_;
  std::array<Batch, kBatches> batches_;
  std::int32_t most_cpu_ = 0;
  std::int32_t most_memory_ = 0;
  unsigned cpu_step_ = 0;  // powers of two
  unsigned memory_step_ = 0;
  std::vector<Caps> alone_;
  std::vector<Caps> cpu_caps_;  // kBuckets a row
  std::vector<Caps> memory_caps_;
  std::array<std::uint8_t, kWhole> bucket_ = {};
};

}  // namespace bulkhead::fraction
