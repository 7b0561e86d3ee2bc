"""What Dynamo's and Ray's `start` do before they start anything."""

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType

import pytest

from fope_export.deploy.base import FILES


def start_of(target: str) -> ModuleType:
    loader = SourceFileLoader(f"start_of_{target}", str(FILES / target / "start"))
    spec = spec_from_loader(loader.name, loader)
    assert spec
    loader.exec_module(module := module_from_spec(spec))
    return module


@pytest.mark.parametrize(
    ("target", "next_step"), [("dynamo", "--no-deps ai-dynamo==1.6.1"), ("ray", "fope-export[ray]")]
)
def test_what_is_missing_is_said_with_the_next_step(target: str, next_step: str) -> None:
    bare = subprocess.run([sys.executable, "-I", "-S", FILES / target / "start"], capture_output=True, text=True)
    assert bare.returncode == 2 and "fope_export is not installed" in bare.stderr and next_step in bare.stderr


def test_a_number_of_workers_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    start = start_of("dynamo")
    monkeypatch.setattr(start, "NEEDED", ())
    monkeypatch.setenv("WORKERS", "two")
    assert start.main() == 2 and "WORKERS is 'two'" in capsys.readouterr().err


def test_a_machine_alone_listens_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYN_DISCOVERY_BACKEND", raising=False)
    alone = start_of("dynamo").environment("store")
    assert alone["DYN_FILE_KV"] == "store" and alone["DYN_TCP_RPC_HOST"] == alone["DYN_HTTP_HOST"] == "127.0.0.1"


def test_among_many_machines_dynamo_s_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DYN_DISCOVERY_BACKEND": "etcd", "DYN_MIGRATION_LIMIT": "7", "HOST": "0.0.0.0"}.items():
        monkeypatch.setenv(name, value)
    many = start_of("dynamo").environment("store")
    assert many["DYN_MIGRATION_LIMIT"] == "7" and many["DYN_HTTP_HOST"] == "0.0.0.0"
    assert many.keys().isdisjoint({"DYN_FILE_KV", "DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST"})
