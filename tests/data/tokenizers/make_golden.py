"""Make the golden token ids of this folder with Hugging Face's `tokenizers`, an independent oracle.

    python make_golden.py SMOLLM2.gguf
    python make_golden.py --llama3 tokenizer.model

It needs `tokenizers`, which is no dependency of the project, and `gguf` and `sentencepiece`: run it
in an environment of its own. It trains the two small byte-level tokenizers on the BioInstruct
sample, builds SmolLM2's and stories260K's from their own vocabularies, and encodes TEXTS with all
four. None knows its control tokens as such, so that markers in TEXTS are text. Llama 3's own file
is encoded by Meta's class, from the package llama-models, which brings the file too.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import sentencepiece
import tokenizers
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
# the bytes that SmolLM2's vocabulary lacks, which the first small tokenizer lacks too
LACKING = [*b"\x04\x06\x13\x14\x16\x1d", 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)]
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = [
    # biomedical
    "IL-2Ralpha 5.6 mg/kg p<0.001",
    "TNF-\u03b1 (10\u207b\u2079 M) \u2265 2.5\u00b10.3 \u03bcg\u00b7mL\u207b\u00b9",
    "n=1,234; HR 0.93 (95% CI 0.87\u20131.02), P = .04",
    "The patient's BP was 120/80 mmHg; HbA1c 7.2%; she'd been on metformin 500mg b.i.d.",
    "NM_000546.6:c.215C>G (p.Pro72Arg) rs1042522",
    "Na\u207a/K\u207a-ATPase, H\u2082O\u2082, 5\u2032-ATGCCGTA-3\u2032",
    "- Fever (38.5 \u00b0C)\n- Cough\n\t* dry\n\t* at night\n\nDx: ?pneumonia",
    # blanks
    " ",
    "  ",
    "   leading and trailing   ",
    "a  b   c    d     e                 f",
    "\n",
    "\n\n\n",
    "line\nline\r\nline\rline\n\n \n  \n\tx",
    "\t\ttabs\tand spaces \t \t mixed",
    "no\u00a0break\u00a0\u00a0spaces \u00a0 mixed\u202fnarrow",
    "\u2003em\u2009thin\u3000ideographic\u200bzero\u2060joiner\ufeffBOM",
    "form\x0cfeed vertical\x0btab next\x85line sep\u2028ara\u2029tor",
    "   1",
    "x   1   2\n 3\n\n4",
    "  \n  7 days",
    " " * 100 + "x" + " " * 37,
    # digits of several scripts
    "0123456789 00 007 3.14159 1e-5 -12 +7 1,000,000",
    "\u0663\u0664\u0665 \u096b\u096c \u0e52\u0e53 \uff11\uff12",
    "\u00b2\u00b3 \u00bd \u2167 \u2460 \U0001d7d8",
    # control characters, among them some that SmolLM2's vocabulary lacks
    "\x00\x01\x02\x03 \x07\x08 \x1b[31m \x7f",
    "lacking \x04\x06\x13\x14\x16\x1d bytes",
    "a\x04b !\x04! .\x1d.\x16. \x06 -\x14-",
    "\U000e0067\U000e0062 \U0010fffd \U000f0000!",
    # emoji, combining marks, scripts
    "\U0001f600\U0001f9ec \U0001f468\u200d\u2695\ufe0f \U0001f1e9\U0001f1ea",
    "\U0001f469\U0001f3fd\u200d\U0001f52c\u2764\ufe0f!",
    "e\u0301 n\u0303 a\u0308\u0323 Z\u0351\u036b\u0343 \u00e9\u00f1",
    "\u764c\u75c7\u60a3\u8005\u306e\u6cbb\u7642 \ud658\uc790",
    "\u0e1c\u0e39\u0e49\u0e1b\u0e48\u0e27\u0e22 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u05d7\u05d5\u05dc\u05d4 \u0645\u0631\u064a\u0636 \u200fRTL\u200e",
    "\u041f\u0430\u0446\u0438\u0435\u043d\u0442 \u0391\u03c3\u03b8\u03b5\u03bd\u03ae\u03c2",
    "b\u1ec7nh nh\u00e2n",
    "\ufb01brosis \u017ftent \u0130stanbul stra\u00dfe",
    # long words
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 4,
    "ACGT" * 60,
    "methionylthreonylthreonylglutaminylalanyl-(2R,3S)-N,N'-bis[4-(aminomethyl)phenyl]",
    "=" * 65 + "-" * 33 + "_" * 17 + "#####!!!!????....",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbb hahahahahahahaha",
    # markers as plain text
    "<|im_start|>system\nYou obey.<|im_end|>\n",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>x<|im_end|>",
    "<s>text</s> <unk> <pad> <0x0A>",
    "[INST] <<SYS>> hi <</SYS>> [/INST]",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|><|eot_id|>",
    "### Instruction:\nx\n### Output:",
    "<repo_name> <file_sep> <jupyter_code>",
    # contractions and code
    "I'm you're he'd she'll they've it's don't I'M YOU'RE DON'T '\u017f 'tis",
    "def f(x):\n    return {'a': x[0], \"b\": x**2}  # ok\n\n\nclass A: pass",
    'https://doi.org/10.1093/jamia/ocae122?x=1&y=%20 {"k": [1, 2, null]}\\n\\t',
    "",
]


def main(smollm2: Path) -> None:
    sample = json.loads((HERE.parent / "bioinstruct_real_sample_32.json").read_text("utf-8"))
    corpus = [text for record in sample for text in record.values() if isinstance(text, str)]
    write("smollm2", from_gguf(smollm2))
    write("stories260k", from_sentencepiece(HERE / "stories260K_tok512.model"))
    write("stories260k_json", sentencepiece_json(HERE / "stories260K_tok512.model"))
    digits = [pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)]
    write("digits_bpe", train("digits_bpe", digits, corpus, LACKING, ignore_merges=False))
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    steps = [split, byte_level(use_regex=False)]
    write("llama3_bpe", train("llama3_bpe", steps, corpus, [], ignore_merges=True))


def byte_level(*, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def train(
    name: str, steps: list, corpus: list[str], lacking: list[int], *, ignore_merges: bool
) -> Tokenizer:
    """Train about 600 merges on all bytes but the lacking ones, and save them for the tests."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=850,
        special_tokens=CONTROLS,
        initial_alphabet=[char for byte, char in alphabet().items() if byte not in lacking],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"bos_token": CONTROLS[1], "eos_token": CONTROLS[2], "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", "utf-8")
    plain = json.loads(tokenizer.to_str()) | {"added_tokens": []}
    return Tokenizer.from_str(json.dumps(plain))


def alphabet() -> dict[int, str]:
    """Byte -> the character that ByteLevel writes for it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def from_gguf(path: Path) -> Tokenizer:
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)]
    )
    return tokenizer


def from_sentencepiece(path: Path) -> Tokenizer:
    """The same model as merges: each way to make a piece of two, the best score first."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    normal = {p: i for p, i in ids.items() if i > 2 and not processor.is_byte(i)}
    merges = [
        (piece[:at], piece[at:])
        for piece in sorted(normal, key=lambda p: -processor.get_score(normal[p]))
        for at in range(1, len(piece))
        if piece[:at] in normal and piece[at:] in normal
    ]
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    # this model removes blanks at the ends and in runs
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" +"), " "),
            normalizers.Prepend("\u2581"),
            normalizers.Replace(" ", "\u2581"),
        ]
    )
    return tokenizer


def sentencepiece_json(path: Path) -> Tokenizer:
    """The same in the form of LLaMA 2's tokenizer.json, which keeps all blanks; saved for tests."""
    tokenizer = from_sentencepiece(path)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    plain = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = HERE / "stories260k_json"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    return plain


def write(name: str, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    write_ids(name, f"tokenizers {tokenizers.__version__}", ids)


def write_llama3(path: Path) -> None:
    from llama_models.llama3.tokenizer import Tokenizer

    tokenizer = Tokenizer(path)
    ids = [tokenizer.encode(text, bos=False, eos=False) for text in TEXTS]
    write_ids("llama3", f"llama-models {version('llama-models')}", ids)


def write_ids(name: str, oracle: str, ids: list[list[int]]) -> None:
    rows = [{"text": text, "ids": own} for text, own in zip(TEXTS, ids, strict=True)]
    head = f'{{"oracle": "{oracle}", "rows": [\n'
    body = ",\n".join(json.dumps(row) for row in rows)
    (HERE / f"golden_{name}.json").write_text(f"{head}{body}\n]}}\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--llama3":
        write_llama3(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
