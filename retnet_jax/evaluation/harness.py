r"""The model behind the interface of EleutherAI's lm-evaluation-harness, under the name retnet_jax.

    python -m retnet_jax.evaluation.harness run --model retnet_jax \
        --model_args pretrained=runs/mine --batch_size 32 --tasks hellaswag

is the harness's own command with the model registered; in Python import this module and give
`lm_eval.simple_evaluate(model="retnet_jax", model_args={"pretrained": ...})`. Needs lm-eval
(`pip install lm-eval`), which nothing else here imports.
"""

from collections import defaultdict

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.held_out_texts import encoded
from retnet_jax.evaluation.perplexity import stateful_nll, window_nll
from retnet_jax.evaluation.prefix_trie import PrefixTrie, Request
from retnet_jax.evaluation.scoring import score_trie
from retnet_jax.evaluation.statistics import sums
from retnet_jax.evaluation.task_requests import encode_pairs
from retnet_jax.files.paths import place
from retnet_jax.generation.sampling import Sampler
from retnet_jax.generation.texts import Writer
from retnet_jax.model import for_decoding
from retnet_jax.parallel.mesh import first_device
from retnet_jax.pretrained import load_checkpoint, read_pretrained

# What of a request's generation arguments is used; more would be another distribution.
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@register_model("retnet_jax")
class RetNetLM(TemplateLM):
    """A trained model of this project, or any that `load_pretrained` reads.

    Args:
      pretrained: directory of a training run or a checkpoint.
      batch_size: rows at once; "auto": 32.
      max_length: most tokens that are read for a log-likelihood, cut at their beginning, and the
        length of the windows of `loglikelihood_rolling`. None: nothing is cut, and rolling carries
        the state through the whole text, which a RetNet can. Prompts to generate from are not cut.
      dtype: of activations; None or "auto": that of the run.
      max_gen_toks: tokens to generate where a task does not say.
      seed: of random choices in generation.
      add_bos_token: whether BOS opens every text, which it does here: False is refused.
      device: taken because the harness passes it; jax chooses the device.
      max_batch_size: taken likewise.
      trust_remote_code: taken likewise; no code is loaded.

    Raises:
      ConfigError, CheckpointError: for a directory or an argument that does not fit.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 32,
        max_length: int | str | None = None,
        dtype: str | None = None,
        max_gen_toks: int | str = 256,
        seed: int | str = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool | None = None,
        add_bos_token: bool | None = None,
    ):
        super().__init__()
        directory = place(pretrained)
        _, self.tokenizer = read_pretrained(directory)
        if str(add_bos_token).lower() == "false":
            raise ConfigError(
                "add_bos_token=False: here every text begins with BOS, as in training; leave it out"
            )
        changes = {} if dtype in (None, "auto") else {"dtype": dtype}
        self.model, self.step = load_checkpoint(directory, first_device(), **changes)
        self.batch_size = 32 if str(batch_size).startswith("auto") else int(batch_size)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is less than 1")
        self.max_length = None if max_length is None else int(max_length)
        self.max_gen_toks = int(max_gen_toks)
        self.seed = int(seed)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.end_id

    @property
    def prefix_token_id(self) -> int:
        """The id that opens every text."""
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in the harness's cache of requests."""
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        """The ids of a text; BOS is put before contexts where they are scored."""
        return self.tokenizer.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of a conversation, which no model of this project has.

        Raises:
          ConfigError: if one is asked for.
        """
        if chat_template:
            raise ConfigError(
                "--apply_chat_template: no model here has the template of a conversation; run "
                "without it, with texts as the tasks have them"
            )
        return None

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log p of continuations, and whether each is greedy, by `score`."""
        pairs = encode_pairs(self.tokenizer, [request.args for request in requests])
        for request, pair in zip(requests, pairs, strict=True):
            if not pair.continuation:
                context, continuation = request.args
                raise ConfigError(
                    f"the continuation {continuation!r} is no token of its own after a context "
                    f"that ends in {context[-40:]!r}: one token spans both, or it becomes none"
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
        """Log p of whole texts, in windows of `max_length` or else in one piece."""
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
        """Texts up to a stop string, which they are without.

        Raises:
          ConfigError: for generation arguments that are not known here.
        """
        model = for_decoding(self.model)
        groups = defaultdict(list)
        for number, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            if options.get("num_beams") == 1:
                del options["num_beams"]
            if unknown := set(options) - _GENERATION:
                raise ConfigError(
                    f"generation arguments {sorted(unknown)} are none of {sorted(_GENERATION)}"
                )
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            groups[options["max_gen_toks"], tuple(x for x in until if x)].append((number, options))
        texts = [""] * len(requests)
        with tqdm(total=len(requests), unit="text", disable=disable_tqdm or None) as bar:
            for (max_tokens, stop), members in groups.items():
                for start in range(0, len(members), self.batch_size):
                    part = members[start : start + self.batch_size]
                    writer = Writer(
                        model,
                        self.tokenizer,
                        [requests[number].args[0] for number, _ in part],
                        max_tokens,
                        [_sampler(options) for _, options in part],
                        # A request may be asked several times, to be answered differently.
                        self.seed + part[0][0],
                        stop=stop,
                    )
                    for _ in writer:
                        pass
                    for (number, _), found in zip(part, writer.continuations, strict=True):
                        texts[number] = found.text
                    bar.update(len(part))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def get_model_info(self) -> dict:
        """What the harness writes beside its results."""
        return {
            "model": type(self.model).__name__,
            "model_num_parameters": self.model.config.parameter_count(),
            "model_dtype": self.model.config.dtype,
            "model_step": self.step,
            "device": jax.devices()[0].device_kind,
        }


def _sampler(options: dict) -> Sampler:
    temperature = options.get("temperature")
    if temperature is None:
        temperature = 1.0 if options.get("do_sample") else 0.0
    if temperature == 0:
        return Sampler()
    top_k, top_p = options.get("top_k") or None, options.get("top_p")
    return Sampler(temperature, top_k, None if top_p == 1 else top_p)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
