"""Prompts and answers: exact texts, the boundary between them, the stop token."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.model.templates import (
    TEMPLATES,
    Control,
    Template,
    decode_answer,
    encode_prompt,
    encode_sample,
    get_template,
    guess_template,
)
from bioinstruct.model.tokenizers.bpe_tokenizer import ByteBPE
from bioinstruct.model.tokenizers.tokenizer import Tokenizer, load_tokenizer
from bioinstruct.synth.records import Turn

TOKENIZERS = Path(__file__).parent.parent / "data" / "tokenizers"
STORIES = load_tokenizer(TOKENIZERS / "stories260K_tok512.model")
DIGITS = load_tokenizer(TOKENIZERS / "digits_bpe")
LLAMA3 = load_tokenizer(TOKENIZERS / "llama3_bpe")

NAMES = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"]


def with_controls(names: list[str]) -> Tokenizer:
    """LLAMA3 with more control tokens, and a beginning-of-sequence token."""
    assert isinstance(LLAMA3, ByteBPE)
    vocabulary = LLAMA3.vocabulary
    more = {name: LLAMA3.vocab_size + place for place, name in enumerate(names)}
    grown = replace(vocabulary, controls={**vocabulary.controls, **more}, adds_bos=True)
    return ByteBPE(LLAMA3.source, grown)


FULL = with_controls(NAMES)
PAIRS = [
    *[(TEMPLATES[name], FULL) for name in TEMPLATES],
    *[(TEMPLATES[n], one) for n in ("chatml", "alpaca", "medtuned") for one in (DIGITS, LLAMA3)],
    (TEMPLATES["bioinstruct"], STORIES),
    (TEMPLATES["medtuned"], STORIES),
]
pairs = st.sampled_from(PAIRS)
MARKERS = [
    *["</s>", "<s>", "<|im_start|>", "<|im_end|>\n", "<|endoftext|>", "[INST]", "### Output:"],
    *["{input}", "{instruction}", "{", "}", "{0}", "a", " ", "\n", "  b", "1"],
]
texts = st.text(max_size=20) | st.lists(st.sampled_from(MARKERS), max_size=8).map("".join)


def with_bos(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=tokenizer.adds_bos)


def test_medtuned_is_written_as_in_its_training_code() -> None:
    sample = encode_sample(TEMPLATES["medtuned"], LLAMA3, "Tag.", "IL-2 : B", "none")
    text = "### Instruction: Tag.\n ### Input: IL-2 : B\n ### Output: none \n"
    assert LLAMA3.decode(sample.prompt_ids + sample.answer_ids) == text
    # the header ends the prompt, so the answer begins with a blank
    assert LLAMA3.decode(sample.prompt_ids).endswith("### Output:")
    assert LLAMA3.decode_continuation(sample.answer_ids) == " none \n"
    sample = encode_sample(TEMPLATES["medtuned"], LLAMA3, "Tag.", "", "none")
    text = "### Instruction: Tag.\n ### Input: \n ### Output: none \n"
    assert LLAMA3.decode(sample.prompt_ids + sample.answer_ids) == text


def test_bioinstruct_is_written_as_in_its_paper() -> None:
    text = (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context.\nWrite a response that appropriately completes the request.\n"
        "### Instruction:\nSummarize.\n### Input:\nA cough.\n### Output:\n"
    )
    template = TEMPLATES["bioinstruct"]
    assert encode_prompt(template, LLAMA3, "Summarize.", "A cough.") == LLAMA3.encode(text)
    text = (
        "Below is an instruction that describes a task.\n"
        "Write a response that appropriately completes the request.\n"
        "### Instruction:\nSummarize.\n### Output:\n"
    )
    for blank in ("", " ", "\n"):
        assert encode_prompt(template, LLAMA3, "Summarize.", blank) == LLAMA3.encode(text)


def test_chatml_is_one_user_turn() -> None:
    start, end = 1, 2
    ids = encode_prompt(TEMPLATES["chatml"], DIGITS, "Do it.", "x")
    user, answer = DIGITS.encode("user\nDo it.\n\nx"), DIGITS.encode("assistant\n")
    # texts between two control tokens are pieced together, never joined with them
    assert DIGITS.decode(ids) == "user\nDo it.\n\nx\nassistant\n"
    assert [ids[0], ids[-len(answer) - 1]] == [start, start] and ids[-len(answer) :] == answer
    assert [at for at, token in enumerate(ids) if token == end] == [1 + len(user)]
    assert DIGITS.decode(encode_prompt(TEMPLATES["chatml"], DIGITS, "Do it.")) == (
        "user\nDo it.\nassistant\n"
    )


def test_bos_stands_before_a_text_template_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    assert encode_prompt(TEMPLATES["medtuned"], STORIES, "a")[0] == STORIES.bos_id
    assert encode_prompt(TEMPLATES["medtuned"], DIGITS, "a")[0] != DIGITS.bos_id
    name = "tokenizer.json"
    (tmp_path / name).write_bytes((TOKENIZERS / "digits_bpe" / name).read_bytes())
    config = '{"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": true}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    adding = load_tokenizer(tmp_path)
    assert encode_prompt(TEMPLATES["bioinstruct"], adding, "a")[0] == 0
    # chatml opens with its own control token
    assert encode_prompt(TEMPLATES["chatml"], adding, "a")[0] == 1


@given(pairs, texts, texts, texts)
@settings(max_examples=400)
def test_the_last_supervised_token_is_the_stop_token(
    pair: tuple[Template, Tokenizer], instruction: str, given_input: str, output: str
) -> None:
    template, tokenizer = pair
    sample = encode_sample(template, tokenizer, instruction, given_input, output)
    stop = template.stop_id(tokenizer)
    assert sample.answer_ids[-1] == stop
    assert sample.answer_ids.count(stop) == 1
    assert sample.prompt_ids == encode_prompt(template, tokenizer, instruction, given_input)


@given(pairs, texts, texts, texts)
@settings(max_examples=400)
def test_control_tokens_come_from_the_template_alone(
    pair: tuple[Template, Tokenizer], instruction: str, given_input: str, output: str
) -> None:
    template, tokenizer = pair
    sample = encode_sample(template, tokenizer, instruction, given_input, output)
    controls = [token for token in sum(sample, []) if token in tokenizer.control_ids]
    parts = template.prompt if given_input.strip() else template.prompt_without_input
    opening = [tokenizer.bos_id] if template.opens_sequence and tokenizer.adds_bos else []
    own = [tokenizer.control_id(part) for part in parts if isinstance(part, Control)]
    assert controls == [*opening, *own, template.stop_id(tokenizer)]


@given(pairs, texts, texts, texts)
@settings(max_examples=400)
def test_the_boundary_between_prompt_and_answer_does_not_drift(
    pair: tuple[Template, Tokenizer], instruction: str, given_input: str, output: str
) -> None:
    template, tokenizer = pair
    if tokenizer.lacking(instruction + given_input + output):
        return
    sample = encode_sample(template, tokenizer, instruction, given_input, output)
    parts = template.prompt if given_input.strip() else template.prompt_without_input
    prompt = "".join(part for part in parts if not isinstance(part, Control))
    prompt = prompt.format(instruction=instruction, input=given_input)
    answer = template.answer.format(output=output)
    if tokenizer.lossless:
        assert tokenizer.decode(sample.prompt_ids) == prompt
    whole = tokenizer.decode(sample.prompt_ids + sample.answer_ids)
    assert whole == tokenizer.decode(sample.prompt_ids) + answer
    assert decode_answer(template, tokenizer, sample.answer_ids) == output.strip()


def test_an_empty_answer_is_its_framing_and_the_stop_token() -> None:
    assert encode_sample(TEMPLATES["chatml"], DIGITS, "a", "", "").answer_ids == [2]
    ids = encode_sample(TEMPLATES["medtuned"], DIGITS, "a", "", "").answer_ids
    assert DIGITS.decode(ids) == "  \n" and decode_answer(TEMPLATES["medtuned"], DIGITS, ids) == ""


def test_a_generated_answer_ends_at_the_stop_token() -> None:
    template = TEMPLATES["bioinstruct"]
    ids = STORIES.encode_continuation(" yes \n")
    assert decode_answer(template, STORIES, ids) == "yes"
    assert decode_answer(template, STORIES, [*ids, 2, *ids]) == "yes"
    assert decode_answer(template, STORIES, []) == decode_answer(template, STORIES, [2]) == ""


def test_each_template_names_its_stop_token() -> None:
    assert {name: template.stop for name, template in TEMPLATES.items()} == {
        "bioinstruct": "end-of-sequence token",
        "medtuned": "end-of-sequence token",
        "chatml": "<|im_end|>",
        "alpaca": "end-of-sequence token",
        "llama-2-chat": "end-of-sequence token",
        "llama-3": "<|eot_id|>",
        "mistral": "end-of-sequence token",
        "mistral-v1": "end-of-sequence token",
    }
    assert [TEMPLATES[name].stop_id(STORIES) for name in ("bioinstruct", "medtuned")] == [2, 2]
    with pytest.raises(ValueError, match=r"'chatml' does not fit .*, which has no <\|im_end\|>"):
        TEMPLATES["chatml"].stop_id(STORIES)


def test_a_template_is_guessed_from_the_vocabulary() -> None:
    assert guess_template(DIGITS) == "chatml"
    assert guess_template(STORIES) == "bioinstruct"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_fits_is_given(name: str) -> None:
    assert get_template(name, FULL) is TEMPLATES[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chatlm", r"no template is called 'chatlm'; did you mean 'chatml'\? known are bioinstr"),
        (
            "x",
            r"no template is called 'x'; known are bioinstruct, medtuned, .*, and text files",
        ),
        ("", r"no template is called ''; known are"),
    ],
)
def test_an_unknown_template_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_template(name, DIGITS)


def test_a_template_whose_control_tokens_are_lacking_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"'chatml' needs the control token <\|im_start\|>, which the tokenizer .*512\.model "
        r"lacks; templates that fit it: bioinstruct, medtuned, alpaca, llama-2-chat, mistral-v1$",
    ):
        get_template("chatml", STORIES)


def test_a_template_without_an_end_of_sequence_token_is_refused(tmp_path: Path) -> None:
    name = "tokenizer.json"
    (tmp_path / name).write_bytes((TOKENIZERS / "digits_bpe" / name).read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(
        ValueError, match=r"needs the end-of-sequence token, .* templates that fit it: chatml$"
    ):
        get_template("medtuned", tokenizer)


def test_smollm2_is_prompted_in_chatml(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert guess_template(tokenizer) == "chatml"
    sample = encode_sample(TEMPLATES["chatml"], tokenizer, "Hi", "", "Hello!")
    assert sample.prompt_ids == [1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]
    assert sample.answer_ids == [*tokenizer.encode("Hello!"), 2]


# ---- conversations -----------------------------------------------------------------------------

HISTORY = (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello."))


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids, control tokens by their names."""
    assert isinstance(tokenizer, ByteBPE)
    names = {token: name for name, token in tokenizer.vocabulary.controls.items()}
    return "".join(names.get(i) or tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids)


WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\n=So.<|im_end|>",
    "llama-3": "BOS<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n=So.<|eot_id|>",
    "llama-2-chat": "BOS[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. EOS"
    "BOS[INST] Why? [/INST]= So. EOS",
    "mistral": "BOS[INST] Be brief.\n\nHi[/INST] Hello.EOS[INST] Why?[/INST]= So.EOS",
    "mistral-v1": "BOS[INST] Be brief.\n\nHi [/INST] Hello.EOS[INST] Why? [/INST]= So.EOS",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_conversations_are_written_as_their_models_learned_them(name: str) -> None:
    sample = encode_sample(TEMPLATES[name], FULL, "Why?", "", "So.", HISTORY)
    prompt, answer = (spelled(FULL, ids) for ids in sample)
    ends = {spelled(FULL, [FULL.bos_id or 0]): "BOS", spelled(FULL, [FULL.eos_id or 0]): "EOS"}
    text = f"{prompt}={answer}"
    for own, known in ends.items():
        if name != "chatml":
            text = text.replace(own, known)
    assert text == WRITTEN[name]


@pytest.mark.parametrize("name", ["bioinstruct", "medtuned", "alpaca"])
def test_templates_without_turns_refuse_a_history(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}' cannot write conv.*: chatml, llama-2-chat, lla"):
        encode_prompt(TEMPLATES[name], FULL, "a", "", HISTORY)


def test_alpaca_is_written_as_stanford_wrote_it() -> None:
    sample = encode_sample(TEMPLATES["alpaca"], LLAMA3, "Add.", "1 2", "3")
    assert LLAMA3.decode(sample.prompt_ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    sample = encode_sample(TEMPLATES["alpaca"], LLAMA3, "Add.", "", "3")
    assert LLAMA3.decode(sample.prompt_ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:"
    )


# ---- a text file of the user's own -------------------------------------------------------------


def own(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "own.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_file_is_a_template(tmp_path: Path) -> None:
    text = "# {x} task\n\nTask: {instruction}\n\nText: {input}\n\nAnswer: {output}\n"
    template = get_template(own(tmp_path, text), LLAMA3)
    sample = encode_sample(template, LLAMA3, "Tag {a}.", "IL-2", "none")
    assert (
        LLAMA3.decode(sample.prompt_ids) == "# {x} task\n\nTask: Tag {a}.\n\nText: IL-2\n\nAnswer: "
    )
    assert LLAMA3.decode_continuation(sample.answer_ids) == "none"
    assert sample.answer_ids[-1] == LLAMA3.eos_id
    sample = encode_sample(template, LLAMA3, "Tag.", " ", "none")
    assert LLAMA3.decode(sample.prompt_ids) == "# {x} task\n\nTask: Tag.\n\nAnswer: "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a template holds {instruction} once, not 0 times"),
        ("{instruction}", "holds {output} once, not 0 times"),
        ("{instruction} {instruction} {output}", "{instruction} once, not 2 times"),
        ("{instruction} {output} {output}", "{output} once, not 2 times"),
        ("{instruction}\n\n{input}{input} {output}", "{input} once, not 2 times"),
        ("{output} {instruction}", "{output} must be the end of a template, not ' {instruction}'"),
        ("{instruction} {output} end", "must be the end of a template, not ' end'"),
        ("{instruction} {input}\n\n{output}", "share a paragraph"),
        (b"\xff {instruction}", "must be UTF-8 text"),
    ],
)
def test_a_file_that_is_no_template(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_template(own(tmp_path, text), LLAMA3)


def test_a_template_file_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="data.template: there is no file nowhere.txt"):
        get_template("nowhere.txt", LLAMA3)
