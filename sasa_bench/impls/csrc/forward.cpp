// The forward pass, one build: compiled once per instruction set with SASA_ISA set to its name. With SASA_ONNX, where the
// headers of ONNX Runtime are, it is a library of custom operators for that, too.
#include "forward.h"

#ifdef SASA_ONNX
#include "onnx_operator.h"
#endif

extern "C" const sasa::Table* sasa_forward_table() {
  using namespace SASA_ISA;
  static const sasa::Table table{sasa::TABLE_VERSION, LANES, ROWS, forward, nullptr, nullptr};
  return &table;
}
