// The forward pass of a few queries: what it holds, and its steps.
#pragma once

#include "local_attention.h"

namespace SASA_ISA {

struct Forward {
  Rows qkv, k, v;    // qkv: where k and v are part of what a projection writes
  V **k_row, **v_row;  // [kernel + ROWS - 1]: where the key rows of the blocks at hand begin
  V* q;              // [ROWS][W][d]: queries, unless they are used where they are
  V* y;              // [ROWS][W][d]
  V *top, *sum;      // [ROWS][W]: of the softmax
  V* logits;         // [STRIP][keys][ROWS]
  V* out;            // [STRIP][ROWS][d]
  int64_t keys;

  static bool copies_queries(const Problem& p) { return !p.project && !in_place(p.q); }
  static int64_t vectors(const Problem& p) {
    const int64_t row = p.width * p.channels;
    return Task::vectors(p) + 2 * row_pointers(p) + (p.project ? 1 : 2) * ring_rows(p) * p.width * key_stride(p) +
           ROWS * ((copies_queries(p) ? 2 : 1) * row + 2 * p.width + STRIP * (logit_keys(p) + p.channels));
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
    k_row = reinterpret_cast<V**>(a.take(row_pointers(p)));
    v_row = reinterpret_cast<V**>(a.take(row_pointers(p)));
    keys = logit_keys(p);
    q = a.take(copies_queries(p) ? ROWS * row : 0);
    y = a.take(ROWS * row);
    top = a.take(ROWS * p.width);
    sum = a.take(ROWS * p.width);
    logits = a.take(STRIP * ROWS * keys);
    out = a.take(STRIP * ROWS * p.channels);
  }
};

// The queries (y0 + i, x), i < nq, and their outputs. x is column number `at` of its strip.
template <int D>
struct ForwardBlock {
  const Task& t;
  const Forward& f;
  const int64_t y0, x, d;
  const int nq;
  const int64_t xa, n, ka, kb;  // keys (ka..kb, xa..xa + n)
  V *const w, *const out;       // the logits or weights at hand, [key][ROWS]; sums of weighted values, [ROWS][d]
  const V *const row_logit, *const col_logit;
  const V* q[ROWS];
  V top[ROWS], sum[ROWS];  // what is taken off the logits, and the sum of their exponentials

  SASA_INLINE ForwardBlock(const Task& t_, const Forward& f_, const Queries& from, int64_t y0_, int nq_, int64_t x_, int at)
      : t(t_), f(f_), y0(y0_), x(x_), d(known<D>(t_.d)), nq(nq_), xa(t_.first_key(x_)), n(t_.keys_until(x_) - xa),
        ka(t_.first_key_row(y0_)), kb(t_.key_rows_until(y0_, nq_)), w(f_.logits + at * f_.keys * ROWS),
        out(f_.out + at * ROWS * d), row_logit(t_.row_logits(at)), col_logit(t_.col_logits(at)) {
    for (int i = 0; i < nq; ++i) q[i] = from(i, x);
    t.relative_logits<D>(q, nq, at);
  }

  // w = logits of the queries [from, to) and key row ky, in slot `slot` of those at hand.
  SASA_INLINE void logits(int64_t ky, int64_t slot, int from, int to) const {
    t.window_logits<D>(q, row_logit + (ky - y0 + t.r) * ROWS, col_logit + (xa - x + t.r) * ROWS,
                       f.k_row[ky - ka] + xa * t.ks, n, w + slot * n * ROWS, from, to);
  }

  // w = function(w, top) of so many slots; sum += it.
  template <class F>
  SASA_INLINE void weights(int64_t slots, F function) {
    constexpr int PIECES = ROWS / WIDTH;
    Wide total[PIECES], less[PIECES];
    unroll<PIECES>([&](auto i) SASA_ALWAYS_INLINE {
      total[i] = Wide{};
      less[i] = load<Wide>(top + i * WIDTH);
    });
    for (V *at = w, *end = w + slots * n * ROWS; at < end; at += ROWS)
      unroll<PIECES>([&](auto i) SASA_ALWAYS_INLINE {
        const Wide e = function(load<Wide>(at + i * WIDTH), less[i]);
        store(at + i * WIDTH, e);
        total[i] += e;
      });
    unroll<PIECES>([&](auto i) SASA_ALWAYS_INLINE {
      store(sum + i * WIDTH, load<Wide>(sum + i * WIDTH) + total[i]);
    });
  }

  // `out` (+)= weights times values of the slots [sa, sb), channels from c0 on; the outputs after the last slot: over the sum
  // of the weights, and with what stands behind the layer.
  template <class T, int N>
  SASA_INLINE void weigh_values(Piece<T, N>, int64_t c0, int64_t sa, int64_t sb, bool add) const {
    T acc[ROWS][N];
    unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE {
        acc[i][c] = add && i < nq ? load<T>(out + i * d + c0 + c * PARTS<T>) : T{};
      });
    });
    for (int64_t s = sa; s < sb; ++s)
      t.rows_of_slot(s, y0, nq, ka, kb, [&](int64_t ky, int lo, int hi) SASA_ALWAYS_INLINE {
        weighted(acc, lo, hi, w + (s - sa) * n * ROWS, f.v_row[ky - ka] + xa * t.ks + c0, t.ks, n);
      });
    const bool last = sb == t.slots(ka, kb);
    unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
      if (i >= nq) return;
      V* to = (last ? f.y + (i * t.W + x) * d : out + i * d) + c0;
      const T scale = spread<T>(last ? 1.0f / sum[i] : splat(1.0f));
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE {
        T y = acc[i][c] * scale;
        if (last && t.bias) y += load<T>(t.bias + c0 + c * PARTS<T>);
        if (last && t.p.relu) y = vmax(T{}, y);
        store(to + c * PARTS<T>, y);
      });
    });
  }

  // Keys outside the image, whose logits are the relative ones alone, added to the sums by `exponential`: where nothing was taken
  // off the logits, they may be of any size.
  template <class F>
  void sum_outside(F exponential) {
    for (int i = 0; i < nq; ++i) {
      // Row by row: one chain of K * K additions would lose digits.
      V part = V{};
      int64_t line = 0;
      t.outside(y0 + i, x, [&](int64_t a, int64_t b) {
        if (a != line) {
          sum[i] += part;
          part = V{};
          line = a;
        }
        part += exponential(row_logit[a * ROWS + i] + col_logit[b * ROWS + i] - top[i]);
      });
      sum[i] += part;
    }
  }

  SASA_INLINE void begin_direct() {
    for (int i = 0; i < ROWS; ++i) top[i] = sum[i] = V{};
    if (t.p.zero_border) sum_outside([](V x) SASA_ALWAYS_INLINE { return exp_near(x); });
  }

  // Returns whether anything is summed already.
  bool begin_shifted() {
    bool any = false;
    for (int i = 0; i < ROWS; ++i) {
      top[i] = splat(-std::numeric_limits<float>::infinity());
      sum[i] = V{};
    }
    if (!t.p.zero_border) return false;
    for (int i = 0; i < nq; ++i)
      t.outside(y0 + i, x, [&](int64_t a, int64_t b) {
        top[i] = vmax(row_logit[a * ROWS + i] + col_logit[b * ROWS + i], top[i]);
        any = true;
      });
    if (any) sum_outside([](V x) SASA_ALWAYS_INLINE { return expv(x); });
    std::memset(static_cast<void*>(out), 0, size_t(nq * d) * sizeof(V));
    return any;
  }

  // Takes the largest of the logits at hand into account; `any`: something is summed already.
  void raise_top(int64_t slots, bool any) {
    V before[ROWS];
    for (int i = 0; i < ROWS; ++i) before[i] = top[i];
    for (int64_t j = 0; j < slots * n; ++j)
      for (int i = 0; i < ROWS; ++i) top[i] = vmax(w[j * ROWS + i], top[i]);
    for (int i = 0; i < nq && any; ++i) {
      const V fade = expv(before[i] - top[i]);
      sum[i] *= fade;
      for (int64_t c = 0; c < d; ++c) out[i * d + c] *= fade;
    }
  }

  // Whether the sums are near enough to 1 for float32.
  SASA_INLINE bool fits() const {
    VI near = VI{} - 1;
    for (int i = 0; i < nq; ++i) near &= (VI)(sum[i] > 1 / DIRECT) & (VI)(sum[i] < DIRECT);
    return all(near);
  }

  // Whether blocks beside this one are likely to fit with nothing taken off the logits.
  SASA_INLINE bool near() const {
    VI near = VI{} - 1;
    for (int i = 0; i < nq; ++i) near &= (VI)(top[i] < DIRECT_LOGIT) & (VI)(top[i] > -DIRECT_LOGIT);
    return all(near);
  }

  SASA_INLINE void save() const {
    for (int i = 0; i < nq; ++i) {
      f.top[i * t.W + x] = top[i];
      f.sum[i * t.W + x] = sum[i];
    }
  }
};

}  // namespace SASA_ISA
