"""Fuzz target of the header parser: `python tests/fuzz_header.py --seconds 600`.

Whatever the bytes, the parser gives a header that covers its file, or a CheckpointError that names the file.
`check_one` can be given to any fuzzing engine.
"""

from __future__ import annotations

import argparse
import json
import random
import time

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.header import read_header

_SEEDS = [
    b"{}",
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    b'{"a":{"dtype":"BF16","shape":[],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}',
    b'{"b":{"dtype":"F4","shape":[4],"data_offsets":[0,2]},"\xc3\xa9":{"dtype":"I8","shape":[6],"data_offsets":[2,8]}}',
    json.dumps({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode(),
]
_TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0041", b"\\ud800", b"null", b"true", b"NaN"),
    *(
        b"-1",
        b"0",
        b"00",
        b"1e9",
        b"18446744073709551616",
        b"9" * 30,
        b"\0",
        b"\xff",
        b" ",
        b"\n",
        b"[" * 2000,
    ),
    *(b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"F32"', b'"F6_E2M3"', b'"a"'),
]


def check_one(raw: bytes) -> None:
    """Fail if the bytes of a file bring anything but a sound header or an error of ours."""
    refusal = None
    try:
        header = read_header(lambda begin, end: raw[begin:end], len(raw), "fuzzed.safetensors")
    except CheckpointError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith("fuzzed.safetensors: "), refusal
        assert len(refusal) < 1000, len(refusal)
        return
    reached = header.data_begin
    for entry in sorted(header.tensors.values(), key=lambda entry: (entry.begin, entry.end)):
        assert entry.begin == reached, header
        reached = entry.end
    assert reached == len(raw), header


def mutate(rng: random.Random) -> bytes:
    """Return the bytes of a file that is nearly a safetensors file."""
    header = rng.choice(_SEEDS)
    for _ in range(rng.randrange(4)):
        begin = rng.randrange(len(header) + 1)
        end = min(len(header), begin + rng.choice((0, 0, 1, 1, 2, 8)))
        header = header[:begin] + rng.choice((rng.choice(_TOKENS), rng.randbytes(1))) + header[end:]
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 7, 2**31, 2**63, 10**8, len(header) + 1))
    raw = length.to_bytes(8, "little") + header + bytes(rng.choice((0, 2, 8, 8, 8, 9)))
    return raw if rng.random() < 0.95 else raw[: rng.randrange(len(raw))]


def fuzz(rng: random.Random, count: int | None = None, seconds: float | None = None) -> int:
    """Check `count` files, or as many as `seconds` allow, and return how many they were."""
    stop = None if seconds is None else time.monotonic() + seconds
    done = 0
    while (count is None or done < count) and (stop is None or time.monotonic() < stop):
        check_one(mutate(rng))
        done += 1
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    print(fuzz(random.Random(arguments.seed), seconds=arguments.seconds), "files, no error but ours")
