#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "e4m3.h"
#include "ops.h"
#include "parallel.h"

namespace hswq {
namespace {

constexpr double kLargestThreshold = std::numeric_limits<float>::max();

// One layer's histogram with its workspace.
class ClipSearch {
 public:
  explicit ClipSearch(size_t bins) {
    size_t padded = 1;
    while (padded < bins) padded *= 2;
    centres_.resize(bins);
    above_mass_.resize(bins + 1);
    above_moment_.resize(bins + 1);
    terms_.resize(padded);
    histogram_.bins = bins;
    histogram_.padded_bins = padded;
    histogram_.centres = centres_.data();
    histogram_.above_mass = above_mass_.data();
    histogram_.above_moment = above_moment_.data();
    histogram_.terms = terms_.data();
  }
  // Moving keeps the addresses in histogram_, copying would not.
  ClipSearch(ClipSearch&&) = default;
  ClipSearch(const ClipSearch&) = delete;

  // max_abs > 0, finite. The caller keeps `hist` alive.
  void Load(const double* hist, float max_abs, bool scaled) {
    max_abs_ = max_abs;
    scaled_ = scaled;
    histogram_.hist = hist;
    histogram_.width = max_abs_ / static_cast<double>(histogram_.bins);
    kernels_.prepare_clip(&histogram_);
  }

  double Rank(float amax) const {
    if (scaled_) {
      return kernels_.rank_clip(histogram_, amax / 448.0, std::numeric_limits<double>::infinity());
    }
    return kernels_.rank_clip(histogram_, 1.0, std::min<double>(amax, 448.0));
  }

  // Finds the candidate with the least J, the first of equals, over all stages. `amaxes` and
  // `ranks` are workspace for `count` values each.
  void Run(size_t count, size_t refinements, float* amaxes, double* ranks, float* amax,
           double* mse) {
    double low = 0.5 * max_abs_;
    double high = max_abs_;
    *amax = std::numeric_limits<float>::quiet_NaN();
    *mse = std::numeric_limits<double>::infinity();
    for (size_t stage = 0; stage <= refinements; ++stage) {
      if (stage > 0) {
        const double width = (high - low) / 4;
        low = std::max(0.1 * max_abs_, *amax - width);
        high = std::min({1.2 * max_abs_, *amax + width, kLargestThreshold});
      }
      RunStage(low, high, count, amaxes, ranks, amax, mse);
    }
    // Only a histogram that holds NaN or infinity beats no candidate.
    if (!std::isfinite(*mse)) {
      *amax = std::numeric_limits<float>::quiet_NaN();
      *mse = std::numeric_limits<double>::quiet_NaN();
    }
  }

 private:
  void RunStage(double low, double high, size_t count, float* amaxes, double* ranks, float* amax,
                double* mse) {
    const double step = (high - low) / static_cast<double>(count - 1);
    for (size_t i = 0; i < count; ++i) {
      amaxes[i] = static_cast<float>(low + static_cast<double>(i) * step);
      ranks[i] = Rank(amaxes[i]);
    }
    // Two ranks may each be off by 2^-44 of the power (search.inl). A candidate that could still
    // win is evaluated by the definition; the rest cannot, and the outcome is that of evaluating
    // all.
    const double reach = *std::min_element(ranks, ranks + count) + 0x1p-42 * histogram_.power;
    size_t evaluated = kE4m3Magnitudes;
    for (size_t i = 0; i < count; ++i) {
      if (ranks[i] > reach) continue;
      if (!scaled_) {
        // Unscaled, thresholds that round to one codepoint have one J, and the first of them wins.
        const double* midpoints = kE4m3Ladder.midpoint;
        const auto codepoint = static_cast<size_t>(
            std::lower_bound(midpoints, midpoints + kE4m3Magnitudes - 1, amaxes[i]) - midpoints);
        if (codepoint == evaluated) continue;
        evaluated = codepoint;
      }
      const double error = kernels_.clip_mse(histogram_, amaxes[i], scaled_);
      if (error < *mse) {
        *mse = error;
        *amax = amaxes[i];
      }
    }
  }

  const Kernels& kernels_ = ActiveKernels();
  ClipHistogram histogram_{};
  std::vector<double> centres_, above_mass_, above_moment_, terms_;
  double max_abs_ = 0.0;
  bool scaled_ = false;
};

}  // namespace

void ClipMse(const double* hist, size_t bins, float max_abs, const float* candidates, size_t count,
             bool scaled, double* mse) {
  if (!(max_abs > 0.0f)) {
    std::fill_n(mse, count, static_cast<double>(max_abs));
    return;
  }
  const ScopedFloatEnvironment environment;
  ClipSearch search(bins);
  search.Load(hist, max_abs, scaled);
  for (size_t i = 0; i < count; ++i) mse[i] = search.Rank(candidates[i]);
}

void SearchAmax(const double* hists, size_t layers, size_t bins, const float* max_abs, bool scaled,
                size_t candidates, size_t refinements, size_t threads, float* amax, double* mse) {
  struct Workspace {
    ClipSearch search;
    std::vector<float> amaxes;
    std::vector<double> ranks;
  };
  std::vector<Workspace> workspaces;
  for (size_t worker = 0; worker < WorkerCount(layers, threads); ++worker) {
    workspaces.push_back(
        {ClipSearch(bins), std::vector<float>(candidates), std::vector<double>(candidates)});
  }
  ParallelFor(layers, threads, [&](size_t layer, size_t worker) {
    if (!(max_abs[layer] > 0.0f)) {
      // 0 or NaN: there is nothing to search.
      amax[layer] = max_abs[layer];
      mse[layer] = max_abs[layer];
      return;
    }
    Workspace& workspace = workspaces[worker];
    workspace.search.Load(hists + layer * bins, max_abs[layer], scaled);
    workspace.search.Run(candidates, refinements, workspace.amaxes.data(), workspace.ranks.data(),
                         amax + layer, mse + layer);
  });
}

}  // namespace hswq
