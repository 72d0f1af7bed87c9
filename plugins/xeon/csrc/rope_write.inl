// attn.rope_paged up to the attention: a token's heads are normalised, rotated and, keys, written while they are in the L1 cache.

template <typename T>
INLINE void turn_heads(const RopeWriteArgs& a, const T* x, int64_t heads, const void* weight, const float* cosine, T* normed, T* out) {
  int64_t dim = a.write.k_store.dim;
  for (int64_t head = 0; head < heads; ++head, x += dim, out += dim) {
    if (weight) rms_of(x, weight, a.weight_dtype, dim, a.eps, normed);
    turn(weight ? normed : x, cosine, a.rotary, dim, a.interleaved, out);
  }
}

template <typename T>
static void rope_write_token(const void* opaque, int64_t token) {
  const RopeWriteArgs& a = *static_cast<const RopeWriteArgs*>(opaque);
  const KvWriteArgs& write = a.write;
  const float* cosine = a.cos_sin + int64_t(a.positions[token]) * a.rotary;
  T* normed = static_cast<T*>(scratch(kSlotTile, size_t(write.k_store.dim + write.k_store.row) * sizeof(T)));
  T* key = normed + write.k_store.dim;
  T* out = static_cast<T*>(a.q_out.data) + token * a.q_out.stride;
  turn_heads(a, static_cast<const T*>(a.q.data) + token * a.q.stride, a.q_heads, a.q_weight, cosine, normed, out);
  turn_heads(a, static_cast<const T*>(write.k.data) + token * write.k.stride, write.num_heads, a.k_weight, cosine, normed, key);
  write_store(write, {key, write.k.dtype, 0}, write.k_store, token);
  write_store(write, write.v, write.v_store, token);
}

static void rope_write(const RopeWriteArgs& args) {
  int64_t width = args.q_out.stride + args.write.k_store.row + args.write.v_store.row;
  if (args.q.dtype == DType::bf16)
    each_row<rope_write_token<uint16_t>>(&args, args.write.num_tokens, width);
  else
    each_row<rope_write_token<float>>(&args, args.write.num_tokens, width);
}
