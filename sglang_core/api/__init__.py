"""All that a plugin may import. Its version is the core's major.minor; importing it imports no torch.

`sglang_core.api.ops` has the op bodies and specs, `sglang_core.api.models` what a model file is written with; both import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_core.backend.captured_driver import DeviceDriver as DeviceDriver
    from sglang_core.backend.captured_driver import DeviceEvent as DeviceEvent
    from sglang_core.backend.captured_driver import DeviceGraph as DeviceGraph
    from sglang_core.backend.captured_driver import TorchDriver as TorchDriver
    from sglang_core.backend.captured_runtime import CapturedRuntime as CapturedRuntime
    from sglang_core.backend.captured_step import CapturedSteps as CapturedSteps
    from sglang_core.backend.claims import Claim as Claim
    from sglang_core.backend.claims import Claims as Claims
    from sglang_core.backend.claims import Support as Support
    from sglang_core.backend.claims import Waiver as Waiver
    from sglang_core.backend.communicator import Communicator as Communicator
    from sglang_core.backend.communicator import FlatCommunicator as FlatCommunicator
    from sglang_core.backend.communicator import LocalCommunicator as LocalCommunicator
    from sglang_core.backend.communicator import TorchCommunicator as TorchCommunicator
    from sglang_core.backend.device_stream import DeviceStream as DeviceStream
    from sglang_core.backend.hookspecs import hookimpl as hookimpl
    from sglang_core.backend.interface import Backend as Backend
    from sglang_core.backend.interface import Bucket as Bucket
    from sglang_core.backend.interface import DefaultsContext as DefaultsContext
    from sglang_core.backend.interface import DeviceInfo as DeviceInfo
    from sglang_core.backend.interface import DeviceNote as DeviceNote
    from sglang_core.backend.interface import DeviceRuntime as DeviceRuntime
    from sglang_core.backend.interface import KernelContext as KernelContext
    from sglang_core.backend.interface import MemoryInfo as MemoryInfo
    from sglang_core.backend.interface import MeshContext as MeshContext
    from sglang_core.backend.interface import RuntimeContext as RuntimeContext
    from sglang_core.backend.interface import Stream as Stream
    from sglang_core.backend.interface import Work as Work
    from sglang_core.backend.kernel import Kernel as Kernel
    from sglang_core.backend.kernel import OpSite as OpSite
    from sglang_core.backend.kernel import SelectionContext as SelectionContext
    from sglang_core.backend.pool import Pool as Pool
    from sglang_core.backend.pool import PoolSpec as PoolSpec
    from sglang_core.backend.state_pool import StatePool as StatePool
    from sglang_core.backend.state_pool import StatePoolSpec as StatePoolSpec
    from sglang_core.backend.step_modules import step_modules as step_modules
    from sglang_core.backend.tensor_tree import leaves as leaves
    from sglang_core.backend.tensor_tree import map_tensors as map_tensors
    from sglang_core.backend.torch_backend import TorchBackend as TorchBackend
    from sglang_core.backend.torch_runtime import HostStream as HostStream
    from sglang_core.backend.torch_runtime import TorchRuntime as TorchRuntime
    from sglang_core.backend.transfers import one_transfer as one_transfer
    from sglang_core.backend.tuning import Choice as Choice
    from sglang_core.backend.tuning import Knob as Knob
    from sglang_core.backend.tuning import TuneContext as TuneContext
    from sglang_core.backend.tuning import Tuner as Tuner
    from sglang_core.backend.version import API_VERSION as API_VERSION
    from sglang_core.errors import ConfigError as ConfigError
    from sglang_core.errors import DeviceError as DeviceError
    from sglang_core.errors import PluginError as PluginError
    from sglang_core.errors import SglangError as SglangError
    from sglang_core.errors import WeightError as WeightError

_HOME = {  # module -> the names it defines
    "backend.captured_driver": ("DeviceDriver", "DeviceEvent", "DeviceGraph", "TorchDriver"),
    "backend.captured_runtime": ("CapturedRuntime",),
    "backend.captured_step": ("CapturedSteps",),
    "backend.claims": ("Claim", "Claims", "Support", "Waiver"),
    "backend.communicator": ("Communicator", "FlatCommunicator", "LocalCommunicator", "TorchCommunicator"),
    "backend.device_stream": ("DeviceStream",),
    "backend.hookspecs": ("hookimpl",),
    "backend.interface": (
        "Backend",
        "Bucket",
        "DefaultsContext",
        "DeviceInfo",
        "DeviceNote",
        "DeviceRuntime",
        "KernelContext",
        "MemoryInfo",
        "MeshContext",
        "RuntimeContext",
        "Stream",
        "Work",
    ),
    "backend.kernel": ("Kernel", "OpSite", "SelectionContext"),
    "backend.pool": ("Pool", "PoolSpec"),
    "backend.state_pool": ("StatePool", "StatePoolSpec"),
    "backend.step_modules": ("step_modules",),
    "backend.tensor_tree": ("leaves", "map_tensors"),
    "backend.torch_backend": ("TorchBackend",),
    "backend.torch_runtime": ("HostStream", "TorchRuntime"),
    "backend.transfers": ("one_transfer",),
    "backend.tuning": ("Choice", "Knob", "TuneContext", "Tuner"),
    "backend.version": ("API_VERSION",),
    "errors": ("ConfigError", "DeviceError", "PluginError", "SglangError", "WeightError"),
}
_MODULE_OF = {name: f"sglang_core.{module}" for module, names in _HOME.items() for name in names}

__all__ = [*sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
