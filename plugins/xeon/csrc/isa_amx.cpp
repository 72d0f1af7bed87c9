// Matrix products on AMX tiles: blocks of panels, packed as for VDPBF16PS and VPDPBUSD. Two by two tiles of sums, so that each tile
// that is loaded is multiplied twice: 2 KB of activations and 2 KB of weights for four products of 16 x 16 x 64 bytes.

#include <sys/syscall.h>
#include <unistd.h>

#include "isa.h"
#include "tiles.h"

namespace sglang_xeon {
namespace {

constexpr int64_t kTile = 16;      // rows of a tile, and columns of sums
constexpr int64_t kStep = 64;      // bytes of k a tile covers: 32 bf16, 64 int8
constexpr int64_t kUnitBytes = 4;  // pairs of bf16, quads of int8

template <bool Int8, int C, int A, int B>
inline void dot() {
  if constexpr (Int8)
    tiles::dot_u8s8<C, A, B>();
  else
    tiles::dot_bf16<C, A, B>();
}

// Sums of `rows` <= 32 rows and one or two panels. Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
template <bool Int8, bool TwoRows, bool TwoPanels>
void block(const TileBlock& b, const char* a, const char* w, char* c, int64_t rows) {
  tiles::Config config;
  int64_t lower = rows - kTile;
  for (int t = 0; t < 8; ++t) {
    bool second = t == 2 || t == 3 || t == 5;  // of the lower rows
    config.set(t, t >= 6 ? kTile : !TwoRows ? (second ? 1 : rows) : second ? lower : kTile, 64);
  }
  tiles::configure(config);  // and zeroes them
  int64_t c_step = kTile * b.c_stride * 4, a_step = kTile * b.a_stride;
  if (b.add) {
    tiles::load<0>(c, b.c_stride * 4);
    if constexpr (TwoPanels) tiles::load<1>(c + 64, b.c_stride * 4);
    if constexpr (TwoRows) tiles::load<2>(c + c_step, b.c_stride * 4);
    if constexpr (TwoRows && TwoPanels) tiles::load<3>(c + c_step + 64, b.c_stride * 4);
  }
  auto step = [&](const char* at, const char* first, const char* second) __attribute__((always_inline)) {
    tiles::load<4>(at, b.a_stride);
    tiles::load<6>(first, 64);
    dot<Int8, 0, 4, 6>();
    if constexpr (TwoPanels) {
      tiles::load<7>(second, 64);
      dot<Int8, 1, 4, 7>();
    }
    if constexpr (TwoRows) {
      tiles::load<5>(at + a_step, b.a_stride);
      dot<Int8, 2, 5, 6>();
      if constexpr (TwoPanels) dot<Int8, 3, 5, 7>();
    }
  };
  int64_t whole = b.units / kTile, rest = b.units % kTile;
  for (int64_t i = 0; i < whole; ++i) step(a + i * kStep, w + i * kTile * 64, w + b.panel_bytes + i * kTile * 64);
  if (rest) {
    // Past its last unit a panel has another's bytes, which may be NaN: zeros in their place. Activations have zeros there.
    alignas(64) char tail[2][kTile * 64] = {};
    for (int64_t p = 0; p < (TwoPanels ? 2 : 1); ++p)
      __builtin_memcpy(tail[p], w + p * b.panel_bytes + whole * kTile * 64, size_t(rest * 64));
    step(a + whole * kStep, tail[0], tail[1]);
  }
  tiles::store<0>(c, b.c_stride * 4);
  if constexpr (TwoPanels) tiles::store<1>(c + 64, b.c_stride * 4);
  if constexpr (TwoRows) tiles::store<2>(c + c_step, b.c_stride * 4);
  if constexpr (TwoRows && TwoPanels) tiles::store<3>(c + c_step + 64, b.c_stride * 4);
}

template <bool Int8>
void multiply(const TileBlock& b) {
  for (int64_t p = 0; p < b.panels; p += 2) {
    bool two = p + 1 < b.panels;
    const char* w = static_cast<const char*>(b.w) + p * b.panel_bytes;
    for (int64_t row = 0; row < b.rows; row += 2 * kTile) {
      int64_t rows = b.rows - row < 2 * kTile ? b.rows - row : 2 * kTile;
      const char* a = static_cast<const char*>(b.a) + row * b.a_stride;
      char* c = static_cast<char*>(b.c) + (row * b.c_stride + p * kPanel) * 4;
      if (rows > kTile)
        two ? block<Int8, true, true>(b, a, w, c, rows) : block<Int8, true, false>(b, a, w, c, rows);
      else
        two ? block<Int8, false, true>(b, a, w, c, rows) : block<Int8, false, false>(b, a, w, c, rows);
    }
  }
  tiles::release();  // idle tiles would slow every context switch
}

}  // namespace

const TileKernels kTileKernels = {multiply<false>, multiply<true>};

bool allow_tiles() {
#ifdef EMULATE_AVX512
  return true;
#else
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

}  // namespace sglang_xeon
