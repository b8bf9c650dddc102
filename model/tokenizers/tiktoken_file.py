"""Llama 3's own tokenizer file, which Meta calls tokenizer.model as well: tiktoken's format.

Each line holds a token's bytes in base64 and its rank, which is its id. Neighbours are joined
whenever their bytes make a token, the lowest rank first. The 256 control tokens behind them stand
in Meta's code and not in the file.
"""

import base64
import binascii
from pathlib import Path

from bioinstruct.model.tokenizers.bpe_files import LLAMA3, ByteVocabulary
from bioinstruct.model.tokenizers.byte_alphabet import to_text

NUM_TOKENS = 128_000
NUM_CONTROLS = 256
# ids from NUM_TOKENS on; those not named are reserved
NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def from_tiktoken(path: Path) -> ByteVocabulary:
    """Read Llama 3's file.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is broken, or it is another model's.
    """
    tokens: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            text, rank = line.split()
            token = to_text(base64.b64decode(text, validate=True))
            if int(rank) != number - 1 or token in tokens:
                raise ValueError
            tokens[token] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}:{number}: {line[:40].decode('utf-8', 'replace')!r} must be new bytes in "
                f"base64 and the rank {number - 1}; download or copy the file again"
            ) from None
    if len(tokens) != NUM_TOKENS:
        raise ValueError(
            f"{path}: holds {len(tokens)} tokens; of tiktoken-format files only Llama 3's is "
            f"known, with {NUM_TOKENS}; use the tokenizer.json of the same model"
        )
    return ByteVocabulary(
        tokens=tokens,
        controls={name: NUM_TOKENS + place for place, name in enumerate(_controls())},
        merges=[],
        ranked=True,
        pattern=LLAMA3,
        whole_words=True,
        nfc=False,
        bos_id=NUM_TOKENS,
        eos_id=NUM_TOKENS + 1,
        adds_bos=True,
    )


def _controls() -> list[str]:
    names, reserved = [], 0
    for place in range(NUM_CONTROLS):
        if place in NAMED:
            names.append(NAMED[place])
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names
