"""What the local server answers to a chat request: a function of the request's body."""

import json
import random
from typing import Any

from server_behaviour import Behaviour

VERBS = ("Summarise", "Extract", "Classify", "Explain", "List", "Compare", "Assess", "Draft")
PARTS = "ar bel cor dan el fi gor hal in jo kel lum mor nex or pil quo ras sel tum ul vex wi zor"


def completion(doing: Behaviour, body: dict[str, Any], mark: str, size: int) -> dict[str, Any]:
    """Return the answer to a body; chance comes from its mark alone."""
    asked = "Category" in str(body["messages"]) or "category" in str(body["messages"])
    content = doing.content or _tasks(doing, mark, asked)
    most = 4 * (body.get("max_tokens") or body.get("max_completion_tokens"))
    cut = doing.honour_cap and len(content) > most
    content = content[:most] if cut else content
    usage = {
        "prompt_tokens": size // 4,
        "completion_tokens": -(-len(content) // 4) + doing.usage_extra,
    }
    finish = doing.finish or ("length" if cut else "stop")
    message = {"role": "assistant", "content": content}
    return {
        "id": f"chatcmpl-{mark[:12]}",
        "object": "chat.completion",
        "created": 1700000000,
        "model": body["model"],
        "system_fingerprint": "fp_local",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }


def _tasks(doing: Behaviour, mark: str, with_category: bool) -> str:
    chance = random.Random(mark)
    made = [_task(doing, chance) for _ in range(doing.tasks)]
    for task in made if with_category else []:
        task["category"] = chance.choice(doing.categories)
    if doing.form == "schema":
        return json.dumps({"tasks": made})
    return "\n\n".join(
        f"{k}. Instruction: {t['instruction']}\n{k}. Input: {t['input']}\n"
        f"{k}. Output: {t['output']}"
        + (f"\n{k}. Category: {t['category']}" if with_category else "")
        for k, t in enumerate(made, 4)
    )


def _task(doing: Behaviour, chance: random.Random) -> dict[str, str]:
    verb, count = chance.choice(VERBS), doing.words
    instruction = f"{verb} the {_words(chance, chance.randint(6, 14))}."
    if chance.random() < doing.junk:
        instruction = chance.choice(
            ("Summarise this.", f"Draw a {_words(chance, 5)}.", "Explain the finding to them.")
        )
    length = chance.randint(count // 2, count + count // 2)
    return {
        "instruction": instruction,
        "input": _words(chance, length),
        "output": _words(chance, length),
    }


def _words(chance: random.Random, count: int) -> str:
    parts = PARTS.split()
    return " ".join("".join(chance.choices(parts, k=3)) for _ in range(count))
