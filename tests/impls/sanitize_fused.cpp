// Runs the kernels on odd shapes in heap blocks of exactly the right size, for the address and undefined-behaviour
// sanitizers, and checks that every output was written.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "local_attention.h"

using sasa::Planes;
using sasa::Problem;
using sasa::Scalar;

static std::mt19937 generator(7);

struct Buffer {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  void* data;
  Buffer(int64_t n, bool narrow, bool random) {
    std::normal_distribution<float> normal;
    if (narrow) {
      halves.resize(n, 0x7fc0);
      if (random)
        for (auto& x : halves) x = SASA_ISA::narrow<uint16_t>(normal(generator));
      halves.shrink_to_fit();
      data = halves.data();
    } else {
      floats.resize(n, NAN);
      if (random)
        for (auto& x : floats) x = normal(generator);
      floats.shrink_to_fit();
      data = floats.data();
    }
  }
  bool finite() const {
    for (float x : floats)
      if (!std::isfinite(x)) return false;
    for (uint16_t x : halves)
      if (!std::isfinite(SASA_ISA::widen(x))) return false;
    return true;
  }
};

static Problem problem(int64_t images, int64_t heads, int64_t d, int64_t H, int64_t W, int64_t K) {
  Problem p;
  p.planes = images * heads;
  p.heads = heads;
  p.channels = d;
  p.height = H;
  p.width = W;
  p.kernel = K;
  return p;
}

static bool attend(int64_t images, int64_t heads, int64_t d, int64_t H, int64_t W, int64_t K, bool zero, bool relative,
                   bool narrow, int64_t bands) {
  std::vector<std::unique_ptr<Buffer>> inputs, outputs;
  const Scalar scalar = narrow ? Scalar::bfloat16 : Scalar::float32;
  const int64_t C = heads * d, groups = (images * heads + SASA_ISA::LANES - 1) / SASA_ISA::LANES;
  const int64_t blocks = (H + SASA_ISA::ROWS - 1) / SASA_ISA::ROWS;
  auto make = [&](int64_t n, bool half, bool input) {
    auto& list = input ? inputs : outputs;
    list.push_back(std::make_unique<Buffer>(n, half, input));
    return list.back()->data;
  };
  auto planes = [&](bool input) { return Planes{make(images * C * H * W, narrow, input), C * H * W, H * W, scalar}; };
  Problem p = problem(images, heads, d, H, W, K);
  p.zero_border = zero;
  p.relative = relative;
  p.scalar = scalar;
  p.q = planes(true);
  p.k = planes(true);
  p.v = planes(true);
  p.dy = planes(true);
  p.y = planes(false);
  p.dq = planes(false);
  p.dk = planes(false);
  p.dv = planes(false);
  for (Planes* stat : {&p.top, &p.sum})
    *stat = {make(images * heads * H * W, false, false), heads * H * W, H * W, Scalar::float32};
  std::unique_ptr<void, decltype(&std::free)> parts(
      std::aligned_alloc(64, size_t(groups * blocks * K * d * SASA_ISA::LANES * 4 + 63) / 64 * 64), &std::free);
  if (relative) {
    p.rel_row = make(heads * (d / 2) * K, narrow, true);
    p.rel_col = make(heads * (d - d / 2) * K, narrow, true);
    p.drel_row = make(heads * (d / 2) * K, narrow, false);
    p.drel_col = make(heads * (d - d / 2) * K, narrow, false);
    p.drel_parts = parts.get();
  }
  bands = std::min(bands, blocks);
  for (auto rows : {SASA_ISA::forward, SASA_ISA::backward})
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t b = 0; b < bands; ++b)
        rows(p, g, blocks * b / bands * SASA_ISA::ROWS, std::min(H, blocks * (b + 1) / bands * SASA_ISA::ROWS));
  if (relative)
    for (int64_t h = 0; h < heads; ++h) SASA_ISA::reduce_relative(p, h);
  for (auto& o : outputs)
    if (!o->finite()) return false;
  return true;
}

// Writes ones: every output must be one then, whatever the weights.
static void ones(const void* context, int64_t, int64_t from, int64_t to, float* out, int64_t pixel) {
  const auto& p = *static_cast<const Problem*>(context);
  for (int64_t i = 0; i < (to - from) * p.width; ++i)
    for (int64_t c = 0; c < 3 * p.channels * SASA_ISA::LANES; ++c) out[i * pixel + c] = 1;
}

// Forward with queries, keys and values that are made as they are needed and dropped after use.
static bool project(int64_t images, int64_t lane_groups, int64_t d, int64_t H, int64_t W, int64_t K) {
  const int64_t heads = lane_groups * SASA_ISA::LANES, C = heads * d;
  Problem p = problem(images, heads, d, H, W, K);
  Buffer y(images * C * H * W, false, false);
  p.project = &ones;
  p.context = &p;
  for (Planes* t : {&p.q, &p.k, &p.v}) t->pixel = 3 * C;
  p.y = {y.data, C * H * W, H * W, Scalar::float32};
  for (int64_t g = 0; g < images * lane_groups; ++g) SASA_ISA::forward(p, g, 0, H);
  for (float v : y.floats)
    if (!(std::fabs(v - 1) < 1e-5f)) return false;
  return true;
}

int main() {
  const int64_t shapes[][6] = {
      {2, 8, 8, 9, 11, 7}, {1, 2, 3, 5, 6, 3},   {3, 3, 1, 4, 1, 5},  {1, 1, 12, 7, 7, 19}, {1, 3, 16, 14, 9, 7},
      {1, 2, 32, 3, 7, 5}, {1, 9, 64, 2, 7, 7},  {1, 2, 8, 3, 63, 7}, {1, 1, 8, 1, 1, 1},   {1, 1, 8, 2, 3, 41},
      {1, 1, 8, 1, 95, 101}, {1, 1, 5, 13, 6, 19}};
  for (auto& s : shapes)
    for (int flags = 0; flags < 8; ++flags)
      for (int64_t bands : {1, 3})
        if (!attend(s[0], s[1], s[2], s[3], s[4], s[5], flags & 1, flags & 2, flags & 4, bands)) {
          std::printf("not finite: %ld %ld %ld %ld %ld %ld flags %d\n", s[0], s[1], s[2], s[3], s[4], s[5], flags);
          return 1;
        }
  const int64_t projected[][6] = {{2, 1, 8, 9, 11, 7}, {1, 2, 8, 30, 40, 7}, {1, 3, 4, 70, 5, 3}, {2, 2, 3, 3, 300, 5}};
  for (auto& s : projected)
    if (!project(s[0], s[1], s[2], s[3], s[4], s[5])) {
      std::printf("projected wrongly: %ld %ld %ld %ld %ld %ld\n", s[0], s[1], s[2], s[3], s[4], s[5]);
      return 1;
    }
  std::puts("ok");
}
