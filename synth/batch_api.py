"""OpenAI's files and batches, through the `openai` package.

A batch is a file of requests, one JSON object a line, that the endpoint works off within a day at a
lower price. It is created with a name of the run and a number among its metadata, so that it is
found again if its answer to the creation never arrived. Retries are ours: reading is repeated,
uploading and deleting too, and creating only after a look at what exists.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from bioinstruct.synth.endpoint import Endpoint, fatal, says
from bioinstruct.synth.models import Request
from bioinstruct.synth.pace import retry_after_s
from bioinstruct.synth.totals import Answer

if TYPE_CHECKING:
    import openai

RUN, NUMBER = "bioinstruct_run", "bioinstruct_batch"
TRIES, BACKOFF_S = 6, 0.5
RETRIED = frozenset((408, 409, 425, 429))
ENDED = frozenset(("completed", "failed", "expired", "cancelled"))
PATH = "/v1/chat/completions"

T = TypeVar("T")


class Remote(NamedTuple):
    """A batch as the endpoint tells of it."""

    id: str
    number: int
    status: str
    input: str
    """The file of its requests."""
    files: tuple[str, ...]
    """Output and errors, where there are such files."""
    completed: int
    """Requests that were answered, and so billed."""
    total: int
    problems: tuple[tuple[str, str], ...]
    """Codes and messages of what made it fail."""


class Line(NamedTuple):
    """One line of an output or an error file."""

    key: str
    """Of the request; empty where the line is none of the documented form."""
    status: int | None
    """Of the response; None where there is none."""
    raw: bytes
    """The response's body."""
    error: str


class Unclear(Exception):
    """Whether a batch was created is not known."""


class BatchApi:
    """An endpoint's files and batches.

    Args:
        endpoint: where to.
        timeout_s: how long one call may take.

    Raises:
        ValueError: the `openai` package is missing.
    """

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        try:
            import openai
        except ImportError as error:
            raise ValueError(
                "batches need the openai package; install it with pip install 'bioinstruct[batch]'"
            ) from error
        self.openai, self.endpoint = openai, endpoint
        self.client = openai.OpenAI(
            base_url=endpoint.base_url,
            api_key=endpoint.key or "none",
            timeout=timeout_s,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=not endpoint.local),
        )

    def close(self) -> None:
        """Let go of the connections."""
        self.client.close()

    def upload(self, requests: Sequence[Request]) -> str:
        """Upload the requests of a batch; return the file's name."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "batch.jsonl"
            with path.open("wb") as file:
                file.writelines(line_of(request) for request in requests)
            made = self._again(lambda: self.client.files.create(file=path, purpose="batch"))
        return str(made.id)

    def create(self, file: str, run: str, number: int) -> Remote:
        """Create a batch.

        Raises:
            Unclear: no answer came, so that it may or may not exist.
        """
        try:
            made = self.client.batches.create(
                input_file_id=file,
                endpoint=PATH,
                completion_window="24h",
                metadata={RUN: run, NUMBER: str(number)},
            )
        except self.openai.APIStatusError as error:
            if error.status_code in RETRIED or error.status_code >= 500:
                raise Unclear(self._said(error)) from error
            raise self._refused(error) from error
        except self.openai.APIConnectionError as error:
            raise Unclear(str(error.__cause__ or error)) from error
        return _remote(made)

    def of_run(self, run: str) -> dict[int, Remote]:
        """Return a run's batches by their numbers, whoever created them."""
        found = self._again(lambda: list(self.client.batches.list(limit=100)))
        return {
            remote.number: remote
            for remote in (_remote(made) for made in found if (made.metadata or {}).get(RUN) == run)
        }

    def one(self, name: str) -> Remote | None:
        """Return a batch, or None where the endpoint has none of this name."""

        def call() -> Any:
            try:
                return self.client.batches.retrieve(name)
            except self.openai.NotFoundError:
                return None

        made = self._again(call)
        return made and _remote(made)

    def delete(self, file: str) -> None:
        """Delete a file, or find it deleted.

        Raises:
            ValueError: the endpoint does not do it.
        """

        def call() -> None:
            with contextlib.suppress(self.openai.NotFoundError):
                self.client.files.delete(file)

        self._again(call)

    def lines(self, file: str) -> Iterator[Line]:
        """Yield the lines of a file of answers or errors."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "answers.jsonl"
            self._again(lambda: self._download(file, path))
            with path.open("rb") as content:
                for text in content:
                    yield _line(text)

    def _download(self, file: str, path: Path) -> None:
        with self.client.files.with_streaming_response.content(file) as response:
            response.stream_to_file(path)

    def _again(self, call: Callable[[], T]) -> T:
        """Call until it succeeds or cannot; for what may be done twice."""
        for attempt in range(1, TRIES + 1):
            try:
                return call()
            except self.openai.APIStatusError as error:
                passing = error.status_code in RETRIED or error.status_code >= 500
                if not passing or attempt == TRIES:
                    raise self._refused(error) from error
                told_s = retry_after_s(error.response.headers)
            except self.openai.APIConnectionError as error:
                if attempt == TRIES:
                    raise ValueError(
                        f"cannot reach {self.endpoint.base_url}: {error.__cause__ or error}; the "
                        "same command goes on"
                    ) from error
                told_s = None
            time.sleep(BACKOFF_S * 2 ** (attempt - 1) if told_s is None else told_s)
        raise AssertionError

    def _refused(self, error: "openai.APIStatusError") -> ValueError:
        answer = self._answer(error)
        if error.status_code == 404:
            return ValueError(
                f"{self.endpoint.base_url} has no such file or batch, or no Batch API (HTTP 404: "
                f"{says(answer)}); `generate` needs none"
            )
        return ValueError(fatal(self.endpoint, "", answer) or self._said(error))

    def _said(self, error: "openai.APIStatusError") -> str:
        return f"HTTP {error.status_code}: {says(self._answer(error))}; the same command goes on"

    def _answer(self, error: "openai.APIStatusError") -> Answer:
        return Answer("", error.status_code, self.endpoint.without_key(error.response.content))


def line_of(request: Request) -> bytes:
    """Return a request as a line of a batch's file."""
    head = json.dumps({"custom_id": request.key, "method": "POST", "url": PATH}).encode()
    return b'%b, "body": %b}\n' % (head[:-1], request.body)


def _remote(made: Any) -> Remote:
    files = (name for name in (made.output_file_id, made.error_file_id) if name)
    counts = made.request_counts
    errors = made.errors.data if made.errors and made.errors.data else []
    return Remote(
        made.id,
        int((made.metadata or {}).get(NUMBER, 0)),
        made.status,
        made.input_file_id,
        tuple(files),
        counts.completed if counts else 0,
        counts.total if counts else 0,
        tuple((error.code or "", error.message or "") for error in errors),
    )


def _line(text: bytes) -> Line:
    try:
        value = json.loads(text)
        key, response, error = value["custom_id"], value.get("response"), value.get("error")
        status = response["status_code"] if response else None
        # ASCII, so that halves of surrogate pairs stay what they are
        raw = json.dumps(response["body"], separators=(",", ":")).encode() if response else b""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Line("", None, b"", "")
    if not isinstance(key, str) or not (status is None or type(status) is int):
        return Line("", None, b"", "")
    return Line(key, status, raw, _words(error))


def _words(error: object) -> str:
    if not isinstance(error, dict):
        return ""
    return " ".join(str(error[name]) for name in ("code", "message") if error.get(name))
