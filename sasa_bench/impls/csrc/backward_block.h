// The backward pass of a few queries: what it holds, and its steps.
#pragma once

#include "local_attention.h"
#include "phases.h"

namespace SASA_ISA {

struct Backward {
  Rows k, v, dk, dv;
  V **k_row, **v_row, **dk_row, **dv_row;  // where the key rows of the blocks at hand begin
  V* q;        // [ROWS][W][d]: queries, unless they are used where they are
  V* dq;       // [ROWS][W][d], likewise
  V* dy;       // [ROWS][W][d], over the sum of the softmax, so that P need not be divided by it
  V *top, *delta;  // [W][ROWS]: what is taken off the logits; dy.y
  V* stats;    // [2][ROWS][W]: both as they come
  V *P, *dS;   // [STRIP][keys][ROWS]
  V* dq_sum;   // [STRIP][ROWS][d]
  V* sums;     // [STRIP][row, column][K][ROWS]: dS summed over rows and columns of the window
  V *drel_row, *drel_col;
  int64_t keys;

  static int64_t vectors(const Problem& p) {
    const int64_t row = p.width * p.channels;
    return Task::vectors(p) + 4 * row_pointers(p) + 4 * ring_rows(p) * row +
           ROWS * (3 * row + 4 * p.width + STRIP * (2 * (logit_keys(p) + p.kernel) + p.channels));
  }
  void setup(const Task& t, Arena& a) {
    const Problem& p = t.p;
    const int64_t row = p.width * p.channels;
    k = t.rows(p.k, a);
    v = t.rows(p.v, a);
    dk = t.rows(p.dk, a);
    dv = t.rows(p.dv, a);
    for (V*** pointers : {&k_row, &v_row, &dk_row, &dv_row})
      *pointers = reinterpret_cast<V**>(a.take(row_pointers(p)));
    keys = logit_keys(p);
    q = a.take(ROWS * row);
    dq = a.take(ROWS * row);
    dy = a.take(ROWS * row);
    top = a.take(ROWS * p.width);
    delta = a.take(ROWS * p.width);
    stats = a.take(2 * ROWS * p.width);
    P = a.take(STRIP * ROWS * keys);
    dS = a.take(STRIP * ROWS * keys);
    sums = a.take(STRIP * 2 * ROWS * p.kernel);
    dq_sum = a.take(STRIP * ROWS * p.channels);
  }
};

// Key rows of a pass: queries are compared with [ka, cb), those in [from, to) of which get gradients. `own`: the queries are
// this task's, so their gradient and that of the relative embedding are its to compute.
struct KeyRows {
  int64_t ka, kb, from, to;
  bool own;
};

// The queries (y0 + i, x), i < nq, and what follows from the gradients of their outputs. x is column number `at` of its strip.
template <int D>
struct BackwardBlock {
  const Task& t;
  const Backward& f;
  const KeyRows& rows;
  const int64_t y0, x, d;
  const int nq;
  const int64_t xa, n;            // keys (xa..xa + n) of a row
  V *const P, *const dS;          // of the slots at hand, [key][ROWS]
  V *const row_sum, *const col_sum, *const dq_sum;
  const V *const row_logit, *const col_logit, *const top, *const delta;
  const V *q[ROWS], *dy[ROWS];
  V* dq[ROWS];

  SASA_INLINE BackwardBlock(const Task& t_, const Backward& f_, const KeyRows& rows_, const Queries& queries,
                            const Queries& gradients, int64_t y0_, int nq_, int64_t x_, int at)
      : t(t_), f(f_), rows(rows_), y0(y0_), x(x_), d(known<D>(t_.d)), nq(nq_), xa(t_.first_key(x_)),
        n(t_.keys_until(x_) - xa), P(f_.P + at * f_.keys * ROWS), dS(f_.dS + at * f_.keys * ROWS),
        row_sum(f_.sums + at * 2 * ROWS * t_.K), col_sum(row_sum + ROWS * t_.K), dq_sum(f_.dq_sum + at * ROWS * d),
        row_logit(t_.row_logits(at)), col_logit(t_.col_logits(at)), top(f_.top + x_ * ROWS), delta(f_.delta + x_ * ROWS) {
    for (int i = 0; i < nq; ++i) {
      q[i] = queries(i, x);
      dq[i] = const_cast<V*>(gradients(i, x));
      dy[i] = f.dy + (i * t.W + x) * d;
    }
    t.relative_logits<D>(q, nq, at);
    std::memset(static_cast<void*>(row_sum), 0, size_t(2 * ROWS * t.K) * sizeof(V));
  }

  SASA_INLINE V* keys(V* const* row_of, int64_t ky) const { return row_of[ky - rows.ka] + xa * t.ks; }

  // P = logits of the queries [from, to) and key row ky, in slot `slot` of those at hand.
  SASA_INLINE void logits(int64_t ky, int64_t slot, int from, int to) const {
    t.window_logits<D>(q, row_logit + (ky - y0 + t.r) * ROWS, col_logit + (xa - x + t.r) * ROWS, keys(f.k_row, ky), n,
                       P + slot * n * ROWS, from, to);
  }

  // P = exp(P - top) of so many slots.
  SASA_INLINE void weights(int64_t slots) const {
    constexpr int PIECES = ROWS / WIDTH;
    Wide less[PIECES];
    unroll<PIECES>([&](auto i) SASA_ALWAYS_INLINE { less[i] = load<Wide>(top + i * WIDTH); });
    for (V *at = P, *end = at + slots * n * ROWS; at < end; at += ROWS)
      unroll<PIECES>([&](auto i) SASA_ALWAYS_INLINE {
        store(at + i * WIDTH, expv(load<Wide>(at + i * WIDTH) - less[i]));
      });
  }

  // dS = P (dy.v - delta) of a key row, and its sums over rows and columns of the window.
  SASA_INLINE void logit_gradients(int64_t ky, int64_t slot, int from, int to) const {
    with_queries(from, to, [&]<class Some>(Some some, int lo) SASA_ALWAYS_INLINE {
      V total[Some::COUNT] = {};
      const V* weight = P + slot * n * ROWS + lo;
      V *out = dS + slot * n * ROWS + lo, *column = col_sum + (xa - x + t.r) * ROWS + lo;
      dot<D>(some, dy + lo, keys(f.v_row, ky), t.ks, n, d, {}, [&](auto at, auto s) SASA_ALWAYS_INLINE {
        s = (s - at.of_query(delta + lo)) * at.of_key(weight);
        at.store(out, s);
        at.add_to(total, s);
        at.store(column, at.of_key(column) + s);
      });
      unroll<Some::COUNT>([&](auto i) SASA_ALWAYS_INLINE {
        row_sum[(ky - y0 - lo - i + t.r) * ROWS + lo + i] += total[i];
      });
    });
  }

  // dk and dv of a key row.
  SASA_INLINE void key_gradients(int64_t ky, int64_t slot, int from, int to) const {
    with_queries(from, to, [&]<class Some>(Some, int lo) SASA_ALWAYS_INLINE {
      const int64_t at = slot * n * ROWS + lo;
      outer<D, Some::COUNT>(dS + at, q + lo, keys(f.dk_row, ky), t.ks, n, d);
      outer<D, Some::COUNT>(P + at, dy + lo, keys(f.dv_row, ky), t.ks, n, d);
    });
  }

  // dq_sum (+)= dS times keys of the slots [sa, sb), channels from c0 on.
  template <class T, int N>
  SASA_INLINE void query_gradients(Piece<T, N>, int64_t c0, int64_t sa, int64_t sb) const {
    T acc[ROWS][N];
    unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
      unroll<N>([&](auto c) SASA_ALWAYS_INLINE {
        acc[i][c] = sa && i < nq ? load<T>(dq_sum + i * d + c0 + c * PARTS<T>) : T{};
      });
    });
    for (int64_t s = sa; s < sb; ++s)
      t.rows_of_slot(s, y0, nq, rows.ka, rows.kb, [&](int64_t ky, int from, int to) SASA_ALWAYS_INLINE {
        weighted(acc, from, to, dS + (s - sa) * n * ROWS, keys(f.k_row, ky) + c0, t.ks, n);
      });
    unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
      if (i < nq)
        unroll<N>([&](auto c) SASA_ALWAYS_INLINE { store(dq_sum + i * d + c0 + c * PARTS<T>, acc[i][c]); });
    });
  }

  // Keys outside the image: their logits are the relative ones alone, their values zero.
  void outside() const {
    for (int i = 0; i < nq; ++i)
      t.outside(y0 + i, x, [&](int64_t a, int64_t b) {
        const int64_t row = a * ROWS + i, column = b * ROWS + i;
        const V gradient = -delta[i] * expv(row_logit[row] + col_logit[column] - top[i]);
        row_sum[row] += gradient;
        col_sum[column] += gradient;
      });
  }

  // The gradient of the relative embedding, and what it adds to that of the queries.
  SASA_INLINE void relative_gradients() const {
    const V* second[ROWS];
    for (int i = 0; i < nq; ++i) second[i] = q[i] + t.dr;
    with_queries(0, nq, [&]<class Some>(Some, int lo) {
      outer<D / 2, Some::COUNT>(row_sum + lo, q + lo, f.drel_row, t.dr, t.K, t.dr);
      outer<D / 2, Some::COUNT>(col_sum + lo, second + lo, f.drel_col, t.dc, t.K, t.dc);
    });
    auto half = [&](const V* sums, const V* rel, int64_t channels, V* out) SASA_ALWAYS_INLINE {
      by_channels<D / 2>(channels, [&]<class T, int N>(Piece<T, N>, int64_t c0) SASA_ALWAYS_INLINE {
        T acc[ROWS][N] = {};
        weighted(acc, 0, nq, sums, rel + c0, channels, t.K);
        unroll<ROWS>([&](auto i) SASA_ALWAYS_INLINE {
          if (i < nq)
            unroll<N>([&](auto c) SASA_ALWAYS_INLINE {
              V* sum = out + i * d + c0 + c * PARTS<T>;
              store(sum, load<T>(sum) + acc[i][c]);
            });
        });
      });
    };
    half(row_sum, t.rel_row, t.dr, dq_sum);
    half(col_sum, t.rel_col, t.dc, dq_sum + t.dr);
  }

  SASA_INLINE void finish() const {
    if (t.p.relative) {
      if (t.p.zero_border) outside();
      relative_gradients();
    }
    for (int i = 0; i < nq; ++i)
      for (int64_t c = 0; c < d; ++c) dq[i][c] = dq_sum[i * d + c];
  }
};

// Blocks side by side: a key row serves all of them while it is in the first-level cache.
template <int D, size_t... AT>
SASA_INLINE void backward_strip(const Task& t, const Backward& f, const KeyRows& rows, const Queries& queries,
                                const Queries& gradients, int64_t y0, int nq, int64_t x0, std::index_sequence<AT...>) {
  SASA_PHASE(position);
  BackwardBlock<D> block[] = {
      BackwardBlock<D>(t, f, rows, queries, gradients, y0, nq, std::min(x0 + int64_t(AT), t.W - 1), int(AT))...};
  SASA_PHASE(gradients);
  const int count = int(std::min<int64_t>(STRIP, t.W - x0));
  auto each = [&](auto work) SASA_ALWAYS_INLINE {
    for (int i = 0; i < count; ++i) work(block[i]);
  };
  int64_t most = 1;
  for (auto& b : block) most = std::max(most, b.n);
  const int64_t slots = t.slots(rows.ka, rows.kb), step = std::max<int64_t>(1, f.keys / most);
  for (int64_t sa = 0; sa < slots; sa += step) {
    const int64_t sb = std::min(slots, sa + step);
    auto by_key_rows = [&](auto work) SASA_ALWAYS_INLINE {
      for (int64_t s = sa; s < sb; ++s)
        t.rows_of_slot(s, y0, nq, rows.ka, rows.kb, [&](int64_t ky, int from, int to) SASA_ALWAYS_INLINE {
          each([&](auto& b) SASA_ALWAYS_INLINE { work(b, ky, s - sa, from, to); });
        });
    };
    for (int64_t s = sa; s < sb; ++s)
      if (!t.fills(s, y0, nq, rows.ka, rows.kb))
        each([&](auto& b) {
          std::memset(static_cast<void*>(b.P + (s - sa) * b.n * ROWS), 0, size_t(b.n * ROWS) * sizeof(V));
        });
    by_key_rows([](auto& b, auto... row) SASA_ALWAYS_INLINE { b.logits(row...); });
    each([&](auto& b) SASA_ALWAYS_INLINE { b.weights(sb - sa); });
    by_key_rows([](auto& b, auto... row) SASA_ALWAYS_INLINE { b.logit_gradients(row...); });
    by_key_rows([&](auto& b, int64_t ky, auto... row) SASA_ALWAYS_INLINE {
      if (ky >= rows.from && ky < rows.to) b.key_gradients(ky, row...);
    });
    if (rows.own)
      by_channels<D>(t.d, [&](auto piece, int64_t c0) SASA_ALWAYS_INLINE {
        each([&](auto& b) SASA_ALWAYS_INLINE { b.query_gradients(piece, c0, sa, sb); });
      });
  }
  SASA_PHASE(position);
  if (rows.own) each([](auto& b) SASA_ALWAYS_INLINE { b.finish(); });
}

}  // namespace SASA_ISA
