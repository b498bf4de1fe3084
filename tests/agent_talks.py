"""Tokenizers of three kinds for the chat templates, and agents' conversations that a scripted model and its tools make."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.chat_templates import FAMILIES, FOLDER, TOOL, template_tokenizer
from togi.data.chat import closing_token
from togi.data.messages import Message
from togi.env.render import Renderer
from togi.env.tool_calls import CallFormat, Parsed, ToolCall, reasoning_tags, written

# Added tokens of Qwen's tokenizers that are not special.
QWEN_WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}, "most": {"type": "integer"}}},
    },
}
TOOLS = (TOOL, SEARCH)
WORDS = (
    *(
        "the",
        "weather",
        "in",
        "Oslo",
        "is",
        "22",
        "degrees;",
        "søk,",
        "東京",
        "🙂",
        "naïve\n\n",
        "",
        "a=b",
        "{x}",
        "[y]",
    ),
    *('"q"', "'r'", "\t<b>", "e\u0301", "half_done", "3.14", "ok"),
)


@cache
def _trained(kind: str) -> str:
    """A small BPE vocabulary, as JSON: ``bpe`` of bytes, or ``spaces`` of characters with a mark for white space."""
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.jinja"))] + [" ".join(WORDS)] * 20
    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet, fallback = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, fallback = [], ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=fallback, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    # The tokens of bytes are words of the vocabulary, and none that are added.
    return json.dumps({**json.loads(backend.to_str()), "added_tokens": []})


def agent_tokenizer(name: str, kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, of ``bytes``, ``bpe`` or ``spaces``; the special tokens of the last take white space away."""
    known = template_tokenizer(name)
    if kind == "bytes":
        tokenizer = known
    else:
        bos, eos, others = FAMILIES[name]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_trained(kind)), clean_up_tokenization_spaces=False
        )
        special = [
            # As Phi's tokens do, and those of Mistral do not.
            AddedToken(text, special=True, normalized=False, rstrip=kind == "spaces" and text != eos and text[0] == "<")
            for text in (eos, *others)
        ]
        if bos is not None:
            tokenizer.add_special_tokens({"bos_token": AddedToken(bos, special=True, normalized=False)})
        if bos is None:
            special.append(AddedToken("<|im_start|>", special=True, normalized=False))
        tokenizer.add_special_tokens({"eos_token": special[0], "additional_special_tokens": special[1:]})
        tokenizer.chat_template = known.chat_template
    if name.startswith("qwen3"):
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in QWEN_WORDS])
    return tokenizer


@dataclass(frozen=True)
class Request:
    """What a request was asked with. ``follows``: what came after the last answer; ``ids``: that answer."""

    context: tuple[int, ...]
    before: tuple[int, ...]
    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    parsed: Parsed
    follows: str
    notes: frozenset[str]


@dataclass
class Talk:
    """A conversation that is made by chance from a seed."""

    renderer: Renderer
    seed: int
    thinks: bool = True
    calls: bool = True
    clean: bool = False
    """Whether answers are as a template would write them, with no white space around them."""
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def requests(self, turns: int = 5) -> Iterator[Request]:
        """Each request after the first."""
        renderer, chance = self.renderer, self.chance
        messages: list[Message] = [{"role": "system", "content": "be brief"}] if chance.random() < 0.5 else []
        messages.append({"role": "user", "content": self.words()})
        tools = TOOLS if self.calls else ()
        context = renderer.first(messages, tools)
        for _ in range(turns):
            ids, notes = self.answer()
            parsed = renderer.parsed(ids)
            messages.append(renderer.said(ids))
            follows = self.follow(messages, parsed)
            before = (*context, *ids)
            context = renderer.after(before, messages, tools)
            yield Request(context, before, tuple(messages), ids, parsed, follows, frozenset(notes))

    def follow(self, messages: list[Message], parsed: Parsed) -> str:
        if not (parsed.calls or parsed.problems):
            messages.append({"role": "user", "content": self.words()})
            return "question"
        for call in parsed.calls:
            messages.append(self.renderer.observation(self.words(trap=True), call))
        for problem in parsed.problems:
            messages.append(self.renderer.observation(problem))
        return "results" if parsed.calls else "problem"

    def words(self, *, trap: bool = False) -> str:
        some = self.chance.choices(WORDS, k=self.chance.randint(1, 6))
        if trap and self.chance.random() < 0.4:
            some.append(self.chance.choice([*self.renderer.template.controls.values()]))
        return " ".join(some).strip() or "ok"

    def answer(self) -> tuple[tuple[int, ...], set[str]]:
        """Token ids, and what is special about them."""
        chance, form, notes = self.chance, self.renderer.form, set[str]()
        opening, closing = reasoning_tags(form)[0]
        parts = []
        if self.thinks and chance.random() < 0.7:
            start = "" if self.renderer.template.opens else f"{opening}\n"
            gap = "\n\n" if form is not CallFormat.GEMMA4 else ""
            parts.append(f"{start}{self.words()}\n{closing}{gap}")
            notes.add("thought")
        elif self.renderer.template.opens:
            parts.append(f"\n{closing}\n\n")
        kind = chance.choice(["text", "call", "call", "calls", "spoken call", "broken"]) if self.calls else "text"
        notes.add(kind)
        if kind in ("text", "spoken call"):
            parts.append(self.words())
            if not self.clean and chance.random() < 0.3:
                parts.append("  \n")
                notes.add("spaces")
        if kind != "text":
            parts += [self.call() for _ in range(2 if kind == "calls" else 1)]
        if kind == "broken":
            parts[-1] = parts[-1][: len(parts[-1]) * 2 // 3]
        ids = self.tokens("".join(parts))
        if chance.random() < 0.2 and len(ids) > 3:
            notes.add("cut")
            return ids[: chance.randint(1, len(ids))], notes
        return (*ids, self.end(kind)), notes

    def call(self) -> str:
        arguments: dict[str, Any] = {"query": self.words()} if self.chance.random() < 0.7 else {"most": 3}
        call = ToolCall("search", arguments, f"{self.chance.getrandbits(30):09d}"[:9])
        text = written(call, self.renderer.form)
        return (
            text
            if self.renderer.form is not CallFormat.LLAMA
            else text + ";" * (not self.clean and self.chance.random() < 0.2)
        )

    def tokens(self, text: str) -> tuple[int, ...]:
        """Not as the tokenizer would do it: the model may part words where it likes."""
        tokenizer, ids = self.renderer.tokenizer, list[int]()
        # After a special token, as white space before the first word is otherwise lost.
        lead = str(tokenizer.eos_token)
        while text:
            length = self.chance.randint(1, 30)
            # A control token is one token.
            for control in self.renderer.template.controls.values():
                start = text.rfind(control, 0, length + len(control) - 1)
                if 0 <= start < length < start + len(control):
                    length = start + len(control)
            piece = tokenizer(lead + text[:length], add_special_tokens=False)["input_ids"]
            ids += piece[1:]
            text = text[length:]
        return tuple(ids)

    def end(self, kind: str) -> int:
        tokenizer = self.renderer.tokenizer
        opener = {CallFormat.FUNCTION_GEMMA: "<start_function_response>", CallFormat.GEMMA4: "<|tool_response>"}
        if kind not in ("text", "broken") and self.renderer.form in opener:
            return int(tokenizer.convert_tokens_to_ids(opener[self.renderer.form]))
        closing = closing_token(tokenizer)
        return int(tokenizer.eos_token_id if closing is None else closing)
