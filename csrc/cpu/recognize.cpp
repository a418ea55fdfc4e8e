// SPDX-License-Identifier: Apache-2.0
// recognize: whether a map is exactly one-hot, and its label codes, in one pass that ends at the first other value.
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

#include "common.h"

namespace spade_fast::cpu {
namespace {

// Values are compared as bits: 1 has one representation in each type; 0 may have a sign, in floating point.
template <typename T>
struct Bits {
  T one, magnitude;  // magnitude: all bits of a value but a sign that 0 may have
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

// What is known of a block of pixels: how many of the channels before the last are 1, the sum of their numbers, and
// whether the last channel is 1.
struct Block {
  uint32_t count[kPixels], label[kPixels], last[kPixels];
};

// Adds channel `number` of `size` pixels; whether a value is neither 0 nor 1. unit: pixels are adjacent.
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

// One pixel's channels before the last; whether a value is neither 0 nor 1.
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

template <typename T>
int64_t recognize_as(const at::Tensor& map, int32_t* codes) {
  const int64_t n = map.size(0), channels = map.size(1), h = map.size(2), w = map.size(3), before = channels - 1;
  const int64_t channel = map.stride(1), pixel = map.stride(3);
  const bool whole = map.stride(2) == w * pixel || h == 1;  // rows follow one another: an image is one long row
  const int64_t rows = whole ? n : n * h, length = whole ? h * w : w;
  const int64_t blocks = (length + kPixels - 1) / kPixels;
  const bool by_pixel = channels > 1 && channel < pixel;
  const T* data = static_cast<const T*>(map.const_data_ptr());
  const Bits<T> is = bits<T>(map.scalar_type());
  std::atomic<bool> one_hot{true}, single{true};
  at::parallel_for(
      0, rows * blocks, std::max<int64_t>(1, 16384 / (kPixels * channels)), [&](int64_t begin, int64_t end) {
        const auto block = std::make_unique<Block>();
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i / blocks, first = i % blocks * kPixels, size = std::min(kPixels, length - first);
          const T* values = data + (whole ? row * map.stride(0) : row / h * map.stride(0) + row % h * map.stride(2));
          values += first * pixel;
          std::memset(block.get(), 0, sizeof(Block));
          bool other = false;
          const auto plane = [&](int64_t c, uint32_t* count, uint32_t* label) {
            const T* from = values + c * channel;
            other |= pixel == 1 ? add_channel<true>(from, 1, size, is, static_cast<uint32_t>(c), count, label)
                                : add_channel<false>(from, pixel, size, is, static_cast<uint32_t>(c), count, label);
          };
          if (by_pixel) {
            for (int64_t p = 0; p < size && !other; ++p) {
              const T* from = values + p * pixel;
              other = channel == 1 ? add_pixel<true>(from, 1, before, is, block->count + p, block->label + p)
                                   : add_pixel<false>(from, channel, before, is, block->count + p, block->label + p);
            }
          } else {
            for (int64_t c = 0; c < before && !other; ++c) plane(c, block->count, block->label);
          }
          uint32_t most = 0, both = 0;
          if (!other) {
            // The sum of numbers of the last channel alone is of no use: it goes where nothing is read any more.
            uint32_t unused[kPixels];
            std::memset(unused, 0, sizeof(unused));
            plane(before, block->last, unused);
            int32_t* out = codes + row * length + first;
            for (int64_t p = 0; p < size; ++p) {
              const uint32_t count = block->count[p], last = block->last[p];
              most = std::max(most, count);
              both |= count & last;
              out[p] = static_cast<int32_t>((count ? block->label[p] : static_cast<uint32_t>(before)) * 2 + last);
            }
          }
          if (both) single.store(false, std::memory_order_relaxed);
          if (other || most > 1) one_hot.store(false, std::memory_order_relaxed);
          if (!one_hot.load(std::memory_order_relaxed)) return;
        }
      });
  if (!one_hot) return 0;
  if (!single) return 2;
  const auto num = static_cast<int32_t>(channels);
  for (int64_t i = 0; i < n * h * w; ++i)  // the last channel is a label
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
