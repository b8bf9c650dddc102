"""NCBI-disease: find the disease mentions of a sentence; entity-level precision, recall and F1.

Paper: Dogan, Leaman, Lu. NCBI disease corpus: a resource for disease name recognition and concept
normalization. J Biomed Inform 47:1-10, 2014. Public domain (US National Library of Medicine); the
CoNLL form is Crichton et al.'s, BMC Bioinformatics 18:368, 2017, CC BY 4.0.
File: test.tsv of NCBI-disease-IOB (940 sentences, 960 mentions), plain or gzip.
Reading: a mention is right if both of its ends are; see eval/answers.py for how answers are laid
onto the sentence. An unparsed answer predicts nothing, so its gold mentions are false negatives.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bioinstruct.eval import answers, metrics
from bioinstruct.eval.task import Item, Task, Verdict
from bioinstruct.synth.convert import NER_FORMS, ner_answer, ner_prompt
from bioinstruct.synth.sources import Sentence, keep_entity, read_conll

VERSION = 1
ENTITY = "disease"


def _read(path: Path, form: str) -> list[Item]:
    return [_item(s, form) for s in keep_entity(read_conll(path), ENTITY)]


def _item(sentence: Sentence, form: str) -> Item:
    prompt = ner_prompt(sentence, ENTITY, form)
    judge = partial(_judge, sentence, form)
    return Item(str(sentence.number), *prompt, ner_answer(sentence, form), judge)


def _judge(sentence: Sentence, form: str, output: str) -> Verdict:
    gold = {(start, end) for start, end, _ in sentence.spans}
    bad_lines: dict[str, int] = {}
    placed = None
    if form == "list":
        mentions = answers.read_list(output, sentence.tokens)
        if mentions is not None:
            placed = answers.place_list(mentions, sentence.tokens)
    elif tagged := answers.read_tagged(output):
        placed = answers.place_tagged(tagged, sentence.tokens)
        bad_lines = {"bad_lines": tagged.bad_lines}
    if placed is None:
        return Verdict(None, {"tp": 0, "fp": 0, "fn": len(gold), "hallucinated": 0})
    hits = len(gold & set(placed.spans))
    misses = len(placed.spans) - hits + len(placed.hallucinated)
    counts = {"tp": hits, "fp": misses, "fn": len(gold) - hits}
    parsed = {
        "mentions": [[start, end, sentence.text(start, end)] for start, end in placed.spans],
        "hallucinated": placed.hallucinated,
    }
    return Verdict(parsed, {**counts, "hallucinated": len(placed.hallucinated), **bad_lines})


def _grade(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, metrics.Score]:
    counts_NC = np.array([[v.counts[name] for name in ("tp", "fp", "fn")] for v in verdicts])
    total: Counter[str] = Counter()
    for verdict in verdicts:
        total.update(verdict.counts)
    unparsed = sum(v.parsed is None for v in verdicts)
    named = {"f1": metrics.f1, "precision": metrics.precision, "recall": metrics.recall}
    return {
        name: metrics.score(
            counts_NC, statistic, unparsed=unparsed, extra=dict(total), version=VERSION
        )
        for name, statistic in named.items()
    }


TASK = Task(
    name="ncbi-disease",
    version=VERSION,
    paper="Dogan, Leaman, Lu. J Biomed Inform 47:1-10, 2014",
    licence="public domain; CoNLL form CC BY 4.0",
    source="test.tsv[.gz] of NCBI-disease-IOB; ids are sentence numbers, from 1",
    forms=NER_FORMS,
    max_new_tokens=None,
    main="f1",
    read=_read,
    grade=_grade,
)
