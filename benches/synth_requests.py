"""CPU time a request: our engine, a bare aiohttp loop and the openai client, on one local server.

Each client runs in a process of its own and asks the same questions, with as many in flight; what
is counted is the process's user and system time between the first request and the last answer,
divided by the requests. The clients take turns, and ratios are those of a round. Ours journals
every intent and every answer to disk and takes the tasks out of the text; the bare loop reads the
body and decodes its JSON; the openai client does what it does.

    python benches/synth_requests.py --requests 3000 --in-flight 256
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

SERVER = Path(__file__).parents[1] / "tests" / "synth" / "server.py"
CLIENTS = ("bare", "ours", "openai")
WORDS = 13  # in a text of a task; 17 tasks are about 7 KB then
PROMPT = "Write 17 tasks for biomedicine, number {index}. " + "Vary what is asked for. " * 60

Ask = Callable[[int], Awaitable[object]]


def body(index: int) -> dict[str, Any]:
    """Return question number index."""
    message = {"role": "user", "content": PROMPT.format(index=index)}
    return {"model": "local", "messages": [message], "max_tokens": 4096}


async def drive(ask: Ask, requests: int, in_flight: int) -> float:
    """Ask everything, in_flight at a time; return the CPU seconds it took."""
    numbers = iter(range(requests))

    async def worker() -> None:
        for index in numbers:
            await ask(index)

    start_s = time.process_time()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return time.process_time() - start_s


async def bare(url: str, requests: int, in_flight: int) -> float:
    """A loop on aiohttp and nothing else."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(index: int) -> None:
            data = json.dumps(body(index)).encode()
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{url}/chat/completions", data=data, headers=headers) as got:
                json.loads(await got.read())

        return await drive(ask, requests, in_flight)


async def ours(url: str, requests: int, in_flight: int) -> float:
    """The engine, with its journal on disk and the tasks taken out of every answer."""
    from bioinstruct.synth.answers import candidates
    from bioinstruct.synth.endpoint import Endpoint, text_of
    from bioinstruct.synth.engine import Engine
    from bioinstruct.synth.journal import Journal
    from bioinstruct.synth.models import Request
    from bioinstruct.synth.money import Ledger, Prices
    from bioinstruct.synth.pace import Limits

    found = 0
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
        async with Engine(
            Endpoint(url, "", True),
            journal=journal,
            ledger=Ledger(10**15),
            prices=Prices(10**6, 10**6),
            limits=Limits(concurrency=in_flight),
        ) as engine:

            async def ask(index: int) -> None:
                nonlocal found
                answer = await engine.ask(Request(body(index), 4096), "local")
                found += len(candidates(text_of(answer), "schema"))

            spent_s = await drive(ask, requests, in_flight)
    assert found == 17 * requests
    return spent_s


async def openai(url: str, requests: int, in_flight: int) -> float:
    """The official client; retries off."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def ask(index: int) -> None:
            got = await client.chat.completions.create(**body(index))
            assert got.choices[0].message.content

        return await drive(ask, requests, in_flight)


def measure(name: str, url: str, requests: int, in_flight: int) -> float:
    """Return the CPU milliseconds a request of one client in a process of its own."""
    args = [sys.executable, __file__, "--client", name, "--url", url]
    args += ["--requests", str(requests), "--in-flight", str(in_flight)]
    return float(subprocess.run(args, check=True, capture_output=True, text=True).stdout)


def _spread(ratios: list[float]) -> dict[str, float]:
    """Return the median of the rounds' ratios, and the least and the greatest."""
    found = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Measure all clients in turns and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--openai-requests", type=int, help="Default: as many.")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--client", choices=CLIENTS)
    parser.add_argument("--url")
    given = parser.parse_args()
    if given.client:
        ask = {"bare": bare, "ours": ours, "openai": openai}[given.client]
        spent_s = asyncio.run(ask(given.url, given.requests, given.in_flight))
        print(1000 * spent_s / given.requests)
        return
    args = [sys.executable, str(SERVER), "--words", str(WORDS)]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        counts = {
            "bare": given.requests,
            "ours": given.requests,
            "openai": given.openai_requests or given.requests,
        }
        times: dict[str, list[float]] = {name: [] for name in CLIENTS}
        for _ in range(given.rounds):
            for name, count in counts.items():
                times[name].append(measure(name, url, count, given.in_flight))
        server.terminate()
    over_bare = [a / b for a, b in zip(times["ours"], times["bare"], strict=True)]
    under_openai = [a / b for a, b in zip(times["openai"], times["ours"], strict=True)]
    told = {
        "in_flight": given.in_flight,
        "requests": counts,
        "rounds": given.rounds,
        "cpu_ms_per_request": {
            name: round(statistics.median(values), 4) for name, values in times.items()
        },
        "ours_over_bare": _spread(over_bare),
        "openai_over_ours": _spread(under_openai),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "aiohttp": version("aiohttp"),
        "openai": version("openai"),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
