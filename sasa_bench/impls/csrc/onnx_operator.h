// A library of custom operators for ONNX Runtime: sasa_bench::LocalAttention, the forward pass as a node.
//
//   inputs      q, k, v [B, C, H, W]; rel_row [N, d / 2, K] and rel_col [N, d - d / 2, K], both or neither; float32
//   output      y [B, C, H, W]
//   attributes  kernel_size K, heads N, zero_border (1: pixels outside the image take part, with k = v = 0)
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "forward.h"

namespace {

struct Kernel {
  int64_t window, heads;
  bool zero_border;
  int64_t threads = std::max(1u, std::thread::hardware_concurrency());

  explicit Kernel(const OrtKernelInfo* raw) {
    Ort::ConstKernelInfo info(raw);
    window = info.GetAttribute<int64_t>("kernel_size");
    heads = info.GetAttribute<int64_t>("heads");
    zero_border = info.GetAttribute<int64_t>("zero_border") != 0;
    if (window < 1 || window % 2 == 0)
      throw std::invalid_argument("LocalAttention: kernel_size must be odd and at least 1, got " +
                                  std::to_string(window));
    if (heads < 1)
      throw std::invalid_argument("LocalAttention: heads must be at least 1, got " + std::to_string(heads));
  }

  void Compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const auto q = context.GetInput(0), k = context.GetInput(1), v = context.GetInput(2);
    const std::vector<int64_t> shape = q.GetTensorTypeAndShapeInfo().GetShape();
    if (shape.size() != 4 || k.GetTensorTypeAndShapeInfo().GetShape() != shape ||
        v.GetTensorTypeAndShapeInfo().GetShape() != shape || shape[1] % heads)
      throw std::invalid_argument("LocalAttention: q, k and v must have one shape [B, C, H, W], C a multiple of heads");
    auto y = context.GetOutput(0, shape);

    sasa::Problem p;
    p.planes = shape[0] * heads;
    p.heads = heads;
    p.channels = shape[1] / heads;
    p.height = shape[2];
    p.width = shape[3];
    p.kernel = window;
    p.zero_border = zero_border;
    const int64_t channel = shape[2] * shape[3], image = shape[1] * channel;
    auto planes = [&](const float* data) {
      sasa::Planes found;
      found.data = const_cast<float*>(data);
      found.image = image;
      found.channel = channel;
      return found;
    };
    p.q = planes(q.GetTensorData<float>());
    p.k = planes(k.GetTensorData<float>());
    p.v = planes(v.GetTensorData<float>());
    p.y = planes(y.GetTensorMutableData<float>());
    if (context.GetInputCount() == 5) {
      const auto row = context.GetInput(3), column = context.GetInput(4);
      const std::vector<int64_t> of_row{heads, p.channels / 2, window};
      const std::vector<int64_t> of_column{heads, p.channels - p.channels / 2, window};
      if (row.GetTensorTypeAndShapeInfo().GetShape() != of_row ||
          column.GetTensorTypeAndShapeInfo().GetShape() != of_column)
        throw std::invalid_argument("LocalAttention: rel_row must be [N, d / 2, K] and rel_col [N, d - d / 2, K]");
      p.relative = true;
      p.rel_row = row.GetTensorData<float>();
      p.rel_col = column.GetTensorData<float>();
    }
    if (!p.planes || !image) return;

    const sasa::Tasks tasks(p, SASA_ISA::LANES, SASA_ISA::ROWS, threads);
    context.ParallelFor(
        [](void* all, size_t task) {
          static_cast<const sasa::Tasks*>(all)->run(int64_t(task), &SASA_ISA::forward);
        },
        size_t(tasks.count()), 0, const_cast<sasa::Tasks*>(&tasks));
  }
};

struct LocalAttention : Ort::CustomOpBase<LocalAttention, Kernel> {
  void* CreateKernel(const OrtApi&, const OrtKernelInfo* info) const { return new Kernel(info); }
  const char* GetName() const { return "LocalAttention"; }
  size_t GetInputTypeCount() const { return 5; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i < 3 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
};

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  Ort::InitApi(base->GetApi(ORT_API_VERSION));
  static const LocalAttention op;
  try {
    // Sessions keep a pointer to the domain.
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made("sasa_bench");
      made.Add(&op);
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
