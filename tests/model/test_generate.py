"""Decoding with a cache against decoding without one, and its contracts."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bioinstruct.model import Llm
from bioinstruct.model import generate as module
from bioinstruct.model.generate import generate
from bioinstruct.model.llama import Llama, pack_documents


def slowly(model: Llama, prompt: list[int], count: int, end: int) -> list[int]:
    """Greedy decoding that recomputes the whole sequence for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        token = int(model.logits(pack_documents([ids]))[-1].argmax())
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt) :]


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompts=st.lists(st.lists(st.integers(3, 511), min_size=1, max_size=12), min_size=1, max_size=6)
)
def test_a_batch_equals_slow_decoding_of_each(stories: Llm, prompts: list[list[int]]) -> None:
    model = stories.model
    completions = generate(model, prompts, max_new_tokens=12, end_ids=[2])
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = slowly(model, prompt, 12, 2)
        assert completion.ids == expected
        assert completion.finished == (len(expected) < 12)


def test_batches_are_cut_by_cache_size(stories: Llm, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1, 100 + i] for i in range(9)]
    whole = generate(stories.model, prompts, max_new_tokens=8, end_ids=[2])
    monkeypatch.setattr(module, "MAX_BATCH", 2)
    seen: list[int] = []
    parts = generate(stories.model, prompts, max_new_tokens=8, end_ids=[2], on_progress=seen.append)
    assert parts == whole
    assert seen == [2, 4, 6, 8, 9]


def test_samples_do_not_depend_on_their_neighbours(stories: Llm) -> None:
    prompts = [[1, 50, 60], [1], [1, 70]]

    def sample(chosen: list[list[int]], seed: int) -> list[list[int]]:
        completions = generate(
            stories.model, chosen, max_new_tokens=20, end_ids=[2], temperature=0.8, seed=seed
        )
        return [c.ids for c in completions]

    assert sample(prompts, 3) == sample(prompts, 3)
    assert sample(prompts, 3) != sample(prompts, 4)
    assert sample(prompts[:1], 3) == sample(prompts, 3)[:1]


def test_temperature_samples_from_the_softmax(stories: Llm) -> None:
    n, t = 4000, 1.5
    completions = generate(
        stories.model, [[1]] * n, max_new_tokens=1, end_ids=[], temperature=t, seed=0
    )
    counts = torch.bincount(torch.tensor([c.ids[0] for c in completions]), minlength=512) / n
    p = (stories.logits([[1]])[0][0] / t).softmax(-1)
    assert (counts - p).abs().max() < 5 * float((p * (1 - p)).max() / n) ** 0.5


def test_stop_strings_end_an_answer_and_are_not_returned(stories: Llm) -> None:
    (whole,) = stories.generate(["Once upon a time"], max_new_tokens=60)
    (cut,) = stories.generate(["Once upon a time"], max_new_tokens=60, stop=("Lily", "zzz"))
    assert "Lily" in whole
    assert cut == whole[: whole.index("Lily")]


def test_greedy_text_continues_the_prompt(stories: Llm) -> None:
    texts = stories.generate(["Once upon a time", "Tom"], max_new_tokens=8)
    assert texts == [
        stories.generate([p], max_new_tokens=8)[0] for p in ("Once upon a time", "Tom")
    ]
    assert texts[0].startswith(",")


@pytest.mark.parametrize(
    ("prompts", "changes", "sentence"),
    [
        ([[]], {}, "prompt 0 has no tokens"),
        ([[1]], {"max_new_tokens": 0}, "must be at least 1"),
        ([[1]], {"temperature": -1.0}, "must be 0 or more"),
        ([[1]], {"temperature": float("nan")}, "must be 0 or more"),
        ([[1] * 510], {}, "more than the model's 512"),
    ],
)
def test_wrong_arguments(
    stories: Llm, prompts: list[list[int]], changes: dict[str, float], sentence: str
) -> None:
    arguments = {"max_new_tokens": 8, "end_ids": [2], **changes}
    with pytest.raises(ValueError, match=sentence):
        generate(stories.model, prompts, **arguments)  # type: ignore[arg-type]
