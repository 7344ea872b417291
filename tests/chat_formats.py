"""Chat formats written down by hand, character by character, from their published descriptions.

``FORMATS`` says for each how a conversation is spelt.  Control tokens stand between NULs, so that they can be
told from the same letters in somebody's words.  Nothing here looks at a template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trl

OWN = Path(__file__).parent / "data" / "tokens" / "templates"
TRL = Path(trl.__file__).parent / "chat_templates"
Words = Callable[[str], str]


def same(text: str) -> str:
    return text


def c(*tokens: str) -> str:
    return "".join(f"\0{token}\0" for token in tokens)


@dataclass(frozen=True)
class Format:
    """``begin`` opens the text; ``default`` stands where no system turn is given, ``system`` around one given
    (None: the format has none).  ``user`` is how a user's turn is written, ``ask`` what opens a reply.
    A reply is ``before`` + words + ``stop``, all of it trained, and ``between`` follows if more is said.
    ``said`` is what the template does to anybody's words.  ``heard`` is how a reply is written that is no
    longer the last one, if it differs."""

    path: Path
    user: Words
    ask: str
    stop: str
    begin: str = ""
    default: str = ""
    system: Words | None = None
    before: str = ""
    between: str = ""
    said: Words = same
    answered: Words | None = None
    heard: Words | None = None
    bos: str = "<s>"
    eos: str = "</s>"
    merge: Callable[[str, str], str] | None = None  # of the system's words and a user's, in one turn
    merge_last: bool = False  # it is the last user's turn, not the first one's

    def rows(self, system: str | None, turns: list[tuple[str, str]]) -> list[list[tuple[str, bool]]]:
        """The training rows as (text, trained) pieces."""
        rows: list[list[tuple[str, bool]]] = []
        for place in range(len(turns)):
            prompt = self.prompt(system, turns, place)
            answer = self.before + (self.answered or self.said)(turns[place][1]) + self.stop
            if rows and prompt.startswith("".join(text for text, _ in rows[-1])):
                done = "".join(text for text, _ in rows[-1])
                rows[-1] += [(prompt[len(done) :], False), (answer, True)]
            else:
                rows.append([(prompt, False), (answer, True)])
        return rows

    def prompt(self, system: str | None, turns: list[tuple[str, str]], place: int) -> str:
        text = self.begin
        if self.merge is None:
            text += self.default if system is None else self.system(system)
        for number, (question, reply) in enumerate(turns[: place + 1]):
            carries = system is not None and number == (place if self.merge_last else 0)
            text += self.user(self.merge(system, question) if self.merge and carries else self.said(question))
            text += self.ask
            if number < place:
                heard = self.heard or (
                    lambda words: self.before + (self.answered or self.said)(words) + self.stop
                )
                text += heard(reply) + self.between
        return text


def chatml(name: str, **other) -> Format:
    return Format(
        **{
            "path": OWN / f"{name}.jinja",
            "system": lambda text: f"{c('<|im_start|>')}system\n{text}{c('<|im_end|>')}\n",
            "user": lambda text: f"{c('<|im_start|>')}user\n{text}{c('<|im_end|>')}\n",
            "ask": f"{c('<|im_start|>')}assistant\n",
            "stop": c("<|im_end|>"),
            "between": "\n",
            "eos": "<|im_end|>",
        }
        | other
    )


def headed(role: str, text: str) -> str:
    """A turn in Llama 3's way."""
    return f"{c('<|start_header_id|>')}{role}{c('<|end_header_id|>')}\n\n{text}{c('<|eot_id|>')}"


def llama3(name: str, **other) -> Format:
    return Format(
        **{
            "path": TRL / f"{name}.jinja",
            "begin": c("<s>"),
            "system": lambda text: headed("system", text.strip()),
            "user": lambda text: headed("user", text),
            "ask": f"{c('<|start_header_id|>')}assistant{c('<|end_header_id|>')}\n\n",
            "stop": c("<|eot_id|>"),
            "said": str.strip,
            "eos": "<|eot_id|>",
        }
        | other
    )


def gemma(name: str, **other) -> Format:
    return Format(
        **{
            "path": TRL / f"{name}.jinja",
            "begin": c("<s>"),
            "user": lambda text: f"{c('<start_of_turn>')}user\n{text}{c('<end_of_turn>')}\n",
            "ask": f"{c('<start_of_turn>')}model\n",
            "stop": c("<end_of_turn>"),
            "between": "\n",
            "said": str.strip,
        }
        | other
    )


def phi3(name: str, **other) -> Format:
    return Format(
        **{
            "path": TRL / f"{name}.jinja",
            "system": lambda text: f"{c('<|system|>')}\n{text}{c('<|end|>')}\n",
            "user": lambda text: f"{c('<|user|>')}\n{text}{c('<|end|>')}\n",
            "ask": f"{c('<|assistant|>')}\n",
            "stop": c("<|end|>"),
            "between": "\n",
        }
        | other
    )


def worded(name: str, user: Words, ask: str, **other) -> Format:
    """A format that ends a reply with the tokenizer's end of text."""
    return Format(path=OWN / f"{name}.jinja", user=user, ask=ask, stop=c("</s>"), **other)


QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def smollm3_system(text: str) -> str:
    head = (
        "## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 26 July 2024\nReasoning Mode: /no_think"
    )
    written = f"{head}\n\n## Custom Instructions\n\n{text}\n\n"
    return f"{c('<|im_start|>')}system\n{written}{c('<|im_end|>')}\n"


def cohere_turn(role: str, text: str) -> str:
    return f"{c('<|START_OF_TURN_TOKEN|>', role)}{text}{c('<|END_OF_TURN_TOKEN|>')}"


def granite_turn(role: str, text: str) -> str:
    return f"{c('<|start_of_role|>')}{role}{c('<|end_of_role|>')}{text}{c('<|end_of_text|>')}\n"


THINK = "<think>\n\n</think>\n\n"

FORMATS: dict[str, Format] = {
    "chatml": chatml("chatml"),
    "internlm2": chatml("internlm2", begin=c("<s>"), eos="</s>"),
    "qwen2.5": chatml(
        "",
        path=TRL / "qwen2_5.jinja",
        default=f"{c('<|im_start|>')}system\n{QWEN_SYSTEM}{c('<|im_end|>')}\n",
    ),
    "qwen3": chatml(
        "",
        path=TRL / "qwen3.jinja",
        before=THINK,
        answered=lambda text: text.lstrip("\n"),
        heard=lambda text: f"{text}{c('<|im_end|>')}",
    ),
    "qwen3 marked": chatml(
        "", path=TRL / "qwen3_training.jinja", before=THINK, answered=lambda text: text.lstrip("\n")
    ),
    "lfm2": chatml("", path=TRL / "lfm2.jinja", begin=c("<s>")),
    "smollm2": chatml("smollm2", default=f"{c('<|im_start|>')}system\n{SMOL_SYSTEM}{c('<|im_end|>')}\n"),
    "smollm3": chatml(
        "smollm3",
        ask=f"{c('<|im_start|>')}assistant\n<think>\n\n</think>\n",
        answered=lambda text: text.lstrip("\n"),
        system=smollm3_system,
        default=smollm3_system(f"{SMOL_SYSTEM}."),
    ),
    "llama2": worded(
        "llama2",
        lambda text: f"{c('<s>')}[INST] {text} [/INST]",
        "",
        merge=lambda system, text: f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}".strip(),
        said=str.strip,
        answered=lambda text: f" {text.strip()} ",
    ),
    "llama3": llama3("llama3"),
    "llama3 marked": llama3("llama3_training"),
    "llama3.2": llama3(
        "llama3_2",
        default=headed("system", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
        system=lambda text: headed(
            "system", f"Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{text.strip()}"
        ),
    ),
    "mistral": worded(
        "mistral",
        lambda text: f"[INST] {text}[/INST]",
        "",
        begin=c("<s>"),
        merge=lambda system, text: f"{system}\n\n{text}",
        merge_last=True,
        before=" ",
    ),
    "mistral tekken": worded(
        "mistral_tekken",
        lambda text: f"{c('[INST]')}{text}{c('[/INST]')}",
        "",
        begin=c("<s>"),
        system=lambda text: f"{c('[SYSTEM_PROMPT]')}{text}{c('[/SYSTEM_PROMPT]')}",
    ),
    "gemma and gemma2": gemma("gemma"),
    "gemma3": gemma("gemma3", merge=lambda system, text: f"{system}\n\n{text.strip()}"),
    "phi3": phi3("phi3", eos="<|endoftext|>"),
    "phi3.5": phi3("phi3_5", eos="<|endoftext|>"),
    "phi4": Format(
        OWN / "phi4.jinja",
        system=lambda text: f"{c('<|im_start|>')}system{c('<|im_sep|>')}{text}{c('<|im_end|>')}",
        user=lambda text: f"{c('<|im_start|>')}user{c('<|im_sep|>')}{text}{c('<|im_end|>')}",
        ask=f"{c('<|im_start|>')}assistant{c('<|im_sep|>')}",
        stop=c("<|im_end|>"),
        eos="<|im_end|>",
    ),
    "command-r": Format(
        TRL / "cohere.jinja",
        begin=c("<s>"),
        system=lambda text: cohere_turn("<|SYSTEM_TOKEN|>", text),
        user=lambda text: cohere_turn("<|USER_TOKEN|>", text),
        ask=c("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        stop=c("<|END_OF_TURN_TOKEN|>"),
        said=str.strip,
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek r1 marked": Format(
        TRL / "deepseek_r1_distill_training.jinja",
        begin=c("<s>"),
        system=lambda text: text,
        user=lambda text: f"{c('<｜User｜>')}{text}",
        ask=c("<｜Assistant｜>"),
        stop=c("<｜end▁of▁sentence｜>"),
        eos="<｜end▁of▁sentence｜>",
    ),
    "gpt-oss": Format(
        TRL / "gptoss.jinja",
        begin=(
            f"{c('<|start|>')}system{c('<|message|>')}You are ChatGPT, a large language model trained by "
            "OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: 2024-07-26\n\nReasoning: medium\n\n"
            "# Valid channels: analysis, "
            f"commentary, final. Channel must be included for every message.{c('<|end|>')}"
        ),
        system=lambda text: (
            f"{c('<|start|>')}developer{c('<|message|>')}# Instructions\n\n{text}\n\n{c('<|end|>')}"
        ),
        user=lambda text: f"{c('<|start|>')}user{c('<|message|>')}{text}{c('<|end|>')}",
        ask=f"{c('<|start|>')}assistant",
        before=f"{c('<|channel|>')}final{c('<|message|>')}",
        stop=c("<|return|>"),
        heard=lambda text: f"{c('<|channel|>')}final{c('<|message|>')}{text}{c('<|end|>')}",
        eos="<|return|>",
    ),
    "zephyr": worded(
        "zephyr",
        lambda text: f"{c('<|user|>')}\n{text}{c('</s>')}\n",
        f"{c('<|assistant|>')}\n",
        system=lambda text: f"{c('<|system|>')}\n{text}{c('</s>')}\n",
        between="\n",
    ),
    "granite": Format(
        OWN / "granite.jinja",
        default=granite_turn(
            "system", "Knowledge Cutoff Date: April 2024.\nYou are Granite, developed by IBM."
        ),
        system=lambda text: granite_turn("system", text),
        user=lambda text: granite_turn("user", text),
        ask=f"{c('<|start_of_role|>')}assistant{c('<|end_of_role|>')}",
        stop=c("<|end_of_text|>"),
        between="\n",
        eos="<|end_of_text|>",
    ),
    "olmo2": worded(
        "olmo2",
        lambda text: f"{c('<|user|>')}\n{text}\n",
        f"{c('<|assistant|>')}\n",
        begin=c("<s>"),
        system=lambda text: f"{c('<|system|>')}\n{text}\n",
        between="\n",
    ),
    "falcon3": worded(
        "falcon3",
        lambda text: f"{c('<|user|>')}\n{text}\n",
        f"{c('<|assistant|>')}\n",
        system=lambda text: f"{c('<|system|>')}\n{text}\n",
        between="\n",
    ),
    "deepseek llm": worded(
        "deepseek_chat",
        lambda text: f"User: {text}\n\n",
        "Assistant:",
        begin=c("<s>"),
        system=lambda text: f"{text}\n\n",
        before=" ",
    ),
    "vicuna": worded(
        "vicuna", lambda text: f"USER: {text} ", "ASSISTANT:", system=lambda text: f"{text} ", before=" "
    ),
    "openchat": Format(
        OWN / "openchat.jinja",
        begin=c("<s>"),
        user=lambda text: f"GPT4 Correct User: {text}{c('<|end_of_turn|>')}",
        ask="GPT4 Correct Assistant:",
        before=" ",
        stop=c("<|end_of_turn|>"),
        eos="<|end_of_turn|>",
    ),
    "exaone3": Format(
        OWN / "exaone3.jinja",
        default=f"{c('[|system|]', '[|endofturn|]')}\n",
        system=lambda text: f"{c('[|system|]')}{text}{c('[|endofturn|]')}\n",
        user=lambda text: f"{c('[|user|]')}{text}\n",
        ask=c("[|assistant|]"),
        stop=c("[|endofturn|]"),
        between="\n",
        eos="[|endofturn|]",
    ),
    "minicpm": worded("minicpm", lambda text: f"<用户>{text}<AI>", "", said=str.strip),
}
