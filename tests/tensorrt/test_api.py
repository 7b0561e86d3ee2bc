import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fope_export.errors import BackendError
from fope_export.tensorrt import api


def test_versions_are_compared_as_numbers() -> None:
    library = api.LIBRARIES["tensorrt"]
    assert api.version_of("10.13.3.9.post1") == (10, 13)
    assert not library.refusal({"tensorrt": "10.13.3.9"}) and not library.refusal({"tensorrt": "11.0.0.114"})
    assert library.refusal({"tensorrt": "10.9.0.34"}) == "tensorrt is 10.9.0.34, and 10.13 is needed"


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "placeholder"), ({"OnnxParser": object, "__version__": "10.2.0"}, "10.2.0, and 10.13 is needed")],
)
def test_a_module_that_is_no_tensorrt(
    content: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("tensorrt")
    module.__file__ = "tensorrt/__init__.py"
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    api.load.cache_clear()
    with pytest.raises(BackendError, match=message):
        api.load("tensorrt")


def test_a_plugin_of_another_version_has_no_creator(plugin: Path) -> None:
    code = (
        "from pathlib import Path\nfrom fope_export.tensorrt import api\ntrt = api.load('tensorrt-rtx')\n"
        f"log, path = api.make_log(trt), Path({str(plugin)!r})\nbuilder = trt.Builder(log)\n"
        "for version in '7':\n"
        "    try: api.load_plugin(trt, path, log, name='FopeRotary', versions=[version], namespace='fope')\n"
        "    except api.BackendError as error: print(version, error, error.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"7 .*has no creator fope::FopeRotary of version 7 .*compiled again\.\n", done.stdout)


class Severity:
    """TensorRT's logger, as far as ours needs it."""

    INTERNAL_ERROR, ERROR, WARNING = range(3)


def test_messages_are_logged_and_few_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    trt: Any = types.ModuleType("tensorrt")
    trt.ILogger = Severity
    log = api.make_log(trt)
    with caplog.at_level("DEBUG", logger="fope_export"):
        for i in range(100 * api.MESSAGES):
            log.log(Severity.WARNING, "slow")
            log.log(Severity.ERROR, f"broken {i % (2 * api.MESSAGES)}")
    assert (
        caplog.messages[:2] == ["tensorrt: slow", "tensorrt: broken 0"] and len(caplog.messages) == 200 * api.MESSAGES
    )
    assert log.errors() == "; ".join(f"broken {i}" for i in range(api.MESSAGES, 2 * api.MESSAGES))
    log.log(Severity.INTERNAL_ERROR, "CUDA driver missing")
    assert "CUDA" not in log.errors() and log.errors().startswith("broken 33")


def test_rtx_imported_too_early_is_refused() -> None:
    code = (
        "import tensorrt_rtx\nfrom fope_export.tensorrt import api\n"
        "try: api.load('tensorrt-rtx')\nexcept api.BackendError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "was imported before" in done.stdout
