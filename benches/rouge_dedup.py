"""Near copies removed by exact ROUGE-L: our time and memory, and rapidfuzz's time beside it.

The texts come from a bigram model of real instructions (Alpaca's, in BIOINSTRUCT_DATA): each word
is drawn from those that follow the last one there. Lengths are real ones scaled to a mean of 20
words. About 15 % of the texts are near copies of an earlier one, with an edit to up to every fifth
word. One seed gives the same texts everywhere.

Both sides start from strings and decide in order, each text against those that stay. rapidfuzz gets
a word as one code point, 256 texts against all that stay in one matrix call, and the exact formula
where its own score reaches the threshold; so both must decide alike. That is checked, and before it
our decisions on the first texts against every pair of them.
"""

import hashlib
import json
import os
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from bioinstruct.synth import console
from bioinstruct.synth.near_copies import near_copies
from bioinstruct.synth.records import read_records
from bioinstruct.synth.rouge import RougeIndex, f_measure, rouge_l, rouge_words

ALPACA = "instructions/alpaca52k_random_9k.json.gz"
THRESHOLD = 0.7
MEAN_WORDS = 20
COPIES = 0.15
CHECKED = 300  # texts compared pair by pair first
QUERIES = 256  # of one call of rapidfuzz

Ints = NDArray[np.int64]


class Bigrams:
    """A bigram model of sentences; word 0 is the border between two of them."""

    def __init__(self, sentences: list[list[str]]) -> None:
        numbers, flat = {"": 0}, [0]
        for words in sentences:
            flat += [numbers.setdefault(word, len(numbers)) for word in words] + [0]
        self.words = list(numbers)
        self.flat = np.array(flat)
        self.lengths = np.array([len(words) for words in sentences])
        before, after = self.flat[:-1], self.flat[1:]
        self.followers = after[np.argsort(before, kind="stable")]
        self.counts = np.bincount(before, minlength=len(numbers))
        self.starts = np.cumsum(self.counts) - self.counts

    def texts(self, number: int, rng: np.random.Generator) -> list[list[str]]:
        """Draw texts, as lists of words; every sentence's end is followed by another's start."""
        scale = MEAN_WORDS / self.lengths.mean()
        lengths = np.maximum(3, np.rint(rng.choice(self.lengths, number) * scale)).astype(int)
        drawn = np.zeros((number, lengths.max()), np.int64)
        last = np.zeros(number, np.int64)
        for place in range(lengths.max()):
            rows = np.flatnonzero(lengths > place)
            words = self._follow(last[rows], rng)
            words[words == 0] = self._follow(words[words == 0], rng)
            last[rows] = drawn[rows, place] = words
        rows_of_words = (row[:length] for row, length in zip(drawn, lengths, strict=True))
        return [[self.words[word] for word in row.tolist()] for row in rows_of_words]

    def edit(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """Return a near copy: words replaced, inserted and removed, up to one in five."""
        words = list(words)
        for _ in range(rng.integers(1, max(2, len(words) // 5 + 1))):
            place, kind = rng.integers(len(words)), rng.integers(3)
            other = self.words[rng.choice(self.flat[self.flat > 0])]
            if kind == 0:
                words[place] = other
            elif kind == 1:
                words.insert(place, other)
            elif len(words) > 3:
                del words[place]
        return words

    def _follow(self, words: Ints, rng: np.random.Generator) -> Ints:
        drawn = (rng.random(len(words)) * self.counts[words]).astype(np.int64)
        followers: Ints = self.followers[self.starts[words] + drawn]
        return followers


def make_texts(data: Path, number: int, seed: int) -> list[str]:
    """Return the corpus.

    Args:
        data: a record file, whose instructions are the model's sentences.
        number: of texts, at least 1.
        seed: of everything drawn.
    """
    rng = np.random.default_rng(seed)
    sentences = [rouge_words(record.instruction) for record in read_records(data)]
    model = Bigrams([words for words in sentences if words])
    texts = model.texts(number, rng)
    for place in np.flatnonzero(rng.random(number) < COPIES).tolist():
        if place > 0:
            texts[place] = model.edit(texts[rng.integers(place)], rng)
    return [" ".join(words) for words in texts]


def dropped_by_pairs(texts: list[str]) -> list[bool]:
    """Decide by the definition: every text against every one that stays."""
    stays: list[str] = []
    dropped = []
    for text in texts:
        dropped.append(any(rouge_l(text, other) >= THRESHOLD for other in stays))
        if not dropped[-1]:
            stays.append(text)
    return dropped


def dropped_by_us(texts: list[str]) -> list[bool]:
    """Decide by synth/near_copies.py."""
    return [near is not None for near in near_copies(texts, THRESHOLD)]


def dropped_by_rapidfuzz(texts: list[str]) -> list[bool]:
    """Decide by rapidfuzz's similarity of strings."""
    numbers: dict[str, int] = {}
    # no half of a surrogate pair among the code points
    coded = [
        "".join(_code(numbers.setdefault(word, len(numbers))) for word in rouge_words(text))
        for text in texts
    ]
    stays: list[str] = []
    dropped: list[bool] = []
    for at in range(0, len(coded), QUERIES):
        queries = coded[at : at + QUERIES]
        outer, inner = _near(queries, stays), _near(queries, queries)
        kept: list[int] = []
        for row in range(len(queries)):
            away = bool(outer[row].any() or inner[row, kept].any())
            dropped.append(away)
            if not away:
                kept.append(row)
        stays += [queries[row] for row in kept]
    return dropped


def _near(queries: list[str], others: list[str]) -> NDArray[np.bool_]:
    from rapidfuzz import process
    from rapidfuzz.distance import Indel

    near = np.zeros((len(queries), len(others)), bool)
    if others:
        cutoff = THRESHOLD - 1e-6
        scorer = Indel.normalized_similarity
        found = process.cdist(queries, others, scorer=scorer, score_cutoff=cutoff)
        for row, column in np.argwhere(found).tolist():
            m, n = len(queries[row]), len(others[column])
            lcs = round(float(found[row, column]) * (m + n) / 2)
            near[row, column] = f_measure(lcs, m, n) >= THRESHOLD
    return near


def _code(number: int) -> str:
    return chr(number + 0x100 if number < 0xD000 else number + 0x10000)


class Timed(NamedTuple):
    """One pass over a corpus."""

    seconds: float
    cpu_seconds: float
    dropped: list[bool]


def timed(decide: Any, texts: list[str]) -> Timed:
    """Run decide on texts, from strings to decisions."""
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    dropped = decide(texts)
    cpu_s = time.process_time() - cpu_start_s
    return Timed(time.perf_counter() - start_s, cpu_s, dropped)


def measure_alone(data: Path, texts: int, seed: int) -> dict[str, Any]:
    """Return our pass over the corpus; the peak memory is that of the process, corpus included."""
    run = timed(dropped_by_us, make_texts(data, texts, seed))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    digest = hashlib.sha256(bytes(run.dropped)).hexdigest()
    return {
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "dropped": sum(run.dropped),
        "peak_rss_bytes": peak,
        "decisions_sha256": digest,
    }


def measure_stream(data: Path, number: int, seed: int) -> dict[str, Any]:
    """Return a pass one text at a time, as `generate` makes it: the nearest of each is found."""
    texts, index = make_texts(data, number, seed), RougeIndex(THRESHOLD)
    digest = hashlib.sha256()

    def decide(texts: list[str]) -> list[bool]:
        dropped = []
        for text in texts:
            near = index.nearest(text)
            digest.update(repr(near).encode())
            dropped.append(near is not None and near.score >= THRESHOLD)
            if not dropped[-1]:
                index.add(text)
        return dropped

    run = timed(decide, texts)
    return {
        "bench": "rouge_stream",
        "texts": number,
        "seed": seed,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "dropped": sum(run.dropped),
        "nearest_sha256": digest.hexdigest(),
    }


def measure(data: Path, number: int, seed: int, against: int) -> dict[str, Any]:
    """Check, then time; against is on how many texts rapidfuzz is timed, 0 for none.

    Raises:
        ValueError: decisions differ, or a process failed.
    """
    # late, for it imports torch, and the process that is measured needs none
    from bioinstruct.benches.harness import describe, run_alone

    options = ["--data", str(data), "--texts", str(number), "--seed", str(seed), "--alone"]
    alone = run_alone(__file__, options)
    texts = make_texts(data, number, seed)
    _same(dropped_by_us(texts[:CHECKED]), dropped_by_pairs(texts[:CHECKED]), "every pair")
    row = {"bench": "rouge_dedup", "texts": number, "seed": seed, **alone}
    row["words_per_text"] = sum(text.count(" ") + 1 for text in texts) / number
    if against:
        some = texts[:against]
        ours, theirs = timed(dropped_by_us, some), timed(dropped_by_rapidfuzz, some)
        _same(ours.dropped, theirs.dropped, "rapidfuzz")
        row["against_rapidfuzz"] = {
            "texts": len(some),
            "seconds": ours.seconds,
            "rapidfuzz_seconds": theirs.seconds,
            "rapidfuzz_cpu_seconds": theirs.cpu_seconds,
            "ratio_cpu": theirs.cpu_seconds / ours.cpu_seconds,
        }
    import torch

    return {**row, **describe(torch.device("cpu"), ("rapidfuzz",))}


def _same(ours: list[bool], theirs: list[bool], name: str) -> None:
    wrong = [place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(ours)} decisions differ from those by {name}, first that on "
            f"text {wrong[0]}; nothing counts"
        )


def _alpaca() -> Path:
    folder = os.environ.get("BIOINSTRUCT_DATA")
    if not folder:
        raise ValueError("set BIOINSTRUCT_DATA to the folder of the larger data, or pass --data")
    return Path(folder) / ALPACA


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--texts", type=click.IntRange(1), default=25_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help=f"Default: BIOINSTRUCT_DATA/{ALPACA}")
@click.option(
    "--rapidfuzz",
    "against",
    type=click.IntRange(0),
    default=25_000,
    show_default=True,
    help="Time rapidfuzz on at most so many texts (its time grows with their square); 0: do not.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the line.")
@click.option("--stream", is_flag=True, help="Time one text at a time instead, and its nearest.")
@click.option("--alone", is_flag=True, hidden=True)
def command(
    texts: int,
    seed: int,
    data: Path | None,
    against: int,
    out: Path | None,
    stream: bool,
    alone: bool,
) -> None:
    """Time the removal of near copies; print one JSON line."""
    data = data or _alpaca()
    if alone or stream:
        measured = measure_alone(data, texts, seed) if alone else measure_stream(data, texts, seed)
        print(json.dumps(measured))
        return
    from bioinstruct.benches.harness import report

    if against:
        _need_rapidfuzz()
    report(measure(data, texts, seed, against), out)


def _need_rapidfuzz() -> None:
    try:
        import rapidfuzz  # noqa: F401
    except ImportError as error:
        raise ValueError("rapidfuzz is not installed; install it, or pass --rapidfuzz 0") from error


if __name__ == "__main__":
    console.run(command)
