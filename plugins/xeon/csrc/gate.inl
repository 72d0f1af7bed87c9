// Activations, on vectors.

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }
INLINE vf gelu_tanh(vf x) {
  return 0.5f * x * (1.0f + tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
INLINE vf gelu(vf x) {
  UNROLL for (int i = 0; i < VL; ++i) x[i] = 0.5f * x[i] * (1.0f + __builtin_erff(x[i] * 0.7071067811865476f));
  return x;
}
INLINE vf gate(vf x, Gate kind) { return kind == Gate::silu ? silu(x) : kind == Gate::gelu_tanh ? gelu_tanh(x) : gelu(x); }
