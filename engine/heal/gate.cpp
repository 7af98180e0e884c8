#include "engine/heal/gate.hpp"

#include <array>
#include <cmath>
#include <cstring>

namespace bulkhead::heal::gate {

namespace {

// Both kernels begin and end alike: x from the thread's number; at the end x, and where it ran.
#define GATE_BEGIN                                                   \
  "  ld.param.u64 %out, [results]; ld.param.u32 %n, [rounds];\n"     \
  "  mov.u32 %t, %tid.x; mov.u32 %block, %ctaid.x; mov.u32 %i, 0;\n" \
  "  mul.lo.u32 %x, %t, 2654435761; xor.b32 %x, %x, 0x9e3779b9;\n"
#define GATE_END                                                                         \
  "  add.u32 %i, %i, 1; setp.lt.u32 %p, %i, %n; @%p bra again;\n"                        \
  "  mad.lo.u32 %w, %block, 256, %t; mul.wide.u32 %at, %w, 4; add.u64 %at, %out, %at;\n" \
  "  st.global.u32 [%at], %x;\n"                                                         \
  "  setp.ne.u32 %p, %t, 0; @%p ret;\n"                                                  \
  "  mov.u32 %w, %nctaid.x; mad.lo.u32 %w, %w, 256, %block;\n"                           \
  "  mul.wide.u32 %at, %w, 4; add.u64 %at, %out, %at;\n"                                 \
  "  mov.u32 %w, %smid; st.global.u32 [%at], %w; ret;\n"
#define GATE_REGISTERS "  .reg .b32 %x, %w, %v, %i, %n, %t, %block; .reg .b64 %out, %at; .reg .pred %p;\n"
#define GATE_STEP(into) "  mad.lo.u32 %x, %x, 1664525, 1013904223; mov.b32 " into ", %x;\n"

std::uint32_t begin(unsigned thread) { return (thread * 2654435761U) ^ 0x9e3779b9U; }
std::uint32_t step(std::uint32_t x) { return x * 1664525U + 1013904223U; }

}  // namespace

const Kernel arithmetic{
    "bulkhead_gate", "integers, single and double precision", 7, 16384,
    ".version 7.0\n.target sm_70\n.address_size 64\n"
    ".visible .entry bulkhead_gate(.param .u64 results, .param .u32 rounds) {\n" GATE_REGISTERS
    "  .reg .f32 %f, %g; .reg .f64 %d, %e;\n" GATE_BEGIN
    "  cvt.rn.f32.u32 %f, %t; cvt.rn.f64.u32 %d, %t;\n"
    "again:\n"
    "  mad.lo.u32 %x, %x, 1664525, 1013904223; shr.u32 %w, %x, 15; xor.b32 %x, %x, %w;\n"
    "  and.b32 %w, %x, 65535; cvt.rn.f32.u32 %g, %w; fma.rn.f32 %f, %f, 0f3F2AAAAB, %g;\n"
    "  cvt.rn.f64.u32 %e, %x; fma.rn.f64 %d, %d, 0d3FE5555555555555, %e;\n"
    "  mov.b32 %w, %f; xor.b32 %x, %x, %w; mov.b64 {%w, %v}, %d; xor.b32 %x, %x, %w; xor.b32 %x, %x, "
    "%v;\n" GATE_END "}\n"};

const Kernel tensor{
    "bulkhead_gate_mma", "tensor cores", 8, 1024,
    ".version 7.0\n.target sm_80\n.address_size 64\n"
    ".visible .entry bulkhead_gate_mma(.param .u64 results, .param .u32 rounds) {\n" GATE_REGISTERS
    "  .reg .b32 %a0, %a1, %a2, %a3, %b0, %b1, %c0, %c1, %c2, %c3;\n" GATE_BEGIN
    "  mov.u32 %c0, 0; mov.u32 %c1, 0; mov.u32 %c2, 0; mov.u32 %c3, 0;\n"
    "again:\n" GATE_STEP("%a0") GATE_STEP("%a1") GATE_STEP("%a2") GATE_STEP("%a3") GATE_STEP("%b0") GATE_STEP("%b1")
    "  mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%c0, %c1, %c2, %c3}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, "
    "{%c0, %c1, %c2, %c3};\n"
    "  xor.b32 %x, %x, %c0; xor.b32 %x, %x, %c1; xor.b32 %x, %x, %c2; xor.b32 %x, %x, %c3;\n"
    GATE_END "}\n"};

std::vector<std::uint32_t> expected_arithmetic(unsigned rounds) {
  std::vector<std::uint32_t> out(threads);
  for (unsigned t = 0; t < threads; ++t) {
    std::uint32_t x = begin(t);
    auto f = static_cast<float>(t);
    auto d = static_cast<double>(t);
    for (unsigned i = 0; i < rounds; ++i) {
      x = step(x);
      x ^= x >> 15U;
      f = std::fma(f, 0x1.555556p-1F, static_cast<float>(x & 65535U));
      d = std::fma(d, 0x1.5555555555555p-1, static_cast<double>(x));
      std::uint32_t single = 0, halves[2];
      std::memcpy(&single, &f, sizeof f);
      std::memcpy(halves, &d, sizeof d);
      x ^= single ^ halves[0] ^ halves[1];
    }
    out[t] = x;
  }
  return out;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k32": of lane l, with g = l / 4 and q = l % 4, the bytes of a0..a3
// are A[g][4q..], A[g + 8][4q..], A[g][16 + 4q..], A[g + 8][16 + 4q..], those of b0, b1 B[4q..][g], B[16 +
// 4q..][g], and c0..c3 C[g][2q], C[g][2q + 1], C[g + 8][2q], C[g + 8][2q + 1].
std::vector<std::uint32_t> expected_tensor(unsigned rounds) {
  std::vector<std::uint32_t> out(threads);
  for (unsigned warp = 0; warp < threads / 32; ++warp) {
    std::array<std::uint32_t, 32> x{};
    std::int8_t a[16][32], b[8][32];
    std::uint32_t c[16][8] = {};
    for (unsigned lane = 0; lane < 32; ++lane) x[lane] = begin(warp * 32 + lane);
    for (unsigned i = 0; i < rounds; ++i) {
      for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned g = lane / 4, q = lane % 4 * 4;
        for (std::int8_t* const at :
             {&a[g][q], &a[g + 8][q], &a[g][16 + q], &a[g + 8][16 + q], &b[g][q], &b[g][16 + q]}) {
          x[lane] = step(x[lane]);
          std::memcpy(at, &x[lane], 4);
        }
      }
      for (unsigned row = 0; row < 16; ++row)
        for (unsigned column = 0; column < 8; ++column) {
          std::int32_t sum = 0;
          for (unsigned k = 0; k < 32; ++k) sum += a[row][k] * b[column][k];
          c[row][column] += static_cast<std::uint32_t>(sum);
        }
      for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned g = lane / 4, q = lane % 4 * 2;
        x[lane] ^= c[g][q] ^ c[g][q + 1] ^ c[g + 8][q] ^ c[g + 8][q + 1];
      }
    }
    for (unsigned lane = 0; lane < 32; ++lane) out[warp * 32 + lane] = x[lane];
  }
  return out;
}

}  // namespace bulkhead::heal::gate
