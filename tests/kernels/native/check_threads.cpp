// Calls every op with one thread and with several, two callers at a time, and compares the bits.
//
// Built with -fsanitize=thread it finds races between the threads of an op and between callers. It
// prints one line a case, "name hash", the hash of what one thread wrote, so that runs on other
// instruction sets can be compared; the exit status is 1 where threads change a bit.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "ops.h"

namespace {

using hswq::DType;
using Bytes = std::vector<unsigned char>;

// Several blocks of 32,768 elements, in rows and groups that end inside them.
constexpr size_t kRows = 36;
constexpr size_t kRowSize = 10 * 731;
constexpr size_t kTaps = 5;
constexpr size_t kCount = kRows * kRowSize;
constexpr size_t kGroups = 4;
constexpr size_t kBins = 1021;
constexpr size_t kLayers = 5;

uint64_t Next(uint64_t* state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return *state >> 33;
}

// Fills with floats below 1 in magnitude of every kind of bits, but not Inf or NaN.
Bytes RandomElements(DType dtype, size_t count) {
  uint64_t state = 20 + static_cast<uint64_t>(dtype);
  Bytes bytes(count * (dtype == DType::kFloat32 ? 4 : 2));
  for (size_t i = 0; i < count; ++i) {
    if (dtype == DType::kFloat32) {
      const auto bits = static_cast<uint32_t>(Next(&state) ^ Next(&state) << 31) & 0xbf7fffff;
      std::memcpy(bytes.data() + 4 * i, &bits, 4);
    } else {
      const uint16_t mask = dtype == DType::kFloat16 ? 0xbbff : 0xbf7f;
      const auto bits = static_cast<uint16_t>(Next(&state) & mask);
      std::memcpy(bytes.data() + 2 * i, &bits, 2);
    }
  }
  return bytes;
}

template <typename T>
void Append(Bytes* bytes, const std::vector<T>& values) {
  const auto* first = reinterpret_cast<const unsigned char*>(values.data());
  bytes->insert(bytes->end(), first, first + values.size() * sizeof(T));
}

Bytes Quantize(DType dtype, const Bytes& elements, bool by_rows, size_t threads) {
  const size_t rows = by_rows ? kRows : 1;
  std::vector<float> amax(rows), scale(rows);
  for (size_t row = 0; row < rows; ++row) {
    amax[row] = 0.01f * static_cast<float>(row + 1);
    scale[row] = 0.37e-3f * static_cast<float>(row + 1);
  }
  std::vector<uint8_t> codes(kCount);
  hswq::PreferHugePages(codes.data(), codes.size());
  hswq::QuantizeE4m3(dtype, elements.data(), rows, kCount / rows, amax.data(), scale.data(),
                     threads, codes.data());
  std::vector<float> values(kCount);
  hswq::DequantizeE4m3(codes.data(), rows, kCount / rows, scale.data(), DType::kFloat32, threads,
                       values.data());
  Bytes result;
  Append(&result, codes);
  Append(&result, values);
  return result;
}

Bytes Search(DType dtype, const Bytes& elements, bool weighted, size_t threads) {
  std::vector<int64_t> importance(kGroups * kRowSize);
  uint64_t state = 7;
  for (int64_t& value : importance) value = static_cast<int64_t>(Next(&state));
  std::vector<double> hists(kLayers * kBins);
  std::vector<float> max_abs(kLayers);
  for (size_t layer = 0; layer < kLayers; ++layer) {
    const hswq::HistogramWeights weights{dtype,
                                         elements.data(),
                                         kRows,
                                         kRowSize / kTaps,
                                         kTaps,
                                         weighted ? importance.data() : nullptr,
                                         weighted ? kGroups : 1};
    max_abs[layer] = hswq::WeightedHistogram(weights, kBins, threads, hists.data() + layer * kBins);
  }
  std::vector<float> amax(kLayers);
  std::vector<double> mse(kLayers);
  Bytes result;
  for (const bool scaled : {false, true}) {
    hswq::SearchAmax(hists.data(), kLayers, kBins, max_abs.data(), scaled, 40, 2, threads,
                     amax.data(), mse.data());
    Append(&result, amax);
    Append(&result, mse);
    hswq::ClipMse(hists.data(), kBins, max_abs[0], amax.data(), kLayers, scaled, mse.data());
    Append(&result, mse);
  }
  Append(&result, hists);
  return result;
}

Bytes Watch(DType dtype, const Bytes& elements, bool convolution, size_t threads) {
  const size_t channels = convolution ? 10 : kRowSize;
  const size_t inner = convolution ? 731 : 1;
  std::vector<double> abs_mean(channels), means(channels), moments(3);
  std::vector<int64_t> calls(1), skipped(1), mean_y(2), mean_y2(2), abs_mean_sum(channels);
  const hswq::MonitorSums sums{calls.data(), skipped.data(), mean_y.data(), mean_y2.data(),
                               abs_mean_sum.data()};
  for (const bool has_abs_mean : {false, true}) {
    hswq::Monitor(dtype, elements.data(), kRows, channels, inner, dtype, elements.data(), kCount,
                  has_abs_mean, threads, sums, abs_mean.data());
  }
  hswq::ChannelAbsMean(dtype, elements.data(), kRows, channels, inner, threads, means.data());
  hswq::Moments(dtype, elements.data(), kCount, threads, moments.data());
  Bytes result;
  for (const auto* values : {&calls, &skipped, &mean_y, &mean_y2, &abs_mean_sum}) {
    Append(&result, *values);
  }
  for (const auto* values : {&abs_mean, &means, &moments}) Append(&result, *values);
  return result;
}

// The products of a Linear's inputs or of a convolution's patches, and weights rounded with a
// factor of the size of a block of columns and more.
Bytes Multiply(DType dtype, const Bytes& elements, bool convolution, size_t threads) {
  constexpr size_t kImages = 3;
  constexpr size_t kColumns = 180;
  hswq::Patches patches{kColumns, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, {}};
  if (convolution) patches = {20, {29, 31}, {3, 3}, {2, 1}, {1, 0}, {1, 2}, {}};
  Bytes result;
  std::vector<float> single(kColumns * kColumns / 2);
  hswq::Gram(dtype, elements.data(), convolution ? kImages : 1200, patches, 2, false, threads,
             single.data());
  Append(&result, single);
  std::vector<double> factor(kColumns * kColumns);
  hswq::Gram(dtype, elements.data(), convolution ? kImages : 1200, patches, 1, true, threads,
             factor.data());
  Append(&result, factor);
  for (size_t k = 0; k < kColumns; ++k) {
    for (size_t l = 0; l < kColumns; ++l) {
      factor[k * kColumns + l] = k == l ? 1.0 : static_cast<double>((k * 7 + l) % 13) * 0x1p-8;
    }
  }
  std::vector<int64_t> order(kColumns);
  for (size_t k = 0; k < kColumns; ++k) order[k] = static_cast<int64_t>(k * 7 % kColumns);
  constexpr size_t kRoundedRows = 150;
  std::vector<float> scale(kRoundedRows, 0.37e-2f);
  std::vector<uint8_t> codes(kRoundedRows * kColumns);
  hswq::RoundCompensated(dtype, elements.data(), kRoundedRows, kColumns, factor.data(),
                         scale.data(), order.data(), threads, codes.data());
  Append(&result, codes);

  // The same codes, as columns of as many rows as give several blocks of lanes.
  constexpr size_t kSwept = 64;
  const size_t lanes = codes.size() / kSwept;
  std::vector<float> second(kSwept * kSwept);
  for (size_t k = 0; k < kSwept; ++k) {
    for (size_t l = 0; l < kSwept; ++l) {
      second[k * kSwept + l] = k == l ? 2.0f : static_cast<float>((k * 5 + l) % 11) * 0x1p-6f;
    }
  }
  std::vector<float> slope(kSwept * lanes);
  for (size_t k = 0; k < slope.size(); ++k) slope[k] = static_cast<float>(k % 17) * 0x1p-9f;
  std::vector<float> scales(lanes, 0.37e-2f);
  std::vector<float> steps(slope.size());
  hswq::SweepCodes(slope.data(), codes.data(), second.data(), kSwept, lanes, scales.data(), threads,
                   steps.data());
  Append(&result, codes);
  Append(&result, slope);
  Append(&result, steps);
  return result;
}

uint64_t Hash(const Bytes& bytes) {
  uint64_t hash = 14695981039346656037u;
  for (const unsigned char byte : bytes) hash = (hash ^ byte) * 1099511628211u;
  return hash;
}

}  // namespace

int main() {
  std::printf("isa %s\n", hswq::ActiveKernels().isa);
  using Op = Bytes (*)(DType, const Bytes&, bool, size_t);
  const std::pair<const char*, Op> ops[] = {
      {"quantize", Quantize}, {"search", Search}, {"watch", Watch}, {"multiply", Multiply}};
  bool same = true;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    const Bytes elements = RandomElements(dtype, kCount);
    for (const auto& [name, op] : ops) {
      for (const bool variant : {false, true}) {
        const Bytes expected = op(dtype, elements, variant, 1);
        const std::string label =
            std::string(name) + (variant ? "+" : "-") + std::to_string(static_cast<int>(dtype));
        std::printf("%s %016llx\n", label.c_str(), static_cast<unsigned long long>(Hash(expected)));
        Bytes other;
        std::thread caller([&] { other = op(dtype, elements, variant, 3); });
        const bool equal = op(dtype, elements, variant, 7) == expected;
        caller.join();
        if (!equal || other != expected) {
          std::printf("threads change the bits of %s\n", label.c_str());
          same = false;
        }
      }
    }
  }
  return same ? 0 : 1;
}
