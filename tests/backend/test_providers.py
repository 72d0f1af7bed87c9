"""Providers: plugins that add kernels, models and parsers through hooks."""

from __future__ import annotations

import pytest

from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import KernelContext
from sglang_core.backend.providers import Providers, collect_kernels
from sglang_core.errors import ConfigError, PluginError

KERNELS = """
from sglang_core.api import Kernel, hookimpl
@hookimpl
def sglang_kernels(ctx):
    return [Kernel("norm.rms", fn="somewhere:rms", device=(ctx.device.path,))]
"""


def install_provider(install, name: str, source: str, *, requires=("sglang-core>=0.1,<0.2",)) -> None:
    module = f"{name}_provider"
    install(
        f"sglang-{name}",
        entry_points={"sglang_core.plugins": {name: module}},
        modules={module: source},
        requires=requires,
    )


def context() -> KernelContext:
    return KernelContext(device=CpuBackend().probe()[0])


def hook(name: str, answer: str) -> str:
    return f"from sglang_core.api import hookimpl\n@hookimpl\ndef {name}():\n    {answer}\n"


def test_kernels_of_many_providers_carry_their_names(install) -> None:
    install_provider(install, "one", KERNELS)
    install_provider(install, "two", KERNELS)
    kernels = collect_kernels(CpuBackend(), context(), Providers())
    assert [(k.op, k.provider) for k in kernels] == [("norm.rms", "one"), ("norm.rms", "two")]


def test_a_class_is_a_provider_too(install) -> None:
    source = "from sglang_core.api import hookimpl\nclass P:\n    @hookimpl\n    def sglang_models(self):\n        return {'A': 'm:A'}\n"
    install("sglang-p", entry_points={"sglang_core.plugins": {"p": "p_provider:P"}}, modules={"p_provider": source})
    assert Providers().named("sglang_models") == {"A": "m:A"}


@pytest.mark.parametrize(
    "name", ["sglang_models", "sglang_parsers", "sglang_grammar_engines", "sglang_routing_policies"]
)
def test_named_answers_are_merged_and_a_clash_names_both(install, name: str) -> None:
    install_provider(install, "one", hook(name, "return {'a': 'm:A'}"))
    install_provider(install, "two", hook(name, "return {'b': 'm:B'}"))
    assert Providers().named(name) == {"a": "m:A", "b": "m:B"}
    install_provider(install, "three", hook(name, "return {'a': 'x:A'}"))
    with pytest.raises(PluginError, match="'a' comes from plugin 'one' and from plugin 'three'"):
        Providers().named(name)


def test_a_hook_that_raises_names_its_plugin(install) -> None:
    install_provider(install, "good", hook("sglang_models", "return {}"))
    install_provider(install, "bad", hook("sglang_models", "raise KeyError('boom')"))
    with pytest.raises(PluginError, match=r"'sglang-bad'.*raised in sglang_models: KeyError: 'boom'"):
        Providers().named("sglang_models")


def test_what_a_hook_says_of_a_setting_is_the_users_to_mend(install) -> None:
    """No advice to repair a plugin that found a wrong environment variable."""
    wrong = "from sglang_core.api import ConfigError; raise ConfigError('ACME_FAST=2 must be 0 or 1')"
    install_provider(install, "strict", hook("sglang_models", wrong))
    with pytest.raises(ConfigError, match="^ACME_FAST=2 must be 0 or 1$"):
        Providers().named("sglang_models")

    class Strict(CpuBackend):
        def kernels(self, ctx):
            raise ConfigError("ACME_FAST=2 must be 0 or 1")

    with pytest.raises(ConfigError, match="^ACME_FAST"):
        collect_kernels(Strict(), context())


@pytest.mark.parametrize("answer", ["return 3", "return ['a']"])
def test_an_answer_of_the_wrong_kind_names_its_plugin(install, answer: str) -> None:
    install_provider(install, "bad", hook("sglang_models", answer))
    with pytest.raises(PluginError, match="'sglang-bad'.*must return a mapping"):
        Providers().named("sglang_models")


def test_kernels_of_the_wrong_kind_name_their_plugin(install) -> None:
    source = "from sglang_core.api import hookimpl\n@hookimpl\ndef sglang_kernels(ctx):\n    return ['norm.rms']\n"
    install_provider(install, "bad", source)
    with pytest.raises(PluginError, match="'sglang-bad'.*must return a list of Kernel"):
        Providers().kernels(context())


@pytest.mark.parametrize(
    "source",
    [
        "from sglang_core.api import hookimpl\n@hookimpl\ndef sglang_kernls(ctx):\n    return []\n",
        "from sglang_core.api import hookimpl\n@hookimpl\ndef sglang_kernels(context):\n    return []\n",
        "raise ValueError('boom')",
    ],
    ids=["no such hook", "no such argument", "raises on import"],
)
def test_a_provider_that_cannot_be_registered_is_named(install, source: str) -> None:
    install_provider(install, "bad", source)
    with pytest.raises(PluginError, match="'sglang-bad'"):
        Providers()


def test_the_api_range_holds_for_providers_too(install) -> None:
    install_provider(install, "stale", "raise RuntimeError('imported')", requires=("sglang-core>=0.2",))
    with pytest.raises(PluginError, match=r"'sglang-stale'.*supports sglang-core >=0\.2"):
        Providers()


def test_two_providers_of_one_name_are_refused(install) -> None:
    for dist in ("sglang-a", "sglang-b"):
        install(dist, entry_points={"sglang_core.plugins": {"same": "json"}}, modules={})
    with pytest.raises(PluginError, match="'same' is claimed by 'sglang-a' and by 'sglang-b'"):
        Providers()


def test_a_disabled_provider_is_not_loaded(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install_provider(install, "bad", "raise ValueError('boom')")
    monkeypatch.setenv("SGLANG_DISABLE_PLUGINS", "sglang-bad")
    assert "bad" not in Providers().names


def test_a_backend_whose_kernels_raise_is_named() -> None:
    class Broken(CpuBackend):
        def kernels(self, ctx):
            raise OSError("no file")

    with pytest.raises(PluginError, match=r"backend 'cpu' raised in kernels\(\) for cpu:0: OSError: no file"):
        collect_kernels(Broken(), context())
