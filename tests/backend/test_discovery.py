"""Every way in which a device plugin can be found, or be wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sglang_core.backend.devices import installed_backends, open_device
from sglang_core.backend.discovery import find_backend
from sglang_core.errors import ConfigError, DeviceError, PluginError

BACKENDS = "sglang_core.backends"


def backend_source(
    name: str, *, score: int = 50, devices: int = 1, path: str = "", probe: str = "", extra: str = ""
) -> str:
    body = probe or (
        f"return [DeviceInfo(backend={name!r}, index=i, path={path or name + '/v1'!r}, name='fake', score={score})"
        f" for i in range({devices})]"
    )
    return (
        "from sglang_core.api import DeviceInfo, TorchBackend\n"
        f"class B(TorchBackend):\n    name = {name!r}\n    def probe(self):\n        {body}\n{extra}"
    )


def install_backend(
    install, name: str = "acme", *, dist: str = "", requires=("sglang-core>=0.1,<0.2",), source="", **kwargs
):
    module = f"{(dist or name).replace('-', '_')}_plugin"
    install(
        dist or f"sglang-{name}",
        entry_points={BACKENDS: {name: f"{module}:B"}},
        modules={module: source or backend_source(name, **kwargs)},
        requires=requires,
    )


def test_core_brings_cpu_and_strict_by_the_same_door() -> None:
    rows = {row.name: row for row in installed_backends() if row.dist == "sglang-core"}
    assert {"cpu", "strict"} <= rows.keys()
    assert rows["cpu"].status == "ok"
    assert rows["cpu"].devices[0].score == 0


def test_a_device_is_found_by_name_index_and_label(install) -> None:
    install_backend(install, devices=2, path="acme/v1/big")
    assert open_device("acme").info.index == 0
    assert open_device("acme:1").info.index == 1
    assert open_device("acme:big").info.index == 0
    assert open_device("acme:v1/big").info.index == 0


def test_unknown_device_names_what_is_installed_and_the_nearest(install) -> None:
    install_backend(install, "xeon")
    with pytest.raises(DeviceError) as e:
        find_backend("xeno")
    message = str(e.value)
    assert "'xeno'" in message
    assert "cpu" in message
    assert "did you mean 'xeon'" in message
    assert "pip install sglang-xeno" in message


@pytest.mark.parametrize("text", ["", ":1", "cpu:"])
def test_a_malformed_device_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="NAME:INDEX"):
        open_device(text)


def test_a_missing_index_lists_the_devices_there_are(install) -> None:
    install_backend(install, devices=2)
    with pytest.raises(DeviceError, match=r"'acme:7' is not here; 'acme' has acme:0 \(acme/v1\), acme:1"):
        open_device("acme:7")


def test_an_absent_device_gives_its_own_reason(install) -> None:
    extra = "    def absent_reason(self):\n        return 'no driver is loaded; install it'\n"
    install_backend(install, probe="return []", extra=extra)
    with pytest.raises(DeviceError, match="'acme' is not here: no driver is loaded; install it"):
        open_device("acme")


@pytest.mark.parametrize("asked", ["acme", "acme:0", "auto"])
def test_a_device_with_a_problem_is_no_device_to_run_on(install, asked: str) -> None:
    """Nor is the next best taken in its place."""
    probe = "return [DeviceInfo(backend='acme', path='acme/v1', name='fake', score=500, problem='torch is not built for it; do X')]"
    install_backend(install, probe=probe)
    with pytest.raises(DeviceError, match=r"acme:0 \(fake\) cannot be opened: torch is not built for it; do X"):
        open_device(asked)
    (row,) = [row for row in installed_backends() if row.name == "acme"]
    assert row.status == "ok" and row.devices[0].problem


def test_a_wrong_api_range_is_refused_before_anything_is_imported(install) -> None:
    install_backend(install, requires=("sglang-core>=0.7,<0.8",), source="raise RuntimeError('imported')")
    with pytest.raises(PluginError) as e:
        find_backend("acme")
    message = str(e.value)
    assert "sglang-acme" in message
    assert "<0.8" in message
    assert "this is sglang-core 0.1" in message
    assert "SGLANG_DISABLE_PLUGINS=acme" in message
    assert "acme_plugin" not in sys.modules


@pytest.mark.parametrize("requires", [(), ("torch>=2",), ("sglang-core",), ("sglang-core>=0.1; extra == 'dev'",)])
def test_a_plugin_without_api_range_is_refused(install, requires: tuple[str, ...]) -> None:
    install_backend(install, requires=requires)
    with pytest.raises(PluginError, match=r"does not say which plugin API it supports.*'sglang-core>=0\.1,<0\.2'"):
        find_backend("acme")


def test_unreadable_metadata_names_the_package(install) -> None:
    install_backend(install, requires=("sglang-core >>> 1",))
    with pytest.raises(PluginError, match=r"'sglang-acme'.*Requires-Dist cannot be read"):
        find_backend("acme")


@pytest.mark.parametrize(
    "requires", ["sglang-core>=0.1,<0.2", "sglang_core[bench]~=0.1.0", "sglang-core==0.1.*", "sglang-core>=0.1.0.dev1"]
)
def test_ranges_that_hold_this_core(install, requires: str) -> None:
    install_backend(install, requires=(requires,))
    assert find_backend("acme").name == "acme"


def test_two_plugins_for_one_device_are_both_named(install) -> None:
    install_backend(install, dist="sglang-acme")
    install_backend(install, dist="other-acme")
    with pytest.raises(PluginError, match=r"'acme' is claimed by 'other-acme' .* and by 'sglang-acme'"):
        find_backend("acme")
    rows = [row for row in installed_backends() if row.name == "acme"]
    assert [row.status for row in rows] == ["failed", "failed"]


def test_disabling_one_of_two_by_package_name_settles_it(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install_backend(install, dist="sglang-acme")
    install_backend(install, dist="other-acme")
    monkeypatch.setenv("SGLANG_DISABLE_PLUGINS", "other_acme")
    assert type(find_backend("acme")).__module__ == "sglang_acme_plugin"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise ValueError('boom')", "ValueError: boom"),
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("x = (", "SyntaxError"),
        ("A = 1", "AttributeError"),
    ],
)
def test_a_plugin_that_raises_on_load_is_named_with_its_cause(install, source: str, cause: str) -> None:
    install_backend(install, source=source)
    with pytest.raises(PluginError) as e:
        find_backend("acme")
    message = str(e.value)
    assert "'sglang-acme'" in message
    assert "acme = acme_plugin:B" in message
    assert cause in message


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("B = 3", "no subclass of sglang_core.api.Backend"),
        ("class B: pass", "no subclass of sglang_core.api.Backend"),
        ("from sglang_core.api import Backend\nclass B(Backend):\n    name = 'acme'", "cannot be made: TypeError"),
        (backend_source("emca"), "named 'emca' in its class"),
    ],
)
def test_an_entry_point_that_is_no_backend_is_refused(install, source: str, match: str) -> None:
    install_backend(install, source=source)
    with pytest.raises(PluginError, match=match):
        find_backend("acme")


def test_a_probe_that_raises_is_the_plugins_fault(install) -> None:
    install_backend(install, probe="raise OSError('no bus')")
    with pytest.raises(PluginError, match=r"'sglang-acme'.*raised in probe\(\).*OSError: no bus"):
        open_device("acme")


# auto


def test_auto_takes_the_best_score_and_says_why(install) -> None:
    install_backend(install, "acme", score=50)
    install_backend(install, "nova", score=10**6)
    chosen = open_device("auto")
    assert chosen.info.label == "nova:0"
    assert "1000000" in chosen.reason
    assert "acme:0 scores 50" in chosen.reason
    assert "strict" not in chosen.reason


def test_auto_says_which_backend_found_no_device(install) -> None:
    install_backend(install, probe="return []")
    chosen = open_device("auto")
    assert chosen.info.backend != "acme"
    assert "acme is not here" in chosen.reason


@pytest.mark.parametrize(
    "broken", [{"source": "raise ValueError('boom')"}, {"requires": ("sglang-core>=9",)}, {"probe": "raise OSError()"}]
)
def test_auto_never_skips_a_broken_plugin(install, broken: dict[str, object]) -> None:
    install_backend(install, **broken)
    with pytest.raises(PluginError, match="sglang-acme"):
        open_device("auto")


def test_auto_does_not_draw_lots(install) -> None:
    install_backend(install, "acme", score=10**6)
    install_backend(install, "nova", score=10**6)
    with pytest.raises(DeviceError, match="both score 1000000; choose one with --device"):
        open_device("auto")


# listing and disabling


def test_the_listing_shows_failures_as_rows(install) -> None:
    install_backend(install, "broken", source="raise ValueError('boom')")
    install_backend(install, "stale", requires=("sglang-core>=9",))
    install_backend(install, "away", probe="return []")
    rows = {row.name: row for row in installed_backends()}
    assert (rows["broken"].status, rows["stale"].status, rows["away"].status) == ("failed", "failed", "absent")
    assert "boom" in rows["broken"].message
    assert rows["cpu"].status == "ok"


def test_a_disabled_plugin_is_left_alone_and_named(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install_backend(install, source="raise ValueError('boom')")
    monkeypatch.setenv("SGLANG_DISABLE_PLUGINS", "other, ACME")
    assert open_device("auto").info.backend != "acme"
    assert {row.name: row.status for row in installed_backends()}["acme"] == "disabled"
    with pytest.raises(DeviceError, match="'sglang-acme', which SGLANG_DISABLE_PLUGINS disables"):
        find_backend("acme")


@pytest.mark.parametrize("value", ["a,,b", "a b", ",", "a;b"])
def test_a_malformed_disable_list_raises(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DISABLE_PLUGINS", value)
    with pytest.raises(ConfigError, match="SGLANG_DISABLE_PLUGINS"):
        open_device("cpu")


@pytest.mark.parametrize(
    "code",
    [
        "from sglang_core.backend.devices import installed_backends, open_device; installed_backends(); open_device('cpu')",
        "from sglang_core.backend.providers import Providers; Providers()",
        "import sglang_core.api as api; [getattr(api, n) for n in ('Backend', 'Kernel', 'TorchBackend', 'hookimpl')]",
    ],
)
def test_discovery_imports_no_torch(code: str) -> None:
    check = f"import sys; {code}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
