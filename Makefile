# Two commands for a newcomer: `make serve` and `make test`. Both make .venv/ first; the second time that takes a second.
VENV   := .venv
PY     := $(VENV)/bin/python
PYTHON ?= python3
# The build of torch is yours to pick: TORCH="torch==2.13.0 --index-url ..." make install
TORCH  ?= torch==2.13.0
MODEL  ?= demo
DEVICE ?= auto
ARGS   ?=

.PHONY: install serve test lint types test-core test-slow test-conformance test-xeon test-triton test-triton-slow test-tpu test-tpu-slow test-npu test-gpu test-isa reports format clean

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml plugins/xeon/pyproject.toml $(wildcard plugins/xeon/setup.py plugins/xeon/csrc/*) plugins/triton/pyproject.toml plugins/cuda/pyproject.toml plugins/rocm/pyproject.toml conformance/pyproject.toml compat/pyproject.toml tests/toy_vendor/pyproject.toml
	$(PY) -m pip install --quiet -e ".[dev]"
	$(PY) -m pip install --quiet --no-build-isolation -e plugins/xeon -e "plugins/triton[triton]" -e plugins/cuda -e plugins/rocm
	$(PY) -m pip install --quiet --no-build-isolation --no-deps -e conformance -e compat -e tests/toy_vendor
	touch $@

serve: install
	$(VENV)/bin/sglang-core serve --model-path $(MODEL) --device $(DEVICE) $(ARGS)

test: lint types test-core test-xeon test-conformance test-triton

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

types: install
	$(VENV)/bin/mypy

test-core: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests

test-xeon: install
	$(PY) -m pytest plugins/xeon/tests

# Triton kernels against their ops' definitions, interpreted, and compiled ahead of time for one architecture.
TRITON_CONFORMANCE = TRITON_INTERPRET=1 $(VENV)/bin/sglang-conformance run triton --level ops --jobs 2 --num-threads 1
test-triton: install
	$(PY) -m pytest -n 2 plugins/triton/tests plugins/cuda/tests plugins/rocm/tests
	PYTHONPATH=plugins/tpu $(PY) -m pytest plugins/tpu/tests/test_tpu_probe.py
	PYTHONPATH=plugins/npu $(PY) -m pytest plugins/npu/tests
	$(TRITON_CONFORMANCE) -k act. -k norm. -k rope. -k embed. -k kv.w -k logits.

# All of the suite that is for them, and every architecture: an hour and more.
test-triton-slow: install
	$(PY) -m sglang_triton.aot --check benchmarks/gpu/budgets.json
	$(PY) -m pytest plugins/cuda/tests -m slow
	$(TRITON_CONFORMANCE)

# The engine and the kernels of sglang-tpu on JAX's CPU backend, in an environment of their own: JAX is 0.6 GB, libtpu 0.7 GB.
TPU_VENV := .venv-tpu
# Interpreted kernels take longer to compile than to run: XLA optimises nothing here, and has its older code generator.
TPU_CONFORMANCE = JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS=--xla_cpu_use_fusion_emitters=false \
	$(TPU_VENV)/bin/sglang-conformance run tpu:cpu --level ops --jobs 2 --num-threads 1
test-tpu: $(TPU_VENV)/.installed
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m pytest -n 2 --dist loadfile plugins/tpu/tests
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m sglang_tpu.aot --check benchmarks/tpu/budgets.json --chip v6e --only attn --only kv.write --only "16 tokens"
	$(TPU_VENV)/bin/python benchmarks/tpu/steps.py --quick --chip v6e
	$(TPU_CONFORMANCE) -k runtime. -k graph. -k norm.rms -k "norm.add_rms[" -k "act.gated[" -k rope.apply -k "embed.lookup[a part" -k sample. \
	  -k moe.route -k "attn.paged[decode-" -k "attn.paged[prefill-" -k "attn.paged[mixed-" -k "attn.paged[padded" -k "attn.paged[window 16" \
	  -k "attn.paged[soft cap-" -k "attn.paged[sinks-" -k "attn.paged[odd" -k "attn.mla_paged[decode-" -k "attn.mla_paged[mixed-" \
	  -k "attn.mla_paged[padded" -k "kv.write[slots-" -k "kv.write_mla[slots-" -k "gemm.linear[int8" -k "gemm.linear[int4.awq.g128" \
	  -k "gemm.linear[fp8.block128" -k "gemm.grouped[prefill" -k "gemm.grouped[int" -k "moe.fused[prefill" -k "moe.fused[remote" -k "moe.fused[int"

# All of the suite but engines, and every kernel and every step of the budgets, for every chip: an hour and more.
test-tpu-slow: $(TPU_VENV)/.installed
	$(TPU_CONFORMANCE)
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m sglang_tpu.aot --check benchmarks/tpu/budgets.json
	$(TPU_VENV)/bin/python benchmarks/tpu/steps.py

$(TPU_VENV)/.installed: pyproject.toml plugins/tpu/pyproject.toml conformance/pyproject.toml
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(TPU_VENV)/bin/python -m pip install --quiet $(TORCH)
	$(TPU_VENV)/bin/python -m pip install --quiet -e ".[dev]"
	$(TPU_VENV)/bin/python -m pip install --quiet --no-build-isolation -e "plugins/tpu[tpu]"
	$(TPU_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps -e conformance
	touch $@

# sglang-npu on an emulation of torch_npu's ops, in an environment of their own: with torch_npu installed PyTorch imports it by itself, unless it is told not to.
NPU_VENV := .venv-npu
NPU_CONFORMANCE = $(NPU_VENV)/bin/sglang-conformance run npu_emulated --level ops --strict --jobs 2 --num-threads 1
test-npu: export TORCH_DEVICE_BACKEND_AUTOLOAD = 0
test-npu: $(NPU_VENV)/.installed
	$(NPU_VENV)/bin/python -m pytest -n 2 plugins/npu/tests plugins/npu/emulation/tests
	$(NPU_CONFORMANCE)

$(NPU_VENV)/.installed: export TORCH_DEVICE_BACKEND_AUTOLOAD = 0
$(NPU_VENV)/.installed: pyproject.toml plugins/npu/pyproject.toml plugins/npu/emulation/pyproject.toml plugins/triton/pyproject.toml conformance/pyproject.toml
	$(PYTHON) -m venv $(NPU_VENV)
	$(NPU_VENV)/bin/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(NPU_VENV)/bin/python -m pip install --quiet $(TORCH)
	$(NPU_VENV)/bin/python -m pip install --quiet -e ".[dev]"
	$(NPU_VENV)/bin/python -m pip install --quiet --no-build-isolation -e plugins/triton -e "plugins/npu[npu,triton]"
	$(NPU_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps -e plugins/npu/emulation -e conformance
	$(NPU_VENV)/bin/python -m sglang_npu_emulation.stubs
	touch $@

test-conformance: install
	$(VENV)/bin/sglang-conformance run cpu --strict --jobs 2 --num-threads 1
	$(VENV)/bin/sglang-conformance run xeon --strict

# Every kernel at every instruction set that this CPU has: SGLANG_XEON_ISA=avx2, avx512, ...
test-isa: install
	for level in $$($(PY) -m sglang_xeon.isa); do \
	  echo "SGLANG_XEON_ISA=$$level"; \
	  SGLANG_XEON_ISA=$$level $(VENV)/bin/sglang-conformance run xeon --strict || exit 1; done

# On a GPU, GPU=rocm for one of AMD's: every part of benchmarks/gpu, again until nothing of it is left, and all of the suite. Some hours; what is
# finished stays. The first part ends at once where there is no such device, and says why.
GPU ?= cuda
test-gpu: install
	for part in build kernels engine conformance; do \
	  status=3; \
	  while [ $$status -eq 3 ]; do PYTHON=$(abspath $(PY)) benchmarks/gpu/run.sh $$part --device $(GPU); status=$$?; done; \
	  [ $$status -eq 0 ] || exit $$status; done
	$(VENV)/bin/sglang-conformance run $(GPU) --full --strict --json conformance/reports/$(GPU).json

# After a change of the suite or of a kernel: the committed reports, and the page made of them.
reports: install
	for device in cpu xeon; do \
	  $(VENV)/bin/sglang-conformance run $$device --full --strict --perf --json conformance/reports/$$device.json || exit 1; done
	$(VENV)/bin/sglang-conformance matrix conformance/reports/*.json -o docs/backends.md

test-slow: install
	$(PY) -m pytest tests plugins/xeon/tests -m slow

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
