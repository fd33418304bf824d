// Every loop, written once. Included by isa_*.cpp, each compiled with its own flags.
//
// All of it is in unnamed namespaces and uses no inline function or template of the standard
// library: what the linker merges across ISA files might not run on this CPU. Built with
// -ffp-contract=off and without fast-math, all instruction sets give the same bits.

#include "gram.inl"
#include "histogram.inl"
#include "kernels.h"
#include "monitor.inl"
#include "quantize.inl"
#include "rounding.inl"
#include "search.inl"

namespace hswq {
namespace {

constexpr Kernels MakeKernels(const char* isa) {
  Kernels kernels{};
  kernels.isa = isa;
  kernels.quantize_e4m3 = QuantizeE4m3;
  kernels.look_up_codes = LookUpCodes;
  kernels.dequantize_e4m3 = DequantizeE4m3;
  kernels.max_abs = MaxAbs;
  kernels.magnitude_histogram = MagnitudeHistogram;
  kernels.bin_histogram = BinHistogram;
  kernels.prepare_clip = PrepareClip;
  kernels.rank_clip = RankClip;
  kernels.clip_mse = ClipMse;
  kernels.moments = Moments;
  kernels.channel_abs_sum = ChannelAbsSum;
  kernels.round_compensated = RoundCompensated;
  kernels.sweep_codes = SweepCodes;
  kernels.pack_gram = PackGram;
  kernels.add_gram = AddGram;
  return kernels;
}

}  // namespace
}  // namespace hswq
