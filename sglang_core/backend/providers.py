"""Plugins of group `sglang_core.plugins`, loaded into pluggy, and what they answer, each answer tied to who gave it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pluggy

from sglang_core.backend import hookspecs
from sglang_core.backend.discovery import PLUGINS, PluginEntry, failed, load_entry, plugin_entries
from sglang_core.backend.interface import Backend, KernelContext
from sglang_core.backend.kernel import Kernel
from sglang_core.errors import ConfigError, PluginError


class Providers:
    """The loaded providers. Made once a process; asking imports nothing heavy unless a plugin does."""

    def __init__(self, entries: list[PluginEntry] | None = None) -> None:
        """Load `entries`, by default every installed one that is not disabled. Raises PluginError naming the plugin."""
        self._hooks = pluggy.PluginManager(hookspecs.PROJECT)
        self._hooks.add_hookspecs(hookspecs)
        self._entries: dict[str, PluginEntry] = {}
        for entry in plugin_entries(PLUGINS) if entries is None else entries:
            if not entry.disabled:
                self._register(entry)

    def _register(self, entry: PluginEntry) -> None:
        if other := self._entries.get(entry.name):
            raise PluginError(
                f"provider {entry.name!r} is claimed by {other.dist!r} and by {entry.dist!r}; uninstall one, or disable one"
                f" with SGLANG_DISABLE_PLUGINS={entry.dist}"
            )
        plugin = load_entry(entry)
        try:
            self._hooks.register(plugin() if isinstance(plugin, type) else plugin, name=entry.name)
            self._hooks.check_pending()
        except Exception as e:  # pluggy's, or the constructor's own
            raise failed(entry, "cannot be registered", e) from e
        self._entries[entry.name] = entry

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        """Every provider's kernels for this device; a kernel that names no provider gets its plugin's entry name."""
        found: list[Kernel] = []
        for name, kernels in self._ask("sglang_kernels", ctx=ctx):
            found += owned_kernels(kernels, name, f"{self._entries[name].title}: sglang_kernels")
        return found

    def named(self, hook: str) -> dict[str, str]:
        """All answers of a hook that maps names to "module:Class". Raises PluginError where two plugins give one name."""
        found: dict[str, str] = {}
        givers: dict[str, str] = {}
        for plugin, answers in self._ask(hook):
            if not isinstance(answers, Mapping):
                raise PluginError(f"{self._entries[plugin].title}: {hook} must return a mapping, not {answers!r}")
            for name, target in answers.items():
                if name in found:
                    raise PluginError(
                        f"{hook}: {name!r} comes from plugin {givers[name]!r} and from plugin {plugin!r}; disable one with"
                        f" SGLANG_DISABLE_PLUGINS={plugin}"
                    )
                found[name], givers[name] = target, plugin
        return found

    def _ask(self, hook: str, **kwargs: Any) -> list[tuple[str, Any]]:
        """(plugin, answer) in order of plugin name. Plugins are asked one by one, so that one that raises is known."""
        answers: list[tuple[str, Any]] = []
        for name in sorted(self._entries):
            others = [self._hooks.get_plugin(other) for other in self._entries if other != name]
            caller = self._hooks.subset_hook_caller(hook, remove_plugins=others)
            try:
                answers += [(name, answer) for answer in caller(**kwargs)]
            except ConfigError:  # what the user set, and nothing to repair
                raise
            except Exception as e:
                raise failed(self._entries[name], f"raised in {hook}", e) from e
        return answers


def owned_kernels(kernels: Any, provider: str, title: str) -> list[Kernel]:
    """`kernels` with `provider` filled in. Raises PluginError where it is no list of Kernel."""
    if not isinstance(kernels, list) or not all(isinstance(kernel, Kernel) for kernel in kernels):
        raise PluginError(f"{title} must return a list of Kernel, not {kernels!r}")
    return [kernel if kernel.provider else replace(kernel, provider=provider) for kernel in kernels]


def collect_kernels(backend: Backend, ctx: KernelContext, providers: Providers | None = None) -> list[Kernel]:
    """Every kernel that may run on the device: its backend's own, then the providers'."""
    try:
        kernels = backend.kernels(ctx)
    except ConfigError:
        raise
    except Exception as e:
        raise PluginError(
            f"backend {backend.name!r} raised in kernels() for {ctx.device.label}: {type(e).__name__}: {e}; repair or"
            " uninstall its package"
        ) from e
    own = owned_kernels(kernels, backend.name, f"backend {backend.name!r}: kernels()")
    return own + (providers.kernels(ctx) if providers else [])
