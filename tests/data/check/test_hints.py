from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.data.check.hints import (
    encoding_spans,
    excerpt,
    mask_personal,
    personal_spans,
    printable,
    repaired_encoding,
    special_token_pattern,
    special_token_spans,
)


def found(text: str) -> list[tuple[str, str]]:
    return [(rule, text[start:end]) for start, end, rule in personal_spans(text)]


@pytest.mark.parametrize(
    ("text", "value", "rule"),
    [
        ("write to joe.doe+x@mail.example.co.uk now", "joe.doe+x@mail.example.co.uk", "e-mail"),
        ("写信给 李雷@例子.公司 吧", "李雷@例子.公司", "e-mail"),
        ("call +44 20 7946 0958.", "+44 20 7946 0958", "phone"),
        ("call (212) 555-0147 now", "(212) 555-0147", "phone"),
        ("call 212-555-0147", "212-555-0147", "phone"),
        ("打 13800138000 找我", "13800138000", "phone"),
        ("电话 010-62345678", "010-62345678", "phone"),
        ("card 4111 1111 1111 1111 ok", "4111 1111 1111 1111", "card"),
        ("card 5500-0000-0000-0004", "5500-0000-0000-0004", "card"),
        ("key AKIA" + "A1B2" * 4 + ".", "AKIA" + "A1B2" * 4, "key"),
        ("token ghp_" + "a1" * 18, "ghp_" + "a1" * 18, "key"),
        ("token sk-" + "a1B" * 12, "sk-" + "a1B" * 12, "key"),
        ("token hf_" + "aB" * 17, "hf_" + "aB" * 17, "key"),
        ("xoxb-" + "12345-abcde", "xoxb-" + "12345-abcde", "key"),
        (
            "-----BEGIN " + "RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN " + "RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
            "key",
        ),
    ],
)
def test_personal_data_are_found_and_masked(text, value, rule):
    assert found(text) == [(rule, value)]
    assert mask_personal(text) == text.replace(value, f"[{rule}]")


@pytest.mark.parametrize(
    "text",
    [
        "on 2024-01-02 10:20:30 there were 1,234,567,890 of 12345678",
        "pi is 3.14159265358979, e is 2.718281828459045",
        "4111 1111 1111 1112",  # a wrong check digit
        "0000 0000 0000 0000",
        "a total of 100 200 300 400 500",
        "http://site.example/?id=1234567890123",
        "@someone said so, and so did 5 @ 3 each",
        "a task-force of sk-ills, ghp_short, eyJust",
        "version 10.11.12.13",
    ],
)
def test_what_only_looks_a_little_like_personal_data_is_not_found(text):
    assert found(text) == []


def card_by_another_rule(rng: random.Random) -> str:
    """A number whose last digit makes the sum of the digits, every second one doubled and cast out, 0."""
    digits = [4, *(rng.randrange(10) for _ in range(14))]
    total = sum(sum(divmod(2 * d, 10)) if place % 2 == 0 else d for place, d in enumerate(digits))
    return "".join(map(str, [*digits, -total % 10]))


def test_every_valid_card_number_is_found_and_a_changed_digit_is_not():
    rng = random.Random(0)
    for _ in range(200):
        number = card_by_another_rule(rng)
        if len(set(number)) < 3:
            continue
        assert found(f"pay {number} now")[0] == ("card", number)
        place = rng.randrange(1, 16)
        other = number[:place] + str((int(number[place]) + 1) % 10) + number[place + 1 :]
        assert ("card", other) not in found(f"pay {other} now")


@given(st.text(max_size=200), st.text(max_size=200))
def test_masking_leaves_no_address_and_an_excerpt_none_either(before, after):
    address = "jane.roe@mail.example.org"
    text = f"{before} {address} {after}"
    assert "jane.roe@" not in mask_personal(text)
    for span in [*personal_spans(text), *encoding_spans(text), (0, 1, "special-token")]:
        assert "jane.roe@" not in excerpt(text, span)


@given(st.text(max_size=300))
def test_spans_are_in_order_and_do_not_overlap(text):
    spans = personal_spans(text)
    assert spans == sorted(spans)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a\x00b", "control-character"),
        ("a\x1bb", "control-character"),
        ("a\ufeffb", "control-character"),
        ("lost \ufffd here", "replacement-character"),
        ("锟斤拷", "replacement-character"),
        ("half \ud83d", "lone-surrogate"),
        ("x\u202ey", "bidi-control"),
        ("cafÃ©", "mojibake"),
        ("donâ€™t", "mojibake"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "mojibake"),
        ("ä½\xa0å¥½", "mojibake"),
    ],
)
def test_encoding_trouble_is_found(text, rule):
    assert {name for _, _, name in encoding_spans(text)} == {rule}


@pytest.mark.parametrize(
    "text", ["plain\ttext\r\n", "«CAFÉ»", "Größe, naïve, Ærø", "你好，世界", "مرحبا", "🙂 \u2028", "Ünïçödé"]
)
def test_text_in_any_script_is_no_encoding_trouble(text):
    assert encoding_spans(text) == []
    assert repaired_encoding(text) == (text, [])


@given(st.text(st.characters(min_codepoint=0xC0, max_codepoint=0xFF, exclude_characters="×÷"), min_size=1))
def test_western_letters_read_with_the_wrong_encoding_are_mended(text):
    wrong = "".join(
        bytes([byte]).decode("cp1252", errors="ignore") or chr(byte) for byte in text.encode("utf-8")
    )
    assert repaired_encoding(wrong)[0] == text


def test_mending_removes_control_characters_and_says_so():
    assert repaired_encoding("a\x00b\x07 cafÃ© cafÃ©") == (
        "ab café café",
        ["read as UTF-8 again: 2", "control characters removed: 2"],
    )


def test_the_longest_special_token_that_fits_is_found():
    pattern = special_token_pattern(["<s>", "</s>", "<|im_end|>", "<|im_end|>x", ""])
    text = "a <|im_end|>x b </s> [s] <s"
    assert [text[a:b] for a, b, _ in special_token_spans(text, pattern)] == ["<|im_end|>x", "</s>"]
    assert special_token_spans(text, special_token_pattern([])) == []


def test_an_excerpt_is_short_and_on_one_line():
    text = "x" * 1000 + "\n\x00" + "y" * 1000
    assert excerpt(text, (1001, 1002, "control-character")) == "..." + "x" * 29 + r"\n\x00" + "y" * 30 + "..."
    assert len(excerpt("<s>" * 10_000, (0, 30_000, "special-token"))) < 200
    assert printable("a\u202eb\ud800") == r"a\u202eb\ud800"


@pytest.mark.parametrize(
    "piece",
    [
        "me@mail.example 13800138000 4111111111111111 ",
        "a.",
        "1 ",
        "a@",
        "Ã©",
        "+1 ",
        "eyJ",
        "1-",
        "@",
        "-----BEGIN ",
        "0",
        "(0",
    ],
)
def test_time_grows_no_faster_than_the_text(piece):
    def seconds(count: int) -> float:
        text = piece * count
        started = time.process_time()
        personal_spans(text)
        encoding_spans(text)
        return time.process_time() - started

    seconds(1000)
    assert seconds(160_000) < 40 * max(seconds(16_000), 0.02)
