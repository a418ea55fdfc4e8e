// SPDX-License-Identifier: Apache-2.0
// patterns: the distinct k×k patches of label maps, by a hash table in raster order.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"

namespace spade_fast::cpu {
namespace {

constexpr int32_t kOutside = -1;  // the code of a position outside the image

SPADE_FAST_CLONES void hash_columns(const int32_t* rows, int64_t stride, int64_t width, int64_t k, uint32_t* columns) {
  for (int64_t x = 0; x < width; ++x) columns[x] = 0;
  uint32_t factor = 0x9E3779B1u;
  for (int64_t dy = 0; dy < k; ++dy, factor = factor * 0x85EBCA6Bu + 0x27220A96u)  // stays odd
    for (int64_t x = 0; x < width; ++x) columns[x] += static_cast<uint32_t>(rows[dy * stride + x]) * factor;
  for (int64_t x = 0; x < width; ++x) columns[x] = (columns[x] ^ (columns[x] >> 15)) * 0x2C1B3C6Du;
}

// hashes[x] of the patch whose columns are x..x + k - 1.
SPADE_FAST_CLONES void hash_patches(const uint32_t* columns, int64_t width, int64_t k, uint32_t* hashes) {
  for (int64_t x = 0; x < width; ++x) hashes[x] = 0;
  uint32_t factor = 0xC2B2AE35u;
  for (int64_t dx = 0; dx < k; ++dx, factor = factor * 0x85EBCA6Bu + 0x27220A96u)
    for (int64_t x = 0; x < width; ++x) hashes[x] += columns[x + dx] * factor;
  for (int64_t x = 0; x < width; ++x) {
    const uint32_t h = (hashes[x] ^ (hashes[x] >> 16)) * 0x7FEB352Du;
    hashes[x] = h ^ (h >> 15);
  }
}

// fresh[x]: whether the patch at x differs from the patch at x - 1. The first counts as different.
SPADE_FAST_CLONES void mark_fresh(const int32_t* rows, int64_t stride, int64_t width, int64_t k, uint8_t* changes,
                                  uint8_t* fresh) {
  const int64_t steps = width + k - 2;  // from column x to column x + 1 of the padded rows
  for (int64_t x = 0; x < steps; ++x) changes[x] = 0;
  for (int64_t dy = 0; dy < k; ++dy) {
    const int32_t* row = rows + dy * stride;
    for (int64_t x = 0; x < steps; ++x) changes[x] |= row[x] != row[x + 1] ? 1 : 0;
  }
  for (int64_t x = 0; x < width; ++x) fresh[x] = 0;
  for (int64_t dx = 0; dx < k; ++dx)
    for (int64_t x = 1; x < width; ++x) fresh[x] |= changes[x - 1 + dx];
  fresh[0] = 1;
}

// The patches of one image. Patches with equal hashes are compared themselves.
class Image {
 public:
  std::vector<int64_t> first;  // where each pattern appears first, as the offset of its patch in padded_

  // pattern_ids [h, w]: the number of each pixel's patch, by first appearance.
  template <int kStatic>
  void find(const int32_t* codes, int64_t h, int64_t w, int64_t kernel_size, int32_t* pattern_ids) {
    const int64_t k = kStatic > 0 ? kStatic : kernel_size;
    stride_ = w + k - 1;
    padded_.assign((h + k - 1) * stride_, kOutside);
    for (int64_t y = 0; y < h; ++y) std::copy_n(codes + y * w, w, padded_.data() + (y + k / 2) * stride_ + k / 2);
    int64_t capacity = 64;
    while (capacity < std::min<int64_t>(h * w, 2048) * 2) capacity *= 2;
    table_.assign(capacity, Entry{0, -1});
    std::vector<uint32_t> columns(stride_), hashes(w);
    std::vector<uint8_t> changes(stride_), fresh(w);
    for (int64_t y = 0; y < h; ++y) {
      const int32_t* rows = padded_.data() + y * stride_;
      mark_fresh(rows, stride_, w, k, changes.data(), fresh.data());
      hash_columns(rows, stride_, stride_, k, columns.data());
      hash_patches(columns.data(), w, k, hashes.data());
      int32_t id = 0;
      for (int64_t x = 0; x < w; ++x) {
        if (fresh[x]) id = number<kStatic>(y * stride_ + x, hashes[x], k);
        pattern_ids[y * w + x] = id;
      }
    }
  }

  // taps [first.size(), k·k]: the patches, row-major.
  void write(int64_t k, int32_t* taps) const {
    for (const int64_t corner : first)
      for (int64_t dy = 0; dy < k; ++dy)
        for (int64_t dx = 0; dx < k; ++dx) *taps++ = padded_[corner + dy * stride_ + dx];
  }

 private:
  struct Entry {
    uint32_t hash;
    int32_t id;  // -1: free
  };
  std::vector<Entry> table_;  // open addressing, at most half full; the size is a power of two
  std::vector<int32_t> padded_;
  int64_t stride_ = 0;

  template <int kStatic>
  bool equal(int64_t a, int64_t b, int64_t kernel_size) const {
    const int64_t k = kStatic > 0 ? kStatic : kernel_size;
    const int32_t *p = padded_.data() + a, *q = padded_.data() + b;
    int32_t difference = 0;
    for (int64_t dy = 0; dy < k; ++dy)
      for (int64_t dx = 0; dx < k; ++dx) difference |= p[dy * stride_ + dx] ^ q[dy * stride_ + dx];
    return difference == 0;
  }

  template <int kStatic>
  int32_t number(int64_t corner, uint32_t hash, int64_t k) {
    const size_t mask = table_.size() - 1;
    size_t slot = hash & mask;
    for (; table_[slot].id >= 0; slot = (slot + 1) & mask)
      if (table_[slot].hash == hash && equal<kStatic>(first[table_[slot].id], corner, k)) return table_[slot].id;
    const auto id = static_cast<int32_t>(first.size());
    table_[slot] = {hash, id};
    first.push_back(corner);
    if (first.size() * 2 > table_.size()) grow();
    return id;
  }

  void grow() {
    std::vector<Entry> old(table_.size() * 2, Entry{0, -1});
    old.swap(table_);
    const size_t mask = table_.size() - 1;
    for (const Entry& entry : old) {
      if (entry.id < 0) continue;
      size_t slot = entry.hash & mask;
      while (table_[slot].id >= 0) slot = (slot + 1) & mask;
      table_[slot] = entry;
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> patterns(const at::Tensor& codes, int64_t k) {
  const int64_t n = codes.size(0), h = codes.size(1), w = codes.size(2);
  const at::Tensor source = codes.contiguous();
  const at::Tensor pattern_ids = at::empty({n, h, w}, codes.options());
  const at::Tensor counts = at::empty({n}, codes.options().dtype(at::kLong));
  auto* number = pattern_ids.data_ptr<int32_t>();
  auto* count = counts.data_ptr<int64_t>();
  const auto* code = source.const_data_ptr<int32_t>();
  std::vector<Image> images(n);
  if (h * w > 0) {
    at::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t start = i * h * w;
        if (k == 3)
          images[i].find<3>(code + start, h, w, k, number + start);
        else
          images[i].find<0>(code + start, h, w, k, number + start);
      }
    });
  }
  std::vector<int64_t> base(n + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    count[i] = static_cast<int64_t>(images[i].first.size());
    base[i + 1] = base[i] + count[i];
  }
  TORCH_CHECK(base[n] < (int64_t{1} << 31), "patterns: at most 2**31 - 1 patterns, got ", base[n]);
  const at::Tensor taps = at::empty({base[n], k * k}, codes.options());
  auto* tap = taps.data_ptr<int32_t>();
  at::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      images[i].write(k, tap + base[i] * k * k);
      if (base[i] == 0) continue;
      for (int64_t p = i * h * w; p < (i + 1) * h * w; ++p) number[p] += static_cast<int32_t>(base[i]);
    }
  });
  return {pattern_ids, taps, counts};
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("patterns", patterns); }

}  // namespace
}  // namespace spade_fast::cpu
