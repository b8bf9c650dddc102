"""Draws against a slow oracle that cuts token by token, and what generation promises of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.model import Llm
from bioinstruct.model.generate import generate
from bioinstruct.model.llama import pack_documents
from bioinstruct.model.sampling import Sampling, choose, penalised, probabilities


def slowly(logits: list[float], sampling: Sampling) -> np.ndarray:
    """The definition, one token at a time, in float64."""
    p = np.exp(np.array(logits, dtype=np.float64) / sampling.temperature)
    p /= p.sum()
    kept = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    share, total, cut = 0.0, p[kept].sum(), []
    for i in kept:
        if share / total < sampling.top_p:
            cut.append(i)
        share += p[i]
    cut = [i for i in cut if p[i] >= sampling.min_p * p[cut[0]]]
    out = np.zeros(len(p))
    out[cut] = p[cut] / p[cut].sum()
    return out


@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 5),
    top_p=st.sampled_from([0.05, 0.31, 0.77, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.37, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_probabilities_are_those_of_the_definition(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    values = [x / 9.7 for x in logits]
    found = probabilities(torch.tensor([values], dtype=torch.float64), sampling)[0].numpy()
    assert np.abs(found - slowly(values, sampling)).max() < 1e-9


def test_the_penalty_lowers_what_is_there() -> None:
    logits = torch.tensor([[2.0, -2.0, 4.0, 0.0], [2.0, -2.0, 4.0, 0.0]])
    found = penalised(logits, [[0, 1, 1], [2, 9]], 2.0)
    assert found.tolist() == [[1.0, -4.0, 4.0, 0.0], [2.0, -2.0, 2.0, 0.0]]
    assert penalised(logits, [[0], [0]], 1.0) is logits


def test_greedy_follows_the_penalty() -> None:
    logits = torch.tensor([[2.0, 1.9]])
    for penalty, token in ((1.0, 0), (1.1, 1)):
        sampling = Sampling(repetition_penalty=penalty)
        assert choose(logits, [[0]], sampling, [torch.Generator()]) == [token]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1}, "temperature is -1; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0, at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 1.1}, "min_p is 1.1; it must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0"),
    ],
)
def test_wrong_settings(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**settings)  # type: ignore[arg-type]


PROMPTS = [[1, 100, 30], [1], [1, 55, 9, 12, 8]]
WARM = Sampling(temperature=1.0, top_p=0.9, top_k=40, seed=3)


def test_top_k_of_one_is_greedy(stories: Llm) -> None:
    greedy = generate(stories.model, PROMPTS, max_new_tokens=10, end_ids=[2])
    sampling = Sampling(temperature=2.0, top_k=1)
    warm = generate(stories.model, PROMPTS, max_new_tokens=10, end_ids=[2], sampling=sampling)
    assert warm == greedy


def test_a_request_s_seed_decides_wherever_it_stands(stories: Llm) -> None:
    def answers(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        done = generate(
            stories.model, prompts, max_new_tokens=12, end_ids=[2], sampling=WARM, seeds=seeds
        )
        return [one.ids for one in done]

    first = answers(PROMPTS, [7, 8, 9])
    assert answers(PROMPTS[::-1], [9, 8, 7]) == first[::-1]
    assert answers([PROMPTS[1]] * 2, [8, 8]) == [first[1]] * 2
    assert answers([PROMPTS[1]] * 3, [1, 2, 3]) != [first[1]] * 3


def test_seeds_must_be_as_many_as_prompts(stories: Llm) -> None:
    with pytest.raises(ValueError, match="there are 1 seeds for 3 prompts"):
        generate(stories.model, PROMPTS, max_new_tokens=2, end_ids=[2], seeds=[1])


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_log_probabilities_are_the_model_s_own(stories: Llm, sampling: Sampling) -> None:
    done = generate(
        stories.model, PROMPTS, max_new_tokens=12, end_ids=[2], sampling=sampling, logprobs=True
    )
    for prompt, one in zip(PROMPTS, done, strict=True):
        assert one.logprobs is not None
        with torch.inference_mode():
            logits = stories.model.logits(pack_documents([[*prompt, *one.ids]]))
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        places = torch.tensor(one.ids)[:, None]
        assert torch.tensor(one.logprobs) == pytest.approx(
            expected.gather(-1, places).flatten(), abs=1e-4
        )


def test_without_being_asked_there_are_none(stories: Llm) -> None:
    (one,) = generate(stories.model, [[1]], max_new_tokens=2, end_ids=[2])
    assert one.logprobs is None


def test_a_penalty_keeps_from_repeating(stories: Llm) -> None:
    strong = Sampling(repetition_penalty=1e9)
    (one,) = generate(stories.model, [[1, 100]], max_new_tokens=30, end_ids=[2], sampling=strong)
    assert len(set(one.ids)) == len(one.ids)
