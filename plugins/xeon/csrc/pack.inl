// Weights into panels and back: the codes of isa.h's Weight. Scales are few; the bindings lay them out.

// Where k lies in a unit: the index of its first bit in the word of a column (of a whole unit for f32 and f16, see pack_panel).
INLINE int place_in_unit(Element e, int64_t i) {
  switch (e) {
    case Element::int4:
    case Element::int4_zero:
    case Element::e2m1: return int(i / 2 * 4 + i % 2 * 16);
    case Element::fp8: return int(i == 1 ? 2 : i == 2 ? 1 : i) * 8;
    case Element::int8: return int(i) * 8;
    default: return int(i) * 16;
  }
}

INLINE int64_t source_of(const PackArgs& args, int64_t k) {
  if (args.order) return args.order[k];
  return k < args.k ? k : -1;
}

// Elements that follow one another: f32 [k][16], f16 [k][16].
template <typename T>
static void pack_rows_of_k(const PackArgs& args, int64_t panel) {
  T* packed = static_cast<T*>(args.packed) + panel * args.k_padded * kPanel;
  int64_t columns = min1(kPanel, args.n - panel * kPanel);
  for (int64_t k = 0; k < args.k_padded; ++k) {
    for (int64_t j = 0; j < kPanel; ++j) {
      T* w = reinterpret_cast<T*>(static_cast<char*>(args.w) + (panel * kPanel + j) * args.row_bytes);
      bool inside = j < columns && k < args.k;
      if (!args.unpack)
        packed[k * kPanel + j] = inside ? w[k] : T(0);
      else if (inside)
        w[k] = packed[k * kPanel + j];
    }
  }
}

// Elements that share a word of 32 bits: Bits of each.
template <int Bits>
static void pack_words(const PackArgs& args, int64_t panel) {
  constexpr int unit = 32 / Bits;
  constexpr uint32_t mask = Bits == 16 ? 0xffffu : Bits == 8 ? 0xffu : 0xfu;
  uint32_t* packed = static_cast<uint32_t*>(args.packed) + panel * (args.k_padded / unit) * kPanel;
  int64_t columns = min1(kPanel, args.n - panel * kPanel);
  int place[unit];
  for (int i = 0; i < unit; ++i) place[i] = place_in_unit(args.element, i);
  for (int64_t j = 0; j < columns; ++j) {
    uint8_t* w = static_cast<uint8_t*>(args.w) + (panel * kPanel + j) * args.row_bytes;
    for (int64_t u = 0; u < args.k_padded / unit; ++u) {
      uint32_t& word = packed[u * kPanel + j];
      uint32_t made = 0;
      for (int i = 0; i < unit; ++i) {
        int64_t k = source_of(args, u * unit + i);
        if (k < 0) continue;
        if (args.unpack) {
          uint32_t code = word >> place[i] & mask;
          if (Bits == 16) reinterpret_cast<uint16_t*>(w)[k] = uint16_t(code);
          if (Bits == 8) w[k] = uint8_t(code);
          // Two codes share a byte; rows belong to one task, so nobody else writes it.
          if (Bits == 4) w[k / 2] = uint8_t(k % 2 ? (w[k / 2] & 0x0f) | code << 4 : (w[k / 2] & 0xf0) | code);
        } else {
          uint32_t code = Bits == 16 ? reinterpret_cast<uint16_t*>(w)[k] : Bits == 8 ? w[k] : w[k / 2] >> (k % 2 * 4);
          made |= (code & mask) << place[i];
        }
      }
      if (!args.unpack) word = made;
    }
  }
  if (args.unpack) return;
  for (int64_t u = 0; u < args.k_padded / unit; ++u)
    for (int64_t j = columns; j < kPanel; ++j) packed[u * kPanel + j] = 0;
}

static void pack_task(const void* opaque, int64_t panel) {
  const PackArgs& args = *static_cast<const PackArgs*>(opaque);
  switch (args.element) {
    case Element::f32: return pack_rows_of_k<uint32_t>(args, panel);
    case Element::f16: return pack_rows_of_k<uint16_t>(args, panel);
    case Element::bf16: return pack_words<16>(args, panel);
    case Element::fp8:
    case Element::int8: return pack_words<8>(args, panel);
    default: return pack_words<4>(args, panel);
  }
}

static void pack(const PackArgs& args) { run_tasks(ceil_div(args.n, kPanel), pack_task, &args); }
