"""Prompt templates: how a record becomes the ids of a prompt and the ids of its answer.

    bioinstruct  Alpaca's preamble, then blocks     BioInstruct, arXiv 2310.19975, Table 7
    medtuned     `### Instruction: ... ### Output:` Llama2-MedTuned, arXiv 2401.00579
    chatml       one user turn, no system turn      the <|im_start|> ... <|im_end|> convention

Training and inference build their prompts by the same function, `encode_prompt`. The answer is
encoded apart from the prompt, so that no token reaches over the boundary between what is and what
is not learned, and it ends in the template's stop token, which is learned too. Control tokens come
from the template alone: what a record's text spells is text.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bioinstruct.model.tokenizer import Tokenizer

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
        ),
    )
}


def get_template(name: str, tokenizer: Tokenizer) -> Template:
    """Return a template that the tokenizer can write.

    Raises:
        ValueError: no template is so called, or the vocabulary lacks one of its control tokens.
    """
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no template is called {name!r}; {hint}known are {', '.join(TEMPLATES)}")
    if missing := _missing(TEMPLATES[name], tokenizer):
        fitting = [other for other, it in TEMPLATES.items() if not _missing(it, tokenizer)]
        raise ValueError(
            f"the template {name!r} needs the {missing[0]}, which the tokenizer {tokenizer.source} "
            f"lacks; templates that fit it: {', '.join(fitting) or 'none'}"
        )
    return TEMPLATES[name]


def guess_template(tokenizer: Tokenizer) -> str:
    """Return the name of the template a model was most likely made for: chatml or bioinstruct."""
    return "bioinstruct" if _missing(TEMPLATES["chatml"], tokenizer) else "chatml"


def encode_prompt(
    template: Template, tokenizer: Tokenizer, instruction: str, input_text: str = ""
) -> list[int]:
    """Return the ids of a prompt, for training and for inference alike.

    Args:
        template: one from get_template for this tokenizer.
        tokenizer: the model's.
        instruction: what to do.
        input_text: what to do it with; blank: the template's form without input.

    Raises:
        ValueError: a text cannot be encoded.
    """
    opens = template.opens_sequence and tokenizer.adds_bos
    ids: list[int] = []
    parts = template.prompt if input_text.strip() else template.prompt_without_input
    for place, part in enumerate(parts):
        if isinstance(part, Control):
            ids.append(_control_id(template, part, tokenizer))
            continue
        text = part.format(instruction=instruction, input=input_text)
        ids += tokenizer.encode_continuation(text) if place else tokenizer.encode(text, bos=opens)
    return ids


def encode_sample(
    template: Template, tokenizer: Tokenizer, instruction: str, input_text: str, output: str
) -> Sample:
    """Return the ids of a record for training: encode_prompt's, and the answer with its stop token.

    Args:
        template: one from get_template for this tokenizer.
        tokenizer: the model's.
        instruction: what to do.
        input_text: what to do it with; blank: the template's form without input.
        output: what to learn to answer; when empty, the framing and the stop token are left.

    Raises:
        ValueError: a text cannot be encoded.
    """
    answer = tokenizer.encode_continuation(template.answer.format(output=output))
    return Sample(
        prompt_ids=encode_prompt(template, tokenizer, instruction, input_text),
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
