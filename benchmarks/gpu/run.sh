#!/usr/bin/env bash
# One part of what is measured on a GPU, on a machine that has PyTorch and Triton and no network: see README.md beside this.
#   benchmarks/gpu/run.sh build|conformance|kernels|engine [--device cuda] [--only TEXT] [--fresh]
# Where $OUT is set, results go there. Where a package is missing and benchmarks/gpu/wheels/ has wheels (wheels.sh), they are installed.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
site=${SITE:-/tmp/sglang-gpu-site}
cd "$root"
if [ ! -e "$site/.complete" ] && compgen -G "benchmarks/gpu/wheels/*.whl" >/dev/null &&
  ! "$python" -c "import fastapi, httptools, msgspec, uvicorn, zmq" 2>/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" benchmarks/gpu/wheels/*.whl
  touch "$site/.complete"
fi
# Entry points are found by metadata: each source tree gets its own beside the wheels.
"$python" benchmarks/gpu/link_sources.py "$site" . conformance plugins/triton plugins/cuda plugins/rocm
export PYTHONPATH="$root:$root/conformance:$root/plugins/triton:$root/plugins/cuda:$root/plugins/rocm:$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "$python" -m benchmarks.gpu "$@"
