"""A prompt template in a text file: {instruction}, {input} and, at its end, {output}.

    Task: {instruction}

    Text: {input}

    Answer: {output}

Paragraphs, which blank lines separate, that hold {input} are left out for records without one.
Other braces are text. The answer ends in the tokenizer's end-of-sequence token.
"""

from pathlib import Path

from bioinstruct.model.templates import END_OF_SEQUENCE, Template


def read_template(path: Path) -> Template:
    """Read a template of the user's own.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not there, no UTF-8 text, or lacks a field.
    """
    if not path.is_file():
        raise ValueError(f"data.template: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: a template must be UTF-8 text") from None
    for field in ("{instruction}", "{input}", "{output}"):
        count = text.count(field)
        if count != 1 and (field != "{input}" or count > 1):
            raise ValueError(f"{path}: a template holds {field} once, not {count} times")
    prompt, _, rest = text.partition("{output}")
    if rest.strip():
        raise ValueError(f"{path}: {{output}} must be the end of a template, not {rest[:40]!r}")
    plain = "\n\n".join(part for part in prompt.split("\n\n") if "{input}" not in part)
    if "{instruction}" not in plain:
        raise ValueError(
            f"{path}: {{instruction}} and {{input}} share a paragraph, so records without an input "
            "would lose both; put a blank line between them"
        )
    return Template(
        name=str(path),
        prompt=(_escaped(prompt),),
        prompt_without_input=(_escaped(plain),),
        answer="{output}",
        stop=END_OF_SEQUENCE,
        opens_sequence=True,
    )


def _escaped(text: str) -> str:
    doubled = text.replace("{", "{{").replace("}", "}}")
    return doubled.replace("{{instruction}}", "{instruction}").replace("{{input}}", "{input}")
