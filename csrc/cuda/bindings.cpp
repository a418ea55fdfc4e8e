// SPDX-License-Identifier: Apache-2.0
// The CUDA implementations of the native operations: tensors in, launchers of launchers.h, tensors out.
//
// Layouts and types that the kernels do not take are converted first. Nothing here links to a CUDA build of torch: the
// device guard is virtual, and the current stream is looked up in libtorch_cuda when it is needed. With
// SPADE_FAST_ON_CPU, for tests only, the same code runs the kernels on CPU tensors (tests/support/cuda_on_cpu.h).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <dlfcn.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "launchers.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef SPADE_FAST_ON_CPU
cudaStream_t current_stream(const Tensor&) { return nullptr; }
int32_t read_int(const Tensor& value, cudaStream_t) { return *value.const_data_ptr<int32_t>(); }
void check(cudaError_t status, const char* op) {
  TORCH_CHECK(status == cudaSuccess, "spade_fast::", op, ": CUDA error ", int(status));
}
#else
void check(cudaError_t status, const char* op) {
  TORCH_CHECK(status == cudaSuccess, "spade_fast::", op, ": ", cudaGetErrorString(status));
}
cudaStream_t current_stream(const Tensor& t) {
  using Lookup = int32_t (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  TORCH_CHECK(lookup != nullptr,
              "spade_fast: this torch has no aoti_torch_get_current_cuda_stream in libtorch_cuda.so; use "
              "SPADE_FAST_BACKEND=triton");
  void* stream = nullptr;
  TORCH_CHECK(lookup(t.get_device(), &stream) == 0, "spade_fast: no current CUDA stream for ", t.device());
  return static_cast<cudaStream_t>(stream);
}
// Waits for the stream.
int32_t read_int(const Tensor& value, cudaStream_t stream) {
  int32_t result = 0;
  check(cudaMemcpyAsync(&result, value.const_data_ptr(), sizeof(result), cudaMemcpyDeviceToHost, stream), "patterns");
  check(cudaStreamSynchronize(stream), "patterns");
  return result;
}
#endif

int dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return SPADE_FAST_FLOAT32;
    case at::kHalf: return SPADE_FAST_FLOAT16;
    case at::kBFloat16: return SPADE_FAST_BFLOAT16;
    default:
      TORCH_CHECK_TYPE(false, "spade_fast::", op, " on backend cuda: ", name,
                       " must be float32, float16 or bfloat16, got ", t.scalar_type());
  }
}

Tensor empty_like(const Tensor& like, at::IntArrayRef shape, at::ScalarType dtype,
                  at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return at::empty(shape, like.options().dtype(dtype), format);
}

Tensor workspace(const Tensor& like, size_t bytes) { return empty_like(like, {int64_t(bytes)}, at::kByte); }

Tensor as(const Tensor& t, at::ScalarType dtype) { return t.to(dtype).contiguous(); }

OptionalTensor as(const OptionalTensor& t, at::ScalarType dtype) {
  if (!t.has_value()) return std::nullopt;
  return as(*t, dtype);
}

const void* pointer(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

// The layout of outputs with the shape of x: channels-last if x's channels are adjacent in memory.
at::MemoryFormat format_of(const Tensor& x) {
  return x.size(1) > 1 && x.stride(1) == 1 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

const int32_t* ints(const Tensor& t) { return t.const_data_ptr<int32_t>(); }

std::tuple<Tensor, Tensor, Tensor> patterns(const Tensor& codes_, int64_t kernel_size) {
  const c10::DeviceGuard guard(codes_.device());
  const Tensor codes = as(codes_, at::kInt);
  const int64_t n = codes.size(0), h = codes.size(1), w = codes.size(2);
  TORCH_CHECK(codes.numel() < (int64_t(1) << 30), "spade_fast::patterns: at most 2**30 - 1 pixels, got ",
              codes.numel());
  const cudaStream_t stream = current_stream(codes);
  const Tensor memory = workspace(codes, spade_fast_patterns_workspace(n, h, w));
  const Tensor total = empty_like(codes, {1}, at::kInt);
  check(spade_fast_patterns_find(ints(codes), n, h, w, int(kernel_size), total.mutable_data_ptr<int32_t>(),
                                 memory.mutable_data_ptr(), stream),
        "patterns");
  const int64_t found = read_int(total, stream);
  Tensor pattern_ids = empty_like(codes, {n, h, w}, at::kInt);
  Tensor taps = empty_like(codes, {found, kernel_size * kernel_size}, at::kInt);
  Tensor counts = empty_like(codes, {n}, at::kLong);
  check(spade_fast_patterns_write(ints(codes), n, h, w, int(kernel_size), found, ints(total),
                                  pattern_ids.mutable_data_ptr<int32_t>(), taps.mutable_data_ptr<int32_t>(),
                                  counts.mutable_data_ptr<int64_t>(), nullptr, memory.mutable_data_ptr(), stream),
        "patterns");
  return {pattern_ids, taps, counts};
}

std::tuple<Tensor, Tensor> segments(const Tensor& segment_ids_, int64_t num) {
  const c10::DeviceGuard guard(segment_ids_.device());
  TORCH_CHECK(segment_ids_.numel() < (int64_t(1) << 31), "spade_fast::segments: at most 2**31 - 1 positions, got ",
              segment_ids_.numel());
  const Tensor segment_ids = as(segment_ids_, at::kInt);
  const int64_t count = segment_ids.numel();
  Tensor order = empty_like(segment_ids, {count}, at::kInt), offsets = empty_like(segment_ids, {num + 1}, at::kInt);
  const Tensor memory = workspace(segment_ids, spade_fast_segments_workspace(count, num));
  check(
      spade_fast_segments(ints(segment_ids), count, num, order.mutable_data_ptr<int32_t>(),
                          offsets.mutable_data_ptr<int32_t>(), memory.mutable_data_ptr(), current_stream(segment_ids)),
      "segments");
  return {order, offsets};
}

Tensor embedding_sum(const Tensor& table_, const OptionalTensor& bias_, const Tensor& codes_, bool edges, bool relu) {
  const c10::DeviceGuard guard(table_.device());
  const int dtype = dtype_of(table_, "embedding_sum", "table");
  const Tensor table = table_.contiguous(), codes = as(codes_, at::kInt);
  const OptionalTensor bias = as(bias_, at::kFloat);
  Tensor out = empty_like(table, {codes.size(0), table.size(2)}, table.scalar_type());
  check(spade_fast_embedding_sum(table.const_data_ptr(), dtype, static_cast<const float*>(pointer(bias)), ints(codes),
                                 codes.size(0), table.size(0), table.size(1), table.size(2), edges, relu,
                                 out.mutable_data_ptr(), current_stream(table)),
        "embedding_sum");
  return out;
}

std::tuple<Tensor, Tensor> embedding_sum_backward(const Tensor& dout_, const Tensor& out_, const Tensor& codes_,
                                                  int64_t num_rows, bool edges, bool relu) {
  const c10::DeviceGuard guard(dout_.device());
  const char* const op = "embedding_sum_backward";
  const int dtype = dtype_of(dout_, op, "dout");
  const Tensor dout = dout_.contiguous(), out = as(out_, dout.scalar_type()), codes = as(codes_, at::kInt);
  const int64_t q = codes.size(0), taps = codes.size(1), width = dout.size(1), per_row = taps * (edges ? 2 : 1);
  const cudaStream_t stream = current_stream(dout);
  const Tensor numbers = empty_like(codes, {q, per_row}, at::kInt);
  check(spade_fast_embedding_rows(ints(codes), q, taps, num_rows, edges, numbers.mutable_data_ptr<int32_t>(), stream),
        op);
  const auto [order, offsets] = segments(numbers, taps * num_rows);
  Tensor dtable = empty_like(dout, {taps, num_rows, width}, dout.scalar_type());
  Tensor dbias = empty_like(dout, {width}, dout.scalar_type());
  const Tensor memory =
      workspace(dout, spade_fast_embedding_sum_backward_workspace(q, per_row, taps * num_rows, width));
  check(spade_fast_embedding_sum_backward(dout.const_data_ptr(), out.const_data_ptr(), dtype, ints(numbers),
                                          ints(order), ints(offsets), q, per_row, taps * num_rows, width, relu,
                                          dtable.mutable_data_ptr(), dbias.mutable_data_ptr(),
                                          memory.mutable_data_ptr(), stream),
        op);
  return {dtable, dbias};
}

std::tuple<Tensor, Tensor> statistics(const Tensor& x_, bool per_sample) {
  const c10::DeviceGuard guard(x_.device());
  const int dtype = dtype_of(x_, "statistics", "x");
  const at::MemoryFormat format = format_of(x_);
  const Tensor x = x_.contiguous(format);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  Tensor mean = empty_like(x, {per_sample ? n : 1, c}, at::kFloat), m2 = empty_like(x, mean.sizes(), at::kFloat);
  const Tensor memory = workspace(x, spade_fast_statistics_workspace(n, c, h, w));
  check(spade_fast_statistics(x.const_data_ptr(), dtype, format == at::MemoryFormat::ChannelsLast, n, c, h, w,
                              per_sample, mean.mutable_data_ptr<float>(), m2.mutable_data_ptr<float>(),
                              memory.mutable_data_ptr(), current_stream(x)),
        "statistics");
  return {mean, m2};
}

// What modulation and its backward give to the kernels, and the converted tensors whose memory it points to.
struct Modulation {
  Tensor x;
  OptionalTensor mean, rstd, pattern_ids;
  std::vector<Tensor> params;
  spade_fast_modulation_args args{};

  Modulation(const char* op, const Tensor& x_, const OptionalTensor& mean_, const OptionalTensor& rstd_,
             at::TensorList params_, const OptionalTensor& pattern_ids_, at::ArrayRef<double> slopes, int64_t upsample,
             at::MemoryFormat format)
      : x(x_.contiguous(format)),
        mean(as(mean_, at::kFloat)),
        rstd(as(rstd_, at::kFloat)),
        pattern_ids(as(pattern_ids_, at::kInt)) {
    args.dtype = dtype_of(x_, op, "x");
    // The kernels take all params in x's type, or all in float32. Other types are converted to float32, exactly.
    at::ScalarType dtype = params_[0].scalar_type();
    for (const Tensor& p : params_) {
      dtype_of(p, op, "params");
      if (p.scalar_type() != x.scalar_type() || p.scalar_type() != dtype) dtype = at::kFloat;
    }
    const bool dense = !pattern_ids_.has_value();
    for (const Tensor& p : params_) {
      params.push_back(p.to(dtype).contiguous(dense ? format : at::MemoryFormat::Contiguous));
    }
    args.n = x.size(0), args.c = x.size(1), args.h = x.size(2), args.w = x.size(3);
    args.params_dtype = dtype_of(params[0], op, "params");
    args.channels_last = format == at::MemoryFormat::ChannelsLast;
    args.upsample = int32_t(upsample);
    args.outputs = int32_t(params.size());
    args.dense = dense;
    args.groups = mean.has_value() ? mean->size(0) : 1;
    args.patterns = dense ? 0 : params[0].size(0);
    args.x = x.const_data_ptr();
    args.mean = static_cast<const float*>(pointer(mean));
    args.rstd = static_cast<const float*>(pointer(rstd));
    args.pattern_ids = static_cast<const int32_t*>(pointer(pattern_ids));
    for (size_t i = 0; i < params.size(); ++i) {
      args.params[i] = params[i].const_data_ptr();
      args.slopes[i] = float(slopes[i]);
    }
  }
};

std::vector<Tensor> modulation(const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd,
                               at::TensorList params, const OptionalTensor& pattern_ids, const OptionalTensor&,
                               const OptionalTensor&, at::ArrayRef<double> slopes, int64_t upsample, bool) {
  const c10::DeviceGuard guard(x.device());
  const at::MemoryFormat format = format_of(x);
  const Modulation call("modulation", x, mean, rstd, params, pattern_ids, slopes, upsample, format);
  std::vector<Tensor> outs;
  std::array<void*, 2> to{};
  for (size_t i = 0; i < params.size(); ++i) {
    outs.push_back(
        empty_like(x, {x.size(0), x.size(1), x.size(2) * upsample, x.size(3) * upsample}, x.scalar_type(), format));
    to[i] = outs[i].mutable_data_ptr();
  }
  check(spade_fast_modulation(&call.args, to.data(), current_stream(x)), "modulation");
  return outs;
}

std::vector<Tensor> modulation_backward(at::TensorList douts_, const Tensor& x, const OptionalTensor& mean,
                                        const OptionalTensor& rstd, at::TensorList params,
                                        const OptionalTensor& pattern_ids, const OptionalTensor& order_,
                                        const OptionalTensor& offsets_, at::ArrayRef<double> slopes, int64_t upsample,
                                        bool stats_from_x) {
  const c10::DeviceGuard guard(x.device());
  const char* const op = "modulation_backward";
  const auto channels_last = at::MemoryFormat::ChannelsLast;
  // Pass 1 gathers pixels, so it needs each pixel's channels in a row.
  const Modulation call(op, x, mean, rstd, params, pattern_ids, slopes, upsample, channels_last);
  OptionalTensor order = as(order_, at::kInt), offsets = as(offsets_, at::kInt);
  if (pattern_ids.has_value() && !(order.has_value() && offsets.has_value())) {
    std::tie(order, offsets) = segments(*call.pattern_ids, call.args.patterns);
  }
  std::vector<Tensor> douts, gradients;
  std::array<const void*, 2> from{};
  std::array<void*, 2> to{};
  Tensor dx = empty_like(x, x.sizes(), x.scalar_type(), channels_last);
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = call.params[i];
    douts.push_back(douts_[i].to(x.scalar_type()).contiguous(channels_last));
    gradients.push_back(
        empty_like(p, p.sizes(), p.scalar_type(), p.dim() == 4 ? channels_last : at::MemoryFormat::Contiguous));
    from[i] = douts[i].const_data_ptr();
    to[i] = gradients[i].mutable_data_ptr();
  }
  const Tensor memory = workspace(x, spade_fast_modulation_backward_workspace(&call.args));
  check(spade_fast_modulation_backward(&call.args, from.data(), static_cast<const int32_t*>(pointer(order)),
                                       static_cast<const int32_t*>(pointer(offsets)), stats_from_x,
                                       dx.mutable_data_ptr(), to.data(), memory.mutable_data_ptr(), current_stream(x)),
        op);
  std::vector<Tensor> results{dx.contiguous(format_of(x))};
  for (size_t i = 0; i < params.size(); ++i) results.push_back(gradients[i].to(params[i].scalar_type()));
  return results;
}

void implement(torch::Library& m) {
  m.impl("patterns", &patterns);
  m.impl("segments", &segments);
  m.impl("embedding_sum", &embedding_sum);
  m.impl("embedding_sum_backward", &embedding_sum_backward);
  m.impl("statistics", &statistics);
  m.impl("modulation", &modulation);
  m.impl("modulation_backward", &modulation_backward);
}

}  // namespace

#ifdef SPADE_FAST_ON_CPU
TORCH_LIBRARY_IMPL(spade_fast_cuda_on_cpu, CPU, m) { implement(m); }
#else
TORCH_LIBRARY_IMPL(spade_fast_native, CUDA, m) { implement(m); }
#endif
