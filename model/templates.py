"""Prompt templates: how a record becomes the ids of a prompt and the ids of its answer.

    bioinstruct   Alpaca's preamble, then blocks     BioInstruct, arXiv 2310.19975, Table 7
    medtuned      `### Instruction: ... ### Output:` Llama2-MedTuned, arXiv 2401.00579
    alpaca        Alpaca's preamble, blank lines     Stanford Alpaca's training text
    chatml        turns                              the <|im_start|> ... <|im_end|> convention
    llama-2-chat  turns                              `[INST] <<SYS>> ... [/INST]`, all of it text
    llama-3       turns                              <|start_header_id|> ... <|eot_id|>
    mistral       turns                              [INST] and [/INST] are control tokens (v3)
    mistral-v1    turns                              `[INST] ... [/INST]` as text (v0.1 and v0.2)

or a text file of the user's own. A conversation's earlier turns and its system text are its
history, which only templates with turns can write.

Training and inference build their prompts by the same function, `encode_prompt`. The answer is
encoded apart from the prompt, so that no token reaches over the boundary between what is and what
is not learned, and it ends in the template's stop token, which is learned too. Control tokens come
from the template alone: what a record's text spells is text.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bioinstruct.model.tokenizers.tokenizer import Tokenizer
from bioinstruct.synth.records import Turn

END_OF_SEQUENCE = "end-of-sequence token"


class Control(str):
    """The name of a control token inside of a template."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Template:
    """One way to write records; texts hold the fields {instruction}, {input}, {output}."""

    name: str
    prompt: tuple[str, ...]
    """Texts and Controls in front of the answer, for a record with an input."""
    prompt_without_input: tuple[str, ...]
    """The same for a record whose input is empty."""
    answer: str
    """What is learned, before the stop token."""
    stop: str
    """Name of the control token that ends an answer; END_OF_SEQUENCE: the tokenizer's own."""
    opens_sequence: bool
    """Whether the tokenizer's beginning-of-sequence token stands in front, where it adds one."""
    has_turns: bool = False
    """Whether a record may have a history."""
    system: tuple[str, ...] = ()
    """What the system's {system} text becomes in front of all turns; empty: system_in_user."""
    system_in_user: str = "{system}\n\n{user}"
    """How the system's text is put into the first user's turn instead."""
    between: tuple[str, ...] = ()
    """Texts and Controls between a stop token and the next turn."""
    reopens: bool = False
    """Whether every turn begins with the beginning-of-sequence token again."""

    @property
    def controls(self) -> list[str]:
        """The control tokens that the vocabulary must have, each once."""
        named = [part for part in self.prompt if isinstance(part, Control)]
        return list(dict.fromkeys([*named, self.stop]))

    def stop_id(self, tokenizer: Tokenizer) -> int:
        """Return the id of the token that ends an answer.

        Raises:
            ValueError: the vocabulary lacks it; get_template refuses such a template beforehand.
        """
        return _control_id(self, self.stop, tokenizer)


class Sample(NamedTuple):
    """A training sample; the loss is taken on answer_ids, whose last one is the stop token."""

    prompt_ids: list[int]
    answer_ids: list[int]


# the line break in the preamble and the missing blank lines are the paper's
_RESPOND = "Write a response that appropriately completes the request.\n"
_START, _END = Control("<|im_start|>"), Control("<|im_end|>")
_ASK, _ANSWER = (_START, "user\n"), (_END, "\n", _START, "assistant\n")
_HEAD, _HEAD_END = Control("<|start_header_id|>"), Control("<|end_header_id|>")
_EOT = Control("<|eot_id|>")
_ALPACA = "Below is an instruction that describes a task"
_ALPACA_END = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
_INST, _INST_END = Control("[INST]"), Control("[/INST]")


def _header(role: str) -> tuple[str, ...]:
    return (_HEAD, role, _HEAD_END)


def _bracketed(name: str, answer: str, **others: Any) -> Template:
    """A template that writes [INST] and [/INST] as text."""
    return Template(
        name=name,
        prompt=("[INST] {instruction}\n\n{input} [/INST]",),
        prompt_without_input=("[INST] {instruction} [/INST]",),
        answer=answer,
        stop=END_OF_SEQUENCE,
        opens_sequence=True,
        has_turns=True,
        **others,
    )


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="bioinstruct",
            prompt=(
                "Below is an instruction that describes a task, paired with an input that provides "
                f"further context.\n{_RESPOND}"
                "### Instruction:\n{instruction}\n### Input:\n{input}\n### Output:\n",
            ),
            prompt_without_input=(
                f"Below is an instruction that describes a task.\n{_RESPOND}"
                "### Instruction:\n{instruction}\n### Output:\n",
            ),
            answer="{output}",
            stop=END_OF_SEQUENCE,
            opens_sequence=True,
        ),
        Template(
            name="medtuned",
            # MedTuned's training text; its records all have an input, an empty one leaves its line
            prompt=("### Instruction: {instruction}\n ### Input: {input}\n ### Output:",),
            prompt_without_input=("### Instruction: {instruction}\n ### Input: \n ### Output:",),
            answer=" {output} \n",
            stop=END_OF_SEQUENCE,
            opens_sequence=True,
        ),
        Template(
            name="chatml",
            prompt=(*_ASK, "{instruction}\n\n{input}", *_ANSWER),
            prompt_without_input=(*_ASK, "{instruction}", *_ANSWER),
            answer="{output}",
            stop=_END,
            opens_sequence=False,
            has_turns=True,
            system=(_START, "system\n{system}", _END, "\n"),
            between=("\n",),
        ),
        Template(
            name="alpaca",
            prompt=(
                f"{_ALPACA}, paired with an input that provides further context. {_ALPACA_END}"
                "{instruction}\n\n### Input:\n{input}\n\n### Response:",
            ),
            prompt_without_input=(f"{_ALPACA}. {_ALPACA_END}{{instruction}}\n\n### Response:",),
            answer="{output}",
            stop=END_OF_SEQUENCE,
            opens_sequence=True,
        ),
        _bracketed(
            "llama-2-chat",
            " {output} ",
            system_in_user="<<SYS>>\n{system}\n<</SYS>>\n\n{user}",
            reopens=True,
        ),
        Template(
            name="llama-3",
            prompt=(
                *_header("user"),
                "\n\n{instruction}\n\n{input}",
                _EOT,
                *_header("assistant"),
                "\n\n",
            ),
            prompt_without_input=(
                *_header("user"),
                "\n\n{instruction}",
                _EOT,
                *_header("assistant"),
                "\n\n",
            ),
            answer="{output}",
            stop=_EOT,
            opens_sequence=True,
            has_turns=True,
            system=(*_header("system"), "\n\n{system}", _EOT),
        ),
        Template(
            name="mistral",
            prompt=(_INST, " {instruction}\n\n{input}", _INST_END),
            prompt_without_input=(_INST, " {instruction}", _INST_END),
            answer=" {output}",
            stop=END_OF_SEQUENCE,
            opens_sequence=True,
            has_turns=True,
        ),
        _bracketed("mistral-v1", " {output}"),
    )
}


def get_template(name: str, tokenizer: Tokenizer) -> Template:
    """Return a template that the tokenizer can write.

    Args:
        name: of TEMPLATES, or the path of a text file (its name ends in .txt).
        tokenizer: the model's.

    Raises:
        OSError: the file cannot be read.
        ValueError: no template is so called, or the vocabulary lacks one of its control tokens.
    """
    if name.endswith(".txt"):
        # it builds on this module
        from bioinstruct.model.template_file import read_template

        return _checked(read_template(Path(name)), tokenizer)
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"no template is called {name!r}; {hint}known are {', '.join(TEMPLATES)}, and text "
            "files (NAME.txt)"
        )
    return _checked(TEMPLATES[name], tokenizer)


def _checked(template: Template, tokenizer: Tokenizer) -> Template:
    if missing := _missing(template, tokenizer):
        fitting = [other for other, it in TEMPLATES.items() if not _missing(it, tokenizer)]
        raise ValueError(
            f"the template {template.name!r} needs the {missing[0]}, which the tokenizer "
            f"{tokenizer.source} lacks; templates that fit it: {', '.join(fitting) or 'none'}"
        )
    return template


def guess_template(tokenizer: Tokenizer) -> str:
    """Return the name of the template a model was most likely made for, by its control tokens."""
    fits = [name for name in ("chatml", "llama-3") if not _missing(TEMPLATES[name], tokenizer)]
    return fits[0] if fits else "bioinstruct"


def encode_prompt(
    template: Template,
    tokenizer: Tokenizer,
    instruction: str,
    input_text: str = "",
    history: Sequence[Turn] = (),
) -> list[int]:
    """Return the ids of a prompt, for training and for inference alike.

    Args:
        template: one from get_template for this tokenizer.
        tokenizer: the model's.
        instruction: what to do.
        input_text: what to do it with; blank: the template's form without input.
        history: what was said before: the system, if anything, then user and assistant in turn.

    Raises:
        ValueError: a text cannot be encoded, or the template has no turns but there is a history.
    """
    if history and not template.has_turns:
        fitting = ", ".join(name for name, other in TEMPLATES.items() if other.has_turns)
        raise ValueError(
            f"the template {template.name!r} cannot write conversations of several turns or with a "
            f"system text; those that can: {fitting}"
        )
    opening = [tokenizer.bos_id] if template.opens_sequence and tokenizer.adds_bos else []
    writer = _Writer(template, tokenizer, [t for t in opening if t is not None])
    system = [turn.text for turn in history if turn.role == "system"]
    if system and template.system:
        writer.parts(template.system, system=system[0])
    users = [turn.text for turn in history if turn.role == "user"] + [instruction]
    if system and not template.system:
        users[0] = template.system_in_user.format(system=system[0], user=users[0])
    answers = [turn.text for turn in history if turn.role == "assistant"]
    for user, answer in zip(users, answers, strict=False):
        writer.parts(template.prompt_without_input, instruction=user, input="")
        writer.ids += tokenizer.encode_continuation(template.answer.format(output=answer))
        writer.ids.append(template.stop_id(tokenizer))
        writer.parts(template.between)
        if template.reopens:
            writer.reopen()
    form = template.prompt if input_text.strip() else template.prompt_without_input
    writer.parts(form, instruction=users[-1], input=input_text)
    return writer.ids


class _Writer:
    """Collects the ids of a prompt; only its first text may get a dummy prefix."""

    def __init__(self, template: Template, tokenizer: Tokenizer, opening: list[int]) -> None:
        self.template, self.tokenizer, self.opening = template, tokenizer, opening
        self.ids: list[int] = []
        self.reopen()

    def reopen(self) -> None:
        """Begin as a sequence begins."""
        self.ids += self.opening
        self.begun = False

    def parts(self, parts: Sequence[str], **fields: str) -> None:
        """Write a template's parts."""
        for part in parts:
            if isinstance(part, Control):
                self.ids.append(_control_id(self.template, part, self.tokenizer))
            else:
                text = part.format(**fields)
                first = not self.begun
                encode = self.tokenizer.encode if first else self.tokenizer.encode_continuation
                self.ids += encode(text)
            self.begun = True


def encode_sample(
    template: Template,
    tokenizer: Tokenizer,
    instruction: str,
    input_text: str,
    output: str,
    history: Sequence[Turn] = (),
) -> Sample:
    """Return the ids of a record for training: encode_prompt's, and the answer with its stop token.

    Args:
        template: one from get_template for this tokenizer.
        tokenizer: the model's.
        instruction: what to do.
        input_text: what to do it with; blank: the template's form without input.
        output: what to learn to answer; when empty, the framing and the stop token are left.
        history: what was said before, which is not learned.

    Raises:
        ValueError: as for encode_prompt.
    """
    answer = tokenizer.encode_continuation(template.answer.format(output=output))
    return Sample(
        prompt_ids=encode_prompt(template, tokenizer, instruction, input_text, history),
        answer_ids=[*answer, template.stop_id(tokenizer)],
    )


def decode_answer(template: Template, tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of a generated answer: up to the stop token, without blanks around it.

    Raises:
        ValueError: an id lies outside the vocabulary.
    """
    stop = template.stop_id(tokenizer)
    end = list(ids).index(stop) if stop in ids else len(ids)
    return tokenizer.decode_continuation(ids[:end]).strip()


def _missing(template: Template, tokenizer: Tokenizer) -> list[str]:
    absent = [name for name in template.controls if _lookup(name, tokenizer) is None]
    return [name if name == END_OF_SEQUENCE else f"control token {name}" for name in absent]


def _control_id(template: Template, name: str, tokenizer: Tokenizer) -> int:
    token = _lookup(name, tokenizer)
    if token is None:
        raise ValueError(
            f"the template {template.name!r} does not fit {tokenizer.source}, which has no {name}"
        )
    return token


def _lookup(name: str, tokenizer: Tokenizer) -> int | None:
    return tokenizer.eos_id if name == END_OF_SEQUENCE else tokenizer.control_id(name)
