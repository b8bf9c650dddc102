"""Batched decoding with a KV cache: greedy or sampled, prompts of different length at once.

Prompts are prefilled as a pack, without padding, through the very ops of training; their keys and
values go into a cache (B, G, U, E), and then every sequence advances one token a step. Finished
sequences leave the batch, so the last long answer does not carry the others along. Each sequence
draws from a generator of its own, seeded by the seed and its number, so that a sampled answer does
not depend on what stands beside it.

Shapes   B sequences, G key/value heads, J query heads of each, U cached tokens, E head width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bioinstruct.kernels import Heads
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.llama import Llama, pack_documents
from bioinstruct.model.sampling import Sampling, choose

CACHE_BYTES = 1 << 30  # of one batch's keys and values
MAX_BATCH = 64


class Completion(NamedTuple):
    """What a model added to one prompt."""

    ids: list[int]
    """Generated tokens, without the one that ended them."""
    finished: bool
    """True where the model stopped by itself, False at the token limit."""
    logprobs: list[float] | None = None
    """Log-probability of each of ids by the model itself, before temperature, penalty and cuts;
    None where it was not asked for."""


class _Cache:
    """Keys and values of a batch, left-aligned: sequence b owns the first lengths_B[b] slots."""

    def __init__(self, model: Llama, B: int, capacity: int):
        config = model.config
        shape = (config.num_layers, 2, B, config.num_kv_heads, capacity, config.head_dim)
        # zeros, not empty: unused slots are masked, but 0 * NaN would still be NaN
        self.kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.lengths_B = torch.zeros(B, dtype=torch.int64, device=model.device)
        self.rows_B = torch.arange(B, device=model.device)

    def store_prompt(self, layer: int, heads: Heads, bounds: Sequence[int]) -> None:
        for b, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            self.kv[layer, 0, b, :, : end - start] = heads.k_TGE[start:end].transpose(0, 1)
            self.kv[layer, 1, b, :, : end - start] = heads.v_TGE[start:end].transpose(0, 1)

    def attend(self, layer: int, heads: Heads) -> Tensor:
        """Append one token a sequence and attend over all of its own."""
        q_BHE, k_BGE, v_BGE = heads
        B, G, E = k_BGE.shape
        self.kv[layer, 0][self.rows_B, :, self.lengths_B] = k_BGE
        self.kv[layer, 1][self.rows_B, :, self.lengths_B] = v_BGE
        longest = int(self.lengths_B.max()) + 1
        k_BGUE, v_BGUE = self.kv[layer, :, :, :, :longest]
        slots = torch.arange(longest, device=k_BGE.device)
        mask_BU = slots <= self.lengths_B[:, None]
        # the query heads of a key head stand where queries of different positions would stand
        o = functional.scaled_dot_product_attention(
            q_BHE.view(B, G, -1, E), k_BGUE, v_BGUE, attn_mask=mask_BU[:, None, None]
        )
        return o.reshape(B, -1, E)

    def keep(self, kept: Tensor) -> None:
        self.kv = self.kv[:, :, kept]
        self.lengths_B = self.lengths_B[kept]
        self.rows_B = torch.arange(len(kept), device=kept.device)


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    adapters: Adapters | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    logprobs: bool = False,
    num_tokens: int | None = None,
    stopped: Callable[[list[int]], bool] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Continue every prompt.

    Args:
        model: loaded weights.
        prompts: token ids, each at least one long.
        max_new_tokens: limit of each answer, > 0.
        end_ids: tokens that end an answer.
        adapters: LoRA branches to add.
        temperature: 0 takes the likeliest token, otherwise samples from softmax(logits / t).
        seed: of the sampling; sequence i draws from (seed, i).
        sampling: in place of temperature and seed, where they are not enough.
        seeds: one a prompt, in place of (seed, i): equal ones draw alike, wherever they stand.
        logprobs: whether completions say how likely their tokens were.
        num_tokens: ids at or above it are padding of the embedding and never chosen.
        stopped: asked after each token with an answer's ids; True ends it there.
        on_progress: called with the number of finished prompts.

    Returns:
        One completion a prompt, in order.

    Raises:
        ValueError: an empty prompt, or arguments out of range.
    """
    _check(model, prompts, max_new_tokens, seeds)
    how = sampling or Sampling(temperature=temperature, seed=seed)
    results: list[Completion | None] = [None] * len(prompts)
    done = 0
    for batch in _batches(model, prompts, max_new_tokens):
        own = [_mixed(how.seed, i) if seeds is None else _mixed(seeds[i], 0) for i in batch]
        generators = [torch.Generator().manual_seed(number) for number in own]
        decoder = _Decoder(
            model, adapters, max_new_tokens, set(end_ids), how, num_tokens, stopped, logprobs
        )
        for i, completion in zip(
            batch, decoder.run([prompts[i] for i in batch], generators), strict=True
        ):
            results[i] = completion
        done += len(batch)
        if on_progress is not None:
            on_progress(done)
    return [completion for completion in results if completion is not None]


def _check(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seeds: Sequence[int] | None,
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"there are {len(seeds)} seeds for {len(prompts)} prompts")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} has no tokens; there is nothing to continue")
        if len(prompt) + max_new_tokens > model.config.max_positions:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, with {max_new_tokens} new ones more than "
                f"the model's {model.config.max_positions}; shorten it or lower max_new_tokens"
            )


def _mixed(seed: int, number: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + number) % (1 << 63)


def _batches(
    model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Group prompts of like length, so that the cache of a batch is nearly full."""
    config = model.config
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    token_bytes *= model.dtype.itemsize
    batches: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        slots = len(prompts[i]) + max_new_tokens
        size = len(batches[-1]) + 1 if batches else MAX_BATCH + 1
        if size > MAX_BATCH or size * slots * token_bytes > CACHE_BYTES:
            batches.append([])
        batches[-1].append(i)
    return batches


class _Decoder:
    """One batch from prefill to its last token."""

    def __init__(
        self,
        model: Llama,
        adapters: Adapters | None,
        max_new_tokens: int,
        end_ids: set[int],
        sampling: Sampling,
        num_tokens: int | None,
        stopped: Callable[[list[int]], bool] | None,
        logprobs: bool,
    ):
        self.model, self.adapters, self.max_new_tokens = model, adapters, max_new_tokens
        self.end_ids, self.sampling, self.stopped = end_ids, sampling, stopped
        self.num_tokens, self.logprobs = num_tokens, logprobs

    def run(
        self, prompts: Sequence[Sequence[int]], generators: Sequence[torch.Generator]
    ) -> list[Completion]:
        capacity = max(len(p) for p in prompts) + self.max_new_tokens
        cache = _Cache(self.model, len(prompts), capacity)
        logits_BV = self._prefill(prompts, cache)
        answers: list[list[int]] = [[] for _ in prompts]
        likely: list[list[float]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        live = list(range(len(prompts)))
        for _ in range(self.max_new_tokens):
            seen = [[*prompts[i], *answers[i]] for i in live]
            chosen = choose(logits_BV, seen, self.sampling, [generators[i] for i in live])
            scores = self._scores(logits_BV, chosen)
            for i, token, score in zip(live, chosen, scores, strict=True):
                finished[i] = token in self.end_ids
                if not finished[i]:
                    answers[i].append(token)
                    likely[i].append(score)
                    finished[i] = self.stopped is not None and self.stopped(answers[i])
            kept = [row for row, i in enumerate(live) if not finished[i]]
            live = [live[row] for row in kept]
            if not live or len(answers[live[0]]) == self.max_new_tokens:
                break
            if len(kept) < len(chosen):
                cache.keep(torch.tensor(kept, device=self.model.device))
            logits_BV = self._step([chosen[row] for row in kept], cache)
        scored = likely if self.logprobs else [None] * len(prompts)
        return [Completion(*one) for one in zip(answers, finished, scored, strict=True)]

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: _Cache) -> Tensor:
        pack = pack_documents([list(p) for p in prompts], self.model.device)
        packed = self.model.packed_attention(pack.documents)
        bounds = pack.documents.bounds

        def attend(layer: int, heads: Heads) -> Tensor:
            cache.store_prompt(layer, heads, bounds)
            return packed(layer, heads)

        h_TD = self.model(pack.ids_T, pack.positions_T, attend, self.adapters)
        cache.lengths_B = torch.tensor([len(p) for p in prompts], device=self.model.device)
        last_B = torch.tensor(bounds[1:], device=self.model.device) - 1
        return self._logits(h_TD[last_B])

    def _step(self, tokens: list[int], cache: _Cache) -> Tensor:
        ids_B = torch.tensor(tokens, device=self.model.device)
        h_BD = self.model(ids_B, cache.lengths_B, cache.attend, self.adapters)
        cache.lengths_B = cache.lengths_B + 1
        return self._logits(h_BD)

    def _logits(self, h_BD: Tensor) -> Tensor:
        return (h_BD @ self.model.head_VD[: self.num_tokens].T).float()

    def _scores(self, logits_BV: Tensor, chosen: Sequence[int]) -> list[float]:
        """Log-probabilities of the chosen tokens; zeros where nobody asks."""
        if not self.logprobs:
            return [0.0] * len(chosen)
        ids_B1 = torch.tensor(chosen, device=logits_BV.device)[:, None]
        found: list[float] = logits_BV.log_softmax(-1).gather(-1, ids_B1).flatten().tolist()
        return found
