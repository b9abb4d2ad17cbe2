// A library of custom operators for ONNX Runtime: the forward pass as a node, alone and with its projections.
//
//   sasa_bench::LocalAttention
//     inputs    q, k, v [B, C, H, W]; rel_row [N, d / 2, K] and rel_col [N, d - d / 2, K], both or neither; float32
//   sasa_bench::LocalAttentionLayer
//     inputs    x [B, C_in, H, W], w_qkv [3 C, C_in] (the rows of q, of k, of v); rel_row and rel_col; float32. Weights that
//               are constant are packed once, when the session is made.
//   both
//     output      y [B, C, H, W]
//     attributes  kernel_size K, heads N, zero_border (1: pixels outside the image take part, with k = v = 0)
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "forward.h"
#include "packing.h"
#include "qkv.h"

namespace {

using Shape = std::vector<int64_t>;

struct Free {
  void operator()(void* data) const { std::free(data); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats floats(int64_t count) {
  auto* data = static_cast<float*>(std::aligned_alloc(64, size_t(count * 4 + 63) / 64 * 64));
  if (!data) throw std::bad_alloc();
  return Floats(data);
}

// work(i) for i in [0, count), on the threads of the session.
template <class Work>
void in_parallel(Ort::KernelContext& context, int64_t count, const Work& work) {
  context.ParallelFor([](void* all, size_t i) { (*static_cast<const Work*>(all))(int64_t(i)); }, size_t(count), 0,
                      const_cast<Work*>(&work));
}

// What both operators have in common.
struct Kernel {
  std::string name;
  int64_t window, heads;
  bool zero_border;
  int64_t threads = std::max(1u, std::thread::hardware_concurrency());

  Kernel(const OrtKernelInfo* raw, const char* name_) : name(name_) {
    Ort::ConstKernelInfo info(raw);
    window = info.GetAttribute<int64_t>("kernel_size");
    heads = info.GetAttribute<int64_t>("heads");
    zero_border = info.GetAttribute<int64_t>("zero_border") != 0;
    require(window >= 1 && window % 2 == 1, "kernel_size must be odd and at least 1, got " + std::to_string(window));
    require(heads >= 1, "heads must be at least 1, got " + std::to_string(heads));
  }

  void require(bool holds, const std::string& what) const {
    if (!holds) throw std::invalid_argument(name + ": " + what);
  }

  // Images of this shape, contiguous.
  static sasa::Planes planes(const float* data, const Shape& shape) {
    sasa::Planes found;
    found.data = const_cast<float*>(data);
    found.channel = shape[2] * shape[3];
    found.image = shape[1] * found.channel;
    return found;
  }

  // All but q, k and v of a problem whose outputs have this shape. Inputs `first` and the next are the relative embedding, if any.
  sasa::Problem problem(Ort::KernelContext& context, const Shape& shape, size_t first) const {
    sasa::Problem p;
    p.planes = shape[0] * heads;
    p.heads = heads;
    p.channels = shape[1] / heads;
    p.height = shape[2];
    p.width = shape[3];
    p.kernel = window;
    p.zero_border = zero_border;
    p.y = planes(context.GetOutput(0, shape).GetTensorMutableData<float>(), shape);
    const auto given = [&](size_t i) {
      return i < context.GetInputCount() && static_cast<const OrtValue*>(context.GetInput(i)) != nullptr;
    };
    require(given(first) == given(first + 1), "give both of rel_row and rel_col, or neither");
    if (given(first)) {
      const auto row = context.GetInput(first), column = context.GetInput(first + 1);
      const Shape of_row{heads, p.channels / 2, window}, of_column{heads, p.channels - p.channels / 2, window};
      require(row.GetTensorTypeAndShapeInfo().GetShape() == of_row &&
                  column.GetTensorTypeAndShapeInfo().GetShape() == of_column,
              "rel_row must be [N, d / 2, K] and rel_col [N, d - d / 2, K]");
      p.relative = true;
      p.rel_row = row.GetTensorData<float>();
      p.rel_col = column.GetTensorData<float>();
    }
    return p;
  }

  sasa::Tasks tasks(const sasa::Problem& p) const { return {p, SASA_ISA::LANES, SASA_ISA::ROWS, threads}; }

  void run(Ort::KernelContext& context, const sasa::Problem& p) const {
    const sasa::Tasks all{p, SASA_ISA::LANES, SASA_ISA::ROWS, threads, sasa::keys_in_place(p)};
    in_parallel(context, all.count(), [&](int64_t task) { all.run(task, &SASA_ISA::forward); });
  }
};

struct AttentionKernel : Kernel {
  explicit AttentionKernel(const OrtKernelInfo* raw) : Kernel(raw, "LocalAttention") {}

  void Compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const auto q = context.GetInput(0), k = context.GetInput(1), v = context.GetInput(2);
    const Shape shape = q.GetTensorTypeAndShapeInfo().GetShape();
    require(shape.size() == 4 && k.GetTensorTypeAndShapeInfo().GetShape() == shape &&
                v.GetTensorTypeAndShapeInfo().GetShape() == shape && shape[1] % heads == 0,
            "q, k and v must have one shape [B, C, H, W], C a multiple of heads");
    sasa::Problem p = problem(context, shape, 3);
    p.q = planes(q.GetTensorData<float>(), shape);
    p.k = planes(k.GetTensorData<float>(), shape);
    p.v = planes(v.GetTensorData<float>(), shape);
    if (p.planes && p.height && p.width) run(context, p);
  }
};

// w_qkv as the right operand of the projection: its rows by lane where heads fill the lanes.
struct Weights {
  int64_t channels, inputs, groups, lanes, columns, floats_of_group;
  Floats packed;

  Weights(const Kernel& kernel, const Ort::ConstValue& w) {
    const Shape shape = w.GetTensorTypeAndShapeInfo().GetShape();
    kernel.require(shape.size() == 2 && shape[0] > 0 && shape[0] % (3 * kernel.heads) == 0,
                   "w_qkv must be [3 * channels, inputs] with channels a multiple of heads");
    channels = shape[0] / 3;
    inputs = shape[1];
    lanes = kernel.heads % SASA_ISA::LANES == 0 ? SASA_ISA::LANES : 0;
    groups = lanes ? kernel.heads / lanes : 1;
    columns = shape[0] / groups;
    std::vector<int64_t> at(static_cast<size_t>(shape[0]));
    std::iota(at.begin(), at.end(), 0);
    if (lanes) at = sasa::rows_by_lane(kernel.heads, channels / kernel.heads, lanes);
    for (int64_t& row : at) row *= inputs;
    const int64_t panels = sasa::panels_of(columns);
    floats_of_group = panels * inputs * sasa::PANEL;
    packed = floats(groups * floats_of_group);
    for (int64_t i = 0; i < groups * panels; ++i) {
      const int64_t group = i / panels;
      SASA_ISA::pack({columns, inputs, w.GetTensorData<float>(), sasa::Scalar::float32, at.data() + group * columns,
                      packed.get() + group * floats_of_group},
                     i % panels);
    }
  }
  int64_t bytes() const { return groups * floats_of_group * 4; }
};

struct LayerKernel : Kernel {
  std::optional<Weights> constant;

  explicit LayerKernel(const OrtKernelInfo* raw) : Kernel(raw, "LocalAttentionLayer") {
    int is_constant = 0;
    const auto w = Ort::ConstKernelInfo(raw).GetTensorConstantInput(1, &is_constant);
    if (is_constant) constant.emplace(*this, w);
  }

  void Compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    std::optional<Weights> given;
    if (!constant) given.emplace(*this, context.GetInput(1));
    const Weights& weights = constant ? *constant : *given;
    const auto x = context.GetInput(0);
    const Shape shape = x.GetTensorTypeAndShapeInfo().GetShape();
    require(shape.size() == 4 && shape[1] == weights.inputs,
            "x must be [B, " + std::to_string(weights.inputs) + ", H, W], as w_qkv has it");
    sasa::Problem p = problem(context, {shape[0], weights.channels, shape[2], shape[3]}, 2);
    if (!p.planes || !p.height || !p.width) return;
    const sasa::Projection projection = applied(weights, planes(x.GetTensorData<float>(), shape), shape);
    Floats qkv;
    if (weights.lanes && sasa::in_parts(p, tasks(p).bands, weights.bytes())) {
      p.project = &sasa::Projection::rows;
      p.context = &projection;
    } else {
      qkv = floats(shape[0] * 3 * weights.channels * p.height * p.width);
      for (int64_t group = 0; group < projection.groups; ++group) project(context, projection, weights, group, qkv.get());
    }
    sasa::point_at_thirds(p, p.q, p.k, p.v, qkv.get(), 4, weights.lanes);
    run(context, p);
  }

 private:
  static const sasa::Products& products() {
    using namespace SASA_ISA;
    static const sasa::Products all{sasa::TABLE_VERSION, TILE_ROWS, product32, packed_rows, pack, pack_pixels};
    return all;
  }

  static sasa::Projection applied(const Weights& weights, const sasa::Planes& x, const Shape& shape) {
    sasa::Projection found{products(), {}};
    found.product.groups = shape[0];
    found.product.rows = shape[2] * shape[3];
    found.product.depth = weights.inputs;
    found.product.columns = weights.columns;
    found.product.a = x.data;
    found.product.a_group = x.image;
    found.product.a_row = 1;
    found.product.a_k = x.channel;
    found.product.b = weights.packed.get();
    found.groups = weights.groups;
    found.floats = weights.floats_of_group;
    found.width = shape[3];
    return found;
  }

  // The columns of one group of heads, of all images.
  void project(Ort::KernelContext& context, const sasa::Projection& projection, const Weights& weights, int64_t group,
               float* qkv) const {
    sasa::Product p = projection.of_group(group);
    const int64_t all = 3 * weights.channels;
    p.out_group = p.rows * all;
    p.out_row = weights.lanes ? all : 1;
    p.out_column = weights.lanes ? 1 : p.rows;
    p.out = qkv + group * p.columns;
    const int64_t tiles = p.groups * sasa::tiles_of(p, SASA_ISA::TILE_ROWS), panels = sasa::panels_of(p.columns);
    const bool by_panels = sasa::has_large_operand(p, p.depth);
    const int64_t parts = by_panels ? panels : tiles, pieces = std::min(parts, 4 * threads);
    in_parallel(context, pieces, [&](int64_t i) {
      const int64_t begin = parts * i / pieces, end = parts * (i + 1) / pieces;
      if (by_panels)
        SASA_ISA::product32(p, 0, tiles, begin, end);
      else
        SASA_ISA::product32(p, begin, end, 0, panels);
    });
  }
};

template <class Op, class K, size_t IMAGES>
struct Operator : Ort::CustomOpBase<Op, K> {
  void* CreateKernel(const OrtApi&, const OrtKernelInfo* info) const { return new K(info); }
  size_t GetInputTypeCount() const { return IMAGES + 2; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i < IMAGES ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
};

struct LocalAttention : Operator<LocalAttention, AttentionKernel, 3> {
  const char* GetName() const { return "LocalAttention"; }
};

struct LocalAttentionLayer : Operator<LocalAttentionLayer, LayerKernel, 2> {
  const char* GetName() const { return "LocalAttentionLayer"; }
};

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) {
    const OrtApi* oldest = base->GetApi(1);
    return oldest->CreateStatus(ORT_FAIL, "the operators were compiled for a newer ONNX Runtime than this one");
  }
  Ort::InitApi(api);
  static const LocalAttention attention;
  static const LocalAttentionLayer layer;
  try {
    // Sessions keep a pointer to the domain.
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made("sasa_bench");
      made.Add(&attention);
      made.Add(&layer);
      return made;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::Status(error).release();
  } catch (const std::exception& error) {
    return Ort::Status(error.what(), ORT_FAIL).release();
  }
}
