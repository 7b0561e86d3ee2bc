"""A model's chat template: messages to the prompt that the model was trained on, as transformers renders them.

A template is code from a checkpoint. It runs in Jinja's immutable sandbox, as there, and in a process of its own with
bounds on time, memory and output: python -m fope_export.chat, a job as JSON on stdin, the answer as JSON on stdout.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fope_export.documents import read_json, read_text
from fope_export.errors import BundleError, ConfigError
from fope_export.processes import child, python
from fope_export.tokens import read_object

Message = Mapping[str, Any]
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What a template may name, of tokenizer_config.json or special_tokens_map.json."""
NAMED = {"name", "template"}
"""What each of several templates has."""
SECONDS, MEMORY, OUTPUT = 5, 1 << 30, 1 << 20
"""Bounds on a template: processor time, bytes, and characters of its result."""
TOLD = 200
"""Characters of a template's failure that are told."""


class Chat:
    """The chat template of a bundle. Raises BundleError where it has none."""

    def __init__(self, folder: Path) -> None:
        config = read_object(folder / "tokenizer_config.json")
        named = read_object(folder / "special_tokens_map.json") | config
        self._where, self._template = _template(folder, config)
        self._names: dict[str, Any] = {n: _content(named[n]) for n in SPECIAL if named.get(n) is not None}
        if isinstance(more := named.get("additional_special_tokens"), list):
            self._names["additional_special_tokens"] = [_content(token) for token in more]

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the next answer. Raises ConfigError with what the template says against it."""
        job = {"template": self._template, "messages": [*messages], "names": self._names}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        try:
            with child(python("fope_export.chat"), encoding="utf-8", **pipes) as process:
                told, _ = process.communicate(json.dumps(job), timeout=10 * SECONDS)
                answer = json.loads(told) if process.returncode == 0 else {}
        except subprocess.TimeoutExpired:
            answer = {}
        if "text" in answer:
            return str(answer["text"])
        reason = answer.get("error", f"it needs more than {SECONDS} s or {MEMORY >> 20} MiB")
        raise ConfigError(
            f"{self._where}: the chat template does not take these messages: {reason}",
            hint="Which roles, in which order, does the model's card show?",
        )


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _template(folder: Path, config: Mapping[str, Any]) -> tuple[Path, str]:
    """Where the template stands, and its text: a file of its own comes first, and of several named ones "default"."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path, read_text(path, raises=BundleError)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {each["name"]: each["template"] for each in template if isinstance(each, dict) and each.keys() == NAMED}
        template = named.get("default")
    if not isinstance(template, str):
        raise BundleError(
            f"{folder} has no chat template, in chat_template.jinja or tokenizer_config.json",
            hint="Leave out --chat: the model continues text. Or put the template beside the checkpoint and export.",
        )
    return folder / "tokenizer_config.json", template


def rendered(template: str, messages: Sequence[Message], names: Mapping[str, Any]) -> str:
    """What the template makes of the messages, with what transformers gives a template.

    Raises jinja2's TemplateError, whatever else a template's code raises, and ValueError for too long a result.
    """
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks an assistant's part, and prints it as it is."""

        tags = {"generation"}  # noqa: RUF012 (as the base class has it)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], autoescape=False
    )
    environment.filters["tojson"] = _as_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().astimezone().strftime(form),
    }
    pieces, length = [], 0
    for piece in environment.from_string(template).generate(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **names
    ):
        pieces.append(piece)
        if (length := length + len(piece)) > OUTPUT:
            raise ValueError(f"the prompt would have more than {OUTPUT:,} characters")
    return "".join(pieces)


def _as_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def read_messages(path: Path) -> list[Message]:
    """A list of {"role", "content"} in a JSON file. Raises ConfigError where it is none."""
    hint = 'As [{"role": "user", "content": "Hello"}].'
    messages = read_json(path, raises=ConfigError, hint=hint)
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ConfigError(f"{path}: expected a list of messages with a role", hint=hint)
    return messages


def main() -> None:
    """Render the job on stdin."""
    import resource

    job = json.load(sys.stdin)
    import jinja2.sandbox  # noqa: F401 (before memory is bounded)

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        answer = {"text": rendered(**job)}
    except Exception as error:  # whatever a template's code raises is the answer
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:TOLD]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
