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
#include "tape.h"

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

// An uninitialised contiguous tensor on the host, without a trip through the dispatcher; where a tape records, one that a replay
// may write again.
inline Tensor empty(const int64_t* sizes, int64_t ndim, ScalarType dtype) {
  std::vector<int64_t> strides(static_cast<size_t>(ndim));
  int64_t step = 1;
  for (int64_t i = ndim; i-- > 0;) strides[size_t(i)] = step, step *= sizes[i];
  int32_t type = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                 : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                 : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                 : aoti_torch_dtype_int32();
  size_t bytes = size_t(step) * (dtype == ScalarType::Float || dtype == ScalarType::Int ? 4 : 2);
  AtenTensorHandle handle;
  if (Recorded memory = recorded_memory(bytes); memory.data) {
    auto release = [](void*, void* lease) { give_back(lease); };
    STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
        memory.data, ndim, sizes, strides.data(), 0, type, aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr,
        0, release, memory.lease));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(ndim, sizes, strides.data(), type, aoti_torch_device_type_cpu(), 0, &handle));
  }
  return Tensor(handle);
}

template <size_t N>
Tensor empty(const int64_t (&sizes)[N], ScalarType dtype) {
  return empty(sizes, int64_t(N), dtype);
}

inline Tensor empty_as(const Tensor& like) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  return empty(sizes.data(), like.dim(), like.scalar_type());
}

// x, or a copy of it where it is not contiguous.
inline Tensor as_contiguous(const Tensor& x) {
  if (x.is_contiguous()) return x;
  cannot_replay("an operand was copied");
  return torch::stable::contiguous(x);
}

// x, [rows, ...], with each row contiguous; copied only where it is not.
inline Tensor with_contiguous_rows(const Tensor& x) {
  int64_t step = 1;
  for (int64_t i = x.dim() - 1; i > 0; --i) {
    if (x.size(i) != 1 && x.stride(i) != step) return as_contiguous(x);
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
