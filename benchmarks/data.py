"""Speed and memory of the data pipeline: preparing a store, making batches, starting a process.

    python -m benchmarks.data --directory=SCRATCH [--tokens=550_000_000]

Preparing runs on one core, in turn with the bare `tokenizers` package on the same text. Batches of
windows of 2048 tokens are made by one thread. Verifying is an epoch of such batches and the same
epoch again, from a store that was just opened, in turn with one that is read as if it had no block
digests. A new process opens a store of over 1 GB and makes its first batch, at step 0 and in the
middle of the store.
"""

import contextlib
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from unittest import mock

from absl import app, flags

from benchmarks.measure import output_of_process, write_results

# Before tokenizers is imported, whose own threads would use more than the one measured core.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from retnet_jax.config import DataConfig
from retnet_jax.data import BatchStream, block_digests, build_store, number_of_windows, open_store
from retnet_jax.data.bpe_sample import train_tokenizer
from retnet_jax.data.sources import Skipped, read_documents
from retnet_jax.data.tokenizers.base import hugging_face

START = """
import sys, time
from retnet_jax.data import BatchStream, open_store
begin = time.perf_counter()
store = open_store(sys.argv[1])
stream = BatchStream([store.train], [1.0], sequence_length=2048, batch_size=32,
                     bos_id=store.tokenizer.bos_id, seed=0, policy=sys.argv[2])
with stream.iterate(int(sys.argv[3])) as batches:
    next(batches)
    seconds = time.perf_counter() - begin
    for _ in range(200):
        next(batches)
print(seconds, memory("RssAnon"))
"""


def preparing(scratch: Path) -> dict:
    """Tokens per second of one core: the builder of stores, and the bare `tokenizers` package."""
    os.sched_setaffinity(0, {0})
    source = DataConfig(held_out=0.02)
    texts = [document.text for document in read_documents(source, Skipped())]
    bpe = train_tokenizer([source], 4096, Skipped())
    (scratch / "tokenizer").mkdir(parents=True, exist_ok=True)
    bpe.save(scratch / "tokenizer")
    bare = hugging_face().Tokenizer.from_file(str(scratch / "tokenizer/tokenizer.json"))
    bare.encode_special_tokens = True

    def build(tokenizer: str) -> tuple[float, int]:
        shutil.rmtree(scratch / "store", ignore_errors=True)
        config = DataConfig(tokenizer=tokenizer, store=str(scratch / "store"))
        begin = time.perf_counter()
        store = build_store(config, 4096, processes=1)
        return time.perf_counter() - begin, store.train.token_count + store.held_out.token_count

    seconds: dict[str, list[float]] = {"tokenizers alone": [], "bpe": [], "byte": []}
    for _ in range(3):
        begin = time.perf_counter()
        encodings = bare.encode_batch_fast(texts)
        total = sum(len(encoding.ids) for encoding in encodings)
        seconds["tokenizers alone"].append(time.perf_counter() - begin)
        del encodings
        taken, bpe_tokens = build(str(scratch / "tokenizer"))
        seconds["bpe"].append(taken)
        taken, byte_tokens = build("byte")
        seconds["byte"].append(taken)
    ratios = [a / b for a, b in zip(seconds["tokenizers alone"], seconds["bpe"], strict=True)]
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokenizers_alone_tokens_per_second": total / middle["tokenizers alone"],
        "bpe_tokens_per_second": bpe_tokens / middle["bpe"],
        "byte_tokens_per_second": byte_tokens / middle["byte"],
        "bpe_share_of_tokenizers_alone": statistics.median(ratios),
        "rounds": seconds,
    }


def large_store(scratch: Path, tokens: int) -> dict:
    """Builds a store of over a gigabyte: the standard library as bytes, repeated."""
    texts = [document.text for document in read_documents(DataConfig(), Skipped())]
    path, written = scratch / "corpus.jsonl", 0
    with path.open("w", encoding="utf-8") as file:
        while written < tokens:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
    config = DataConfig(
        source="jsonl",
        path=str(path),
        tokenizer="byte",
        deduplicate=False,
        held_out=0.001,
        store=str(scratch / "large"),
    )
    shutil.rmtree(config.store, ignore_errors=True)
    begin = time.perf_counter()
    store = build_store(config, 257)
    return {
        "train_tokens": store.train.token_count,
        "shards": len(store.manifest["shards"]),
        "build_seconds": time.perf_counter() - begin,
        "build_processes": os.cpu_count(),
    }


def serving(directory: Path, policy: str) -> float:
    """Tokens per second of one thread that makes batches, with their document borders."""
    stream, _ = _stream(directory, policy)
    rates = []
    for start in range(100, 600, 100):
        begin = time.perf_counter()
        for step in range(start, start + 100):
            stream[step]
        rates.append(100 * 32 * 2048 / (time.perf_counter() - begin))
    return statistics.median(rates)


def verifying(directory: Path, policy: str, rounds: int = 3) -> dict:
    """Tokens per second of one thread while blocks are verified, once they are, and without that.

    Cold are the digests, not the files: the first round, which is not kept, reads them all. The
    first 100 steps of an epoch are given too, when most windows are in blocks not yet verified.
    """
    rates: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name in ("verified", "unverified"):
            as_of_format_3 = mock.patch.object(block_digests.ShardFiles, "digests", _no_digests)
            with contextlib.nullcontext() if name == "verified" else as_of_format_3:
                stream, steps = _stream(directory, policy)
                for at in ("cold", "warm"):
                    begin = time.perf_counter()
                    for step in range(steps):
                        stream[step]
                        if step + 1 == min(100, steps):
                            first = (step + 1) / (time.perf_counter() - begin)
                    whole = steps / (time.perf_counter() - begin)
                    for part, rate in ((at, whole), (f"{at} in the first steps", first)):
                        kept = rates.setdefault(f"{name}, {part}", [])
                        kept += [32 * 2048 * rate] if number else []
    shares = {
        at: statistics.median(
            a / b for a, b in zip(rates[f"verified, {at}"], rates[f"unverified, {at}"], strict=True)
        )
        for at in ("cold in the first steps", "cold", "warm")
    }
    middle = {name: statistics.median(found) for name, found in rates.items()}
    return {"tokens_per_second": middle, "verified_share_of_unverified": shares, "rounds": rates}


def _no_digests(shard: block_digests.ShardFiles, name: str) -> None:
    """In the place of `ShardFiles.digests`."""


def _stream(directory: Path, policy: str) -> tuple[BatchStream, int]:
    """Batches of a store that is opened now, and how many an epoch has."""
    store = open_store(directory)
    stream = BatchStream(
        [store.train],
        [1.0],
        sequence_length=2048,
        batch_size=32,
        bos_id=store.tokenizer.bos_id,
        seed=0,
        policy=policy,
    )
    return stream, max(1, number_of_windows(store.train, 2048) // 32)


def starting(directory: Path, policy: str, step: int) -> dict:
    """Seconds to the first batch of a new process, and its anonymous memory after 200 more."""
    seconds, anonymous = output_of_process(START, str(directory), policy, str(step)).split()
    return {"seconds_to_first_batch": float(seconds), "anonymous_bytes": int(anonymous)}


def main(_) -> None:
    scratch = Path(flags.FLAGS.directory)
    scratch.mkdir(parents=True, exist_ok=True)
    results = {"large_store": large_store(scratch, flags.FLAGS.tokens)}
    middle = results["large_store"]["train_tokens"] // (2 * 32 * 2048)
    small = scratch / "small"
    shutil.rmtree(small, ignore_errors=True)
    build_store(DataConfig(tokenizer="byte", store=str(small)), 257)
    for policy in ("packed", "contiguous"):
        results[policy] = {
            "tokens_per_second": serving(scratch / "large", policy),
            "verifying": verifying(scratch / "large", policy),
            "at_step_0": starting(scratch / "large", policy, 0),
            "in_the_middle": starting(scratch / "large", policy, middle),
            "small_store": starting(small, policy, 0),
        }
    results["preparing"] = preparing(scratch)
    print(json.dumps(results, indent=1))
    print(write_results("data", results))
    shutil.rmtree(scratch)


if __name__ == "__main__":
    flags.DEFINE_string("directory", None, "Scratch directory, for about 2 GB", required=True)
    flags.DEFINE_integer("tokens", 550_000_000, "Tokens of the large store, two bytes each")
    app.run(main)
