"""Makes golden/seqeval.json: what seqeval 1.2.2, in its default mode, says of perturbed tags.

Run once in a throwaway environment that holds seqeval; no test imports it:

    python tests/eval/seqeval_golden.py DATA > tests/eval/golden/seqeval.json

DATA is the folder that BIOINSTRUCT_DATA names. The tests read `perturb` and `tags_of` from here.
"""

import gzip
import json
import random
import sys
import zlib
from pathlib import Path

FILES = (
    "ner/NCBI-disease-IOB/devel.tsv.gz",
    "ner/NCBI-disease-IOB/test.tsv.gz",
    "ner/BC5CDR-chem-IOB/test.tsv.gz",
    "ner/BC5CDR-disease-IOB/test.tsv.gz",
    "ner/JNLPBA/devel.tsv.gz",
)


def perturb(sentences: list[list[str]]) -> list[list[str]]:
    """Replace about a tenth of the tags, by a rule that every Python version computes alike."""
    kinds = sorted({tag[2:] for tags in sentences for tag in tags if tag != "O"})
    return [
        [_changed(tag, kinds, f"{i}:{j}") for j, tag in enumerate(tags)]
        for i, tags in enumerate(sentences)
    ]


def tags_of(path: Path) -> list[list[str]]:
    """Read the tags of a gzip CoNLL file, with nothing of the project's own reader."""
    blocks = gzip.decompress(path.read_bytes()).decode().split("\n\n")
    lines = [[line.split("\t") for line in block.split("\n") if line] for block in blocks]
    return [[tag for _, tag in block] for block in lines if block and block[0][0] != "-DOCSTART-"]


def _changed(tag: str, kinds: list[str], key: str) -> str:
    draw = zlib.crc32(key.encode())
    if draw % 10:
        return tag
    kind = kinds[draw // 100 % len(kinds)]
    return ("O", f"B-{kind}", f"I-{kind}")[draw // 10 % 3]


def _small_cases() -> list[list[list[str]]]:
    draw = random.Random(7)
    cases = []
    for tags in (["O", "B", "I"], ["O", "B-X", "I-X"], ["O", "B-X", "I-X", "B-Y", "I-Y"]):
        for _ in range(25):
            size = draw.randint(1, 9)
            cases.append([[draw.choice(tags) for _ in range(size)] for _ in range(2)])
    return cases


def main() -> None:
    """Print the golden values as JSON."""
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.metrics.sequence_labeling import get_entities

    def scores(gold: list[list[str]], other: list[list[str]]) -> dict[str, object]:
        hits = set(get_entities(gold)) & set(get_entities(other))
        counts = [len(hits), len(set(get_entities(gold))), len(set(get_entities(other)))]
        functions = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        values = {n: float(f(gold, other, zero_division=0)) for n, f in functions.items()}
        return {"hits_gold_predicted": counts, **values}

    small = [
        {"gold": gold, "other": other, "spans": get_entities(other), **scores([gold], [other])}
        for gold, other in _small_cases()
    ]
    files = {}
    for name in FILES:
        gold = tags_of(Path(sys.argv[1]) / name)
        files[name] = scores(gold, perturb(gold))
    lines = ",\n  ".join(json.dumps(case) for case in small)
    whole = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in files.items())
    print(f'{{\n "small": [\n  {lines}\n ],\n "files": {{\n  {whole}\n }}\n}}')


if __name__ == "__main__":
    main()
