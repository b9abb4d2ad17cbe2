// One build of the kernels: compiled once per instruction set with SASA_ISA set to its name.
#include "local_attention.h"

extern "C" const sasa::Table* sasa_kernel_table() {
  using namespace SASA_ISA;
  static const sasa::Table table{sasa::TABLE_VERSION, LANES, ROWS, forward, backward, reduce_relative};
  return &table;
}
