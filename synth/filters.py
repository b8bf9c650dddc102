"""Which records are kept, and for every other one the reason.

A set of rules looks at one record at a time; then ROUGE-L, on the instructions alone, at what was
kept before. The sets:

- `paper`: BioInstruct (JAMIA 31(9):1821, 2024). Out: instructions of under 3 or over 150 words
  (split at white space), those that name what a text model cannot handle (KEYWORDS, Alpaca's list),
  outputs that repeat a non-empty input (surrounding space and case aside), and instructions whose
  ROUGE-L F to any kept one reaches the threshold.
- `alpaca`: the same with Alpaca's edges: 3 words are too few, and F must exceed the threshold.
- `strict`: ours. Alpaca's list costs medicine good records (a genetic map, an image report, a
  patient's file), so here a picture or sound must be asked for or pointed at. Out as well: empty
  outputs, outputs that repeat the instruction, placeholders left unfilled, refusals, and text that
  is not English. Lengths, repeated inputs and ROUGE-L are `paper`'s.
- `none`: ROUGE-L only, as `paper` has it.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bioinstruct.synth.near_copies import near_copies
from bioinstruct.synth.records import SUFFIXES, Record, read_records, write_records
from bioinstruct.synth.rouge import checked_threshold
from bioinstruct.synth.text import json_values

RULES = ("paper", "alpaca", "strict", "none")
ROUGE = 0.7  # both papers' threshold
MOST_WORDS = 150
KEYWORDS = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
    *("draw", "plot", "go to", "video", "audio", "music", "flowchart", "diagram"),
)


class Drop(NamedTuple):
    """Why a record is left out: the rule's name, and a sentence for people."""

    rule: str
    reason: str


class NearCopy(NamedTuple):
    """The kept record that a dropped one is too near to."""

    where: str
    instruction: str
    score: float


class Dropped(NamedTuple):
    """A record that was left out."""

    place: int
    drop: Drop
    near: NearCopy | None


def rouge_threshold(rules: str, rouge: float = ROUGE) -> float:
    """Return the least F that drops a record: rouge, or for `alpaca` the next number above it.

    Raises:
        ValueError: rules are unknown, or rouge is not above 0 and at most 1 (`alpaca`: below 1).
    """
    if _known(rules) != "alpaca":
        return checked_threshold(rouge)
    if rouge == 1:
        raise ValueError("rules alpaca drop what is above the threshold, and no F is above 1")
    return math.nextafter(checked_threshold(rouge), 2)


def text_drop(rules: str, record: Record) -> Drop | None:
    """Return why the record's own text drops it, or None.

    Args:
        rules: one of RULES.
        record: what is judged.

    Raises:
        ValueError: rules are unknown.
    """
    for check in _CHECKS[_known(rules)]:
        if drop := check(record):
            return drop
    return None


def sift(
    records: Sequence[Record],
    rules: str,
    *,
    rouge: float = ROUGE,
    against: Iterable[Record] = (),
) -> list[Dropped]:
    """Return what is left out of the records, in their order; the others are kept.

    A record that its own text drops counts for no other. Instructions are compared with all of
    `against`, which is not itself judged, and with those kept before.

    Raises:
        ValueError: rules are unknown, or rouge is out of range.
    """
    threshold = rouge_threshold(rules, rouge)
    drops = [text_drop(rules, record) for record in records]
    pool = list(against)
    judged = [place for place, drop in enumerate(drops) if drop is None]
    compared = pool + [records[place] for place in judged]
    nears = near_copies([r.instruction for r in compared], threshold, pool=len(pool))
    dropped = [Dropped(place, drop, None) for place, drop in enumerate(drops) if drop]
    for place, near in zip(judged, nears[len(pool) :], strict=True):
        if near is not None:
            kept = compared[near.place]
            drop = Drop("rouge", f"ROUGE-L F {near.score:.4g} to the instruction at {kept.where}")
            copy = NearCopy(kept.where, kept.instruction, near.score)
            dropped.append(Dropped(place, drop, copy))
    return sorted(dropped, key=lambda d: d.place)


class Filtered(NamedTuple):
    """What became of a run of filter_files."""

    read: int
    kept: int
    rules: dict[str, int]
    """How many records each rule dropped, the commonest first."""
    dropped: Path
    """The file that holds them."""


def filter_files(
    sources: Sequence[Path],
    out: Path,
    *,
    against: Sequence[Path] = (),
    rules: str = "paper",
    rouge: float = ROUGE,
    overwrite: bool = False,
) -> Filtered:
    """Write the kept records of files, as they are and in order, and beside them the dropped ones.

    Args:
        sources: record files, read in this order.
        out: where to, as write_records takes it; the dropped go to the same name + .dropped.jsonl,
            one object a line: rule, reason, where, for `rouge` the near record, and the record.
        against: record files that the kept ones must differ from too.
        rules: one of RULES.
        rouge: the ROUGE-L threshold.
        overwrite: whether the two files may be replaced.

    Raises:
        ValueError: a file is malformed, a target exists or is a source, rules or rouge are wrong.
        OSError: a file cannot be read or written.
    """
    dropped_file = Path(f"{out}.dropped.jsonl")
    rouge_threshold(rules, rouge)
    _check_targets((out, dropped_file), (*sources, *against), overwrite)
    records = [record for path in sources for record in read_records(path)]
    # read_records takes the fields apart; what is written is the object as it was read
    rows = [_object(value) for path in sources for _, value in json_values(path)]
    pool = [record for path in against for record in read_records(path)]
    dropped = sift(records, rules, rouge=rouge, against=pool)
    out_of = {d.place for d in dropped}
    lines = (_line(d, records[d.place], rows[d.place]) for d in dropped)
    write_records(dropped_file, lines, overwrite=overwrite)
    try:
        kept = (row for place, row in enumerate(rows) if place not in out_of)
        num_kept = write_records(out, kept, overwrite=overwrite)
    except BaseException:
        dropped_file.unlink(missing_ok=True)
        raise
    counts = Counter(d.drop.rule for d in dropped).most_common()
    return Filtered(len(rows), num_kept, dict(counts), dropped_file)


def _check_targets(targets: Sequence[Path], read: Sequence[Path], overwrite: bool) -> None:
    """Refuse what writing would refuse, before the work, and to write over what is read."""
    if not targets[0].name.endswith(SUFFIXES):
        raise ValueError(
            f"{targets[0]}: records are written to {', '.join(SUFFIXES)}; name the file so"
        )
    for target in targets:
        if any(target.resolve() == path.resolve() for path in read):
            raise ValueError(f"{target} would be read and written; choose another --out")
        if target.exists() and not overwrite:
            raise ValueError(f"{target} exists; choose another name or pass --overwrite")


def _line(dropped: Dropped, record: Record, row: Mapping[str, object]) -> dict[str, object]:
    near = dropped.near
    found = {"near": near._asdict()} if near else {}
    return {**dropped.drop._asdict(), "where": record.where, **found, "record": row}


def _object(value: object) -> dict[str, object]:
    assert isinstance(value, dict)  # read_records has seen to it
    return value


def _known(rules: str) -> str:
    if rules not in RULES:
        raise ValueError(f"rules must be one of {', '.join(RULES)}, not {rules!r}")
    return rules


# ---- the paper's and Alpaca's rules ------------------------------------------------------------

_KEYWORDS = re.compile(rf"\b(?:{'|'.join(KEYWORDS)})\b", re.IGNORECASE)


def _words(record: Record, fewest: int) -> Drop | None:
    number = len(record.instruction.split())
    if number < fewest:
        return Drop("too-short", f"the instruction has {number} words, under {fewest}")
    if number > MOST_WORDS:
        return Drop("too-long", f"the instruction has {number} words, over {MOST_WORDS}")
    return None


def _three_words(record: Record) -> Drop | None:
    return _words(record, 3)


def _four_words(record: Record) -> Drop | None:
    return _words(record, 4)


def _keyword(record: Record) -> Drop | None:
    found = _KEYWORDS.search(record.instruction)
    return Drop("keyword", f"the instruction says {found[0]!r}") if found else None


def _echo(record: Record) -> Drop | None:
    output = record.output.strip().casefold()
    if output and output == record.input.strip().casefold():
        return Drop("echo", "the output repeats the input")
    return None


# ---- our stricter ones -------------------------------------------------------------------------

# no `chart` and no `figure`: the patient's is text, others are numbers or people; nor is a report
# of an image one
_MEDIUM = (
    r"(?:[\w-]+\s+)?(?:image|picture|photo|photograph|diagram|flowchart|graph|video|audio)s?\b"
    r"(?!\s+(?:report|finding|description|caption|review))"
)
_SHOWN = re.compile(
    rf"\b(?:attached|following|given|shown|provided|above|below|this|these)\s+{_MEDIUM}",
    re.IGNORECASE,
)
_MADE = re.compile(
    r"\b(?:draw|sketch|plot|paint|create|make|generate|design)\s+(?:me\s+)?(?:an?|the)\s+"
    rf"{_MEDIUM}",
    re.IGNORECASE,
)
_BLANK = re.compile(
    r"<\s*no\s?input\s*>|\blorem ipsum\b|"
    r"[\[{<]\s*(?:insert|enter|add|your|patient'?s?|doctor'?s?|name|date|age|hospital|drug|"
    r"medication|text|input|output|placeholder)\b[^\[\]{}<>]{0,40}[\]}>]",
    re.IGNORECASE,
)
_BLANK_FIELDS = {"input": ("n/a", "no input", "noinput", "..."), "output": ("...", "n/a")}
_CANNOT = (
    r"i(?:'m| am) (?:unable|not able) to|i (?:can't|cannot|can not|could not|won't|will not) "
    r"(?:provide|give|help|assist|answer|offer|comply|fulfil|diagnose|generate|complete|access|"
    r"view|open|process|analy[sz]e|perform|prescribe)|"
    r"i (?:don't|do not) have (?:access|the ability)"
)
# sympathy is no refusal: `I'm sorry to hear that`
_REFUSAL = re.compile(
    r"(?:(?:i(?:'m| am) sorry|sorry|my apologies|i apologi[sz]e|unfortunately)[,.;]?\s+"
    rf"(?:but\s+)?)?(?:{_CANNOT})|(?:.{{0,80}}\b)?as an? (?:ai|(?:large )?language model)\b",
    re.IGNORECASE,
)
_LETTERS = re.compile(r"[^\W\d_]+")
_LATIN_OR_GREEK = re.compile("[A-Za-z\u00aa-\u024f\u0370-\u03ff\u1d00-\u1fff\u2070-\u218f]")
_ENGLISH = frozenset(
    _LETTERS.findall(
        "the of and to is are was were for with that this on by from or as an be at it not have "
        "has what which should patient"
    )
)
# as written in lower case: IL, LA, DES and LES are abbreviations in medicine
_OTHERS = frozenset(
    _LETTERS.findall(
        "der und nicht ist das ein eine mit von zu auf den dem les des une est dans pour que qui "
        "sur le la el los las una por para con del es che di della sono um uma os da na het een "
        "van en niet som och att det"
    )
)


def _medium(record: Record) -> Drop | None:
    found = _SHOWN.search(record.instruction) or _MADE.search(record.instruction)
    return Drop("medium", f"the instruction needs more than text: {found[0]!r}") if found else None


def _no_answer(record: Record) -> Drop | None:
    output = record.output.strip().casefold()
    if not output:
        return Drop("empty", "the output is empty")
    if output == record.instruction.strip().casefold():
        return Drop("echo", "the output repeats the instruction")
    return None


def _placeholder(record: Record) -> Drop | None:
    for name, text in _fields(record):
        found = _BLANK.search(text)
        if found or text.strip().casefold() in _BLANK_FIELDS.get(name, ()):
            what = found[0] if found else text.strip()
            return Drop("placeholder", f"the {name} holds the placeholder {what!r}")
    return None


def _refusal(record: Record) -> Drop | None:
    found = _REFUSAL.match(record.output.strip().replace("\u2019", "'"))
    return Drop("refusal", f"the output refuses: {found[0]!r}") if found else None


def _not_english(record: Record) -> Drop | None:
    for name, text in _fields(record):
        words = _LETTERS.findall(text)
        letters = "".join(words)
        # gene and unit names are Greek in part; any script may be quoted
        foreign = len(letters) - len(_LATIN_OR_GREEK.findall(letters))
        if 3 * foreign > len(letters):
            return Drop("not-english", f"{foreign} of the {name}'s {len(letters)} letters are not")
        others = sum(word in _OTHERS for word in words)
        if others >= 3 and others > sum(word.lower() in _ENGLISH for word in words):
            return Drop("not-english", f"the {name} reads as another language")
    return None


def _fields(record: Record) -> list[tuple[str, str]]:
    texts = (record.instruction, record.input, record.output)
    return list(zip(("instruction", "input", "output"), texts, strict=True))


_CHECKS: Mapping[str, Sequence[Callable[[Record], Drop | None]]] = {
    "paper": (_three_words, _keyword, _echo),
    "alpaca": (_four_words, _keyword, _echo),
    "strict": (_three_words, _medium, _no_answer, _echo, _placeholder, _refusal, _not_english),
    "none": (),
}
