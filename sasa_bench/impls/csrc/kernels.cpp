// One build of the kernels: compiled once per instruction set with SASA_ISA set to its name.
#include "local_attention.h"

extern "C" const sasa::Table* sasa_kernel_table() {
  static const sasa::Table table{sasa::TABLE_VERSION, SASA_ISA::LANES,    SASA_ISA::ROWS,
                                 SASA_ISA::forward,   SASA_ISA::backward, SASA_ISA::reduce_relative};
  return &table;
}
