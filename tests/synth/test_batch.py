"""`batch` against a local server: the records of an online run, bought once, within the budget."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bioinstruct.synth import batch, generate
from bioinstruct.synth.batching import Batching
from bioinstruct.synth.console import Stopped
from bioinstruct.synth.generation import Result
from bioinstruct.synth.money import PICO
from bioinstruct.synth.report import status
from bioinstruct.synth.totals import read_totals

pytest.importorskip("openai")
PRICE_IN, PRICE_OUT = 1.0, 2.0
Make = Callable[..., Result]
QUICK = {"poll_s": 0.02}


@pytest.fixture
def given(local: dict[str, Any]) -> dict[str, Any]:
    return local | {"n": 200, "batch_factor": 0.5}


@pytest.fixture
def make(given: dict[str, Any]) -> Make:
    def call(how: dict[str, Any] | None = None, **settings: Any) -> Result:
        return batch(Batching(**QUICK | (how or {})), **given | settings)

    return call


@pytest.fixture
def online(given: dict[str, Any], tmp_path: Path) -> Callable[..., bytes]:
    """The records of the same run, asked online, as bytes."""

    def call(**settings: Any) -> bytes:
        generate(**given | {"out": tmp_path / "online"} | settings)
        return (tmp_path / "online" / "records.jsonl").read_bytes()

    return call


def billed(server: Any) -> float:
    return server.bill(PRICE_IN, PRICE_OUT)


def command(given: dict[str, Any]) -> list[str]:
    args = ["batch", "--out", given["out"], "--n", given["n"], "--model", "local"]
    args += ["--base-url", given["base_url"], "--seeds", given["seeds"], "--price-in", PRICE_IN]
    args += ["--price-out", PRICE_OUT, "--batch-factor", 0.5, "--budget", "none", "--poll", 0.05]
    return [sys.executable, "-m", "bioinstruct.synth.cli", *map(str, args)]


def check_books(server: Any, out: Path, result: Result) -> None:
    """Every key was bought once, everything received is there, and the bill is what was charged."""
    totals = read_totals(out / "journal.jsonl")
    assert max(server.bought().values()) == 1
    assert totals.received == len(server.bought())
    assert not totals.open
    assert result.charged_usd == pytest.approx(billed(server), abs=1e-9)


def test_batches_make_the_same_records_at_half_the_price(
    make: Make, server: Any, tmp_path: Path, online: Callable[..., bytes]
) -> None:
    result = make({"requests": 5, "tail": 0})
    out = tmp_path / "run"
    check_books(server, out, result)
    assert {s.price for s in server.seen} == {0.5}
    assert len(server.batches) >= 3
    assert "0 under way of" in status(out)
    assert "batches" in (out / "card.md").read_text()
    assert (out / "records.jsonl").read_bytes() == online()


@pytest.mark.parametrize("tail", [0, 64])
def test_errors_and_expiry_are_asked_again(
    make: Make, server: Any, tmp_path: Path, online: Callable[..., bytes], tail: int
) -> None:
    server.behaviour.batch_errors, server.behaviour.batch_end = 0.2, ("expired", 0.6)
    result = make({"tail": tail})
    check_books(server, tmp_path / "run", result)
    assert {s.price for s in server.seen} == ({0.5, 1.0} if tail else {0.5})
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == online()


def test_a_creation_that_was_never_answered_is_found(
    make: Make, server: Any, tmp_path: Path
) -> None:
    server.behaviour.batch_cuts = 1
    result = make({"requests": 6, "tail": 0})
    check_books(server, tmp_path / "run", result)


def test_a_batch_is_found_after_a_kill_at_its_creation(
    make: Make, server: Any, given: dict[str, Any], tmp_path: Path, online: Callable[..., bytes]
) -> None:
    server.behaviour.batch_answer_s = 60.0
    with subprocess.Popen(command(given), stderr=subprocess.DEVNULL) as process:
        while not server.batches:
            time.sleep(0.01)
        process.kill()
    server.behaviour.batch_answer_s = 0.0
    totals = read_totals(tmp_path / "run" / "journal.jsonl")
    assert [(b.id, b.ended) for b in totals.under_way] == [("", False)]
    assert totals.spent / PICO >= billed(server)
    result = make({"tail": 0})
    check_books(server, tmp_path / "run", result)
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == online()


def test_a_batch_that_was_never_sent_costs_nothing(
    make: Make, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bioinstruct.synth.batch_api import BatchApi

    def killed(*_: object) -> None:
        raise InterruptedError("killed")

    monkeypatch.setattr(BatchApi, "upload", killed)
    with pytest.raises(InterruptedError):
        make({"tail": 0}, budget=0.5)
    monkeypatch.undo()
    result = make({"tail": 0}, budget=0.5)  # room for it once, not twice
    check_books(server, tmp_path / "run", result)


def test_answers_journalled_before_a_kill_are_not_taken_twice(
    make: Make, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bioinstruct.synth.journal import Journal

    real, taken = Journal.answer, []

    def killed(self: Journal, *args: Any, **more: Any) -> None:
        if len(taken) == 5:
            raise InterruptedError("killed")
        taken.append(args)
        real(self, *args, **more)

    monkeypatch.setattr(Journal, "answer", killed)
    with pytest.raises(InterruptedError):
        make({"tail": 0})
    monkeypatch.undo()
    check_books(server, tmp_path / "run", make({"tail": 0}))


def test_the_worst_case_is_reserved_and_the_budget_kept(
    make: Make, server: Any, tmp_path: Path
) -> None:
    server.behaviour.batch_errors = 0.1
    for budget in (0.05, 0.05, 0.1):
        with pytest.raises(Stopped, match=r"no room for a batch of one .* raise it with --budget"):
            make({"tail": 0}, n=1000, budget=budget)
        assert 0 < billed(server) <= budget
        assert read_totals(tmp_path / "run" / "journal.jsonl").spent <= budget * PICO


def test_batch_and_generate_share_a_budget(
    make: Make, server: Any, given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        generate(**given | {"n": 1000, "budget": 0.05})
    bill = billed(server)
    with pytest.raises(Stopped):
        make({"tail": 0}, n=1000, budget=0.10)
    assert bill < billed(server) <= 0.10
    assert max(server.bought().values()) == 1


def test_hidden_answers_stay_charged(make: Make, server: Any, tmp_path: Path) -> None:
    server.behaviour.batch_hidden = 0.3
    result = make({"tail": 0})
    assert result.charged_usd > billed(server)
    assert len(result.records) == 200


def test_a_batch_that_is_gone_stays_charged(make: Make, server: Any, tmp_path: Path) -> None:
    server.behaviour.batch_s = 60.0

    def lose() -> None:
        while not server.batches or not read_totals(tmp_path / "run" / "journal.jsonl").batches:
            time.sleep(0.01)
        time.sleep(0.2)
        server.behaviour.batch_s = 0.0
        server.batches.clear()

    thread = threading.Thread(target=lose)
    thread.start()
    result = make({"tail": 0})
    thread.join()
    assert len(result.records) == 200
    assert result.charged_usd > billed(server)
    assert not read_totals(tmp_path / "run" / "journal.jsonl").open


def test_failed_validation_says_why(make: Make, server: Any, tmp_path: Path) -> None:
    server.behaviour.batch_problem = {"code": "token_limit_exceeded", "message": "queue is full"}
    with pytest.raises(ValueError, match=r"token_limit_exceeded: queue is full.*--batch-requests"):
        make()
    assert read_totals(tmp_path / "run" / "journal.jsonl").spent == 0
    server.behaviour.batch_problem = None
    check_books(server, tmp_path / "run", make())


def test_endless_expiry_ends_the_run(make: Make, server: Any) -> None:
    server.behaviour.batch_end = ("expired", 0.0)
    with pytest.raises(ValueError, match="bring no answers: all of them expired"):
        make({"tail": 0})
    assert len(server.batches) == 3


def test_a_cancelled_batch_stops_the_run_and_keeps_its_answers(
    make: Make, server: Any, tmp_path: Path
) -> None:
    server.behaviour.batch_end = ("cancelled", 0.5)
    with pytest.raises(Stopped, match="batch_0 was cancelled with .* the same command goes on"):
        make()
    assert read_totals(tmp_path / "run" / "journal.jsonl").received > 0
    server.behaviour.batch_end = ("completed", 1.0)
    check_books(server, tmp_path / "run", make())


def test_faults_of_files_and_batches_are_retried(make: Make, server: Any, tmp_path: Path) -> None:
    server.behaviour.faults = {"500": 0.1, "429": 0.1}
    check_books(server, tmp_path / "run", make({"requests": 6, "tail": 0}))


def test_refusals_are_one_sentence(make: Make, server: Any, given: dict[str, Any]) -> None:
    server.behaviour.key = "another"
    with pytest.raises(ValueError, match="refuses the key"):
        make()
    server.behaviour.key = None
    server.behaviour.error = (404, {"message": "not here"})
    with pytest.raises(ValueError, match="no Batch API .*`generate` needs none"):
        make()
    with pytest.raises(ValueError, match="not known what a batch costs for 'local'"):
        make(batch_factor=None)
    with pytest.raises(ValueError, match="raise --batch-bytes"):
        make({"size_bytes": 100})
    with pytest.raises(ValueError, match="requests must lie in 1 to 50000, not 0"):
        make({"requests": 0})


def test_a_bill_above_its_reservation_aborts(make: Make, server: Any) -> None:
    server.behaviour.usage_extra = 50_000
    with pytest.raises(ValueError, match="does not keep to the output cap"):
        make()


def noted(done: list[str], name: str, real: Callable[..., None]) -> Callable[..., None]:
    """A function that notes its name and does what the real one does."""

    def call(*args: Any) -> None:
        done.append(name)
        real(*args)

    return call


@pytest.mark.parametrize(
    "behaviour",
    [
        {},
        {"batch_errors": 0.2, "batch_end": ("expired", 0.6)},
        {"batch_cuts": 1},
        {"faults": {"500": 0.1, "429": 0.1}},
    ],
    ids=["well", "expired", "cut", "faults"],
)
def test_files_are_deleted_once_their_answers_are_on_disk(
    make: Make,
    server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    behaviour: dict[str, Any],
) -> None:
    from bioinstruct.synth.batch_api import BatchApi
    from bioinstruct.synth.journal import Journal

    done: list[str] = []
    for what, name in ((Journal, "sync"), (Journal, "batch_ended"), (BatchApi, "delete")):
        monkeypatch.setattr(what, name, noted(done, name, getattr(what, name)))
    for name, value in behaviour.items():
        setattr(server.behaviour, name, value)
    check_books(server, tmp_path / "run", make({"requests": 6, "tail": 0}))
    assert len(server.batches) > 1
    assert server.files == {}
    assert done[done.index("delete") - 2 :][:2] == ["batch_ended", "sync"]
    assert "batch_0: deleted its files at the provider (file-1, file-2" in capsys.readouterr().err


def test_files_may_stay(make: Make, server: Any, tmp_path: Path) -> None:
    check_books(server, tmp_path / "run", make({"tail": 0, "keep_files": True}))
    assert len(server.files) >= 2 * len(server.batches)


@pytest.mark.parametrize(
    ("answer", "said"),
    [((500, {"message": "not now"}), "HTTP 500: not now"), ((405, {"message": "no"}), "405")],
    ids=["fails", "unknown"],
)
def test_files_that_cannot_be_deleted_are_told(
    make: Make,
    server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: tuple[int, dict[str, str]],
    said: str,
) -> None:
    monkeypatch.setattr("bioinstruct.synth.batch_api.BACKOFF_S", 0.001)
    server.behaviour.delete_error = answer
    check_books(server, tmp_path / "run", make({"tail": 0}))
    told = capsys.readouterr().err
    assert "batch_0: files stay at the provider (file-1, file-2): " in told
    assert said in told
    assert len(server.files) >= 2 * len(server.batches)


def test_files_with_what_could_not_be_read_stay(
    make: Make, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behaviour.batch_hidden = 0.3
    make({"tail": 0})
    told = capsys.readouterr().err
    assert "answers are missing, 0 lines belong to no request; its files stay" in told
    assert len(server.files) >= 2


def test_files_are_split_by_size(make: Make, server: Any, tmp_path: Path) -> None:
    how = {"size_bytes": 20_000, "tail": 0, "keep_files": True}
    check_books(server, tmp_path / "run", make(how))
    assert len(server.batches) > 2
    assert max(map(len, (f for f in server.files.values() if b'"method"' in f))) <= 20_000


def test_generate_leaves_batches_alone(
    make: Make, server: Any, given: dict[str, Any], tmp_path: Path
) -> None:
    server.behaviour.batch_s = 60
    process = subprocess.Popen(command(given), stderr=subprocess.PIPE, text=True)
    while not server.batches:
        time.sleep(0.01)
    time.sleep(0.3)  # long enough for the batch to be recorded
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 3, err
    assert "stopped, batches under way: 1, with 0 of 200 records" in err
    assert "1 under way of 1" in status(given["out"])
    with pytest.raises(ValueError, match=r"has batches under way \(1\), which hold"):
        generate(**given)
    with pytest.raises(ValueError, match="begun with seed"):
        make(seed=1)
    server.behaviour.batch_s = 0.0
    for held in server.batches.values():
        held.due_s = 0.0
    check_books(server, given["out"], make({"tail": 0}))


def test_the_official_client_understands_files_and_batches(server: Any, tmp_path: Path) -> None:
    import openai

    path = tmp_path / "in.jsonl"
    body = '{"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}'
    head = '"method": "POST", "url": "/v1/chat/completions"'
    path.write_text("".join(f'{{"custom_id": "{k}", {head}, "body": {body}}}\n' for k in range(3)))
    with openai.OpenAI(base_url=server.url, api_key="sk-x", max_retries=0) as client:
        file = client.files.create(file=path, purpose="batch")
        assert file.bytes == path.stat().st_size
        for name in "abc":
            client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"name": name},
            )
        found = list(client.batches.list(limit=2))
        assert [made.metadata["name"] for made in found] == ["c", "b", "a"]
        made = client.batches.retrieve(found[0].id)
        assert (made.status, made.request_counts.completed) == ("completed", 3)
        assert made.error_file_id is None
        text = client.files.content(made.output_file_id).text
        assert sorted(line.split('"custom_id": "')[1][0] for line in text.splitlines()) == [*"012"]
