"""README and docs/ work as they are printed: commands, what they print, and snippets of Python, page by page."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from reference import files

from fope_export.benchmark.contenders import COMPILED, CONTENDERS
from fope_export.bundle import Bundle
from fope_export.cli import main
from fope_export.parity.run import validate
from fope_export.records import RECORDS
from fope_export.report import write_parity
from tests.pages import PAGES, ROOT, SHOWN, Block, blocks, like

ELSEWHERE = {
    "installs packages": 1,  # scripts/venv and scripts/demo do, in CI
    "needs a server": 4,  # tests/serving/test_docs.py has one
    "needs a GPU": 1,
    "needs Docker": 2,
    "needs Triton": 1,  # these and the next: tests/deploy
    "needs Dynamo": 1,
    "needs Ray": 1,
    "needs transformers.js": 1,  # tests/test_web.py
    "needs optimum-intel": 1,  # tests/test_openvino_peers.py
    "takes minutes": 1,
}
"""How many blocks have a title that says why they do not run here."""
PACKAGE = ROOT / "fope_export"


@pytest.fixture(scope="module")
def made(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that pages but README begin with, validated."""
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path_factory.mktemp("pages") / "out"))
    return write_parity(copy, validate(copy, lengths=(7,))).path


@pytest.fixture
def folder(
    request: pytest.FixtureRequest, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> Path:  # fmt: skip
    """Where a page is followed: README begins with the model that comes along, the others with a small one."""
    if request.node.callspec.params["page"] != "README.md":
        (tmp_path / "checkpoint").symlink_to(native)
        shutil.copytree(request.getfixturevalue("made"), tmp_path / "out")
        shutil.copytree(native, tmp_path / "twin-checkpoint")
        for name in ("FILE", "notes.txt"):
            (tmp_path / name).write_text("\n".join(f"{number}. A note." for number in range(300)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(CONTENDERS, COMPILED)  # it takes its time, and tests of its own
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def follow(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Do what a block says, and find what it says is printed."""
    for (program, *arguments), printed in block.commands():
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        assert program == "fope-export" and code == (2 if printed.startswith('{"error"') else 0), (arguments, err)
        if printed:
            told = out or err
            assert re.fullmatch(like(printed), told if told.endswith("\n") else f"{told}\n"), told


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page == "README.md" else [pytest.mark.whole])
        for page in PAGES
        if any(not each.needs for each in blocks(page))
    ],
)
def test_a_page(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.needs or block.language in SHOWN:
            continue
        if block.language == "python":
            exec(block.text, names)
        else:
            follow(block, capsys)


@pytest.mark.parametrize(
    "block",
    [
        Block("sh", "", "fope-export inspect nowhere/\n"),
        Block("sh", "", "rm out\n"),
        Block("console", "", "$ fope-export --version\nfope-export two\n"),
        Block("console", "", '$ fope-export --version\n{"error": 1}\n'),
    ],
)
def test_what_does_not_work_as_printed_is_found(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        follow(block, capsys)


def test_nothing_that_is_shown_is_left_out() -> None:
    shown = [block for page in PAGES for block in blocks(page)]
    assert Counter(block.needs for block in shown if block.needs) == ELSEWHERE
    assert {block.language for block in shown} == {"console", "js", "python", "sh", *SHOWN}
    for page, path in PAGES.items():
        text = path.read_text()
        assert text.count("```") == 2 * len(blocks(page)), f"{page}: a fence of another form"
        assert not re.search(r"^ {4}\S", re.sub(r"(?ms)^```.*?^```$|^- .*?\n\n", "", text), re.MULTILINE), page


@pytest.mark.parametrize(
    ("printed", "told", "alike"),
    [
        ("a 1.5 b\n", "a  27 b\n", True),
        ("a 1.5 b\n", "a 1.5 c\n", False),
        ("a\n…\nz\n", "a\nb\nc\nz\n", True),
        ("a\n…\nz\n", "a\nb\nc\n", False),
        ("a\n", "a\nb\n", False),
    ],
)
def test_what_is_printed_is_compared(printed: str, told: str, alike: bool) -> None:
    assert bool(re.fullmatch(like(printed), told)) == alike


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page].read_text()):
        assert (PAGES[page].parent / target).exists(), target
    if page != "README.md":
        assert "](../README" not in PAGES[page].read_text()


def test_the_readme_is_short_and_names_its_two_commands() -> None:
    text = PAGES["README.md"].read_text()
    assert len(text.splitlines()) <= 120
    assert re.findall(r"\]\((?!http)([^)]+)\)", text) == ["docs/loss_and_parity.png"]  # a wheel has no other files
    for script in ("scripts/demo", "scripts/test"):
        assert script in text and (ROOT / script).stat().st_mode & 0o111


def test_what_ci_services_read_names_what_there_is() -> None:
    action, job, hook = (yaml.safe_load(each.text) for each in blocks("docs/ci.md") if each.language == "yaml")
    taken = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    assert action[0]["uses"] == "./" and "checkpoint" in action[0]["with"] and action[0]["with"].keys() <= taken.keys()
    assert job["parity"]["extends"] in yaml.safe_load((ROOT / job["include"]).read_text())
    (known,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["repos"][0]["hooks"] == [{"id": known["id"]}]


def listed(entry: object) -> list[str]:
    """The pages of a navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in listed(each)]  # type: ignore[attr-defined]


def test_every_page_is_in_the_navigation() -> None:
    read = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(f"docs/{page}" for page in listed(read["nav"])) == sorted(PAGES.keys() - {"README.md"})


def test_the_reference_is_current() -> None:
    for path, text in files().items():
        assert path.read_text() == text, f"{path}: run scripts/reference.py"


def test_every_document_is_held_to_its_schema_somewhere() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert set(re.findall(r"(?:held|told)\(\"([\w-]+)\"", sources)) >= RECORDS.keys()


def test_the_reference_of_python_has_every_public_name() -> None:
    import fope_export

    found = re.findall(
        r"^::: fope_export\.([\w.]+)\.(\w+)$", PAGES["docs/reference/python.md"].read_text(), re.MULTILINE
    )
    assert {name: home for home, name in found} == fope_export._HOMES and len(found) == len(fope_export._HOMES)


@pytest.mark.parametrize(
    "message", re.findall(r"^\| `(.+?)` \|", PAGES["docs/troubleshooting.md"].read_text(), re.MULTILINE)
)
def test_a_message_that_is_explained_is_one_of_ours(message: str) -> None:
    sources = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py")).replace("{MANIFEST}", "fope_export.json")
    assert [part for part in message.split("…") if part.strip() and part not in sources] == []
