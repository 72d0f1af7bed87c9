#!/usr/bin/env bash
# Launches of an H200's kernels on a host, with the Triton that $PYTHON has: launches.py says what is gone through and what is not.
#   benchmarks/gpu/rehearsal/run.sh loads|cases [TEXT]
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
python=${PYTHON:-python3}
driver=${SITE:-/tmp/sglang-gpu-site}/driver
cd "$root"
mkdir -p "$driver"
gcc -shared -fPIC -o "$driver/libcuda.so.1" -Wl,-soname,libcuda.so.1 benchmarks/gpu/rehearsal/libcuda.c
ln -sf libcuda.so.1 "$driver/libcuda.so"
export LD_LIBRARY_PATH="$driver" TRITON_LIBCUDA_PATH="$driver"
export PYTHONPATH="$root:$root/conformance:$root/plugins/triton:$root/plugins/cuda:${SITE:-/tmp/sglang-gpu-site}${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.gpu.rehearsal.launches "$@"
