// SPDX-License-Identifier: Apache-2.0
// recognize: whether a map is exactly one-hot, and its label codes. One pass, which ends at the first other value.
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

#include "common.h"

namespace spade_fast::cpu {
namespace {

// Values are compared as bits. 1 has one representation in each type. 0 may have a sign in floating point.
template <typename T>
struct Bits {
  T one;        // the bits of 1
  T magnitude;  // a mask of all bits, without the sign in floating point
};

template <typename T>
Bits<T> bits(at::ScalarType type) {
  constexpr T all = static_cast<T>(~T{0}), rest = static_cast<T>(all >> 1);
  switch (type) {
    case at::kDouble: return {static_cast<T>(0x3ff0000000000000), rest};
    case at::kFloat: return {static_cast<T>(0x3f800000), rest};
    case at::kHalf: return {static_cast<T>(0x3c00), rest};
    case at::kBFloat16: return {static_cast<T>(0x3f80), rest};
    default: return {1, all};
  }
}

constexpr int64_t kPixels = 2048;  // of a block: its sums stay in the first-level cache

// For each pixel of a block: how many channels before the last are 1, the sum of the numbers of these channels, and
// whether the last channel is 1.
struct Block {
  uint32_t count[kPixels], label[kPixels], last[kPixels];
};

// Adds channel `number` of `size` pixels. Returns whether a value is neither 0 nor 1. unit: pixels are adjacent.
template <bool unit, typename T>
SPADE_FAST_CLONES bool add_channel(const T* values, int64_t step, int64_t size, Bits<T> is, uint32_t number,
                                   uint32_t* __restrict count, uint32_t* __restrict label) {
  T other = 0;
  for (int64_t i = 0; i < size; ++i) {
    const T value = values[unit ? i : i * step];
    const bool present = value == is.one;
    other |= present ? T{0} : static_cast<T>(value & is.magnitude);
    count[i] += present ? 1 : 0;
    label[i] += present ? number : 0;
  }
  return other != 0;
}

// Adds one pixel's channels before the last. Returns whether a value is neither 0 nor 1.
template <bool unit, typename T>
SPADE_FAST_CLONES bool add_pixel(const T* values, int64_t step, int64_t channels, Bits<T> is, uint32_t* count,
                                 uint32_t* label) {
  T other = 0;
  uint32_t found = 0, sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const T value = values[unit ? c : c * step];
    const bool present = value == is.one;
    other |= present ? T{0} : static_cast<T>(value & is.magnitude);
    found += present ? 1 : 0;
    sum += present ? static_cast<uint32_t>(c) : 0;
  }
  *count = found;
  *label = sum;
  return other != 0;
}

// What the pixels of a block were found to be.
struct Found {
  bool one_hot;          // at most one channel before the last is 1 in each pixel, all others are 0
  bool last_is_a_label;  // the last channel is never 1 beside another
};

// Reads pixels from `values` on and writes their codes, unless they are not one-hot.
template <typename T>
class BlockReader {
 public:
  BlockReader(const at::Tensor& map)
      : before_(map.size(1) - 1), channel_(map.stride(1)), pixel_(map.stride(3)), is_(bits<T>(map.scalar_type())) {}

  Found read(const T* values, int64_t size, Block& block, int32_t* codes) const {
    std::memset(&block, 0, sizeof(Block));
    if (!read_labels(values, size, block) || !read_last(values, size, block)) return {false, true};
    uint32_t most = 0, both = 0;
    for (int64_t p = 0; p < size; ++p) {
      const uint32_t count = block.count[p], last = block.last[p];
      most = std::max(most, count);
      both |= count & last;
      codes[p] = static_cast<int32_t>((count ? block.label[p] : static_cast<uint32_t>(before_)) * 2 + last);
    }
    return {most <= 1, both == 0};
  }

 private:
  // The channels before the last, in the order of memory. Returns whether all values are 0 or 1.
  bool read_labels(const T* values, int64_t size, Block& block) const {
    bool other = false;
    if (before_ > 0 && channel_ < pixel_) {
      for (int64_t p = 0; p < size && !other; ++p) {
        const T* from = values + p * pixel_;
        other = channel_ == 1 ? add_pixel<true>(from, 1, before_, is_, block.count + p, block.label + p)
                              : add_pixel<false>(from, channel_, before_, is_, block.count + p, block.label + p);
      }
    } else {
      for (int64_t c = 0; c < before_ && !other; ++c) other = read_channel(values, size, c, block.count, block.label);
    }
    return !other;
  }

  bool read_last(const T* values, int64_t size, Block& block) const {
    uint32_t unused[kPixels] = {};  // the sums of a single channel's number
    return !read_channel(values, size, before_, block.last, unused);
  }

  bool read_channel(const T* values, int64_t size, int64_t c, uint32_t* count, uint32_t* label) const {
    const T* from = values + c * channel_;
    return pixel_ == 1 ? add_channel<true>(from, 1, size, is_, static_cast<uint32_t>(c), count, label)
                       : add_channel<false>(from, pixel_, size, is_, static_cast<uint32_t>(c), count, label);
  }

  const int64_t before_, channel_, pixel_;
  const Bits<T> is_;
};

template <typename T>
int64_t recognize_as(const at::Tensor& map, int32_t* codes) {
  const int64_t n = map.size(0), channels = map.size(1), h = map.size(2), w = map.size(3), pixel = map.stride(3);
  const bool whole = map.stride(2) == w * pixel || h == 1;  // rows follow one another, so an image is one long row
  const int64_t rows = whole ? n : n * h, length = whole ? h * w : w;
  const int64_t blocks = (length + kPixels - 1) / kPixels;
  const T* data = static_cast<const T*>(map.const_data_ptr());
  const BlockReader<T> reader(map);
  std::atomic<bool> one_hot{true}, last_is_a_label{true};
  const int64_t grain = std::max<int64_t>(1, 16384 / (kPixels * channels));
  at::parallel_for(0, rows * blocks, grain, [&](int64_t begin, int64_t end) {
    const auto block = std::make_unique<Block>();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / blocks, first = i % blocks * kPixels, size = std::min(kPixels, length - first);
      const T* values = data + (whole ? row * map.stride(0) : row / h * map.stride(0) + row % h * map.stride(2));
      const Found found = reader.read(values + first * pixel, size, *block, codes + row * length + first);
      if (!found.last_is_a_label) last_is_a_label.store(false, std::memory_order_relaxed);
      if (!found.one_hot) one_hot.store(false, std::memory_order_relaxed);
      if (!one_hot.load(std::memory_order_relaxed)) return;
    }
  });
  if (!one_hot) return 0;
  if (!last_is_a_label) return 2;
  const auto num = static_cast<int32_t>(channels);
  for (int64_t i = 0; i < n * h * w; ++i)  // the last channel is a label, not an edge
    codes[i] = codes[i] >> 1 < num - 1 ? codes[i] >> 1 : num - (codes[i] & 1);
  return 1;
}

std::tuple<at::Tensor, at::Tensor> recognize(const at::Tensor& map) {
  TORCH_CHECK(map.dim() == 4 && map.size(1) >= 1 && map.size(1) < (1 << 30),
              "recognize: segmap must have shape [N, L, H, W] with L from 1 to 2**30 - 1, got ", map.sizes());
  const auto type = map.scalar_type();
  TORCH_CHECK(at::isIntegralType(type, true) || type == at::kDouble || type == at::kFloat || type == at::kHalf ||
                  type == at::kBFloat16,
              "recognize: segmap must hold integers, booleans or floating point of 16 bits or more, got ", type);
  const at::Tensor codes = empty({map.size(0), map.size(2), map.size(3)}, map.options().dtype(at::kInt));
  int64_t kind = 1;
  if (codes.numel() > 0) {
    auto* out = codes.data_ptr<int32_t>();
    switch (map.element_size()) {
      case 1: kind = recognize_as<uint8_t>(map, out); break;
      case 2: kind = recognize_as<uint16_t>(map, out); break;
      case 4: kind = recognize_as<uint32_t>(map, out); break;
      default: kind = recognize_as<uint64_t>(map, out);
    }
  }
  return {codes, at::scalar_tensor(kind, map.options().dtype(at::kInt))};
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("recognize", recognize); }

}  // namespace
}  // namespace spade_fast::cpu
