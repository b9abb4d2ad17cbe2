// The working memory of a task: a band of rows of one group of planes.
#pragma once

#include "layout.h"
#include "windows.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace SASA_ISA {

// Numbers under 2^-126 are zero while this lives: the small weights of a peaked softmax make many, each of which takes the
// processor a hundred cycles.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | uint64_t(1) << 24));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// Rows of interleaved pixels. Row y lives in slot y % slots, so a window of `slots` rows can slide over a plane.
struct Rows {
  V* base = nullptr;
  int64_t slots = 1, row = 0;  // row: vectors per row
  V* operator()(int64_t y) const { return base + (y % slots) * row; }
  // f(y, count, address) for every run of rows in [from, to) that is contiguous.
  template <class F>
  void runs(int64_t from, int64_t to, F f) const {
    while (from < to) {
      int64_t count = std::min(to - from, slots - from % slots);
      f(from, count, (*this)(from));
      from += count;
    }
  }
};

// The queries of up to ROWS rows.
struct Queries {
  const V* row[ROWS];
  int64_t stride;  // vectors from query to query
  Queries(const Rows& rows, int64_t stride_, int64_t y0, int nq) : stride(stride_) {
    for (int i = 0; i < nq; ++i) row[i] = rows(y0 + i);
  }
  const V* operator()(int i, int64_t x) const { return row[i] + x * stride; }
};

// One growing block per thread. Kept between calls while it is small, because fresh pages cost more than the kernel.
class Arena {
 public:
  ~Arena() { std::free(block_); }
  void reserve(int64_t vectors) {
    used_ = 0;
    int64_t bytes = (vectors * int64_t(sizeof(V)) + 4095) / 4096 * 4096;
    if (bytes > size_ || size_ > KEEP) {
      std::free(block_);
      size_ = 0;
      block_ = std::aligned_alloc(4096, size_t(std::max<int64_t>(bytes, 4096)));
      if (!block_) throw std::bad_alloc();
      size_ = bytes;
    }
#ifdef SASA_SANITIZE
    std::fill_n(static_cast<uint32_t*>(block_), bytes / 4, 0x7fc00000u);  // NaN, and e to it is NaN too
#endif
  }
  V* take(int64_t vectors) {
    V* out = static_cast<V*>(block_) + used_;
    used_ += vectors;
    return out;
  }
  void release_large() {
    if (size_ > KEEP) {
      std::free(block_);
      block_ = nullptr;
      size_ = 0;
    }
  }

 private:
  static constexpr int64_t KEEP = int64_t(4) << 20;
  void* block_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

inline Arena& arena() {
  static thread_local Arena a;
  return a;
}

// Rows projected at once: enough pixels for an efficient product, few enough to stay in cache.
inline int64_t projected_rows(const Problem& p) { return std::max<int64_t>(ROWS, (448 + p.width - 1) / p.width); }

// Keys and values slide through a ring of so many rows, unless they are interleaved in memory already.
inline int64_t ring_rows(const Problem& p) {
  if (in_place(p.k)) return 0;
  return std::min<int64_t>(p.height, p.kernel + ROWS - 1 + (p.project ? projected_rows(p) : 0));
}
// Vectors from key to key: in memory, in a ring of projected rows (queries, keys and values side by side), in a ring of keys.
inline int64_t key_stride(const Problem& p) {
  if (in_place(p.k)) return p.k.pixel / LANES;
  return (p.project ? 3 : 1) * p.channels;
}
// Keys whose logits are held at once.
inline int64_t logit_keys(const Problem& p) {
  return std::max<int64_t>(CHUNK, std::min<int64_t>(p.kernel, p.width));
}

// Vectors that pointers to the key rows of a block take.
inline int64_t row_pointers(const Problem& p) {
  return (std::min(p.height, p.kernel + ROWS - 1) * int64_t(sizeof(V*)) + int64_t(sizeof(V)) - 1) / int64_t(sizeof(V));
}

// What one task shares between its blocks.
struct Task {
  const Problem& p;
  int64_t first;  // plane in lane 0
  int64_t d, dr, dc, W, H, K, r;
  int64_t ks;  // vectors from key to key
  V *rel_row = nullptr, *rel_col = nullptr;  // [K][dr], [K][dc]
  V* logits;                                 // [STRIP][rows, columns][K][ROWS]: the relative ones at hand
  V* bias = nullptr;                         // [d]

  Task(const Problem& p_, int64_t group)
      : p(p_), first(group * LANES), d(p_.channels), dr(p_.channels / 2), dc(p_.channels - p_.channels / 2),
        W(p_.width), H(p_.height), K(p_.kernel), r(p_.kernel / 2), ks(key_stride(p_)) {}

  // Rows of keys, values or a gradient of them: those of an interleaved tensor, or else a ring.
  Rows rows(const Planes& t, Arena& a) const {
    if (in_place(t)) return {interleaved(t, p, first), H, W * ks};
    const int64_t slots = ring_rows(p);
    return {a.take(slots * W * d), slots, W * d};
  }

  // Rows of interleaved queries, keys and values side by side, as a projection writes them.
  Rows projected(Arena& a) const {
    if (p.q.data) return {interleaved(p.q, p, first), H, W * ks};
    const int64_t slots = ring_rows(p);
    return {a.take(slots * W * ks), slots, W * ks};
  }

  static int64_t vectors(const Problem& p) {
    return p.kernel * p.channels + STRIP * 2 * ROWS * p.kernel + (p.bias ? p.channels : 0);
  }

  void setup(Arena& a) {
    rel_row = a.take(K * dr);
    rel_col = a.take(K * dc);
    logits = a.take(STRIP * 2 * ROWS * K);
    if (p.bias) {
      bias = a.take(d);
      for (int l = 0; l < LANES; ++l)
        for (int64_t c = 0; c < d; ++c) bias[c][l] = p.bias[std::min(first + l, p.planes - 1) % p.heads * d + c];
    }
    if (!p.relative) {
      std::memset(static_cast<void*>(logits), 0, size_t(STRIP * 2 * ROWS * K) * sizeof(V));
      return;
    }
    for (int l = 0; l < LANES; ++l) {
      int64_t head = std::min(first + l, p.planes - 1) % p.heads;
      auto fill = [&](const void* src, V* out, int64_t n) {
        with_type(p.scalar, [&]<class T>(Of<T>) {
          const T* from = static_cast<const T*>(src) + head * n * K;
          for (int64_t c = 0; c < n; ++c)
            for (int64_t o = 0; o < K; ++o) out[o * n + c][l] = widen(from[c * K + o]);
        });
      };
      fill(p.rel_row, rel_row, dr);
      fill(p.rel_col, rel_col, dc);
    }
  }

  // Rows of the keys in the windows of nq queries from row y0 on: [first_key_row, key_rows_until).
  int64_t first_key_row(int64_t y0) const { return std::max<int64_t>(0, y0 - r); }
  int64_t key_rows_until(int64_t y0, int nq) const { return std::min(H, y0 + nq + r); }
  // Columns of the keys in the window of a query in column x: [first_key, keys_until).
  int64_t first_key(int64_t x) const { return std::max<int64_t>(0, x - r); }
  int64_t keys_until(int64_t x) const { return std::min(W, x + r + 1); }
  // Logits of the key rows [ka, kb) of a block lie in slots, row ky in slot (ky - ka) % K: no query has two rows that share
  // one, and where no row is outside the image every slot has one for each query.
  int64_t slots(int64_t ka, int64_t kb) const { return std::min(K, kb - ka); }
  // work(ky, lo, hi) for the rows of slot s, which the queries [lo, hi) of the nq have in their windows.
  template <class Work>
  SASA_INLINE void rows_of_slot(int64_t s, int64_t y0, int nq, int64_t ka, int64_t kb, Work work) const {
    for (int64_t ky = ka + s; ky < kb; ky += K)
      work(ky, int(std::max<int64_t>(0, ky - r - y0)), int(std::min<int64_t>(nq, ky + r - y0 + 1)));
  }
  // Whether slot s has a row for each of ROWS queries.
  bool fills(int64_t s, int64_t y0, int nq, int64_t ka, int64_t kb) const {
    int queries = 0;
    rows_of_slot(s, y0, nq, ka, kb, [&](int64_t, int lo, int hi) { queries += hi - lo; });
    return queries == ROWS;
  }

  // Queries of nq rows from row y0 on, where they are or copied to `copies`, [ROWS][W][d].
  Queries queries(const Planes& q, int64_t y0, int nq, V* copies) const {
    if (in_place(q)) return Queries({interleaved(q, p, first), H, W * ks}, ks, y0, nq);
    interleave(q, p, first, d, y0 * W, nq * W, copies);
    return Queries({copies, H, W * d}, d, 0, nq);
  }

  // Those of the block in column `at` of its strip.
  V* row_logits(int at) const { return logits + at * 2 * ROWS * K; }
  V* col_logits(int at) const { return row_logits(at) + ROWS * K; }

  // Computes them from the nq queries at q.
  template <int D>
  void relative_logits(const V* const* q, int nq, int at) const {
    if (!p.relative) return;
    V *row_logit = row_logits(at), *col_logit = col_logits(at);
    with_queries(0, nq, [&]<class Some>(Some some, int lo) {
      auto half = [&](const V* rel, int64_t from, int64_t n, V* out) {
        const V* qc[Some::COUNT];
        for (int i = 0; i < Some::COUNT; ++i) qc[i] = q[lo + i] + from;
        dot<D / 2>(some, qc, rel, n, K, n, {}, [&](auto at, auto s) SASA_ALWAYS_INLINE { at.store(out + lo, s); });
      };
      if (dr)
        half(rel_row, 0, dr, row_logit);
      else
        std::memset(static_cast<void*>(row_logit), 0, size_t(K * ROWS) * sizeof(V));
      half(rel_col, dr, dc, col_logit);
    });
  }

  // w = logits of the queries [from, to) of a block and n keys in a row, [n][ROWS]. row_logit and col_logit: where the relative
  // ones of the first query of the block and the first key are.
  template <int D>
  SASA_INLINE void window_logits(const V* const* q, const V* row_logit, const V* col_logit, const V* keys, int64_t n, V* w,
                                 int from, int to) const {
    with_queries(from, to, [&]<class Some>(Some some, int lo) SASA_ALWAYS_INLINE {
      V begin[Some::COUNT];
      unroll<Some::COUNT>([&](auto i) SASA_ALWAYS_INLINE { begin[i] = row_logit[(lo + i) - (lo + i) * ROWS]; });
      dot<D>(some, q + lo, keys, ks, n, known<D>(d), begin,
             [&](auto at, auto s) SASA_ALWAYS_INLINE { at.store(w + lo, s + at.of_key(col_logit + lo)); });
    });
  }

  // f(row offset, column offset) for every offset of the window of query (y, x) that lies outside the image.
  template <class F>
  void outside(int64_t y, int64_t x, F f) const {
    for (int64_t a = 0; a < K; ++a) {
      bool row_inside = y + a - r >= 0 && y + a - r < H;
      for (int64_t b = 0; b < K; ++b)
        if (!row_inside || x + b - r < 0 || x + b - r >= W) f(a, b);
    }
  }
};

}  // namespace SASA_ISA
