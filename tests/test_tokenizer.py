"""Text to tokens and back, in pieces too; conversations to prompts."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from minipaged.errors import InvalidRequestError, ModelLoadError
from minipaged.models.detokenizer import REPLACEMENT, IncrementalDetokenizer
from minipaged.models.loader import resolve
from minipaged.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer.from_directory(resolve("tiny"))


@given(text=st.text(max_size=60))
def test_any_text_has_tokens_that_spell_it(tiny, text):
    assert tiny.decode(tiny.encode(text), skip_special_tokens=False) == text


@given(text=st.text(max_size=40), data=st.data())
def test_pieces_put_together_are_the_whole(tiny, text, data):
    """Also for tokens in any order, where characters are cut and bytes are no UTF-8."""
    token_ids = tiny.encode(text)
    token_ids += data.draw(st.lists(st.integers(0, tiny.vocab_size - 1), max_size=30))
    token_ids = data.draw(st.permutations(token_ids))
    skip = data.draw(st.booleans())
    detokenizer = IncrementalDetokenizer(tiny, skip)
    pieces = [detokenizer.append(token_id) for token_id in token_ids]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == tiny.decode(token_ids, skip)


@given(text=st.text(alphabet="aé日🙂👩 ", max_size=20))
def test_no_half_character_is_shown(tiny, text):
    detokenizer = IncrementalDetokenizer(tiny)
    shown = ""
    for token_id in tiny.encode(text):
        shown += detokenizer.append(token_id)
        assert REPLACEMENT not in shown
        assert text.startswith(shown)
    assert shown + detokenizer.finish() == text


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer as LLaMA 2 and Mistral have it: spaces are letters, rare characters bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    words += ["a", "b", "\u2581a", "\u2581b", "ab", "\u2581ab"]
    merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "b"), ("\u2581", "ab")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


legible = st.text(alphabet="ab aé日🙂👩 ", max_size=20)


@given(prompt=legible, text=legible, data=st.data())
def test_pieces_with_spaces_and_bytes_as_tokens(sentencepiece, prompt, text, data):
    """Neither half a character is shown nor a space lost, with special tokens in between."""
    prompt_ids = sentencepiece.encode(prompt + "a")
    token_ids = sentencepiece.encode(prompt + "a" + text)[len(prompt_ids) :]
    whole = sentencepiece.decode(prompt_ids + token_ids).removeprefix(
        sentencepiece.decode(prompt_ids)
    )
    specials = data.draw(st.lists(st.integers(0, len(token_ids)), max_size=3))
    for place in specials:  # where no character is cut in two
        if not sentencepiece.decode(token_ids[:place]).endswith(REPLACEMENT):
            token_ids.insert(place, 1)
    detokenizer = IncrementalDetokenizer(sentencepiece, True, prompt_ids)
    shown = ""
    for token_id in token_ids:
        shown += detokenizer.append(token_id)
        assert REPLACEMENT not in shown
        assert whole.startswith(shown)
    assert shown + detokenizer.finish() == whole


@given(prompt=legible, text=legible)
def test_a_prompt_may_end_in_any_character(sentencepiece, prompt, text):
    """Also in one whose bytes are more tokens than the context that the first piece is given."""
    prompt_ids, token_ids = sentencepiece.encode(prompt), sentencepiece.encode(text)
    detokenizer = IncrementalDetokenizer(sentencepiece, True, prompt_ids)
    shown = "".join(map(detokenizer.append, token_ids)) + detokenizer.finish()
    whole = sentencepiece.decode(prompt_ids + token_ids)
    assert shown == whole.removeprefix(sentencepiece.decode(prompt_ids))


def test_a_character_that_the_prompt_begins_and_the_output_ends(sentencepiece):
    first, *rest = (3 + byte for byte in "日".encode())
    detokenizer = IncrementalDetokenizer(sentencepiece, True, [*sentencepiece.encode("a"), first])
    assert "".join(map(detokenizer.append, [*rest, *sentencepiece.encode("ab")])) == "日 ab"


def test_a_piece_costs_the_same_however_long_the_text(tiny):
    lengths = []

    class Counting:
        def decode(self, token_ids, skip):
            lengths.append(len(token_ids))
            return tiny.decode(token_ids, skip)

    detokenizer = IncrementalDetokenizer(Counting())
    for token_id in tiny.encode("And so to bed. " * 200) + [0x80 % tiny.vocab_size] * 300:
        detokenizer.append(token_id)
    assert max(lengths) <= 130
    assert sum(lengths) / len(lengths) < 10


def test_lengths_of_a_training_are_forgotten(tmp_path, tiny):
    backend = tokenizers.Tokenizer.from_str(tiny.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "And so to bed. " * 5
    assert Tokenizer.from_directory(tmp_path).encode(text) == tiny.encode(text)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "é"),
        ("{% if tools is not none or documents is not none %}no{% endif %}x", "x"),
        ("{{ messages[0].content | tojson(ensure_ascii=False) }}", '"é"'),
    ],
)
def test_what_templates_use(tiny, template, text):
    tokenizer = Tokenizer(tiny.backend, template)
    assert tokenizer.render_chat([{"role": "user", "content": "é"}] * 2) == text


def test_a_template_that_adds_what_cannot_be_added(tiny):
    with pytest.raises(InvalidRequestError, match="refuses the conversation"):
        Tokenizer(tiny.backend, "{{ 'a' + 1 }}").render_chat([{"role": "user", "content": ""}])


def directory_with(tmp_path, **files):
    for name, content in files.items():
        path = tmp_path / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


VOCAB = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "Ġ": 5, "Ġab": 6}
MERGES = "#version: 0.2\na b\nĠ ab\n"


def test_the_two_files_do_not_make_qwens_tokenizer(tmp_path):
    files = {"vocab__json": VOCAB, "merges__txt": MERGES, "config__json": {"model_type": "qwen2"}}
    with pytest.raises(ModelLoadError, match=r"vocab.json and merges.txt only"):
        Tokenizer.from_directory(directory_with(tmp_path, **files))


def test_options_of_the_two_files(tmp_path):
    path = directory_with(
        tmp_path,
        vocab__json=VOCAB,
        merges__txt=MERGES,
        config__json={"model_type": "gpt2"},
        tokenizer_config__json={"add_bos_token": True, "add_prefix_space": True},
        special_tokens_map__json={"bos_token": "<s>"},
        added_tokens__json={"<pad>": 7},
    )
    assert Tokenizer.from_directory(path).encode("ab<pad>") == [0, 6, 7]


@pytest.mark.parametrize(("family", "expected"), [("gpt2", [4, 6]), ("opt", [1, 4, 6])])
def test_the_two_files_of_gpt2_and_opt(tmp_path, family, expected):
    path = directory_with(
        tmp_path,
        vocab__json=VOCAB,
        merges__txt=MERGES,
        config__json={"model_type": family},
        tokenizer_config__json={"bos_token": {"content": "</s>"}, "eos_token": "</s>"},
    )
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.encode("ab ab") == expected
    assert tokenizer.encode("ab ab", add_special_tokens=False) == [4, 6]
    assert tokenizer.decode(expected) == "ab ab"


TEMPLATE = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == "robot" %}{{ raise_exception("no robots") }}{% endif %}
[{{ m['role'] }}] {{ m['content'] | trim }}
{% endfor %}
{% if add_generation_prompt %}
[assistant]{% endif %}"""


@pytest.mark.parametrize("place", ["config", "named", "file"])
def test_chat_templates(tmp_path, place, tiny):
    options = {"bos_token": "<s>"}
    if place == "config":
        options["chat_template"] = TEMPLATE
    if place == "named":
        options["chat_template"] = [
            {"name": "tool_use", "template": "wrong"},
            {"name": "default", "template": TEMPLATE},
        ]
    if place == "file":
        directory_with(tmp_path, chat_template__jinja=TEMPLATE)
    path = directory_with(tmp_path, tokenizer_config__json=options)
    tiny.backend.save(str(path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(path)
    messages = [{"role": "user", "content": " hi "}]
    assert tokenizer.render_chat(messages) == "<s>[user] hi\n[assistant]"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "<s>[user] hi\n"
    assert tokenizer.decode(tokenizer.apply_chat_template(messages)) == (
        "<s>[user] hi\n[assistant]"
    )
    with pytest.raises(InvalidRequestError, match="refuses the conversation: no robots"):
        tokenizer.render_chat([{"role": "robot", "content": ""}])


def test_a_template_cannot_reach_out(tmp_path, tiny):
    tokenizer = Tokenizer(tiny.backend, "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequestError, match="refuses the conversation"):
        tokenizer.render_chat([])


def test_a_model_without_a_template(tiny):
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tiny.apply_chat_template([{"role": "user", "content": "hi"}])


def test_what_is_no_tokenizer(tmp_path):
    assert Tokenizer.from_directory(tmp_path) is None
    directory_with(tmp_path, tokenizer__model="binary")
    with pytest.raises(ModelLoadError, match=r"tokenizer.model only; convert it"):
        Tokenizer.from_directory(tmp_path)
    directory_with(tmp_path, tokenizer__json="{")
    with pytest.raises(ModelLoadError, match=r"tokenizer.json is no tokenizer"):
        Tokenizer.from_directory(tmp_path)
