"""Simple systems to hold a model's scores against; they answer in the same form and are scored
through the same reading as a model.

Measured on the official test sets: the lexicon of the NCBI training mentions reaches F1 0.59 with
case folded and 0.69 with case kept (folding turns abbreviations into everyday words); the majority
class of PubMedQA, yes, an accuracy of 0.552.
"""

from collections import Counter
from collections.abc import Sequence

from bioinstruct.eval.task import Item
from bioinstruct.synth.convert import ner_answer
from bioinstruct.synth.sources import Question, Sentence


def lexicon_outputs(
    train: Sequence[Sentence], items: Sequence[Item], *, form: str = "list", fold_case: bool = True
) -> list[str]:
    """Answer with whatever was a mention in training, the longest match first, left to right.

    Args:
        train: sentences whose mentions make the lexicon.
        items: of a task that finds mentions; inputs are tokens joined by single spaces.
        form: list or medtuned, as the items were made.
        fold_case: whether upper and lower case are the same.
    """
    lexicon = {
        _folded(s.tokens[span.start : span.end], fold_case) for s in train for span in s.spans
    }
    longest = max(map(len, lexicon), default=0)
    outputs = []
    for item in items:
        tokens = tuple(item.input.split(" "))
        tags = _matches(_folded(tokens, fold_case), lexicon, longest)
        outputs.append(ner_answer(Sentence(tokens, tags, "lexicon", 1, 1), form))
    return outputs


def majority_outputs(train: Sequence[Question], items: Sequence[Item]) -> list[str]:
    """Answer every question with the most frequent answer of the training questions."""
    ((answer, _),) = Counter(question.answer for question in train).most_common(1)
    return [answer] * len(items)


def _matches(
    tokens: tuple[str, ...], lexicon: set[tuple[str, ...]], longest: int
) -> tuple[str, ...]:
    """Return the B, I, O tags of the longest matches, left to right."""
    tags: list[str] = []
    while (at := len(tags)) < len(tokens):
        sizes = range(min(longest, len(tokens) - at), 0, -1)
        size = next((n for n in sizes if tokens[at : at + n] in lexicon), 0)
        tags += ["B", *["I"] * (size - 1)] if size else ["O"]
    return tuple(tags)


def _folded(tokens: tuple[str, ...], fold_case: bool) -> tuple[str, ...]:
    return tuple(token.lower() for token in tokens) if fold_case else tokens
