#include "resize_crop.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"

namespace fastm3ae {
namespace {

constexpr int kWeightBits = 22;
// Levels that are weighed at once. Along the rows they are those of a column, which a tile has side by side.
constexpr int64_t kTileRows = 16, kRun = 32;

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

// The levels first, first + 1, ... of an axis, and their weights, that make one level of the resized axis.
struct Taps {
  int64_t first;
  std::vector<int32_t> weights;

  int64_t end() const { return first + int64_t(weights.size()); }
};

// The taps of the levels begin, begin + 1, ... of an axis that is resized from size to new_size.
std::vector<Taps> make_taps(int64_t size, int64_t new_size, int64_t begin, int64_t num) {
  const double scale = double(size) / new_size, reduction = std::max(scale, 1.0);
  const double support = 2 * reduction, frequency = 1 / reduction;
  std::vector<Taps> taps(num);
  std::vector<double> exact;
  for (int64_t i = 0; i < num; ++i) {
    const double center = (begin + i + 0.5) * scale;
    const int64_t first = std::max<int64_t>(int64_t(center - support + 0.5), 0);
    const int64_t end = std::min<int64_t>(int64_t(center + support + 0.5), size);
    exact.clear();
    double sum = 0;
    for (int64_t position = first; position < end; ++position) {
      exact.push_back(cubic((position - center + 0.5) * frequency));
      sum += exact.back();
    }
    taps[i].first = first;
    taps[i].weights.reserve(exact.size());
    for (const double weight : exact) {
      const double scaled = weight / sum * (1 << kWeightBits);
      taps[i].weights.push_back(int32_t(scaled + (scaled < 0 ? -0.5 : 0.5)));
    }
  }
  return taps;
}

// out[i] = sum over k of weights[k] * in[k * stride + i], rounded
template <int64_t kNum>
inline void weigh(const uint8_t* in, int64_t stride, const std::vector<int32_t>& weights, uint8_t* out) {
  int32_t sums[kNum];
  std::fill_n(sums, kNum, 1 << (kWeightBits - 1));
  for (const int32_t weight : weights) {
    for (int64_t i = 0; i < kNum; ++i) sums[i] += in[i] * weight;
    in += stride;
  }
  for (int64_t i = 0; i < kNum; ++i) out[i] = uint8_t(std::clamp(sums[i] >> kWeightBits, 0, 255));
}

// (num_rows, width, channels) -> (channels, num_rows, number of taps)
FASTM3AE_CLONES void resize_rows(const uint8_t* image, int64_t num_rows, int64_t width, int64_t channels,
                                 const std::vector<Taps>& taps, uint8_t* out) {
  const int64_t first = taps.front().first, num_levels = (taps.back().end() - first) * channels;
  const int64_t new_width = taps.size();
  std::vector<uint8_t> tile(num_levels * kTileRows);
  for (int64_t row = 0; row < num_rows; row += kTileRows) {
    const int64_t height = std::min(kTileRows, num_rows - row);
    for (int64_t y = 0; y < height; ++y) {
      const uint8_t* levels = image + ((row + y) * width + first) * channels;
      for (int64_t i = 0; i < num_levels; ++i) tile[i * kTileRows + y] = levels[i];
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t x = 0; x < new_width; ++x) {
        uint8_t column[kTileRows];
        const uint8_t* levels = tile.data() + ((taps[x].first - first) * channels + c) * kTileRows;
        weigh<kTileRows>(levels, channels * kTileRows, taps[x].weights, column);
        for (int64_t y = 0; y < height; ++y) out[(c * num_rows + row + y) * new_width + x] = column[y];
      }
    }
  }
}

// (rows from the first tap's on, width) -> (number of taps, width)
FASTM3AE_CLONES void resize_columns(const uint8_t* image, int64_t width, const std::vector<Taps>& taps, uint8_t* out) {
  for (const Taps& row : taps) {
    const uint8_t* levels = image + (row.first - taps.front().first) * width;
    int64_t x = 0;
    for (; x + kRun <= width; x += kRun) weigh<kRun>(levels + x, width, row.weights, out + x);
    for (; x < width; ++x) weigh<1>(levels + x, width, row.weights, out + x);
    out += width;
  }
}

}  // namespace

void resize_crop_cpu(const uint8_t* image, int64_t height, int64_t width, int64_t channels, int64_t new_height,
                     int64_t new_width, int64_t top, int64_t left, int64_t size, uint8_t* square) {
  const std::vector<Taps> columns = make_taps(width, new_width, left, size);
  const std::vector<Taps> rows = make_taps(height, new_height, top, size);
  const int64_t first_row = rows.front().first, num_rows = rows.back().end() - first_row;
  std::vector<uint8_t> narrow(channels * num_rows * size);
  resize_rows(image + first_row * width * channels, num_rows, width, channels, columns, narrow.data());
  for (int64_t c = 0; c < channels; ++c)
    resize_columns(narrow.data() + c * num_rows * size, size, rows, square + c * size * size);
}

}  // namespace fastm3ae
