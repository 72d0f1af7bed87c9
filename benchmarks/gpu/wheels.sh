#!/usr/bin/env bash
# What a GPU machine lacks, as wheels for its Python 3.12: about 5 MB in benchmarks/gpu/wheels/, which git ignores.
set -euo pipefail
cd "$(dirname "$0")"
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64)
# Their own few requirements come along: pydantic takes one pydantic-core and no other.
python3 -m pip download --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" -d wheels \
  msgspec pyzmq fastapi starlette pydantic pydantic-core typing-inspection annotated-types uvicorn httptools
ls wheels
