// Runs the products of matrices on odd shapes in heap blocks of exactly the right size, for the address and
// undefined-behaviour sanitizers, and compares every element with the same sum in double precision. Checks the conversions
// of float16 on every number.
#include "products16.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

using namespace SASA_ISA;

static std::mt19937 generator(7);

static size_t bytes(Scalar scalar) { return scalar == Scalar::float32 ? 4 : 2; }

struct Matrix {
  std::vector<float> values;
  std::unique_ptr<char[]> data;  // exactly as long as it must be
  Matrix(int64_t n, Scalar scalar) : values(size_t(n)), data(new char[size_t(n) * bytes(scalar)]) {
    std::normal_distribution<float> normal;
    with_type(scalar, [&]<class T>(Of<T>) {
      for (size_t i = 0; i < values.size(); ++i) {
        const T x = narrow<T>(normal(generator));
        values[i] = widen(x);
        std::memcpy(data.get() + i * sizeof x, &x, sizeof x);
      }
    });
  }
};

struct Shape {
  int64_t groups, rows, columns, depth;
  bool planes, out_planes, narrow_out, permuted, add;
};

static bool right(const Shape& s, Scalar scalar) {
  const Matrix a(s.groups * s.rows * s.depth, scalar), b(s.columns * s.depth, scalar);
  const Scalar out_scalar = s.narrow_out ? scalar : Scalar::float32;
  const int64_t panels = sasa::panels_of(s.columns), packed = panels * packed_rows(s.depth, scalar) * PANEL;
  std::unique_ptr<float, decltype(&std::free)> words(static_cast<float*>(std::aligned_alloc(64, size_t(packed) * 4)),
                                                     &std::free);
  std::vector<int64_t> at, order;
  for (int64_t j = 0; j < s.columns; ++j) at.push_back(j * s.depth);
  for (int64_t i = 0; i < s.rows; ++i) order.push_back((s.rows - 1 - i) * s.columns);
  for (int64_t j = 0; j < panels; ++j) pack({s.columns, s.depth, b.data.get(), scalar, at.data(), words.get()}, j);
  const int64_t size = s.groups * s.rows * s.columns;
  std::unique_ptr<char[]> out(new char[size_t(size) * bytes(out_scalar)]());
  Product p;
  p.groups = s.groups;
  p.rows = s.rows;
  p.columns = s.columns;
  p.depth = s.depth;
  p.a = a.data.get();
  p.scalar = scalar;
  p.a_group = s.rows * s.depth;
  p.a_row = s.planes ? 1 : s.depth;
  p.a_k = s.planes ? s.rows : 1;
  p.b = words.get();
  p.out = out.get();
  p.out_scalar = out_scalar;
  p.out_group = s.rows * s.columns;
  p.out_row = s.out_planes ? 1 : s.columns;
  p.out_column = s.out_planes ? s.rows : 1;
  if (s.permuted) p.out_at = order.data();
  p.add = s.add;
  const int64_t tiles = s.groups * sasa::tiles_of(p, TILE_ROWS);
  const std::array<int64_t, 3> row_cuts{0, tiles / 2, tiles}, panel_cuts{0, panels / 2, panels};
  for (size_t t = 0; t < 2; ++t)
    for (size_t j = 0; j < 2; ++j) product(p, row_cuts[t], row_cuts[t + 1], panel_cuts[j], panel_cuts[j + 1]);
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t j = 0; j < s.columns; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < s.depth; ++k)
          sum += double(a.values[size_t(g * p.a_group + i * p.a_row + k * p.a_k)]) * b.values[size_t(j * s.depth + k)];
        const int64_t to = g * p.out_group + (s.permuted ? order[size_t(i)] : i * p.out_row) + j * p.out_column;
        float got;
        with_type(out_scalar, [&]<class T>(Of<T>) {
          T x;
          std::memcpy(&x, out.get() + size_t(to) * sizeof x, sizeof x);
          got = widen(x);
        });
        const double budget = s.narrow_out ? std::fabs(sum) / 200 + 1e-3 : 1e-5 * std::sqrt(double(s.depth));
        if (!(std::fabs(got - sum) <= budget)) return false;
      }
  return true;
}

// What a float16 is, and where the numbers between two of them are rounded to.
static bool halves_are_right() {
  auto value = [](int bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? NAN : INFINITY;
    return float(std::ldexp(exponent ? fraction + 1024 : fraction, std::max(exponent, 1) - 25));
  };
  for (int bits = 0; bits < 0x8000; ++bits)
    for (int sign : {0, 0x8000}) {
      const float x = sign ? -value(bits) : value(bits), wide = widen(Half{uint16_t(bits | sign)});
      if (std::isnan(x)) {
        if (!std::isnan(wide) || !std::isnan(widen(narrow<Half>(x)))) return false;
        continue;
      }
      if (wide != x || std::signbit(wide) != bool(sign) || narrow<Half>(x).bits != (bits | sign)) return false;
      if (std::isinf(x)) continue;
      const float next = bits == 0x7bff ? 65536.0f : value(bits + 1), middle = (value(bits) + next) / 2;
      const std::pair<float, int> rounded[] = {
          {middle, bits + (bits & 1)}, {std::nextafter(middle, 0.0f), bits}, {std::nextafter(middle, INFINITY), bits + 1}};
      for (auto [between, to] : rounded)
        if (narrow<Half>(sign ? -between : between).bits != (to | sign)) return false;
    }
  alignas(64) float pixels[LANES];
  Half halves[LANES];
  for (int l = 0; l < LANES; ++l) halves[l] = {uint16_t(0x0001 + 0x1034 * l)};
  const V all = load_pixels(halves);
  std::memcpy(pixels, &all, sizeof pixels);
  store_pixels(halves, all);
  for (int l = 0; l < LANES; ++l)
    if (halves[l].bits != 0x0001 + 0x1034 * l || pixels[l] != widen(halves[l])) return false;
  return true;
}

int main() {
#ifdef SASA_TILES
  if (!may_use_tiles()) {
    std::puts("the operating system refuses this process the tiles");
    return 77;
  }
#endif
  const int64_t sizes[][4] = {{1, 5, 40, 7},  {3, 9, 33, 33}, {2, 49, 72, 65}, {1, 130, 64, 100},
                              {1, 17, 32, 2500}, {2, 16, 96, 64}, {1, 1, 1, 1},   {1, 40, 320, 31}};
  if (!halves_are_right()) {
    std::puts("wrong: conversions of float16");
    return 1;
  }
  for (auto& n : sizes)
    for (Scalar scalar : {Scalar::float32, Scalar::bfloat16, Scalar::float16})
      for (int flags = 0; flags < 32; ++flags) {
        const Shape s{n[0], n[1], n[2], n[3], bool(flags & 1), bool(flags & 2), bool(flags & 4),
                      bool(flags & 8) && !(flags & 2) && n[0] == 1, bool(flags & 16)};
        if (s.narrow_out && (scalar == Scalar::float32 || s.add)) continue;  // no such use
        if (!right(s, scalar)) {
          std::printf("wrong: %ld %ld %ld %ld scalar %d flags %d\n", n[0], n[1], n[2], n[3], int(scalar), flags);
          return 1;
        }
      }
  std::puts("ok");
}
