// The tile instructions of AMX for bfloat16, or, with SASA_SHIM, the same in plain C++ for machines without them.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef SASA_SHIM
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace SASA_ISA {

// Eight tiles of 16 rows of 64 bytes.
struct Tiles {
#ifdef SASA_SHIM
  alignas(64) char tile[8][16][64];

  template <int T>
  void zero() { std::memset(tile[T], 0, sizeof tile[T]); }
  template <int T>
  void load(const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(tile[T][i], static_cast<const char*>(from) + i * stride, 64);
  }
  template <int T>
  void store(void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tile[T][i], 64);
  }
  // C[i][j] += sum over k and h of A[i][2 k + h] B[k][2 j + h], bfloat16 into float32.
  template <int C, int A, int B>
  void multiply() {
    auto at = [](const char* row, int i) {
      uint16_t half;
      std::memcpy(&half, row + 2 * i, 2);
      const uint32_t bits = uint32_t(half) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    };
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 16; ++j) {
          float sum;
          std::memcpy(&sum, tile[C][i] + 4 * j, 4);
          for (int h = 0; h < 2; ++h) sum += at(tile[A][i], 2 * k + h) * at(tile[B][k], 2 * j + h);
          std::memcpy(tile[C][i] + 4 * j, &sum, 4);
        }
  }
#else
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    // Older GCC takes this for a read of 8 bytes, and tile loads for no reads at all.
    asm volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;

  // clang and GCC want the tile's number as a literal.
  template <int T>
  void zero() {
    if constexpr (T == 0) _tile_zero(0);
    if constexpr (T == 1) _tile_zero(1);
    if constexpr (T == 2) _tile_zero(2);
    if constexpr (T == 3) _tile_zero(3);
  }
  template <int T>
  void load(const void* from, int64_t stride) {
    if constexpr (T == 4) _tile_loadd(4, from, stride);
    if constexpr (T == 5) _tile_loadd(5, from, stride);
    if constexpr (T == 6) _tile_loadd(6, from, stride);
    if constexpr (T == 7) _tile_loadd(7, from, stride);
  }
  template <int T>
  void store(void* to, int64_t stride) {
    if constexpr (T == 0) _tile_stored(0, to, stride);
    if constexpr (T == 1) _tile_stored(1, to, stride);
    if constexpr (T == 2) _tile_stored(2, to, stride);
    if constexpr (T == 3) _tile_stored(3, to, stride);
  }
  template <int C, int A, int B>
  void multiply() {
    if constexpr (C == 0 && A == 4 && B == 6) _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 1 && A == 4 && B == 7) _tile_dpbf16ps(1, 4, 7);
    if constexpr (C == 2 && A == 5 && B == 6) _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 3 && A == 5 && B == 7) _tile_dpbf16ps(3, 5, 7);
  }
#endif
};

// Asks the kernel for the tiles' registers, once a process; false where it refuses.
inline bool may_use_tiles() {
#ifdef SASA_SHIM
  return true;
#else
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#endif
}

}  // namespace SASA_ISA
