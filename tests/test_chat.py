"""Chat templates: rendered as transformers renders them, bounded, and refused with a reason."""

import json
from pathlib import Path
from shutil import copytree

import pytest
from transformers import PreTrainedTokenizerFast

from fope_export.bundle import Bundle
from fope_export.chat import Chat, read_messages
from fope_export.cli import main
from fope_export.errors import BundleError, ConfigError
from fope_export.tokens import byte_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <b> & 'you' \u2028 é"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama": "{{ bos_token }}{% for message in messages %}\n  {%- if message.role == 'system' %}\n"
    "<<SYS>>{{ message['content'] | trim }}<</SYS>>\n  {%- else %}\n[{{ message.role }}] {{ message.content }}"
    "{{ eos_token }}{% endif %}\n{% endfor %}",
    "loops and marks": "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}"
    "{% endif %}{% generation %}{{ m | tojson }}{% endgeneration %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n == 2 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}{{ missing }}",
    "date": "{{ strftime_now('%Y') }}{{ messages | length }}{{ tools is none }}{{ messages[1] | tojson(indent=2) }}",
}


def written(folder: Path, template: str | list[dict[str, str]], **names: str) -> Path:
    """A folder with a tokenizer, and the template in its tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **names})
    )
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path, TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    wanted = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert Chat(folder).render(MESSAGES) == wanted


def test_where_a_template_may_stand(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert Chat(written(tmp_path, named)).render(MESSAGES) == "default"
    (tmp_path / "chat_template.jinja").write_text("a file of its own")
    assert Chat(tmp_path).render(MESSAGES) == "a file of its own"


@pytest.mark.parametrize("template", [None, 5, [], [{"name": "rag", "template": "x"}]], ids=str)
def test_a_model_without_a_template_is_not_chatted_with(template: object, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no chat template"):
        Chat(written(tmp_path, template))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[0].content.nothing.at_all }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "more than 1,048,576 characters"),
    ],
)
def test_a_template_that_refuses_or_fails(template: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        Chat(written(tmp_path, template)).render(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='x' * 1000) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
    ids=["time", "memory"],
)
def test_a_template_that_never_ends_is_ended(template: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MemoryError|needs more than"):
        Chat(written(tmp_path, template)).render(MESSAGES)


def test_messages_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(MESSAGES), encoding="utf-8-sig")
    assert read_messages(path) == MESSAGES
    for wrong in ("[]", "{}", '["x"]', '[{"content": "x"}]', "[", "[" * 100_000):
        path.write_text(wrong)
        with pytest.raises(ConfigError):
            read_messages(path)


@pytest.mark.parametrize(
    "arguments",
    ["--prompt x --system y", "--prompt-ids 1 --chat", "--prompt x --chat", "--messages nowhere.json"],
)
def test_misuse(arguments: str, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle.path), *arguments.split()]) == 2
    assert capsys.readouterr().err.startswith("error:")


def test_a_chat_from_the_command_line(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = copytree(bundle.path, tmp_path / "bundle")
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    assert main(["run", str(copy), "--prompt", "a", "--chat", "--system", "b", "--max-new-tokens", "5"]) == 0
    chatted = capsys.readouterr().out
    assert main(["run", str(copy), "--prompt", "system:b;user:a;", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == chatted


def test_rendering_runs_nothing_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(written(tmp_path, "{{ messages | length }}"))
    (tmp_path / "jinja2.py").write_text("open('EXECUTED', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":")
    assert chat.render(MESSAGES) == "4" and not (tmp_path / "EXECUTED").exists()
