// The forward pass of a band of rows of a group of planes.
#pragma once

#include "layout.h"
#include "phases.h"

namespace SASA_ISA {

struct Forward {
  Rows qkv, k, v;  // qkv: where k and v are part of what a projection writes
  V* q;       // [ROWS][W][d]: queries times log2(e), replaced by the outputs
  V *top, *sum;  // [ROWS][W]: of the softmax
  V* logits;  // [ROWS][keys]
  V* out;     // [ROWS][d]
  int64_t keys;

  static int64_t vectors(const Problem& p) {
    int64_t row = p.width * p.channels;
    return Task::vectors(p) + (p.project ? 1 : 2) * ring_rows(p) * p.width * key_stride(p) +
           ROWS * (row + 2 * p.width + logit_keys(p) + p.channels);
  }
  void setup(const Task& t, Arena& a) {
    const Problem& p = t.p;
    const int64_t row = p.width * p.channels;
    if (p.project) {
      qkv = k = v = t.projected(a);
      k.base += p.channels;
      v.base += 2 * p.channels;
    } else {
      k = t.rows(p.k, a);
      v = t.rows(p.v, a);
    }
    keys = logit_keys(p);
    q = a.take(ROWS * row);
    top = a.take(ROWS * p.width);
    sum = a.take(ROWS * p.width);
    logits = a.take(ROWS * keys);
    out = a.take(ROWS * p.channels);
  }
};

template <int D>
void forward_pixel(const Task& t, const Forward& f, int64_t y0, int nq, int64_t x) {
  const int64_t d = D ? D : t.d, r = t.r, K = t.K;
  V* q[ROWS];
  for (int i = 0; i < nq; ++i) q[i] = f.q + (i * t.W + x) * d;
  SASA_PHASE(position);
  t.relative_logits<D>(q, nq);

  SASA_PHASE(softmax);
  V m[ROWS], sum[ROWS];
  bool first = true;
  for (int i = 0; i < nq; ++i) {
    m[i] = splat(-std::numeric_limits<float>::infinity());
    sum[i] = V{};
  }
  if (t.p.zero_border) {
    for (int i = 0; i < nq; ++i) {
      bool any = false;
      t.outside(y0 + i, x, [&](int64_t a, int64_t b) {
        m[i] = vmax(t.row_logit[i * K + a] + t.col_logit[i * K + b], m[i]);
        any = true;
      });
      // Row by row: one chain of K * K additions would lose digits.
      V part = V{};
      int64_t row = 0;
      t.outside(y0 + i, x, [&](int64_t a, int64_t b) {
        if (a != row) {
          sum[i] += part;
          part = V{};
          row = a;
        }
        part += exp2v(t.row_logit[i * K + a] + t.col_logit[i * K + b] - m[i]);
      });
      sum[i] += part;
      if (any) first = false;
    }
    if (!first)
      std::memset(static_cast<void*>(f.out), 0, size_t(nq * d) * sizeof(V));
  }

  const int64_t xa = std::max<int64_t>(0, x - r), xb = std::min(t.W, x + r + 1), n = xb - xa;
  const int64_t ka = std::max<int64_t>(0, y0 - r), kb = std::min(t.H, y0 + nq + r);
  const int64_t step = std::max<int64_t>(1, f.keys / n);
  const V* column = t.col_logit + (xa - x + r);

  for (int64_t ca = ka; ca < kb; ca += step) {
    const int64_t cb = std::min(kb, ca + step);
    V* w[ROWS];
    V m_old[ROWS];
    for (int i = 0; i < nq; ++i) {
      w[i] = f.logits + i * f.keys;
      m_old[i] = m[i];
    }
    SASA_PHASE(logits);
    for (int64_t ky = ca; ky < cb; ++ky) {
      const int lo = int(std::max<int64_t>(0, ky - r - y0)), hi = int(std::min<int64_t>(nq, ky + r - y0 + 1));
      const V* b = f.k(ky) + xa * t.ks;
      with_count(hi - lo, [&](auto na) SASA_ALWAYS_INLINE {
        constexpr int NA = decltype(na)::value;
        V row[NA];
        Wide top[NA];
        const V* cl[NA];
        V* wp[NA];
        const V* qp[NA];
        unroll<NA>([&](auto i) SASA_ALWAYS_INLINE {
          row[i] = t.row_logit[(lo + i) * K + ky - (y0 + lo + i) + r];
          cl[i] = column + (lo + i) * K;
          top[i] = spread<Wide>(m[lo + i]);
          wp[i] = w[lo + i] + (ky - ca) * n;
          qp[i] = q[lo + i];
        });
        dot<D, NA>(
            qp, b, t.ks, n, d, row,
            [&]<class T>(auto i, int64_t j, T s) SASA_ALWAYS_INLINE {
              s += load<T>(cl[i] + j);
              store(wp[i] + j, s);
              raise(top[i], s);
            });
        unroll<NA>([&](auto i) SASA_ALWAYS_INLINE { m[lo + i] = largest_of(top[i]); });
      });
    }
    SASA_PHASE(softmax);
    for (int i = 0; i < nq; ++i) {
      const int64_t ya = std::max(ca, y0 + i - r), yb = std::min(cb, y0 + i + r + 1);
      Wide total = {};
      const V top = m[i];
      auto exponential = [&]<class T>(T, int64_t j) SASA_ALWAYS_INLINE {
        T e = exp2v(load<T>(w[i] + j) - spread<T>(top));
        store(w[i] + j, e);
        add(total, e);
      };
      int64_t j = (ya - ca) * n;
      const int64_t end = (yb - ca) * n;  // before j where no key of these rows is in the window
      if (j % WIDTH && j < end) exponential(V{}, j++);  // no access across cache lines
      for (; j + WIDTH <= end; j += WIDTH) exponential(Wide{}, j);
      for (; j < end; ++j) exponential(V{}, j);
      if (first) {
        sum[i] = sum_of(total);
      } else {
        V fade = exp2v(m_old[i] - top);
        sum[i] = sum[i] * fade + sum_of(total);
        for (int64_t c = 0; c < d; ++c) f.out[i * d + c] *= fade;
      }
    }
    SASA_PHASE(aggregate);
    auto columns = [&]<class T, int N>(Piece<T, N>, int64_t c0) SASA_ALWAYS_INLINE {
      T acc[ROWS][N];
      unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
        unroll<N>([&](auto c) SASA_ALWAYS_INLINE {
          acc[i][c] = (first || i >= nq) ? T{} : load<T>(f.out + i * d + c0 + c * PARTS<T>);
        });
      });
      for (int64_t ky = ca; ky < cb; ++ky) {
        const int lo = int(std::max<int64_t>(0, ky - r - y0)), hi = int(std::min<int64_t>(nq, ky + r - y0 + 1));
        weighted(acc, lo, hi, w, (ky - ca) * n, f.v(ky) + xa * t.ks + c0, t.ks, n);
      }
      unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
        if (i < nq)
          unroll<N>([&](auto c) SASA_ALWAYS_INLINE { store(f.out + i * d + c0 + c * PARTS<T>, acc[i][c]); });
      });
    };
    by_channels<D>(d, columns);
    first = false;
  }
  SASA_PHASE(write);
  for (int i = 0; i < nq; ++i) {
    V scale = 1.0f / sum[i];
    if (t.bias)
      for (int64_t c = 0; c < d; ++c) q[i][c] = f.out[i * d + c] * scale + t.bias[c];
    else
      for (int64_t c = 0; c < d; ++c) q[i][c] = f.out[i * d + c] * scale;
    if (t.p.relu)
      for (int64_t c = 0; c < d; ++c) q[i][c] = vmax(V{}, q[i][c]);
    f.top[i * t.W + x] = m[i];
    f.sum[i * t.W + x] = sum[i];
  }
}

template <int D>
void forward_rows(const Problem& p, int64_t group, int64_t from, int64_t to) {
  SASA_PHASE(interleave);
  Arena& a = arena();
  a.reserve(Forward::vectors(p));
  Task t(p, group);
  t.setup(a);
  Forward f;
  f.setup(t, a);
  int64_t loaded = std::max<int64_t>(0, from - t.r);
  for (int64_t y0 = from; y0 < to; y0 += ROWS) {
    const int nq = int(std::min<int64_t>(ROWS, to - y0));
    const int64_t need = std::min(t.H, y0 + nq + t.r);
    if (p.project && need > loaded) {
      const int64_t until = std::min(t.H, std::max(need, loaded + projected_rows(p)));
      f.qkv.runs(loaded, until, [&](int64_t y, int64_t count, V* out) {
        SASA_PHASE(none);  // products have a clock of their own
        p.project(p.context, group, y, y + count, reinterpret_cast<float*>(out), t.ks * LANES);
        SASA_PHASE(interleave);
      });
      loaded = until;
    } else if (!p.project && !in_place(p.k)) {
      f.k.runs(loaded, need, [&](int64_t y, int64_t count, V* out) {
        interleave(p.k, p, t.first, t.d, y * t.W, count * t.W, out);
      });
      f.v.runs(loaded, need, [&](int64_t y, int64_t count, V* out) {
        interleave(p.v, p, t.first, t.d, y * t.W, count * t.W, out);
      });
      loaded = std::max(loaded, need);
    }
    if (p.project)
      f.qkv.runs(y0, y0 + nq, [&](int64_t y, int64_t count, V* from) {
        copy_pixels(from, t.ks, f.q + (y - y0) * t.W * t.d, t.d, count * t.W, t.d, LOG2E);
      });
    else
      t.load_queries(y0, nq, f.q);
    for (int64_t x = 0; x < t.W; ++x) forward_pixel<D>(t, f, y0, nq, x);
    SASA_PHASE(write);
    separate(p.y, p, t.first, t.d, y0 * t.W, nq * t.W, f.q);
    if (p.top.data) {
      separate(p.top, p, t.first, 1, y0 * t.W, nq * t.W, f.top);
      separate(p.sum, p, t.first, 1, y0 * t.W, nq * t.W, f.sum);
    }
    SASA_PHASE(interleave);
  }
  a.release_large();
  SASA_PHASE(none);
}

}  // namespace SASA_ISA
