"""Many requests of mixed lengths beside a full batch of equal ones: speed, memory and latency.

    python -m benchmarks.requests [--requests=10000] [--rows=32] [--parts=10]

Prompts of 16 to 1,024 tokens and answers of 1 to 512 tokens, both log-uniform, are continued in
`rows` rows by the quickstart's RetNet and by its twin, with random parameters. After each part of
the requests a static batch of the same number of rows is timed: its rows have the mean prompt and
the mean answer of the mixture, so both have the same share of prompt tokens. The twin's attention
has less to read in the static batch, because the longest answers of the mixture are the ones with
most tokens at late positions. Speeds are tokens/s, of prompts and answers together, without
compilation.

Latencies are counted from the time at which a request is taken from the source, 2 * `rows` requests
ahead, as if the source never waits. The peak memory is that of a process which has answered a tenth
of the requests and of one which has answered all.
"""

import json
import math
import statistics
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.measure import output_of_process, write_results
from retnet_jax.configs.quickstart import get_config
from retnet_jax.generation import generate
from retnet_jax.generation.continuous import ContinuousBatch, Job
from retnet_jax.generation.sampling import GREEDY
from retnet_jax.model import build_model, for_decoding

flags.DEFINE_integer("requests", 10_000, "Number of requests", lower_bound=10)
flags.DEFINE_integer("rows", 32, "Number of rows", lower_bound=1)
flags.DEFINE_integer("parts", 10, "Number of parts, between which the static batch is timed")

PROMPT, NEW = (16, 1024), (1, 512)  # shortest and longest, in tokens
PERCENTILES = (50, 90, 99, 100)


class TimedJob(Job):
    """A request that notes when its tokens arrive."""

    def __init__(self, number: int, ids: np.ndarray, max_tokens: int):
        super().__init__(number, ids, max_tokens, GREEDY, f"request {number}")
        self.taken = time.perf_counter()
        self.seconds: list[float] = []  # to the first and to the last token

    def add(self, tokens: list[int], log_probabilities: list[float]) -> None:
        now = time.perf_counter() - self.taken
        self.done = not self.left
        self.seconds = [*self.seconds[:1], now] if self.seconds else [now, now]


def mixture(requests: int, vocab_size: int) -> Iterator[TimedJob]:
    """Requests with log-uniform lengths, made as they are needed."""
    rng = np.random.default_rng(0)
    for number in range(requests):
        prompt, new = (_log_uniform(rng, *bounds) for bounds in (PROMPT, NEW))
        yield TimedJob(number, rng.integers(vocab_size, size=prompt, dtype=np.int32), new)


def _log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    return int(math.exp(rng.uniform(math.log(least), math.log(most + 1))))


def mean_length(least: int, most: int) -> int:
    """The mean of the log-uniform distribution of lengths, rounded."""
    return round((most + 1 - least) / math.log((most + 1) / least) - 0.5)


def measure(architecture: str, requests: int, rows: int, parts: int) -> dict:
    """Answers requests in parts, with a static batch after each."""
    config = get_config(architecture).model
    model = for_decoding(build_model(config, rngs=nnx.Rngs(0)))
    batch = ContinuousBatch(model, rows=rows, max_length=PROMPT[1] + NEW[1])
    rng, prompt, new = np.random.default_rng(1), mean_length(*PROMPT), mean_length(*NEW)
    equal = rng.integers(config.vocab_size, size=(rows, prompt), dtype=np.int32)
    list(batch.run(mixture(rows, config.vocab_size)))  # compiles
    generate(model, equal, new)
    jobs, speeds, static, latencies = batch.run(mixture(requests, config.vocab_size)), [], [], []
    for part in range(parts):
        count = requests * (part + 1) // parts - requests * part // parts
        start = time.perf_counter()
        done = [next(jobs) for _ in range(count)]
        seconds = time.perf_counter() - start
        speeds.append(sum(len(job.ids) + job.max_tokens for job in done) / seconds)
        latencies += [job.seconds for job in done if isinstance(job, TimedJob)]
        start = time.perf_counter()
        generate(model, equal, new)
        static.append(rows * (prompt + new) / (time.perf_counter() - start))
    first, last = (np.percentile(x, PERCENTILES).tolist() for x in zip(*latencies, strict=True))
    return {
        "tokens_per_second": statistics.median(speeds),
        "static_tokens_per_second": statistics.median(static),
        "median_ratio": statistics.median(a / b for a, b in zip(speeds, static, strict=True)),
        "seconds_to_first_token": dict(zip(map(str, PERCENTILES), first, strict=True)),
        "seconds_to_last_token": dict(zip(map(str, PERCENTILES), last, strict=True)),
    }


_MEASURE = """
import json, sys
from benchmarks.requests import measure
architecture, *numbers = sys.argv[1:]
found = measure(architecture, *map(int, numbers))
print(json.dumps(found | {"peak_MiB": memory("VmHWM") / 2**20}))
"""


def main(_) -> None:
    args, results = flags.FLAGS, {}
    for architecture in ("retnet", "transformer"):
        found = []
        for requests, parts in ((args.requests // 10, 1), (args.requests, args.parts)):
            numbers = map(str, (requests, args.rows, parts))
            found.append(json.loads(output_of_process(_MEASURE, architecture, *numbers)))
        results[architecture] = found[1] | {"peak_MiB_of_a_tenth": found[0]["peak_MiB"]}
        shown = results[architecture]
        print(
            f"{architecture}: {shown['tokens_per_second']:,.0f} tokens/s, "
            f"{shown['median_ratio']:.2f} of a static batch "
            f"({shown['static_tokens_per_second']:,.0f}); "
            f"peak {shown['peak_MiB']:.0f} MiB, {shown['peak_MiB_of_a_tenth']:.0f} after a tenth"
        )
        for end in ("first", "last"):
            seconds = shown[f"seconds_to_{end}_token"]
            told = (f"{seconds[str(p)]:.2f} s ({p} %)" for p in PERCENTILES)
            print(f"  to the {end} token: {', '.join(told)}")
    sizes = {"requests": args.requests, "rows": args.rows}
    print(f"written to {write_results(f'requests_{jax.default_backend()}', sizes | results)}")


if __name__ == "__main__":
    app.run(main)
