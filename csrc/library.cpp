// SPDX-License-Identifier: Apache-2.0
// The schemas of the native operations, the same as those of spade_fast/ops/*.py. csrc/cpu/<op>.cpp registers an
// operation's CPU implementation, csrc/cuda/bindings.cpp all CUDA implementations.
#include <torch/library.h>

#define SPADE_FAST_MODULATION                                                                                    \
  "Tensor x, Tensor? mean, Tensor? rstd, Tensor[] params, Tensor? pattern_ids, Tensor? order, Tensor? offsets, " \
  "float[] slopes, int upsample, bool stats_from_x) -> Tensor[]"

TORCH_LIBRARY(spade_fast_native, m) {
  m.def("recognize(Tensor segmap) -> (Tensor, Tensor)");
  m.def("patterns(Tensor codes, int kernel_size) -> (Tensor, Tensor, Tensor)");
  m.def("segments(Tensor segment_ids, int num) -> (Tensor, Tensor)");
  m.def("embedding_sum(Tensor table, Tensor? bias, Tensor codes, bool edges, bool relu) -> Tensor");
  m.def(
      "embedding_sum_backward(Tensor dout, Tensor out, Tensor codes, int num_rows, bool edges, bool relu)"
      " -> (Tensor, Tensor)");
  m.def(
      "pattern_params(Tensor a, Tensor taps, Tensor w_gamma, Tensor b_gamma, Tensor w_beta, Tensor b_beta,"
      " Tensor? tap_order=None, Tensor? tap_offsets=None) -> Tensor");
  m.def(
      "pattern_params_backward(Tensor dparams, Tensor a, Tensor taps, Tensor w_gamma, Tensor w_beta,"
      " Tensor? tap_order=None, Tensor? tap_offsets=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "label_conv(Tensor codes, Tensor table, Tensor? bias, bool edges, int kernel_size, int stride, int padding,"
      " bool pooled=False) -> Tensor");
  m.def(
      "label_conv_backward(Tensor dout, Tensor codes, int num_rows, bool edges, int kernel_size, int stride,"
      " int padding, bool pooled=False) -> (Tensor, Tensor)");
  m.def("statistics(Tensor x, bool per_sample) -> (Tensor, Tensor)");
  m.def("modulation(" SPADE_FAST_MODULATION);
  m.def("modulation_backward(Tensor[] douts, " SPADE_FAST_MODULATION);
}
