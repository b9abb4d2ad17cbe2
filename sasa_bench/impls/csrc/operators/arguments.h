// The builds in use, and what the operators are given: checked, and as the kernels see it.
#pragma once

#include <ATen/ATen.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

#include "../kernel_table.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::atomic<const sasa::Table*> forward_kernels{nullptr}, backward_kernels{nullptr};
std::atomic<const sasa::Products*> matrix_products{nullptr};

// The table that a build exports by the name `symbol`; null where the operating system forbids what it needs.
template <class T>
const T* table_of(c10::string_view path, const char* symbol) {
  const std::string name(path);
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, "fused_local_attention: cannot load the kernels from ", name, ": ", dlerror());
  auto get = reinterpret_cast<const T* (*)()>(dlsym(library, symbol));
  const T* found = get ? get() : nullptr;
  TORCH_CHECK(get && (!found || found->version == sasa::TABLE_VERSION), "fused_local_attention: ", name,
              " is not a build of this version's kernels; delete it and load again");
  return found;
}

// Uses these builds from now on. Returns whether the operating system allows what the products need; if not, nothing
// changes.
bool use_kernels(c10::string_view forward_path, c10::string_view backward_path, c10::string_view products_path) {
  const auto* forward = table_of<sasa::Table>(forward_path, "sasa_forward_table");
  const auto* backward = table_of<sasa::Table>(backward_path, "sasa_backward_table");
  const auto* products = table_of<sasa::Products>(products_path, "sasa_products_table");
  TORCH_CHECK(forward->lanes == backward->lanes && forward->rows == backward->rows,
              "fused_local_attention: ", forward_path, " and ", backward_path, " are of unlike builds; load one build");
  if (!products) return false;
  forward_kernels = forward;
  backward_kernels = backward;
  matrix_products = products;
  return true;
}

// What both passes have in common, and the forward pass.
const sasa::Table& table() {
  const sasa::Table* t = forward_kernels;
  TORCH_CHECK(t, "fused_local_attention: no kernels are loaded; call sasa_bench.impls.fused.load() first");
  return *t;
}

const sasa::Products& products() {
  table();
  return *matrix_products.load();
}

bool computable(const Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& rel_row,
           const OptionalTensor& rel_col, int64_t kernel_size, int64_t heads) {
  constexpr auto op = "fused_local_attention: ";
  TORCH_CHECK_VALUE(q.dim() == 4, op, "q must be [batch, channels, height, width], got ", q.dim(),
                    " dimensions; reshape it");
  TORCH_CHECK_VALUE(k.sym_sizes() == q.sym_sizes() && v.sym_sizes() == q.sym_sizes(), op,
                    "q, k and v must have one shape, got ", q.sym_sizes(), ", ", k.sym_sizes(), " and ", v.sym_sizes(),
                    "; project them to the same number of channels");
  TORCH_CHECK_TYPE(computable(q), op, "dtype must be float32, bfloat16 or float16, got ", q.scalar_type(),
                   "; convert q, k and v with .to()");
  TORCH_CHECK_VALUE(heads >= 1 && q.sym_size(1) % heads == 0 && q.sym_size(1) >= heads, op,
                    "heads must be at least 1 and divide the channels, got ", heads, " heads for ", q.sym_size(1),
                    " channels; choose a divisor");
  TORCH_CHECK_VALUE(kernel_size >= 1 && kernel_size % 2 == 1, op, "kernel_size must be odd and at least 1, got ",
                    kernel_size, "; choose ", std::max<int64_t>(1, kernel_size + 1));
  TORCH_CHECK_VALUE(q.sym_size(2) >= 1 && q.sym_size(3) >= 1, op, "height and width must be at least 1, got ",
                    q.sym_sizes(), "; drop empty images before the call");
  TORCH_CHECK_VALUE(rel_row.has_value() == rel_col.has_value(), op,
                    "rel_row and rel_col go together, got only one; pass both (relative position) or neither");
  auto same = [&](const Tensor& t, const char* name) {
    TORCH_CHECK_TYPE(t.scalar_type() == q.scalar_type(), op, name, " must have q's dtype ", q.scalar_type(), ", got ",
                     t.scalar_type(), "; convert it with .to(q.dtype)");
    TORCH_CHECK_VALUE(t.device() == q.device(), op, name, " must be on q's device ", q.device(), ", got ", t.device(),
                      "; move it with .to(q.device)");
  };
  same(k, "k");
  same(v, "v");
  if (rel_row.has_value()) {
    const auto d = q.sym_size(1) / heads, half = d / 2;
    auto embedding = [&](const Tensor& t, const char* name, const c10::SymInt& n) {
      same(t, name);
      TORCH_CHECK_VALUE(t.dim() == 3 && t.sym_size(0) == heads && t.sym_size(1) == n && t.sym_size(2) == kernel_size,
                        op, name, " must be [heads, channels of its half, kernel_size] = [", heads, ", ", n, ", ",
                        kernel_size, "], got ", t.sym_sizes(), "; make it that shape");
    };
    embedding(*rel_row, "rel_row", half);
    embedding(*rel_col, "rel_col", d - half);
  }
}

// The kernels walk over pixels that lie one behind the other, either in planes or with the channels of a pixel side by
// side; images, and channels of planes, may have any stride.
bool in_planes(const Tensor& t) {
  return (t.stride(3) == 1 || t.size(3) == 1) && (t.stride(2) == t.size(3) || t.size(2) == 1);
}

int64_t from_pixel_to_pixel(const Tensor& t) { return t.size(3) > 1 ? t.stride(3) : t.stride(2); }

bool channels_together(const Tensor& t) {
  const bool even = t.size(2) == 1 || t.size(3) == 1 || t.stride(2) == t.size(3) * t.stride(3);
  return t.stride(1) == 1 && even && from_pixel_to_pixel(t) > 1;
}

Tensor with_even_pixels(const Tensor& t) { return in_planes(t) || channels_together(t) ? t : t.contiguous(); }

sasa::Scalar scalar(const Tensor& t) {
  if (t.scalar_type() == at::kFloat) return sasa::Scalar::float32;
  return t.scalar_type() == at::kHalf ? sasa::Scalar::float16 : sasa::Scalar::bfloat16;
}

sasa::Planes planes(const Tensor& t) {
  sasa::Planes found{const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), scalar(t)};
  if (!in_planes(t)) found.column = from_pixel_to_pixel(t);
  return found;
}

// Options of a result that lies in memory as t does, channels-last or not.
at::TensorOptions like(const Tensor& t) { return t.options().memory_format(t.suggest_memory_format()); }

// Owns what a Problem points to.
struct Inputs {
  Tensor q, k, v, rel_row, rel_col;
  sasa::Problem problem;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& rel_row_,
         const OptionalTensor& rel_col_, int64_t kernel_size, int64_t heads, bool zero_border)
      : Inputs(q_, rel_row_, rel_col_, kernel_size, heads, zero_border) {
    q = with_even_pixels(q_);
    k = with_even_pixels(k_);
    v = with_even_pixels(v_);
    problem.q = planes(q);
    problem.k = planes(k);
    problem.v = planes(v);
  }

  // All but q, k and v, which are of the shape and the dtype of `like`.
  Inputs(const Tensor& like, const OptionalTensor& rel_row_, const OptionalTensor& rel_col_, int64_t kernel_size,
         int64_t heads, bool zero_border) {
    problem.planes = like.size(0) * heads;
    problem.heads = heads;
    problem.channels = like.size(1) / heads;
    problem.height = like.size(2);
    problem.width = like.size(3);
    problem.kernel = kernel_size;
    problem.zero_border = zero_border;
    problem.scalar = scalar(like);
    if (rel_row_.has_value()) {
      problem.relative = true;
      rel_row = rel_row_->contiguous();
      rel_col = rel_col_->contiguous();
      problem.rel_row = rel_row.const_data_ptr();
      problem.rel_col = rel_col.const_data_ptr();
    }
  }
};

}  // namespace
