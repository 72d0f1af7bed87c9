// What every file of bindings needs: checks, views of tensors as plain structs, and outputs.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "isa.h"

namespace sglang_xeon {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of the level that set_isa chose.
const Kernels& kernels();

inline DType dtype_of(const Tensor& t, const char* name) {
  if (t.scalar_type() == ScalarType::Float) return DType::f32;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, "sglang_xeon: ", name, " must be float32 or bfloat16");
  return DType::bf16;
}

// As dtype_of, for ops that take float16 too.
inline DType float_of(const Tensor& t, const char* name) {
  return t.scalar_type() == ScalarType::Half ? DType::f16 : dtype_of(t, name);
}

// An uninitialised contiguous tensor on the host, without a trip through the dispatcher.
template <size_t N>
Tensor empty(const int64_t (&sizes)[N], ScalarType dtype) {
  int64_t strides[N];
  int64_t step = 1;
  for (size_t i = N; i-- > 0;) strides[i] = step, step *= sizes[i];
  int32_t type = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                 : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                 : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                 : aoti_torch_dtype_int32();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(N), sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_as(const Tensor& like) {
  int64_t ndim = like.dim(), step = 1;
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end()), strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = step, step *= sizes[i];
  int32_t type = like.scalar_type() == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// x, [rows, ...], with each row contiguous; copied only where it is not.
inline Tensor with_contiguous_rows(const Tensor& x) {
  int64_t step = 1;
  for (int64_t i = x.dim() - 1; i > 0; --i) {
    if (x.size(i) != 1 && x.stride(i) != step) return torch::stable::contiguous(x);
    step *= x.size(i);
  }
  return x;
}

inline Rows rows_of(const Tensor& x, const char* name) {
  return {x.data_ptr(), dtype_of(x, name), x.size(0) > 1 ? x.stride(0) : (x.numel() / std::max<int64_t>(x.size(0), 1))};
}

inline const int32_t* int32_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous(), "sglang_xeon: ", name, " must be contiguous int32");
  return static_cast<const int32_t*>(t.data_ptr());
}

}  // namespace sglang_xeon
