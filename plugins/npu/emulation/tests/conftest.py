"""Run by `make test-npu`, in an environment with torch_npu and the generated libraries, and with TORCH_DEVICE_BACKEND_AUTOLOAD=0."""

from sglang_npu_emulation.ops import load

load()
