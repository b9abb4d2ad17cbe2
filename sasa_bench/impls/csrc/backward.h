// The backward pass of a band of rows of a group of planes.
#pragma once

#include "layout.h"
#include "phases.h"

namespace SASA_ISA {

struct Backward {
  Rows k, v, dk, dv;
  V* q;      // [ROWS][W][d]: queries times log2(e), replaced by their gradients
  V* dy;     // [ROWS][W][d], over the sum of the softmax, so that P need not be divided by it
  V* top;    // [ROWS][W]
  V* delta;  // [ROWS][W]: dy.y, first the sum of the softmax
  V *P, *dS; // [ROWS][keys]
  V* dq;     // [ROWS][d]
  V *row_sum, *col_sum;  // [ROWS][K]: dS summed over the row, the column
  V *drel_row, *drel_col;
  int64_t keys;

  static int64_t vectors(const Problem& p) {
    int64_t row = p.width * p.channels;
    return Task::vectors(p) + 4 * ring_rows(p) * row + 2 * ROWS * (row + p.width + logit_keys(p) + p.kernel) +
           ROWS * p.channels;
  }
  void setup(const Task& t, Arena& a) {
    const Problem& p = t.p;
    const int64_t row = p.width * p.channels;
    k = t.rows(p.k, a);
    v = t.rows(p.v, a);
    dk = t.rows(p.dk, a);
    dv = t.rows(p.dv, a);
    keys = logit_keys(p);
    q = a.take(ROWS * row);
    dy = a.take(ROWS * row);
    top = a.take(ROWS * p.width);
    delta = a.take(ROWS * p.width);
    P = a.take(ROWS * keys);
    dS = a.take(ROWS * keys);
    row_sum = a.take(ROWS * p.kernel);
    col_sum = a.take(ROWS * p.kernel);
    dq = a.take(ROWS * p.channels);
  }
};

// Queries (y0 + i, x), i < nq, against key rows [ka, kb). `own`: the queries are this task's, so their gradient and
// that of the relative embedding are its to compute; dk and dv are, for the key rows in [from, to).
template <int D>
void backward_pixel(const Task& t, const Backward& f, int64_t y0, int nq, int64_t x, int64_t ka, int64_t kb, bool own,
                    int64_t from, int64_t to) {
  const int64_t d = D ? D : t.d, r = t.r, K = t.K;
  V* q[ROWS];
  const V* dy[ROWS];
  for (int i = 0; i < nq; ++i) {
    q[i] = f.q + (i * t.W + x) * d;
    dy[i] = f.dy + (i * t.W + x) * d;
  }
  SASA_PHASE(position);
  t.relative_logits<D>(q, nq);
  SASA_PHASE(gradients);
  if (own) {
    std::memset(static_cast<void*>(f.row_sum), 0, size_t(nq * K) * sizeof(V));
    std::memset(static_cast<void*>(f.col_sum), 0, size_t(nq * K) * sizeof(V));
    std::memset(static_cast<void*>(f.dq), 0, size_t(nq * d) * sizeof(V));
    if (t.p.zero_border && t.p.relative)
      for (int i = 0; i < nq; ++i) {
        const V top = f.top[i * t.W + x], delta = f.delta[i * t.W + x];
        t.outside(y0 + i, x, [&](int64_t a, int64_t b) {
          V dS = -delta * exp2v(t.row_logit[i * K + a] + t.col_logit[i * K + b] - top);
          f.row_sum[i * K + a] += dS;
          f.col_sum[i * K + b] += dS;
        });
      }
  }
  const int64_t xa = std::max<int64_t>(0, x - r), xb = std::min(t.W, x + r + 1), n = xb - xa;
  const int64_t step = std::max<int64_t>(1, f.keys / n), b0 = xa - x + r;

  for (int64_t ca = ka; ca < kb; ca += step) {
    const int64_t cb = std::min(kb, ca + step);
    V *P[ROWS], *dS[ROWS];
    for (int i = 0; i < nq; ++i) {
      P[i] = f.P + i * f.keys;
      dS[i] = f.dS + i * f.keys;
    }
    for (int64_t ky = ca; ky < cb; ++ky) {
      const int lo = int(std::max<int64_t>(0, ky - r - y0)), hi = int(std::min<int64_t>(nq, ky + r - y0 + 1));
      if (lo >= hi) continue;
      const int64_t at = (ky - ca) * n;
      const bool scatter = ky >= from && ky < to;
      with_count(hi - lo, [&](auto na) SASA_ALWAYS_INLINE {
        constexpr int NA = decltype(na)::value;
        V row[NA], top[NA], delta[NA];
        Wide total[NA];
        const V *cl[NA], *qp[NA], *gp[NA];
        V *Pp[NA], *Sp[NA], *cs[NA];
        unroll<NA>([&](auto i_) SASA_ALWAYS_INLINE {
          const int i = lo + i_;
          row[i_] = t.row_logit[i * K + ky - (y0 + i) + r];
          top[i_] = f.top[i * t.W + x];
          cl[i_] = t.col_logit + i * K + b0;
          delta[i_] = f.delta[i * t.W + x];
          total[i_] = Wide{};
          qp[i_] = q[i];
          gp[i_] = dy[i];
          Pp[i_] = P[i] + at;
          Sp[i_] = dS[i] + at;
          cs[i_] = f.col_sum + i * K + b0;
        });
        dot<D, NA>(
            qp, f.k(ky) + xa * t.ks, t.ks, n, d, row,
            [&]<class T>(auto i, int64_t j, T s) SASA_ALWAYS_INLINE {
              store(Pp[i] + j, exp2v(s + load<T>(cl[i] + j) - spread<T>(top[i])));
            });
        dot<D, NA>(
            gp, f.v(ky) + xa * t.ks, t.ks, n, d, {},
            [&]<class T>(auto i, int64_t j, T s) SASA_ALWAYS_INLINE {
              s = (s - spread<T>(delta[i])) * load<T>(Pp[i] + j);
              store(Sp[i] + j, s);
              add(total[i], s);
              store(cs[i] + j, load<T>(cs[i] + j) + s);
            });
        unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
          f.row_sum[(lo + i) * K + ky - (y0 + lo + i) + r] += sum_of(total[i]);
        });
        if (scatter) {
          outer<D, NA>(Sp, qp, f.dk(ky) + xa * t.ks, t.ks, n, d);
          outer<D, NA>(Pp, gp, f.dv(ky) + xa * t.ks, t.ks, n, d);
        }
      });
    }
    if (!own) continue;
    auto columns = [&]<class T, int N>(Piece<T, N>, int64_t c0) SASA_ALWAYS_INLINE {
      T acc[ROWS][N];
      unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
        unroll<N>([&](auto c) SASA_ALWAYS_INLINE {
          acc[i][c] = i >= nq ? T{} : load<T>(f.dq + i * d + c0 + c * PARTS<T>);
        });
      });
      for (int64_t ky = ca; ky < cb; ++ky) {
        const int lo = int(std::max<int64_t>(0, ky - r - y0)), hi = int(std::min<int64_t>(nq, ky + r - y0 + 1));
        weighted(acc, lo, hi, dS, (ky - ca) * n, f.k(ky) + xa * t.ks + c0, t.ks, n);
      }
      unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
        if (i < nq)
          unroll<N>([&](auto c) SASA_ALWAYS_INLINE { store(f.dq + i * d + c0 + c * PARTS<T>, acc[i][c]); });
      });
    };
    by_channels<D>(d, columns);
  }
  if (!own) return;
  SASA_PHASE(position);
  if (t.p.relative) {
    V *rs[ROWS], *cs[ROWS];
    const V* qc[ROWS];
    for (int i = 0; i < nq; ++i) {
      rs[i] = f.row_sum + i * K;
      cs[i] = f.col_sum + i * K;
      qc[i] = q[i] + t.dr;
    }
    with_count(nq, [&](auto na) {
      constexpr int NA = decltype(na)::value;
      outer<D / 2, NA>(rs, q, f.drel_row, t.dr, K, t.dr);
      outer<D / 2, NA>(cs, qc, f.drel_col, t.dc, K, t.dc);
    });
    auto columns = [&]<class T, int N>(Piece<T, N>, V* const* w, const V* rel, int64_t n, int64_t c0,
                                       V* out) SASA_ALWAYS_INLINE {
      T acc[ROWS][N] = {};
      weighted(acc, 0, nq, w, 0, rel + c0, n, K);
      unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
        if (i < nq)
          unroll<N>([&](auto c) SASA_ALWAYS_INLINE {
            V* sum = out + i * d + c0 + c * PARTS<T>;
            store(sum, load<T>(sum) + acc[i][c]);
          });
      });
    };
    auto half = [&](V* const* w, const V* rel, int64_t n, V* out) {
      by_channels<D / 2>(n, [&](auto piece, int64_t c) SASA_ALWAYS_INLINE { columns(piece, w, rel, n, c, out); });
    };
    half(rs, t.rel_row, t.dr, f.dq);
    half(cs, t.rel_col, t.dc, f.dq + t.dr);
  }
  for (int i = 0; i < nq; ++i)
    for (int64_t c = 0; c < d; ++c) q[i][c] = f.dq[i * d + c];
}

template <int D>
void backward_rows(const Problem& p, int64_t group, int64_t from, int64_t to) {
  SASA_PHASE(interleave);
  Arena& a = arena();
  a.reserve(Backward::vectors(p));
  Task t(p, group);
  t.setup(a);
  Backward f;
  f.setup(t, a);
  const int64_t d = t.d, W = t.W;
  const int64_t begin = std::max<int64_t>(0, from - t.r) / ROWS * ROWS, end = std::min(t.H, to + t.r);
  int64_t loaded = std::max<int64_t>(0, from - t.r), flushed = from;
  for (int64_t y0 = begin; y0 < end; y0 += ROWS) {
    const int nq = int(std::min<int64_t>(ROWS, t.H - y0));
    const bool own = y0 >= from && y0 < to;
    int64_t ka = std::max<int64_t>(0, y0 - t.r), kb = std::min(t.H, y0 + nq + t.r);
    if (!own) {
      ka = std::max(ka, from);
      kb = std::min(kb, to);
      if (ka >= kb) continue;
    }
    auto flush = [&](int64_t until) {
      if (in_place(p.dk)) {
        if (until > flushed) copy_pixels(f.dk(flushed), t.ks, f.dk(flushed), t.ks, (until - flushed) * W, d, LN2);
        flushed = std::max(flushed, until);
        return;
      }
      f.dk.runs(flushed, until, [&](int64_t y, int64_t count, V* in) {
        separate(p.dk, p, t.first, d, y * W, count * W, in, LN2);
      });
      f.dv.runs(flushed, until, [&](int64_t y, int64_t count, V* in) {
        separate(p.dv, p, t.first, d, y * W, count * W, in);
      });
      flushed = std::max(flushed, until);
    };
    SASA_PHASE(write);
    flush(std::min(ka, to));
    SASA_PHASE(interleave);
    if (in_place(p.k)) {
      for (int64_t y = std::max(loaded, from); y < std::min(kb, to); ++y)
        for (int64_t x = 0; x < W; ++x)
          for (V* g : {f.dk(y), f.dv(y)}) std::memset(static_cast<void*>(g + x * t.ks), 0, size_t(d) * sizeof(V));
    } else {
      f.k.runs(loaded, kb, [&](int64_t y, int64_t count, V* out) {
        interleave(p.k, p, t.first, d, y * W, count * W, out);
        std::memset(static_cast<void*>(f.dk(y)), 0, size_t(count * W * d) * sizeof(V));
      });
      f.v.runs(loaded, kb, [&](int64_t y, int64_t count, V* out) {
        interleave(p.v, p, t.first, d, y * W, count * W, out);
        std::memset(static_cast<void*>(f.dv(y)), 0, size_t(count * W * d) * sizeof(V));
      });
    }
    loaded = std::max(loaded, kb);

    interleave(p.y, p, t.first, d, y0 * W, nq * W, f.q);
    interleave(p.dy, p, t.first, d, y0 * W, nq * W, f.dy);
    interleave(p.top, p, t.first, 1, y0 * W, nq * W, f.top);
    interleave(p.sum, p, t.first, 1, y0 * W, nq * W, f.delta);
    for (int64_t i = 0; i < nq * W; ++i) {
      const V over_sum = 1.0f / f.delta[i], *y = f.q + i * d;
      for (int64_t c = 0; c < d; ++c) f.dy[i * d + c] *= over_sum;
      // Added in the order of dy.v, from which it is exactly nothing where a window has one key.
      dot<D, 1>(&y, f.dy + i * d, d, 1, d, {}, [&](auto, int64_t, auto dy_y) { store(f.delta + i, dy_y); });
    }
    t.load_queries(y0, nq, f.q);
    if (own && p.relative) {
      V* part = static_cast<V*>(p.drel_parts) + (group * ((t.H + ROWS - 1) / ROWS) + y0 / ROWS) * t.K * d;
      std::memset(static_cast<void*>(part), 0, size_t(t.K * d) * sizeof(V));
      f.drel_row = part;
      f.drel_col = part + t.K * t.dr;
    }
    for (int64_t x = 0; x < W; ++x) backward_pixel<D>(t, f, y0, nq, x, ka, kb, own, from, to);
    SASA_PHASE(write);
    if (own && in_place(p.dq))
      copy_pixels(f.q, d, interleaved(p.dq, p, t.first) + y0 * W * t.ks, t.ks, nq * W, d);
    else if (own)
      separate(p.dq, p, t.first, d, y0 * W, nq * W, f.q);
    if (y0 + ROWS >= end) flush(to);
  }
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
    sum *= LN2;
    const bool row = e < K * dr;
    const int64_t n = row ? dr : d - dr, at = row ? e : e - K * dr;
    const int64_t to = (head * n + at % n) * K + at / n;
    void* out = row ? p.drel_row : p.drel_col;
    if (p.scalar == Scalar::bfloat16)
      static_cast<uint16_t*>(out)[to] = narrow<uint16_t>(sum);
    else
      static_cast<float*>(out)[to] = sum;
  }
}

}  // namespace SASA_ISA
