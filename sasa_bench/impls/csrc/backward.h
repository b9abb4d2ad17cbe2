// The backward pass of a band of rows of a group of planes.
#pragma once

#include "backward_block.h"

namespace SASA_ISA {

// Key rows of a task whose gradients are complete go out.
inline void flush_gradients(const Task& t, const Backward& f, int64_t from, int64_t until) {
  if (in_place(t.p.dk)) return;
  f.dk.runs(from, until, [&](int64_t y, int64_t count, V* in) {
    separate(t.p.dk, t.p, t.first, t.d, y * t.W, count * t.W, in);
  });
  f.dv.runs(from, until, [&](int64_t y, int64_t count, V* in) {
    separate(t.p.dv, t.p, t.first, t.d, y * t.W, count * t.W, in);
  });
}

// Keys and values of rows [from, until) come in; the gradients of those in [own_from, own_to) begin with zero.
inline void load_keys(const Task& t, const Backward& f, int64_t from, int64_t until, int64_t own_from, int64_t own_to) {
  const Problem& p = t.p;
  const int64_t W = t.W, d = t.d;
  if (in_place(p.k)) {
    for (int64_t y = std::max(from, own_from); y < std::min(until, own_to); ++y)
      for (int64_t x = 0; x < W; ++x)
        for (V* g : {f.dk(y), f.dv(y)}) std::memset(static_cast<void*>(g + x * t.ks), 0, size_t(d) * sizeof(V));
    return;
  }
  f.k.runs(from, until, [&](int64_t y, int64_t count, V* out) {
    interleave(p.k, p, t.first, d, y * W, count * W, out);
    std::memset(static_cast<void*>(f.dk(y)), 0, size_t(count * W * d) * sizeof(V));
  });
  f.v.runs(from, until, [&](int64_t y, int64_t count, V* out) {
    interleave(p.v, p, t.first, d, y * W, count * W, out);
    std::memset(static_cast<void*>(f.dv(y)), 0, size_t(count * W * d) * sizeof(V));
  });
}

// dy over the sum of the softmax, top, and delta = dy.y of nq rows of queries from y0 on.
template <int D>
void load_outputs(const Task& t, const Backward& f, int64_t y0, int nq) {
  const Problem& p = t.p;
  const int64_t W = t.W, d = t.d;
  V *top = f.stats, *sum = f.stats + ROWS * W;
  interleave(p.y, p, t.first, d, y0 * W, nq * W, f.dq);
  interleave(p.dy, p, t.first, d, y0 * W, nq * W, f.dy);
  interleave(p.top, p, t.first, 1, y0 * W, nq * W, top);
  interleave(p.sum, p, t.first, 1, y0 * W, nq * W, sum);
  for (int i = 0; i < ROWS; ++i)
    for (int64_t x = 0; x < W; ++x) {
      V &less = f.top[x * ROWS + i], &delta = f.delta[x * ROWS + i];
      less = delta = V{};
      if (i >= nq) continue;
      const int64_t at = i * W + x;
      const V over_sum = 1.0f / sum[at], *y = f.dq + at * d;
      for (int64_t c = 0; c < d; ++c) f.dy[at * d + c] *= over_sum;
      less = top[at];
      // Added in the order of dy.v, from which it is exactly nothing where a window has one key.
      dot<D>(Some<1, false>(), &y, f.dy + at * d, d, 1, d, {}, [&](auto, auto dy_y) { delta = dy_y; });
    }
}

template <int D>
void backward_rows(const Problem& p, int64_t group, int64_t from, int64_t to) {
  SASA_PHASE(interleave);
  FlushDenormals flush;
  Arena& a = arena();
  a.reserve(Backward::vectors(p));
  Task t(p, group);
  t.setup(a);
  Backward f;
  f.setup(t, a);
  const int64_t begin = t.first_key_row(from) / ROWS * ROWS, end = std::min(t.H, to + t.r);
  int64_t loaded = t.first_key_row(from), flushed = from;
  for (int64_t y0 = begin; y0 < end; y0 += ROWS) {
    const int nq = int(std::min<int64_t>(ROWS, t.H - y0));
    KeyRows rows{t.first_key_row(y0), t.key_rows_until(y0, nq), from, to, y0 >= from && y0 < to};
    if (!rows.own) {
      rows.ka = std::max(rows.ka, from);
      rows.kb = std::min(rows.kb, to);
      if (rows.ka >= rows.kb) continue;
    }
    SASA_PHASE(write);
    if (const int64_t until = std::min(rows.ka, to); until > flushed) {
      flush_gradients(t, f, flushed, until);
      flushed = until;
    }
    SASA_PHASE(interleave);
    load_keys(t, f, loaded, rows.kb, from, to);
    loaded = std::max(loaded, rows.kb);
    for (int64_t ky = rows.ka; ky < rows.kb; ++ky) {
      f.k_row[ky - rows.ka] = f.k(ky);
      f.v_row[ky - rows.ka] = f.v(ky);
      f.dk_row[ky - rows.ka] = f.dk(ky);
      f.dv_row[ky - rows.ka] = f.dv(ky);
    }
    load_outputs<D>(t, f, y0, nq);
    if (rows.own && p.relative) {
      V* part = static_cast<V*>(p.drel_parts) + (group * ((t.H + ROWS - 1) / ROWS) + y0 / ROWS) * t.K * t.d;
      std::memset(static_cast<void*>(part), 0, size_t(t.K * t.d) * sizeof(V));
      f.drel_row = part;
      f.drel_col = part + t.K * t.dr;
    }
    const Queries queries = t.queries(p.q, y0, nq, f.q);
    const Queries gradients = in_place(p.dq) ? t.queries(p.dq, y0, nq, nullptr) : Queries({f.dq, t.H, t.W * t.d}, t.d, 0, nq);
    for (int64_t x = 0; x < t.W; x += STRIP)
      backward_strip<D>(t, f, rows, queries, gradients, y0, nq, x, std::make_index_sequence<STRIP>());
    SASA_PHASE(write);
    if (rows.own && !in_place(p.dq)) separate(p.dq, p, t.first, t.d, y0 * t.W, nq * t.W, f.dq);
  }
  flush_gradients(t, f, flushed, to);
  a.release_large();
  SASA_PHASE(none);
}

// Sums the relative embedding's partial gradients of one head over blocks, groups and lanes, in that fixed order.
inline void reduce_relative(const Problem& p, int64_t head) {
  const int64_t d = p.channels, dr = d / 2, K = p.kernel, blocks = (p.height + ROWS - 1) / ROWS;
  const V* parts = static_cast<const V*>(p.drel_parts);
  for (int64_t e = 0; e < K * d; ++e) {
    float sum = 0;
    for (int64_t plane = head; plane < p.planes; plane += p.heads)
      for (int64_t b = 0; b < blocks; ++b) sum += parts[((plane / LANES) * blocks + b) * K * d + e][plane % LANES];
    const bool row = e < K * dr;
    const int64_t n = row ? dr : d - dr, at = row ? e : e - K * dr;
    const int64_t to = (head * n + at % n) * K + at / n;
    void* out = row ? p.drel_row : p.drel_col;
    with_type(p.scalar, [&]<class T>(Of<T>) { static_cast<T*>(out)[to] = narrow<T>(sum); });
  }
}

inline void backward(const Problem& p, const sasa::Band& band) {
  with_width(p.channels, [&](auto d) { backward_rows<decltype(d)::value>(p, band.group, band.from, band.to); });
}

}  // namespace SASA_ISA
