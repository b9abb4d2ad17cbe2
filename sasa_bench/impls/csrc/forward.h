// The forward pass of a band of a group of planes.
#pragma once

#include "forward_block.h"
#include "phases.h"

namespace SASA_ISA {

// Blocks side by side: a key row serves all of them while it is in the first-level cache.
template <int D>
class ForwardStrip {
 public:
  template <size_t... AT>
  SASA_INLINE ForwardStrip(const Task& t, const Forward& f, const Queries& from, int64_t y0, int nq, int64_t x0,
                           std::index_sequence<AT...>)
      : t_(t), f_(f), y0_(y0), ka_(t.first_key_row(y0)), kb_(t.key_rows_until(y0, nq)), slots_(t.slots(ka_, kb_)), nq_(nq),
        count_(int(std::min<int64_t>(STRIP, t.W - x0))),
        block_{ForwardBlock<D>(t, f, from, y0, nq, std::min(x0 + int64_t(AT), t.W - 1), int(AT))...} {
    int64_t most = 1;
    for (auto& b : block_) most = std::max(most, b.n);
    step_ = std::max<int64_t>(1, f.keys / most);
  }

  // The outputs from exp(logit). Returns false, with nothing computed, where it takes `shifted`.
  SASA_INLINE bool direct() {
    each([](auto& b) SASA_ALWAYS_INLINE { b.begin_direct(); });
    for (int64_t sa = 0; sa < slots_; sa += step_) {
      const int64_t sb = std::min(slots_, sa + step_);
      SASA_PHASE(logits);
      logits(sa, sb, -1000);
      SASA_PHASE(softmax);
      bool fit = true;
      each([&](auto& b) SASA_ALWAYS_INLINE {
        b.weights(sb - sa, [](Wide s, Wide) SASA_ALWAYS_INLINE { return exp_near(s); });
        fit &= b.fits();
      });
      if (sb == slots_ && !fit) return false;
      weigh_values(sa, sb, sa > 0);
    }
    each([](auto& b) SASA_ALWAYS_INLINE { b.save(); });
    return true;
  }

  // The outputs from exp(logit - largest logit), whatever the logits are. Returns whether `direct` is likely to do for the
  // next strip.
  bool shifted() {
    bool any[STRIP], near = true;
    for (int i = 0; i < count_; ++i) any[i] = block_[i].begin_shifted();
    for (int64_t sa = 0; sa < slots_; sa += step_) {
      const int64_t sb = std::min(slots_, sa + step_);
      SASA_PHASE(logits);
      logits(sa, sb, NONE);
      SASA_PHASE(softmax);
      for (int i = 0; i < count_; ++i) {
        block_[i].raise_top(sb - sa, any[i] || sa);
        block_[i].weights(sb - sa, [](Wide s, Wide most) SASA_ALWAYS_INLINE { return expv(s - most); });
      }
      weigh_values(sa, sb, t_.p.zero_border || sa);
    }
    each([&](auto& b) {
      b.save();
      near &= b.near();
    });
    return near;
  }

 private:
  template <class F>
  SASA_INLINE void each(F f) {
    for (int i = 0; i < count_; ++i) f(block_[i]);
  }

  // Logits of the slots [sa, sb), `none` where a query has no key.
  SASA_INLINE void logits(int64_t sa, int64_t sb, float none) {
    for (int64_t s = sa; s < sb; ++s)
      if (!t_.fills(s, y0_, nq_, ka_, kb_))
        each([&](auto& b) {
          const Wide all = Wide{} + none;
          V* at = b.w + (s - sa) * b.n * ROWS;
          for (V* end = at + b.n * ROWS; at < end; at += WIDTH) store(at, all);
        });
    for (int64_t s = sa; s < sb; ++s)
      t_.rows_of_slot(s, y0_, nq_, ka_, kb_, [&](int64_t ky, int from, int to) SASA_ALWAYS_INLINE {
        each([&](auto& b) SASA_ALWAYS_INLINE { b.logits(ky, s - sa, from, to); });
      });
  }

  SASA_INLINE void weigh_values(int64_t sa, int64_t sb, bool add) {
    SASA_PHASE(aggregate);
    by_channels<D>(t_.d, [&](auto piece, int64_t c0) SASA_ALWAYS_INLINE {
      each([&](auto& b) SASA_ALWAYS_INLINE { b.weigh_values(piece, c0, sa, sb, add); });
    });
  }

  const Task& t_;
  const Forward& f_;
  const int64_t y0_, ka_, kb_, slots_;
  const int nq_, count_;
  int64_t step_;  // slots whose logits are held at once
  ForwardBlock<D> block_[STRIP];
};

// The columns [left, right) of a row of blocks.
template <int D>
void forward_blocks(const Task& t, const Forward& f, const Queries& queries, int64_t y0, int nq, int64_t left, int64_t right) {
  for (int64_t ky = t.first_key_row(y0), i = 0; ky < t.key_rows_until(y0, nq); ++ky, ++i) {
    f.k_row[i] = f.k(ky);
    f.v_row[i] = f.v(ky);
  }
  // For gradients the largest logit comes off: the weights of a peaked softmax are then exact.
  const bool may = !t.p.top.data;
  bool direct = may;
  const int64_t step = sasa::column_step(t.p);
  for (int64_t x0 = left; x0 < right; x0 += STRIP) {
    SASA_PHASE(position);
    if (x0 % step == 0) direct = may;
    ForwardStrip<D> strip(t, f, queries, y0, nq, x0, std::make_index_sequence<STRIP>());
    SASA_PHASE(softmax);
    if (!direct || !strip.direct()) direct = strip.shifted() && may;
  }
}

template <int D>
void forward_rows(const Problem& p, const sasa::Band& band) {
  SASA_PHASE(interleave);
  FlushDenormals flush;
  Arena& a = arena();
  a.reserve(Forward::vectors(p));
  Task t(p, band.group);
  t.setup(a);
  Forward f;
  f.setup(t, a);
  // Of the rows in a buffer [ROWS][W][channels], the columns of this band.
  const auto write = [&](const Planes& to, int64_t channels, int64_t y0, int nq, const V* buffer) {
    if (band.right - band.left == t.W) return separate(to, p, t.first, channels, y0 * t.W, nq * t.W, buffer);
    for (int i = 0; i < nq; ++i)
      separate(to, p, t.first, channels, (y0 + i) * t.W + band.left, band.right - band.left,
               buffer + (i * t.W + band.left) * channels);
  };
  int64_t loaded = t.first_key_row(band.from);
  for (int64_t y0 = band.from; y0 < band.to; y0 += ROWS) {
    const int nq = int(std::min<int64_t>(ROWS, band.to - y0));
    const int64_t need = t.key_rows_until(y0, nq);
    if (p.project && need > loaded) {
      const int64_t until = std::min(t.H, std::max(need, loaded + projected_rows(p)));
      f.qkv.runs(loaded, until, [&](int64_t y, int64_t count, V* out) {
        SASA_PHASE(none);  // products have a clock of their own
        p.project(p.context, band.group, y, y + count, reinterpret_cast<float*>(out), t.ks * LANES);
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
    Queries queries = p.project ? Queries(f.qkv, t.ks, y0, nq) : t.queries(p.q, y0, nq, f.q);
    forward_blocks<D>(t, f, queries, y0, nq, band.left, band.right);
    SASA_PHASE(write);
    write(p.y, t.d, y0, nq, f.y);
    if (p.top.data) {
      write(p.top, 1, y0, nq, f.top);
      write(p.sum, 1, y0, nq, f.sum);
    }
    SASA_PHASE(interleave);
  }
  a.release_large();
  SASA_PHASE(none);
}

inline void forward(const Problem& p, const sasa::Band& band) {
  with_width(p.channels, [&](auto d) { forward_rows<decltype(d)::value>(p, band); });
}

}  // namespace SASA_ISA
