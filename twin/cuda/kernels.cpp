// Kernels that compute. Images are not read (module.cpp), so what a kernel of a known name does is written
// here once more, in the host's arithmetic: those that bulkhead's check of a GPU before its next tenant runs
// and whose every word it compares. The results agree with the PTX on silicon: docs/twin-against-real.md.
#include <cmath>
#include <cstring>
#include <vector>

#include "twin/cuda/driver.hpp"

namespace bulkhead::twin::cuda {

namespace {

constexpr unsigned threads = 256;

std::uint32_t next(std::uint32_t x) { return 1664525U * x + 1013904223U; }

// One thread: a linear congruential generator with a multiply-add in single and one in double, fed back.
std::uint32_t arithmetic(std::uint32_t thread, std::uint32_t rounds) {
  std::uint32_t x = thread * 2654435761U ^ 0x9e3779b9U;
  const double double_ratio = 2.0 / 3;
  const float ratio = 2.0F / 3;
  float f = static_cast<float>(thread);
  double d = thread;
  for (; rounds != 0; --rounds) {
    x = next(x);
    x ^= x >> 15U;
    f = std::fma(f, ratio, static_cast<float>(x & 0xffffU));
    d = std::fma(d, double_ratio, static_cast<double>(x));
    std::uint32_t words[3];
    std::memcpy(words, &f, 4);
    std::memcpy(words + 1, &d, 8);
    x ^= words[0] ^ words[1] ^ words[2];
  }
  return x;
}

// One warp's mma.m16n8k32 of signed bytes: registers as the lanes hold them, and the matrices as PTX lays
// them out.
struct Warp {
  std::uint32_t x[32] = {};
  std::uint32_t sums[32][4] = {};

  void round() {
    std::uint32_t a[32][4], b[32][2];
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (auto& word : a[lane]) word = x[lane] = next(x[lane]);
      for (auto& word : b[lane]) word = x[lane] = next(x[lane]);
    }
    const auto byte = [](std::uint32_t word, unsigned at) {
      return static_cast<std::int8_t>(word >> 8 * at);
    };
    for (unsigned lane = 0; lane < 32; ++lane)
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4, half = i / 2, column = lane % 4 * 2 + i % 2;
        std::uint32_t sum = 0;
        for (unsigned k = 0; k < 32; ++k) {
          const unsigned lane_of_k = k % 16 / 4;
          sum += static_cast<std::uint32_t>(byte(a[row * 4 + lane_of_k][half + k / 16 * 2], k % 4) *
                                            byte(b[column * 4 + lane_of_k][k / 16], k % 4));
        }
        sums[lane][i] += sum;
      }
    for (unsigned lane = 0; lane < 32; ++lane)
      for (const auto sum : sums[lane]) x[lane] ^= sum;
  }
};

std::vector<std::uint32_t> tensor(std::uint32_t rounds) {
  std::vector<std::uint32_t> out;
  for (unsigned first = 0; first < threads; first += 32) {
    Warp warp;
    for (unsigned lane = 0; lane < 32; ++lane) warp.x[lane] = (first + lane) * 2654435761U ^ 0x9e3779b9U;
    for (std::uint32_t i = 0; i < rounds; ++i) warp.round();
    out.insert(out.end(), warp.x, warp.x + 32);
  }
  return out;
}

// Block b runs on multiprocessor b modulo how many there are.
void answer(const Device& device, const unsigned* size, void* const* params,
            std::vector<std::uint32_t> block) {
  std::uint64_t results = 0;
  std::memcpy(&results, params[0], sizeof results);
  std::vector<std::uint32_t> places(size[0]);
  for (unsigned i = 0; i < size[0]; ++i) {
    places[i] = i % device.multiprocessors;
    if (places[i] == device.wrong) block[i % threads] ^= 1U << i % 32;
    copy_bytes(results + std::uint64_t{i} * threads * 4, reinterpret_cast<std::uint64_t>(block.data()),
               threads * 4);
    if (places[i] == device.wrong) block[i % threads] ^= 1U << i % 32;
  }
  copy_bytes(results + std::uint64_t{size[0]} * threads * 4, reinterpret_cast<std::uint64_t>(places.data()),
             places.size() * 4);
}

std::uint32_t rounds_of(void* const* params) {
  std::uint32_t rounds = 0;
  std::memcpy(&rounds, params[1], sizeof rounds);
  return rounds;
}

void gate(const Device& device, const unsigned* size, void* const* params) {
  std::vector<std::uint32_t> block;
  for (unsigned thread = 0; thread < threads; ++thread)
    block.push_back(arithmetic(thread, rounds_of(params)));
  answer(device, size, params, std::move(block));
}
void gate_mma(const Device& device, const unsigned* size, void* const* params) {
  answer(device, size, params, tensor(rounds_of(params)));
}

}  // namespace

decltype(CUfunc_st::work) work_of(std::string_view name) {
  if (name == "bulkhead_gate") return gate;
  if (name == "bulkhead_gate_mma") return gate_mma;
  return nullptr;
}

}  // namespace bulkhead::twin::cuda
