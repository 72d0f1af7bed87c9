"""The gallery: kernels with one mistake each, by what they get wrong."""

from tests.conformance.mutants import attention, batch, dense, lora, memory, moe, rope_paged, rows, sampling, ssm

MODULES = (attention, batch, dense, lora, memory, moe, rope_paged, rows, sampling, ssm)
GALLERY = {f"{module.__name__}:{name}": mutant for module in MODULES for name, mutant in module.MUTANTS.items()}
