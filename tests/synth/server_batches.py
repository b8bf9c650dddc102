"""OpenAI's files and batches, as the local server has them."""

import hashlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server_behaviour import Behaviour, Seen
from server_chat import completion


@dataclass
class Batch:
    """A batch as the server holds it."""

    shown: dict[str, Any]
    due_s: float
    requests: list[dict[str, Any]]


class Batches:
    """Files, and batches of requests from them.

    Args:
        doing: tells the server's behaviour as it is now.
        seen: the server's books; a batch's requests are added when they are worked off.
        chance: of faults and of the order of answers.
    """

    def __init__(
        self, doing: Callable[[], Behaviour], seen: list[Seen], chance: random.Random
    ) -> None:
        self.doing, self.seen, self.chance = doing, seen, chance
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Batch] = {}
        self.named = 0

    def _new_name(self) -> str:
        self.named += 1
        return f"file-{self.named}"

    def call(
        self, method: str, path: str, headers: dict[str, str], raw: bytes
    ) -> tuple[int, dict[str, Any] | bytes | None]:
        """Answer a call to files or batches; None stands for a cut connection."""
        path, _, query = path.removeprefix("/v1/").partition("?")
        for batch in self.batches.values():
            self._work_off(batch)
        if path == "files":
            mark = headers["content-type"].partition("boundary=")[2].encode()
            parts = [part.partition(b"\r\n\r\n") for part in raw.split(b"--" + mark)]
            fields = {
                head.split(b'name="')[1].split(b'"')[0]: data for head, _, data in parts[1:-1]
            }
            assert fields[b"purpose"].strip() == b"batch"
            name = self._new_name()
            self.files[name] = fields[b"file"][:-2]
            shown = {"id": name, "object": "file", "bytes": len(self.files[name]), "created_at": 1}
            return 200, shown | {"filename": "b.jsonl", "purpose": "batch", "status": "processed"}
        if path.startswith("files/"):
            name = path.split("/")[1]
            if name not in self.files:
                return 404, {"error": {"message": f"no such file: {name}"}}
            if method == "DELETE" and (error := self.doing().delete_error):
                return error[0], {"error": error[1]}
            if method == "DELETE":
                del self.files[name]
                return 200, {"id": name, "object": "file", "deleted": True}
            return 200, self.files[name]
        if path == "batches" and raw:
            made = self._new_batch(json.loads(raw))
            self.doing().batch_cuts -= 1
            return 200, None if self.doing().batch_cuts >= 0 else made
        if path == "batches":
            return 200, self._page(dict(part.split("=") for part in query.split("&") if part))
        found = self.batches.get(path.split("/")[1])
        return (200, found.shown) if found else (404, {"error": {"message": "no such batch"}})

    def _page(self, query: dict[str, str]) -> dict[str, Any]:
        """Return two batches at a time, the newest first, so that clients must turn pages."""
        names = list(reversed(self.batches))
        at = names.index(query["after"]) + 1 if "after" in query else 0
        data = [self.batches[name].shown for name in names[at : at + 2]]
        more = at + 2 < len(names)
        return {"object": "list", "data": data, "has_more": more} | (
            {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        )

    def _new_batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Take a batch, after the checks that the real service makes."""
        requests = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
        assert len({r["custom_id"] for r in requests}) == len(requests) <= 50_000
        assert {(r["method"], r["url"]) for r in requests} == {("POST", asked["endpoint"])}
        assert len({r["body"]["model"] for r in requests}) == 1
        name = f"batch_{len(self.batches)}"
        shown = asked | {"id": name, "object": "batch", "created_at": 1, "status": "in_progress"}
        shown["request_counts"] = {"total": len(requests), "completed": 0, "failed": 0}
        self.batches[name] = Batch(shown, time.monotonic() + self.doing().batch_s, requests)
        self._work_off(self.batches[name])
        return shown

    def _work_off(self, batch: Batch) -> None:
        """Bring a batch to its end once its time has come."""
        doing, shown = self.doing(), batch.shown
        if shown["status"] != "in_progress" or time.monotonic() < batch.due_s:
            return
        shown["status"], part = doing.batch_end
        if doing.batch_problem:
            shown["status"], part = "failed", 0.0
            shown["errors"] = {"object": "list", "data": [doing.batch_problem]}
        lines: dict[str, list[bytes]] = {"output": [], "error": []}
        requests = self.chance.sample(batch.requests, len(batch.requests))  # in any order
        for place, request in enumerate(requests):
            key, chance = request["custom_id"], self.chance.random()
            row: dict[str, Any] = {"id": f"req_{place}", "custom_id": key, "error": None}
            if place >= part * len(requests):
                row |= {"response": None, "error": {"code": "batch_expired", "message": "late"}}
            elif chance < doing.batch_errors:
                body = {"error": {"message": "the server had an error"}}
                row["response"] = {"status_code": 500, "request_id": "r", "body": body}
            else:
                raw = json.dumps(
                    request["body"], sort_keys=True, separators=(",", ":"), ensure_ascii=False
                ).encode()
                body = completion(doing, request["body"], hashlib.sha256(raw).hexdigest(), len(raw))
                tokens = (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])
                self.seen.append(Seen(time.monotonic(), key, 200, "", *tokens, 0.5))
                shown["request_counts"]["completed"] += 1
                if chance >= 1 - doing.batch_hidden:
                    continue
                row["response"] = {"status_code": 200, "request_id": "r", "body": body}
            kind = (
                "output" if row["response"] and row["response"]["status_code"] == 200 else "error"
            )
            lines[kind].append(json.dumps(row).encode() + b"\n")
        for kind, made in lines.items():
            if made and not doing.batch_problem:
                shown[f"{kind}_file_id"] = name = self._new_name()
                self.files[name] = b"".join(made)
