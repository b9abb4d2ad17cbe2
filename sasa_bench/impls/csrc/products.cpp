// One build of the products: compiled once per instruction set with SASA_ISA set to its name.
#include "products16.h"

// Null where the operating system does not let this process use what the build needs.
extern "C" const sasa::Products* sasa_products_table() {
  using namespace SASA_ISA;
#ifdef SASA_TILES
  if (!may_use_tiles()) return nullptr;
#endif
  static const sasa::Products table{sasa::TABLE_VERSION, TILE_ROWS, product, packed_rows, pack, pack_pixels};
  return &table;
}
