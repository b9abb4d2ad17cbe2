// One build of the products: compiled once per instruction set with SASA_ISA set to its name.
#include "phases.h"
#include "products16.h"

#ifdef SASA_PHASES
template <auto F>
struct Counted;
template <class... A, void (*F)(A...)>
struct Counted<F> {
  static void call(A... a) {
    SASA_PHASE(project);
    F(a...);
    SASA_PHASE(none);
  }
};
#define COUNTED(f) Counted<f>::call
#else
#define COUNTED(f) f
#endif

// Null where the operating system does not let this process use what the build needs.
extern "C" const sasa::Products* sasa_products_table() {
  using namespace SASA_ISA;
#ifdef SASA_TILES
  if (!may_use_tiles()) return nullptr;
#endif
  static const sasa::Products table{sasa::TABLE_VERSION, TILE_ROWS, COUNTED(product), packed_rows, COUNTED(pack),
                                    COUNTED(pack_pixels)};
  return &table;
}
