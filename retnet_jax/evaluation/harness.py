r"""Adapter for EleutherAI's lm-evaluation-harness, which calls the model retnet_jax.

    python -m retnet_jax.evaluation.harness run --model retnet_jax \
        --model_args pretrained=runs/mine --batch_size 32 --tasks hellaswag

This is the harness's own command, with the model registered. In Python, import this module and call
`lm_eval.simple_evaluate(model="retnet_jax", model_args={"pretrained": ...})`. Only this module
needs lm-eval (`pip install lm-eval`).
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.evaluation.held_out_texts import encoded
from retnet_jax.evaluation.perplexity import stateful_nll, window_nll
from retnet_jax.evaluation.prefix_trie import PrefixTrie, Request
from retnet_jax.evaluation.scoring import score_trie
from retnet_jax.evaluation.statistics import sums
from retnet_jax.evaluation.task_requests import encode_pairs
from retnet_jax.files.hub import model_directory
from retnet_jax.generation.requests import Request as GenerationRequest
from retnet_jax.generation.sampling import Sampler
from retnet_jax.generation.texts import answer_requests
from retnet_jax.parallel.mesh import first_device
from retnet_jax.pretrained import load_checkpoint, read_pretrained
from retnet_jax.shapes import power_of_two

# The supported generation arguments; ignoring others would change the distribution.
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@register_model("retnet_jax")
class RetNetLM(TemplateLM):
    """Any trained model that `load_pretrained` reads, as a model of the harness.

    Args:
      pretrained: Directory of a training run or a checkpoint, or name on the Hugging Face hub.
      batch_size: Rows in a batch; "auto": 32.
      max_length: Largest number of tokens read for a log-likelihood (longer requests lose their
        beginning), and the window length of `loglikelihood_rolling`. None: nothing is cut, and
        `loglikelihood_rolling` carries the state through the whole text. Prompts for generation are
        never cut.
      dtype: Dtype of activations; None or "auto": that of the run.
      max_gen_toks: Number of tokens to generate if a task does not give one.
      seed: Seed of the sampling in generation.
      add_bos_token: Whether BOS begins every text. It always does here, so False is refused.
      revision: Branch, tag or commit of a model on the hub; None: the newest commit.
      device: Ignored, accepted because the harness passes it; jax chooses the device.
      max_batch_size: Ignored, accepted because the harness passes it.
      trust_remote_code: Ignored, accepted because the harness passes it.

    Raises:
      ConfigError, CheckpointError: for an unusable directory or an invalid argument.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 32,
        max_length: int | str | None = None,
        dtype: str | None = None,
        max_gen_toks: int | str = 256,
        seed: int | str = 0,
        revision: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool | None = None,
        add_bos_token: bool | None = None,
    ):
        super().__init__()
        automatic = str(batch_size).startswith("auto")
        self.batch_size = 32 if automatic else _integer("batch_size", batch_size, 1)
        self.max_length = None if max_length is None else _integer("max_length", max_length, 1)
        self.max_gen_toks = _integer("max_gen_toks", max_gen_toks, 1)
        self.seed = _integer("seed", seed, 0)
        directory = model_directory(pretrained, revision)
        _, self.tokenizer = read_pretrained(directory)
        if str(add_bos_token).lower() == "false":
            raise ConfigError(
                "add_bos_token=False is not supported: every text begins with BOS, as in training"
            )
        changes = {} if dtype in (None, "auto") else {"dtype": dtype}
        self.model, self.step = load_checkpoint(directory, first_device(), **changes)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.end_id

    @property
    def prefix_token_id(self) -> int:
        """The id that begins every text."""
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in the harness's cache of requests."""
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        """The token ids of a text, without BOS, which is added when contexts are scored."""
        return self.tokenizer.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template, which no model of this project has.

        Raises:
          ConfigError: if a chat template is asked for.
        """
        if chat_template:
            raise ConfigError(
                "--apply_chat_template: this model has no chat template; leave the flag out"
            )
        return None

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding would give it."""
        pairs = encode_pairs(self.tokenizer, [request.args for request in requests])
        for request, pair in zip(requests, pairs, strict=True):
            if not pair.continuation:
                context, continuation = request.args
                raise ConfigError(
                    f"the continuation {continuation!r} after a context that ends in "
                    f"{context[-40:]!r} has no token of its own: one token spans both, or it is "
                    "encoded as nothing"
                )
        return self._loglikelihood_tokens(
            [
                (request.args, pair.context, pair.continuation)
                for request, pair in zip(requests, pairs, strict=True)
            ],
            disable_tqdm=disable_tqdm,
        )

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        trie = PrefixTrie(pairs, self.max_length)
        with tqdm(total=trie.tokens, unit="token", disable=disable_tqdm or None) as bar:
            scores = score_trie(self.model, trie, batch_size=self.batch_size, progress=bar.update)
        found = [(score.log_likelihood, score.is_greedy) for score in scores]
        for (args, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", args, answer)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log p of whole texts: in windows of `max_length`, or if that is None in one piece."""
        documents = encoded([request.args[0] for request in requests], self.tokenizer)
        if self.max_length is None:
            nll = stateful_nll(self.model, documents, batch_size=self.batch_size)
        else:
            nll = window_nll(
                self.model,
                documents,
                window_length=self.max_length,
                batch_size=self.batch_size,
            )
        found = (-sums(nll)).tolist()
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Generates texts up to a stop string, which is not included.

        Raises:
          ConfigError: for unsupported generation arguments.
        """
        asked = [self._generation_request(*x) for x in enumerate(requests)]
        lengths = (
            len(ids) + request.max_tokens
            for request, ids in zip(
                asked, self.tokenizer.encode_batch([x.prompt for x in asked]), strict=True
            )
        )
        answers = answer_requests(
            self.model,
            self.tokenizer,
            asked,
            rows=self.batch_size,
            seed=self.seed,
            max_length=power_of_two(1 + max(lengths, default=0)),  # with BOS
        )
        texts = [""] * len(requests)
        for request, found in tqdm(
            answers, total=len(requests), unit="text", disable=disable_tqdm or None
        ):
            texts[request.number] = found.text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generation_request(self, number: int, request: Any) -> GenerationRequest:
        """A request of the harness with its options; sampling depends on its number."""
        prompt, arguments = request.args
        options: dict[str, Any] = {**normalize_gen_kwargs(arguments, self.max_gen_toks)}
        if options.get("num_beams") == 1:
            del options["num_beams"]
        if unknown := set(options) - _GENERATION:
            raise ConfigError(
                f"unsupported generation arguments {sorted(unknown)}; supported: "
                f"{sorted(_GENERATION)}"
            )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        return GenerationRequest(
            prompt,
            _sampler(options),
            max_tokens=options["max_gen_toks"],
            stop=tuple(x for x in until if x),
            number=number,
            name=f"request {number}",
        )

    def get_model_info(self) -> dict:
        """The description of the model that the harness writes with its results."""
        return {
            "model": type(self.model).__name__,
            "model_num_parameters": self.model.config.parameter_count(),
            "model_dtype": self.model.config.dtype,
            "model_step": self.step,
            "device": jax.devices()[0].device_kind,
        }


def _integer(name: str, value: int | str, least: int) -> int:
    with contextlib.suppress(ValueError):
        number = int(str(value))
        if number >= least:
            return number
    raise ConfigError(f"{name}={value}: expected an integer of at least {least}")


def _sampler(options: dict) -> Sampler:
    temperature = options.get("temperature")
    if temperature is None:
        temperature = 1.0 if options.get("do_sample") else 0.0
    if temperature == 0:
        return Sampler()
    top_k, top_p = options.get("top_k") or None, options.get("top_p")
    return Sampler(temperature, top_k, None if top_p == 1 else top_p)


def main() -> None:
    """The harness's command. An error in the input prints its message and exits with status 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (ConfigError, CheckpointError) as error:
        print(f"retnet_jax: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
