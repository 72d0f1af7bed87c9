"""`lowered`: a kernel of sglang-triton as triton-ascend gives it to the vendor's compiler, as Linalg in MLIR. Importing this imports triton-ascend.

That compiler, bishengir-compile, comes with CANN. What it refuses, such as tiles that are too large for a core's buffer, is not found here.
"""

from __future__ import annotations

from sglang_triton.aot_spec import AotSpec
from sglang_triton.tuning import ASCEND
from triton._C.libtriton import ir
from triton.backends.ascend.compiler import AscendBackend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("npu", "Ascend910B3", 0)  # Atlas A2
STAGES = ("ttir", "ttadapter")  # those before the vendor's compiler


def lowered(spec: AotSpec) -> str:
    """The kernel with the tiles that NPUs have. Raises triton.CompilationError where Triton 3.2 does not know its language, and
    subprocess.CalledProcessError, with the adapter's words in `stderr`, where its operations do not become Linalg."""
    kernel = spec.kernel
    given = {**spec.constexprs, **spec.config(ASCEND)}
    constants = {name: value for name, value in given.items() if name in kernel.arg_names}
    signature = {name: spec.signature[name] for name in kernel.arg_names if name not in constants}
    backend = AscendBackend(TARGET)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    source = ASTSource(kernel, signature, constants)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    stages: dict[str, object] = {}
    backend.add_stages(stages, options)
    metadata = {**vars(options), "target": TARGET}
    for stage in STAGES:
        module = stages[stage](module, metadata)
    return str(module)
