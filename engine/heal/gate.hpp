// Kernels whose results are known: what the multiprocessors of a GPU must compute before its next tenant
// computes on it.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace bulkhead::heal::gate {

inline constexpr unsigned threads = 256;  // of a block

// One kernel, as PTX text, which the driver translates for the chip there is (from its compute capability
// on). Parameters: u64 address of the results, u32 rounds. Every block computes the same, from the thread's
// number alone: results[block * threads + thread], and behind those of all blocks, a word for each: the
// multiprocessor it ran on
// (%smid). Each round's result goes into the next one's, so that one wrong bit ends in a wrong word.
struct Kernel {
  const char* name;
  const char* what;  // in words, for the verdict
  int capability;    // major
  unsigned rounds;
  const char* ptx;
};
// Integers with IEEE 754 fused multiply-adds in single and double; the tensor cores' products of 8-bit
// integers.
extern const Kernel arithmetic, tensor;

// What the threads of a block must answer, computed here.
std::vector<std::uint32_t> expected_arithmetic(unsigned rounds), expected_tensor(unsigned rounds);

}  // namespace bulkhead::heal::gate
