// Runs the kernels on odd shapes in heap blocks of exactly the right size, for the address and undefined-behaviour
// sanitizers and for processors that are emulated. Outputs are compared with the formula in double, gradients by what
// follows from the result being linear in the values and the logits in the queries.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "backward.h"
#include "forward.h"

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

static double at(const void* data, Scalar scalar, int64_t i) {
  if (scalar == Scalar::float32) return static_cast<const float*>(data)[i];
  return SASA_ISA::widen(static_cast<const uint16_t*>(data)[i]);
}

// Whether y is what the formula gives, to `tolerance`.
static bool equals_formula(const Problem& p, double tolerance) {
  const int64_t d = p.channels, H = p.height, W = p.width, K = p.kernel, r = K / 2, half = d / 2;
  auto value = [&](const Planes& t, int64_t plane, int64_t c, int64_t y, int64_t x) {
    return at(t.data, t.scalar, plane / p.heads * t.image + (plane % p.heads * d + c) * t.channel + y * W + x);
  };
  for (int64_t plane = 0; plane < p.planes; ++plane)
    for (int64_t y = 0; y < H; ++y)
      for (int64_t x = 0; x < W; ++x) {
        std::vector<double> logits, sums(d, 0.0);
        std::vector<int64_t> keys;
        for (int64_t a = 0; a < K; ++a)
          for (int64_t b = 0; b < K; ++b) {
            const int64_t ky = y + a - r, kx = x + b - r, head = plane % p.heads;
            const bool inside = ky >= 0 && ky < H && kx >= 0 && kx < W;
            if (!inside && !p.zero_border) continue;
            double logit = 0;
            for (int64_t c = 0; c < d; ++c) {
              double key = inside ? value(p.k, plane, c, ky, kx) : 0;
              if (p.relative)
                key += c < half ? at(p.rel_row, p.scalar, (head * half + c) * K + a)
                                : at(p.rel_col, p.scalar, (head * (d - half) + c - half) * K + b);
              logit += value(p.q, plane, c, y, x) * key;
            }
            logits.push_back(logit);
            keys.push_back(inside ? ky * W + kx : -1);
          }
        const double most = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (size_t j = 0; j < keys.size(); ++j) {
          const double weight = std::exp(logits[j] - most);
          sum += weight;
          for (int64_t c = 0; c < d && keys[j] >= 0; ++c) sums[c] += weight * value(p.v, plane, c, 0, keys[j]);
        }
        for (int64_t c = 0; c < d; ++c)
          if (!(std::fabs(value(p.y, plane, c, y, x) - sums[c] / sum) <= tolerance)) return false;
      }
  return true;
}

// The sum of products of two arrays, and of their absolute values.
static void add_products(const void* a, const void* b, Scalar scalar, int64_t n, double& sum, double& size) {
  for (int64_t i = 0; i < n; ++i) {
    const double product = at(a, scalar, i) * at(b, scalar, i);
    sum += product;
    size += std::fabs(product);
  }
}

// dv.v = dy.y, and dq.q = dk.k + drel.rel.
static bool gradients_agree(const Problem& p, int64_t n, double tolerance) {
  double left = 0, right = 0, size = 0;
  add_products(p.dv.data, p.v.data, p.scalar, n, left, size);
  add_products(p.dy.data, p.y.data, p.scalar, n, right, size);
  if (!(std::fabs(left - right) <= tolerance * size)) return false;
  left = right = size = 0;
  add_products(p.dq.data, p.q.data, p.scalar, n, left, size);
  add_products(p.dk.data, p.k.data, p.scalar, n, right, size);
  if (p.relative) {
    const int64_t half = p.channels / 2;
    add_products(p.drel_row, p.rel_row, p.scalar, p.heads * half * p.kernel, right, size);
    add_products(p.drel_col, p.rel_col, p.scalar, p.heads * (p.channels - half) * p.kernel, right, size);
  }
  return std::fabs(left - right) <= tolerance * size;
}

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
  const int64_t step = sasa::column_step(p), middle = std::min(W, W / 2 / step * step + (bands > 1 ? step : 0));
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t b = 0; b < bands; ++b) {
      const int64_t from = blocks * b / bands * SASA_ISA::ROWS, to = std::min(H, blocks * (b + 1) / bands * SASA_ISA::ROWS);
      if (bands > 1) SASA_ISA::forward(p, {g, from, to, 0, middle});
      SASA_ISA::forward(p, {g, from, to, bands > 1 ? middle : 0, W});
    }
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t b = 0; b < bands; ++b)
      SASA_ISA::backward(p, {g, blocks * b / bands * SASA_ISA::ROWS, std::min(H, blocks * (b + 1) / bands * SASA_ISA::ROWS), 0, W});
  if (relative)
    for (int64_t h = 0; h < heads; ++h) SASA_ISA::reduce_relative(p, h);
  for (auto& o : outputs)
    if (!o->finite()) return false;
  if (bands > 1) return true;
  return equals_formula(p, narrow ? 0.05 : 1e-4) && gradients_agree(p, images * C * H * W, narrow ? 0.01 : 1e-5);
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
  for (int64_t g = 0; g < images * lane_groups; ++g) SASA_ISA::forward(p, {g, 0, H, 0, W});
  for (float v : y.floats)
    if (!(std::fabs(v - 1) < 1e-5f)) return false;
  return true;
}

// The first argument, if there is one, is how many of the shapes to run.
int main(int argc, char** argv) {
  const int64_t shapes[][6] = {
      {2, 8, 8, 9, 11, 7}, {1, 2, 3, 5, 6, 3},   {3, 3, 1, 4, 1, 5},  {1, 1, 12, 7, 7, 19}, {1, 3, 16, 14, 9, 7},
      {1, 2, 32, 3, 7, 5}, {1, 9, 64, 2, 7, 7},  {1, 2, 8, 3, 63, 7}, {1, 1, 8, 1, 1, 1},   {1, 1, 8, 2, 3, 41},
      {1, 1, 8, 1, 95, 101}, {1, 1, 5, 13, 6, 19}};
  int left = argc > 1 ? std::atoi(argv[1]) : int(std::size(shapes));
  for (auto& s : shapes) {
    if (left-- <= 0) break;
    for (int flags = 0; flags < 8; ++flags)
      for (int64_t bands : {1, 3})
        if (!attend(s[0], s[1], s[2], s[3], s[4], s[5], flags & 1, flags & 2, flags & 4, bands)) {
          std::printf("wrong: %ld %ld %ld %ld %ld %ld flags %d\n", s[0], s[1], s[2], s[3], s[4], s[5], flags);
          return 1;
        }
  }
  const int64_t projected[][6] = {{2, 1, 8, 9, 11, 7}, {1, 2, 8, 30, 40, 7}, {1, 3, 4, 70, 5, 3}, {2, 2, 3, 3, 300, 5}};
  for (auto& s : projected)
    if (!project(s[0], s[1], s[2], s[3], s[4], s[5])) {
      std::printf("projected wrongly: %ld %ld %ld %ld %ld %ld\n", s[0], s[1], s[2], s[3], s[4], s[5]);
      return 1;
    }
  std::puts("ok");
}
