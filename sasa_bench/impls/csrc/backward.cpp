// The backward pass, one build: compiled once per instruction set with SASA_ISA set to its name.
#include "backward.h"

extern "C" const sasa::Table* sasa_backward_table() {
  using namespace SASA_ISA;
  static const sasa::Table table{sasa::TABLE_VERSION, LANES, ROWS, nullptr, backward, reduce_relative};
  return &table;
}
