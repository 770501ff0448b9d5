"""Speed and memory of the data pipeline: preparing a store, making batches, starting a process.

    python -m benchmarks.data --directory=SCRATCH [--tokens=550_000_000]

Preparing runs on one core, in turn with the bare `tokenizers` package on the same text. Batches of
windows of 2048 tokens are made by one thread. A new process opens a store of over 1 GB and makes
its first batch, at step 0 and in the middle of the store.
"""

import json
import os
import shutil
import statistics
import time
from pathlib import Path

from absl import app, flags

from benchmarks.measure import output_of_process, write_results

# Before tokenizers is imported, whose own threads would use more than the one measured core.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from retnet_jax.config import DataConfig
from retnet_jax.data import BatchStream, build_store, open_store
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
    rates = []
    for start in range(100, 600, 100):
        begin = time.perf_counter()
        for step in range(start, start + 100):
            stream[step]
        rates.append(100 * 32 * 2048 / (time.perf_counter() - begin))
    return statistics.median(rates)


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
