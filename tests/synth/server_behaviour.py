"""What the local server is told to do, and what it remembers of each request."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

FAULTS = ("429", "429-bare", "500", "slow", "cut", "malformed", "no-usage")


@dataclass
class Behaviour:
    """What the server does; may be changed while it runs."""

    faults: dict[str, float] = field(default_factory=dict)
    """Probability of each fault."""
    latency_s: float = 0.0
    slow_s: float = 5.0
    retry_after: str = "0.05"
    words: int = 12
    """Words of a task's input, and of its output."""
    tasks: int = 17
    junk: float = 0.15
    """Share of the tasks that the paper's rules drop."""
    form: str = "schema"
    categories: tuple[str, ...] = ("qa", "ie", "gen", "other")
    """Of its tasks, one as often as the other; said where the prompt speaks of categories."""
    content: str | None = None
    """Said instead of tasks."""
    finish: str | None = None
    usage_extra: int = 0
    """Tokens billed beyond the truth."""
    honour_cap: bool = True
    rpm: int | None = None
    """Requests in any minute; more get a 429 with Retry-After."""
    error: tuple[int, dict[str, Any]] | None = None
    """A status and an error object for every request."""
    batch_s: float = 0.0
    """How long a batch takes."""
    batch_end: tuple[str, float] = ("completed", 1.0)
    """The status in which batches end, and the share of their requests that is worked off."""
    batch_errors: float = 0.0
    """Share of a batch's requests that end in its error file, with a 500."""
    batch_hidden: float = 0.0
    """Share of a batch's answers that are billed and stand in no file."""
    batch_cuts: int = 0
    """How many creations of batches are carried out and then answered by a cut connection."""
    batch_answer_s: float = 0.0
    """How long the answer to a creation takes, after it was carried out."""
    batch_problem: dict[str, Any] | None = None
    """The error with which batches fail to validate."""
    delete_error: tuple[int, dict[str, Any]] | None = None
    """A status and an error object for every deletion of a file."""
    key: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


class Seen(NamedTuple):
    """One request as the server saw it."""

    time_s: float
    body_hash: str
    status: int
    fault: str
    prompt_tokens: int
    completion_tokens: int
    price: float = 1.0
    """Share of the price that is asked for it."""
