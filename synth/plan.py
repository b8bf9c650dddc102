"""A run of synthesis, resolved: its settings, its requests, and the file that repeats it.

What decides the records - model, seeds, prompt, sampling, format, rules, seed - is fixed once a run
has an answer; `run.toml` holds it, with hashes of seeds and prompt. How many records are wanted,
how fast and for how much may change with every invocation.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bioinstruct.synth import draws, models, money
from bioinstruct.synth.answers import schema
from bioinstruct.synth.endpoint import OPENAI
from bioinstruct.synth.files import write_text
from bioinstruct.synth.filters import ROUGE, RULES, rouge_threshold
from bioinstruct.synth.money import Prices
from bioinstruct.synth.pace import Limits
from bioinstruct.synth.prompting import (
    FORMATS,
    category_wish,
    facet_wish,
    prompt,
    read_prompt,
)
from bioinstruct.synth.seeds import COUNTS, FACETS, Seed, read_seeds
from bioinstruct.synth.text import shown

RUN = "run.toml"
_MAX_SEED = 2**31 - 1  # the largest `seed` that every server takes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user chooses; defaults as of the command line."""

    out: Path
    """The run's folder."""
    n: int
    """Records wanted."""
    model: str
    """As the endpoint calls it."""
    base_url: str = OPENAI
    api_key_env: str | None = None
    """The environment variable that holds the key. Default: OPENAI_API_KEY."""
    seeds: Path | None = None
    """Records to show as examples. Default: the installed ones."""
    prompt: Path | None = None
    """A prompt of one's own."""
    models: Path | None = None
    """A table of models of one's own."""
    seed: int = 0
    """Of the draws, and of the sampling where the model takes one."""
    format: str = "schema"
    """How answers are written: schema (JSON) or list (the paper's numbered list)."""
    rules: str = "paper"
    rouge: float = ROUGE
    temperature: float | None = None
    """Default: 1.0 where the model takes a temperature."""
    top_p: float | None = None
    max_tokens: int = 8192
    """The most tokens of one answer."""
    price_in: float | None = None
    """USD per million tokens read. Default: the table's."""
    price_out: float | None = None
    batch_factor: float | None = None
    """What a batch costs, as a share of the prices. Default: the table's."""
    cache: Path | None = None
    """A folder of answers that runs share: what stands there is not bought."""
    rotate: int = 0
    """How many of a request's three examples are accepted records."""
    quotas: str = ""
    """Shares of the categories, such as qa=0.25,ie=0.35,gen=0.3,other=0.1, or `paper`."""
    facets: str = ""
    """Facets of the seeds, such as topic,difficulty, of which each request asks for one value."""
    budget: float | None = None
    """USD for the folder, all invocations together; infinity for no cap. Default: twice the
    estimate."""
    limits: Limits = Limits()
    allow_phi_like: bool = False
    """Send seeds of one's own to a remote endpoint although they look as if they identify
    persons."""

    def __post_init__(self) -> None:
        for name, allowed in (("format", FORMATS), ("rules", RULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        for name, low, high in (
            ("n", 1, 10**7),
            ("max_tokens", 1, 10**6),
            ("seed", 0, 2**63),
            ("temperature", 0, 2),
            ("top_p", 0, 1),
            ("price_in", 0, 1e6),
            ("price_out", 0, 1e6),
            ("batch_factor", 0, 1),
            ("rotate", 0, draws.SHOWN - 1),
            ("budget", 0, float("inf")),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must lie in {low} to {high}, not {value}")
        rouge_threshold(self.rules, self.rouge)
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("--price-in and --price-out come together; give both or neither")


@dataclass(frozen=True, slots=True)
class Asked:
    """Request i of a run."""

    index: int
    seeds: tuple[Seed, ...]
    """The examples; rotated ones are accepted records."""
    request: models.Request
    facets: dict[str, str]


class Plan:
    """Settings with everything they name read and checked.

    Args:
        settings: what a user chose.
        draw: uniform or permuted. Default: as the rules have it, uniform for the paper's.

    Raises:
        ValueError: the model has no price, or seeds, prompt or table are unusable.
        OSError: a file cannot be opened.
    """

    def __init__(self, settings: Settings, draw: str | None = None) -> None:
        self.settings = settings
        self.draw = draw or ("uniform" if settings.rules == "paper" else "permuted")
        self.model = models.read_model(settings.model, settings.models)
        self.seeds, self.template = (
            read_seeds(settings.seeds),
            read_prompt(settings.prompt, settings.format),
        )
        self.prices = self._prices()
        self.quotas = _quotas(settings.quotas)
        self.facets = self._facets()
        if (self.quotas or self.facets) and "{also}" not in self.template:
            raise ValueError(
                f"{settings.prompt}: with quotas or facets a prompt needs {{also}}, where a "
                "request says what it wants; put it behind the list of requirements"
            )
        if self.quotas and (bare := [s for s in self.seeds if s.category not in COUNTS]):
            raise ValueError(
                f"{bare[0].record.where}: with quotas every seed needs its 'category', one of "
                f"{', '.join(COUNTS)}"
            )

    @property
    def in_rounds(self) -> bool:
        """Whether a request depends on the records accepted before its round."""
        return bool(self.settings.rotate or self.quotas)

    def _prices(self) -> Prices:
        settings, model = self.settings, self.model
        given = settings.price_in is not None
        price_in = settings.price_in if given else model.price_in
        price_out = settings.price_out if given else model.price_out
        if price_in is None or price_out is None:
            raise ValueError(
                f"no price is known for {model.name!r}; pass --price-in and --price-out "
                "(USD per million tokens; 0 for a server of your own)"
            )
        return Prices(money.per_token(price_in), money.per_token(price_out))

    @property
    def batch_prices(self) -> Prices:
        """What a batch costs.

        Raises:
            ValueError: the model's entry does not say what part of the prices a batch costs.
        """
        factor = self.settings.batch_factor
        factor = self.model.batch if factor is None else factor
        if factor is None:
            raise ValueError(
                f"it is not known what a batch costs for {self.model.name!r}; pass --batch-factor "
                "(0.5 where batches cost half, 1 where they cost the same)"
            )
        return Prices(*(math.ceil(price * Fraction(str(factor))) for price in self.prices))

    def _facets(self) -> dict[str, list[str]]:
        """Return the values of each facet asked for, as the seeds have them."""
        names = [name.strip() for name in self.settings.facets.split(",") if name.strip()]
        values = {
            name: sorted({s.facets[name] for s in self.seeds if name in s.facets}) for name in names
        }
        for name, found in values.items():
            if not found:
                raise ValueError(
                    f"no seed has a facet {name!r}; the installed ones have {', '.join(FACETS)}"
                )
        return values

    def ask(
        self, index: int, seeds: tuple[Seed, ...], wanted: Mapping[str, int] | None = None
    ) -> Asked:
        """Return request index.

        Args:
            index: counted from 0.
            seeds: the examples it shows.
            wanted: with quotas, the number of tasks of each category.
        """
        form, seed = self.settings.format, self.settings.seed
        facets = {
            name: values[draws.number(seed, "facet", name, index) % len(values)]
            for name, values in self.facets.items()
        }
        wishes = [category_wish(wanted, form)] if wanted else []
        wishes += [facet_wish(facets)] if facets else []
        text = prompt(self.template, seeds, form, wishes=wishes, with_category=wanted is not None)
        request = models.Request(self.body(text, index), self.settings.max_tokens)
        return Asked(index, seeds, request, facets)

    def body(self, text: str, index: int) -> dict[str, object]:
        """Return the body of request index with a prompt."""
        settings, takes = self.settings, self.model.sampling
        sampling: dict[str, float] = {}
        if settings.temperature is not None or "temperature" in takes:
            sampling["temperature"] = 1.0 if settings.temperature is None else settings.temperature
        if settings.top_p is not None:
            sampling["top_p"] = settings.top_p
        if "seed" in takes:
            sampling["seed"] = draws.number(settings.seed, "sampling", index) % _MAX_SEED
        return models.body(
            self.model,
            [{"role": "user", "content": text}],
            cap_tokens=settings.max_tokens,
            sampling=sampling,
            response_format=schema(self.quotas) if settings.format == "schema" else None,
        )

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """What may not change once a run has an answer, by the name a user knows."""
        settings = self.settings
        rest = {k: v for k, v in self.body("", 0).items() if k not in ("model", "messages", "seed")}
        rest.pop("response_format", None)
        seeds = [[s.id, s.record.instruction, s.record.input, s.record.output] for s in self.seeds]
        return {
            "model": settings.model,
            "format": settings.format,
            "seeds": _hash(json.dumps(seeds)),
            "prompt": _hash(self.template),
            "sampling": json.dumps(rest, sort_keys=True),
            "rules": settings.rules,
            "rouge": settings.rouge,
            "seed": settings.seed,
            "draw": self.draw,
            "rotate": settings.rotate,
            "quotas": json.dumps(self.quotas),
            "facets": ",".join(self.facets),
        }


def _quotas(text: str) -> dict[str, float]:
    """Return the shares that a text names, which add up to 1; none for an empty text."""
    if text == "paper":
        return {name: count / sum(COUNTS.values()) for name, count in COUNTS.items()}
    shares: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            shares[name.strip()] = -1.0
    total = sum(shares.values())
    if shares and (
        not set(shares) <= set(COUNTS)
        or not all(share > 0 for share in shares.values())
        or not math.isclose(total, 1, abs_tol=1e-6)
    ):
        raise ValueError(
            f"quotas must be shares that add up to 1, such as qa=0.25,ie=0.35,gen=0.3,other=0.1, "
            f"or `paper`, not {text!r}"
        )
    return {name: shares[name] for name in COUNTS if name in shares}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_run(folder: Path) -> dict[str, Any]:
    """Return a run's run.toml.

    Raises:
        ValueError: it is broken or none of ours.
        OSError: there is none.
    """
    path = folder / RUN
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: broken TOML: {error}") from error
    if not isinstance(content.get("fixed"), dict) or not isinstance(content.get("free"), dict):
        raise ValueError(
            f"{path} was not written by bioinstruct-synth: [fixed] or [free] is missing"
        )
    return content


def refuse_changes(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse another value of what is fixed.

    Raises:
        ValueError: naming the field and both values.
    """
    for field, value in now.items():
        if was.get(field) != value:
            raise ValueError(
                f"{folder} was begun with {field} = {shown(was.get(field))}, now it is "
                f"{shown(value)}; only n, concurrency, budget, prices and limits may change: "
                "set it back, or choose another --out"
            )


def write_run(plan: Plan, budget: int | None) -> None:
    """Write run.toml: what repeats the run, and what this invocation chose."""
    settings, limits = plan.settings, plan.settings.limits
    free: dict[str, Any] = {
        "n": settings.n,
        "base_url": settings.base_url,
        "price_in": plan.prices.input_pico / 1e6,
        "price_out": plan.prices.output_pico / 1e6,
        "prices_as_of": plan.model.as_of if settings.price_in is None else "given",
        "budget_usd": "none" if budget is None else budget / money.PICO,
        "concurrency": limits.concurrency,
        "rpm": limits.rpm or "none",
        "tpm": limits.tpm or "none",
        "timeout_s": limits.timeout_s,
        "seeds_file": str(settings.seeds or "installed"),
        "prompt_file": str(settings.prompt or "installed"),
        "bioinstruct": version("bioinstruct"),
    }
    lines = ["# written by bioinstruct-synth; [fixed] decides the records", "[fixed]"]
    lines += [
        f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in plan.fixed.items()
    ]
    lines += ["", "[free]"]
    lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in free.items()]
    write_text(settings.out / RUN, "\n".join(lines) + "\n")
