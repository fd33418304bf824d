// One E4M3 codepoint: bits of a float32 in, bits of a float32 out, integer arithmetic only.
//
// Every function here is static on purpose. The ISA files are compiled with different flags, and
// the linker would otherwise keep one shared copy, perhaps one that an older CPU cannot run.
#ifndef HSWQ_E4M3_H_
#define HSWQ_E4M3_H_

#include <cstddef>
#include <cstdint>

namespace hswq {

constexpr uint32_t kFloatInfinity = 0x7f800000;
// 448, the largest E4M3 magnitude.
constexpr uint32_t kE4m3MaxBits = 0x43e00000;
constexpr uint32_t kE4m3NaN = 0x7f;
constexpr size_t kE4m3Magnitudes = 127;

// Rounds a float32 magnitude (bits without the sign, at most infinity) to a float of kMantissaBits
// and exponent bias kBias: nearest, ties to even, subnormals included. What overflows is left to
// the caller: the result then exceeds the largest finite code.
template <uint32_t kMantissaBits, uint32_t kBias>
static constexpr uint32_t RoundMagnitude(uint32_t magnitude) {
  // Biased float32 exponent of the target's smallest normal number.
  constexpr uint32_t kLowest = 128 - kBias;
  const uint32_t exponent = magnitude >> 23;
  const uint32_t raised = exponent > kLowest ? exponent : kLowest;
  const uint32_t distance = raised - exponent;
  // A shift by 25 already rounds every significand to 0; the cap keeps shifts below 32.
  constexpr uint32_t kDropped = 23 - kMantissaBits;
  const uint32_t shift = kDropped + (distance < 26 - kDropped ? distance : 26 - kDropped);
  const uint32_t significand = (magnitude & 0x7fffff) | 0x800000;
  const uint32_t odd = (significand >> shift) & 1;
  const uint32_t below_half = (1u << (shift - 1)) - 1;
  const uint32_t rounded = (significand + below_half + odd) >> shift;
  return rounded + ((raised - kLowest) << kMantissaBits);
}

// Returns the codepoint nearest to the float32 with these bits: ties to even, saturating at +-448,
// infinities too; NaN becomes 0x7F plus its sign.
static constexpr uint32_t EncodeE4m3(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t clipped = magnitude < kE4m3MaxBits ? magnitude : kE4m3MaxBits;
  const uint32_t rounded = RoundMagnitude<3, 7>(clipped);
  return ((bits >> 24) & 0x80) | (magnitude > kFloatInfinity ? kE4m3NaN : rounded);
}

// Returns the float32 bits of a codepoint, which is exact; 0x7F and 0xFF are NaN.
static constexpr uint32_t DecodeE4m3(uint32_t code) {
  const uint32_t magnitude = code & 0x7f;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  // Subnormals are magnitude * 2^-9; `top` is the place of their leading one.
  const uint32_t top = (magnitude > 1 ? 1 : 0) + (magnitude > 3 ? 1 : 0);
  const uint32_t raised = (magnitude << (23 - top)) + ((117 + top) << 23);
  const uint32_t subnormal = magnitude == 0 ? 0 : raised;
  const uint32_t finite = magnitude < 8 ? subnormal : normal;
  return ((code & 0x80) << 24) | (magnitude == kE4m3NaN ? 0x7ff00000 : finite);
}

// The ladder of magnitudes m_0 = 0 < ... < m_126 = 448 as the search sees it: the step from m_k to
// m_{k+1} and the midpoint between them. Padded with zero steps to a whole number of vectors.
struct E4m3Ladder {
  static constexpr size_t kSize = 128;
  double step[kSize];
  double midpoint[kSize];
};

static constexpr double E4m3Magnitude(size_t code) {
  double value = code < 8 ? static_cast<double>(code) : static_cast<double>(8 + code % 8);
  for (size_t exponent = code < 8 ? 1 : code / 8; exponent < 10; ++exponent) value /= 2;
  for (size_t exponent = 10; exponent < code / 8; ++exponent) value *= 2;
  return value;
}

static constexpr E4m3Ladder MakeE4m3Ladder() {
  E4m3Ladder ladder{};
  for (size_t k = 0; k + 1 < kE4m3Magnitudes; ++k) {
    ladder.step[k] = E4m3Magnitude(k + 1) - E4m3Magnitude(k);
    ladder.midpoint[k] = (E4m3Magnitude(k + 1) + E4m3Magnitude(k)) / 2;
  }
  return ladder;
}

constexpr E4m3Ladder kE4m3Ladder = MakeE4m3Ladder();

static_assert(E4m3Magnitude(1) == 0x1p-9 && E4m3Magnitude(8) == 0x1p-6, "E4M3 subnormals");
static_assert(E4m3Magnitude(126) == 448.0, "largest E4M3 magnitude");
static_assert(EncodeE4m3(0x40600000) == 0x46 && DecodeE4m3(0xc6) == 0xc0600000, "3.5");
static_assert(EncodeE4m3(0xff800000) == 0xfe && EncodeE4m3(0xffc00000) == 0xff, "-Inf and NaN");

}  // namespace hswq

#endif  // HSWQ_E4M3_H_
