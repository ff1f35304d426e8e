"""Text to token ids and back, and conversations to prompts.

A thin wrapper around the `tokenizers` library: it finds the files of a model directory and
renders chat templates as `transformers` does.  Streaming is `detokenizer.py`'s work.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, pre_tokenizers, processors

from minipaged.errors import InvalidRequestError, ModelLoadError


class Generation(Extension):
    """`{% generation %}`, by which some templates mark for a training what the model said."""

    tags = {"generation"}  # noqa: RUF012  (the name is that of the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands between the tags, as if they were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Tokenizer:
    """Encodes and decodes; chat_template is the Jinja source of the model, if it has one."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.special_tokens = special_tokens or {}  # bos_token, eos_token: used by templates

    @property
    def vocab_size(self) -> int:
        """Token ids that stand for something."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with a begin-of-sequence token where the model wants one."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of these tokens; bytes that are no UTF-8 show as replacement signs."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation: messages are {"role": ..., "content": ...}."""
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the text that the model was trained on."""
        if self.chat_template is None:
            raise InvalidRequestError(
                "the model has no chat template; give it a plain prompt, or choose a model that "
                "was trained to chat"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (TemplateError, TypeError) as error:  # the second of adding None to text, say
            raise InvalidRequestError(
                f"the model's chat template refuses the conversation: {error}"
            ) from error

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer of a Hugging Face directory; None if it has no file for one."""
        options = _read_json(directory / "special_tokens_map.json")
        options |= _read_json(directory / "tokenizer_config.json")
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (value := options.get(name)) is not None
        }
        backend = _find_backend(directory, options, special)
        if backend is None:
            return None
        return cls(backend, _find_chat_template(directory, options), special)


def _find_backend(
    directory: Path, options: dict[str, Any], special: dict[str, str]
) -> tokenizers.Tokenizer | None:
    whole = directory / "tokenizer.json"
    if whole.exists():
        try:
            backend = tokenizers.Tokenizer.from_file(str(whole))
        except Exception as error:  # the library raises bare Exceptions
            raise ModelLoadError(f"{whole} is no tokenizer that can be read: {error}") from error
        # Many files keep the lengths of a training; a prompt here is whole, and nothing but it.
        backend.no_truncation()
        backend.no_padding()
        return backend
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if vocab.exists() and merges.exists():
        family = _read_json(directory / "config.json").get("model_type")
        if family not in ("gpt2", "opt"):
            raise ModelLoadError(
                f"{directory} has its tokenizer as vocab.json and merges.txt only, which say all "
                "of GPT-2's and OPT's; convert it to tokenizer.json by saving it once with "
                "transformers"
            )
        added = _read_json(directory / "added_tokens.json")
        return _byte_level_bpe(vocab, merges, added, family == "opt", options, special)
    if (directory / "tokenizer.model").exists():
        raise ModelLoadError(
            f"{directory} has its tokenizer as tokenizer.model only; convert it to tokenizer.json "
            "by saving it once with transformers"
        )
    return None


def _byte_level_bpe(
    vocab: Path,
    merges: Path,
    added: dict[str, int],
    is_opt: bool,
    options: dict[str, Any],
    special: dict[str, str],
) -> tokenizers.Tokenizer:
    """The tokenizer of GPT-2 or OPT from its two files, and from what others add to them."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    prefix_space = options.get("add_prefix_space", False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    known = backend.get_vocab()
    names = dict.fromkeys(("<|endoftext|>", *special.values()))
    backend.add_special_tokens([token for token in names if token in known])
    backend.add_special_tokens(sorted(added, key=added.__getitem__))
    if options.get("add_bos_token", is_opt):
        bos = special.get("bos_token", "</s>" if is_opt else "<|endoftext|>")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, known[bos])]
        )
    return backend


def _find_chat_template(directory: Path, options: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = options.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
