// The Python module hswq.kernels._cpp: the operations of ops.h, with addresses as integers.
// hswq/kernels/cpp_backend.py is its only caller; it owns every buffer and checks sizes and dtypes.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "dispatch.h"
#include "ops.h"

namespace py = pybind11;

namespace {

template <typename T>
T* Pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  using hswq::DType;
  using Unlocked = py::call_guard<py::gil_scoped_release>;

  m.doc() = "Compiled CPU kernels; use them through hswq.kernels.";

  py::enum_<DType>(m, "DType")
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16)
      .value("float32", DType::kFloat32);

  m.attr("SWEPT_COLUMNS") = hswq::kSweptColumns;
  m.def("supported_isas", &hswq::SupportedIsas);
  m.def("active_isa", [] { return hswq::ActiveKernels().isa; });

  m.def(
      "prefer_huge_pages",
      [](uintptr_t begin, size_t size) { hswq::PreferHugePages(Pointer<void>(begin), size); },
      py::arg("begin"), py::arg("size"), Unlocked());

  m.def(
      "quantize_e4m3",
      [](DType dtype, uintptr_t weights, size_t rows, size_t row_size, uintptr_t amax,
         uintptr_t scale, size_t threads, uintptr_t codes) {
        hswq::QuantizeE4m3(dtype, Pointer<const void>(weights), rows, row_size,
                           Pointer<const float>(amax), Pointer<const float>(scale), threads,
                           Pointer<uint8_t>(codes));
      },
      py::arg("dtype"), py::arg("weights"), py::arg("rows"), py::arg("row_size"), py::arg("amax"),
      py::arg("scale"), py::arg("threads"), py::arg("codes"), Unlocked());

  m.def(
      "dequantize_e4m3",
      [](uintptr_t codes, size_t rows, size_t row_size, uintptr_t scale, DType dtype,
         size_t threads, uintptr_t values) {
        hswq::DequantizeE4m3(Pointer<const uint8_t>(codes), rows, row_size,
                             Pointer<const float>(scale), dtype, threads, Pointer<void>(values));
      },
      py::arg("codes"), py::arg("rows"), py::arg("row_size"), py::arg("scale"), py::arg("dtype"),
      py::arg("threads"), py::arg("values"), Unlocked());

  m.def(
      "weighted_histogram",
      [](DType dtype, uintptr_t values, std::array<size_t, 3> shape, uintptr_t importance,
         size_t groups, size_t bins, size_t threads, uintptr_t hist) {
        const hswq::HistogramWeights weights{
            dtype,    Pointer<const void>(values),        shape[0], shape[1],
            shape[2], Pointer<const int64_t>(importance), groups};
        return hswq::WeightedHistogram(weights, bins, threads, Pointer<double>(hist));
      },
      py::arg("dtype"), py::arg("values"), py::arg("shape"), py::arg("importance"),
      py::arg("groups"), py::arg("bins"), py::arg("threads"), py::arg("hist"), Unlocked());

  m.def(
      "clip_mse",
      [](uintptr_t hist, size_t bins, float max_abs, uintptr_t candidates, size_t count,
         bool scaled, uintptr_t mse) {
        hswq::ClipMse(Pointer<const double>(hist), bins, max_abs, Pointer<const float>(candidates),
                      count, scaled, Pointer<double>(mse));
      },
      py::arg("hist"), py::arg("bins"), py::arg("max_abs"), py::arg("candidates"), py::arg("count"),
      py::arg("scaled"), py::arg("mse"), Unlocked());

  m.def(
      "search_amax",
      [](uintptr_t hists, size_t layers, size_t bins, uintptr_t max_abs, bool scaled,
         size_t candidates, size_t refinements, size_t threads, uintptr_t amax, uintptr_t mse) {
        hswq::SearchAmax(Pointer<const double>(hists), layers, bins, Pointer<const float>(max_abs),
                         scaled, candidates, refinements, threads, Pointer<float>(amax),
                         Pointer<double>(mse));
      },
      py::arg("hists"), py::arg("layers"), py::arg("bins"), py::arg("max_abs"), py::arg("scaled"),
      py::arg("candidates"), py::arg("refinements"), py::arg("threads"), py::arg("amax"),
      py::arg("mse"), Unlocked());

  m.def(
      "moments",
      [](DType dtype, uintptr_t values, size_t count, size_t threads, uintptr_t sums) {
        hswq::Moments(dtype, Pointer<const void>(values), count, threads, Pointer<double>(sums));
      },
      py::arg("dtype"), py::arg("values"), py::arg("count"), py::arg("threads"), py::arg("sums"),
      Unlocked());

  m.def(
      "channel_abs_mean",
      [](DType dtype, uintptr_t values, size_t outer, size_t channels, size_t inner, size_t threads,
         uintptr_t means) {
        hswq::ChannelAbsMean(dtype, Pointer<const void>(values), outer, channels, inner, threads,
                             Pointer<double>(means));
      },
      py::arg("dtype"), py::arg("values"), py::arg("outer"), py::arg("channels"), py::arg("inner"),
      py::arg("threads"), py::arg("means"), Unlocked());

  m.def(
      "monitor",
      [](DType x_dtype, uintptr_t x, size_t outer, size_t channels, size_t inner, DType y_dtype,
         uintptr_t y, size_t y_count, bool has_abs_mean, size_t threads, uintptr_t calls,
         uintptr_t skipped, uintptr_t mean_y, uintptr_t mean_y2, uintptr_t abs_mean_sum,
         uintptr_t abs_mean) {
        const hswq::MonitorSums sums{Pointer<int64_t>(calls), Pointer<int64_t>(skipped),
                                     Pointer<int64_t>(mean_y), Pointer<int64_t>(mean_y2),
                                     Pointer<int64_t>(abs_mean_sum)};
        hswq::Monitor(x_dtype, Pointer<const void>(x), outer, channels, inner, y_dtype,
                      Pointer<const void>(y), y_count, has_abs_mean, threads, sums,
                      Pointer<double>(abs_mean));
      },
      py::arg("x_dtype"), py::arg("x"), py::arg("outer"), py::arg("channels"), py::arg("inner"),
      py::arg("y_dtype"), py::arg("y"), py::arg("y_count"), py::arg("has_abs_mean"),
      py::arg("threads"), py::arg("calls"), py::arg("skipped"), py::arg("mean_y"),
      py::arg("mean_y2"), py::arg("abs_mean_sum"), py::arg("abs_mean"), Unlocked());

  using Pair = std::array<size_t, 2>;
  m.def(
      "gram",
      [](DType dtype, uintptr_t x, size_t images, size_t channels, Pair size, Pair kernel,
         Pair stride, Pair padding, Pair dilation, size_t blocks, bool is_float64, size_t threads,
         uintptr_t accumulator) {
        hswq::Patches patches{};
        patches.channels = channels;
        for (size_t axis = 0; axis < 2; ++axis) {
          patches.size[axis] = size[axis];
          patches.kernel[axis] = kernel[axis];
          patches.stride[axis] = stride[axis];
          patches.padding[axis] = padding[axis];
          patches.dilation[axis] = dilation[axis];
        }
        return hswq::Gram(dtype, Pointer<const void>(x), images, patches, blocks, is_float64,
                          threads, Pointer<void>(accumulator));
      },
      py::arg("dtype"), py::arg("x"), py::arg("images"), py::arg("channels"), py::arg("size"),
      py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("blocks"), py::arg("is_float64"), py::arg("threads"), py::arg("accumulator"),
      Unlocked());

  m.def(
      "round_compensated",
      [](DType dtype, uintptr_t weights, size_t rows, size_t columns, uintptr_t upper,
         uintptr_t scale, uintptr_t order, size_t threads, uintptr_t codes) {
        hswq::RoundCompensated(dtype, Pointer<const void>(weights), rows, columns,
                               Pointer<const double>(upper), Pointer<const float>(scale),
                               Pointer<const int64_t>(order), threads, Pointer<uint8_t>(codes));
      },
      py::arg("dtype"), py::arg("weights"), py::arg("rows"), py::arg("columns"), py::arg("upper"),
      py::arg("scale"), py::arg("order"), py::arg("threads"), py::arg("codes"), Unlocked());

  m.def(
      "sweep_codes",
      [](uintptr_t slope, uintptr_t codes, uintptr_t second, size_t columns, size_t lanes,
         uintptr_t scale, size_t threads, uintptr_t steps) {
        hswq::SweepCodes(Pointer<float>(slope), Pointer<uint8_t>(codes),
                         Pointer<const float>(second), columns, lanes, Pointer<const float>(scale),
                         threads, Pointer<float>(steps));
      },
      py::arg("slope"), py::arg("codes"), py::arg("second"), py::arg("columns"), py::arg("lanes"),
      py::arg("scale"), py::arg("threads"), py::arg("steps"), Unlocked());
}
