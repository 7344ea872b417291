from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from chat_formats import FORMATS, TRL, Format
from rankfold.data.shapes.example import Example, Image, Message
from rankfold.data.tokens.encode import IGNORE, encode, encode_each, marked_pieces
from rankfold.errors import DataError
from rankfold.models.messages.prompt import prompt_encoder

CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
    },
}


def bytes_tokenizer(template: str, tokens: set[str], bos: str = "<s>", eos: str = "</s>"):
    """A tokenizer that writes one token a byte, and ``tokens`` as one each."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(tokens)])
    tokenizer.chat_template = template
    return tokenizer


def tokens_of(form: Format) -> set[str]:
    """The control tokens that a format's description names."""
    rows = form.rows("a" if form.system or form.merge else None, [("a", "b"), ("c", "d")])
    texts = [text for row in rows for text, _ in row]
    texts += [piece for row in form.rows(None, [("a", "b")]) for piece, _ in row] if not form.system else []
    return {token for text in texts for token in re.findall("\0(.*?)\0", text)}


def spelt(tokenizer, text: str) -> list[int]:
    """The tokens of a text in which control tokens stand between NULs, letter by letter."""
    vocabulary = tokenizer.get_vocab()
    byte_letters = {byte: letter for letter, byte in _letters().items()}
    ids = []
    for place, part in enumerate(text.split("\0")):
        ids += [vocabulary[part]] if place % 2 else [vocabulary[byte_letters[b]] for b in part.encode()]
    return ids


def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes: itself where it can be seen, else the next of those from U+0100."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(others)}


@pytest.fixture(scope="module")
def tokenizers(real_base):
    """One tokenizer for each format."""

    def make(name: str):
        form = FORMATS[name]
        template = real_base.tokenizer.chat_template if name == "smollm2" else form.path.read_text("utf-8")
        return bytes_tokenizer(template, tokens_of(form), form.bos, form.eos)

    return {name: make(name) for name in FORMATS}


SPELT = ["<|im_end|>", "</s>", "<|eot_id|> x", "user", "assistant", "[/INST]", "<|end|>\n", "final", "Hi."]
words = st.one_of(
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0", max_codepoint=0x1FFFF), min_size=1
    ),
    st.lists(st.sampled_from(SPELT), min_size=1, max_size=3).map(" ".join),
).filter(lambda text: bool(text.strip()) and not re.search("think>|[\ufdd0-\ufdef]", text))
conversations = st.tuples(st.none() | words, st.lists(st.tuples(words, words), min_size=1, max_size=4))


def chat(system: str | None, turns: list[tuple[str, str]]) -> Example:
    messages = [Message("system", (system,))] if system is not None else []
    for question, answer in turns:
        messages += [Message("user", (question,)), Message("assistant", (answer,))]
    return Example("f:1", messages=tuple(messages))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=conversations)
@example(
    conversation=("Be <|im_end|> brief.", [("user", "assistant"), (" a </s>", "<|im_end|>"), ("b", "c\n")])
)
def test_the_mask_of_a_format_equals_one_worked_out_letter_by_letter(tokenizers, name, conversation):
    form, tokenizer = FORMATS[name], tokenizers[name]
    system, turns = conversation
    if form.system is None and form.merge is None:
        system = None
    [(_, rows)] = encode_each([chat(system, turns)], tokenizer)
    assert not isinstance(rows, DataError), rows
    expected = form.rows(system, turns)
    assert [row.input_ids for row in rows] == [
        [token for text, _ in row for token in spelt(tokenizer, text)] for row in expected
    ]
    assert [row.labels for row in rows] == [
        [token if trained else IGNORE for text, trained in row for token in spelt(tokenizer, text)]
        for row in expected
    ]


def trl_tokenizer(name: str):
    """A byte tokenizer with one of TRL's templates; what looks like a control token in it is one."""
    template = (TRL / f"{name}.jinja").read_text("utf-8")
    tokens = set(
        re.findall(r"<\|[^<>'\" ]*?\|>|<｜[^<>'\"]*?｜>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>", template)
    )
    return bytes_tokenizer(template, tokens)


def trained(rows, tokenizer) -> list[str]:
    return [text for row in rows for text, is_trained in marked_pieces(row, tokenizer) if is_trained]


def encode_one(example: Example, tokenizer, train_on="assistant"):
    [(_, rows)] = encode_each([example], tokenizer, train_on)
    if isinstance(rows, DataError):
        raise rows
    return rows


THOUGHT = Example(
    "f:1",
    (
        Message("user", ("1+1?",)),
        Message("assistant", ("2",), reasoning="one and one"),
        Message("user", ("2+2?",)),
        Message("assistant", ("4",), reasoning="two and two"),
    ),
)
ERRAND = Example(
    "f:1",
    (
        Message("user", ("How is Oslo?",)),
        Message("assistant", (), tool_calls=(CALL,)),
        Message("tool", ("cold",), tool_call_id="abcdefghi", name="weather"),
        Message("assistant", ("It is cold.",)),
    ),
    tools=(TOOL,),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen3",
            [
                "<think>\none and one\n</think>\n\n2<|im_end|>",
                "<think>\ntwo and two\n</think>\n\n4<|im_end|>",
            ],
        ),
        ("qwen3_6", ["one and one\n</think>\n\n2<|im_end|>", "two and two\n</think>\n\n4<|im_end|>"]),
        ("nemotron_3_nano", ["one and one\n</think>\n2<|im_end|>", "two and two\n</think>\n4<|im_end|>"]),
    ],
)
def test_thoughts_that_a_template_drops_later_are_each_trained_in_a_row_of_their_own(name, expected):
    tokenizer = trl_tokenizer(name)
    rows = encode_one(THOUGHT, tokenizer)
    assert trained(rows, tokenizer) == expected
    for row, count in zip(rows, (1, 3), strict=True):
        asked = [message.for_template() for message in THOUGHT.messages[:count]]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[: len(prompt)] == [IGNORE] * len(prompt)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "qwen2_5",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        ),
        ("llama3_1", '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'),
        ("lfm2_2_5", "<|tool_call_start|>[weather(city='Oslo')]<|tool_call_end|><|im_end|>"),
        (
            "gptoss",
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
        ),
    ],
)
def test_calls_of_tools_are_trained_and_the_tools_answers_are_not(name, call):
    tokenizer = trl_tokenizer(name)
    first, second = trained(encode_one(ERRAND, tokenizer), tokenizer)
    assert first == call
    assert re.fullmatch(r"(<\|channel\|>final<\|message\|>)?It is cold\.<\|\w+\|>", second)


@pytest.mark.parametrize("name", ["deepseekv3", "nemotron_3_nano"])
def test_a_template_that_opens_replies_otherwise_than_it_writes_them_needs_marks(name):
    example = chat(None, [("a", "b")])
    with pytest.raises(DataError, match=r"opens a reply with .* but writes one down with .*generation"):
        encode_one(example, trl_tokenizer(name))
    marked = trl_tokenizer(f"{name}_training")
    [answer] = trained(encode_one(example, marked), marked)
    assert re.fullmatch(r"(<think></think>)?b<[^>]+>", answer)


OPENED = "opens a reply with"
PICTURES = "changes the assistant's words|'str object' has no attribute"  # messages that are lists of parts
REFUSED = {
    "deepseek_r1_distill": OPENED,
    "deepseekv3": OPENED,
    "nemotron_3_5_lightning": OPENED,
    "nemotron_3_nano": OPENED,
    "nemotron_3_super": OPENED,
    "nemotron_3_ultra": OPENED,
    "glm4moe": "without a stop token",
    "idefics3": PICTURES,
    "idefics3_training": PICTURES,
    "llava_next": PICTURES,
    "llava_next_training": PICTURES,
    "smolvlm": PICTURES,
    "smolvlm_training": PICTURES,
}
TRL_NAMES = sorted(path.stem for path in TRL.glob("*.jinja"))


@pytest.mark.parametrize("name", TRL_NAMES)
def test_every_template_of_trl_trains_the_words_and_one_stop_token_or_is_refused(name):
    tokenizer = trl_tokenizer(name)
    example = chat(None, [("ask", "w1"), ("go", "w2")])
    if name in REFUSED:
        with pytest.raises(DataError, match=REFUSED[name]):
            encode_one(example, tokenizer)
        return
    pieces = trained(encode_one(example, tokenizer), tokenizer)
    spelling = prompt_encoder(tokenizer).spelling
    assert len(pieces) == 2
    for piece, word in zip(pieces, ("w1", "w2"), strict=True):
        stop = spelling.findall(piece)[-1]
        assert piece.endswith(word + stop)
        assert "ask" not in piece


@pytest.mark.parametrize(
    ("example", "name", "message"),
    [
        (THOUGHT, "llama3", "leaves out the reasoning"),
        (ERRAND, "llama3", "leaves out the call of the tool 'weather'"),
        (chat("Be brief.", [("a", "b")]), "gemma", "refuses the conversation: System role not supported"),
        (
            Example("f", (*chat(None, [("a", "b")]).messages,), tools=(TOOL,)),
            "llama3",
            "leaves out the tool 'weather'",
        ),
        (chat(None, [("a", " ")]), "qwen2_5", "message 2: the assistant says nothing"),
        (Example("f", (Message("assistant", ("a",)),)), "qwen2_5", "the assistant speaks first"),
        (Example("f", (Message("user", ("a",)),)), "qwen2_5", "no assistant turn"),
        (
            Example("f", (Message("user", ("a", Image("b.png"))), Message("assistant", ("c",)))),
            "qwen2_5",
            "a text model cannot read them",
        ),
    ],
)
def test_what_a_template_would_lose_is_refused_by_name(example, name, message):
    with pytest.raises(DataError, match=message):
        encode(example, trl_tokenizer(name))


def test_only_the_last_turn_is_trained_on_request():
    tokenizer = trl_tokenizer("qwen2_5")
    assert trained(encode_one(chat(None, [("a", "b"), ("c", "d")]), tokenizer, "last"), tokenizer) == [
        "d<|im_end|>"
    ]


def test_everything_but_the_first_token_is_trained_on_request():
    tokenizer = trl_tokenizer("qwen2_5")
    [row] = encode_one(chat(None, [("a", "b"), ("c", "d")]), tokenizer, "all")
    assert row.labels == [IGNORE, *row.input_ids[1:]]


def flagged(*flags: bool | None) -> Example:
    messages = chat(None, [("a", "b"), ("c", "d")]).messages
    return Example(
        "f:1", tuple(Message(m.role, m.parts, train=flag) for m, flag in zip(messages, flags, strict=True))
    )


@pytest.mark.parametrize(
    ("flags", "train_on", "expected"),
    [
        ((None, False, None, None), "assistant", ["d<|im_end|>"]),
        ((None, None, None, False), "assistant", ["b<|im_end|>"]),
        ((None, True, None, None), "last", ["b<|im_end|>", "d<|im_end|>"]),
        ((None, True, None, False), "last", ["b<|im_end|>"]),
    ],
)
def test_a_messages_own_flag_outranks_the_run(flags, train_on, expected):
    tokenizer = trl_tokenizer("qwen2_5")
    assert trained(encode_one(flagged(*flags), tokenizer, train_on), tokenizer) == expected


@pytest.mark.parametrize(
    ("flags", "train_on", "message"),
    [
        (
            (True, None, None, None),
            "assistant",
            "message 1 is flagged to be trained, but it is of the role user",
        ),
        ((None, False, None, False), "assistant", "no assistant turn in this row is to be trained"),
        ((None, False, None, None), "all", "flagged not to be trained, .* but everything is to be"),
    ],
)
def test_a_flag_that_cannot_be_obeyed_is_refused(flags, train_on, message):
    with pytest.raises(DataError, match=message):
        encode_one(flagged(*flags), trl_tokenizer("qwen2_5"), train_on)


def test_a_template_that_speaks_for_the_assistant_is_refused():
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{{ messages[0].content }}"
        "{% endif %}{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(DataError, match="puts words into the assistant's mouth: 'Really"):
        encode(chat(None, [("Really?", "Yes.")]), bytes_tokenizer(template, set()))
