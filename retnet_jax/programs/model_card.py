"""The model card of a training run: README.md as the Hugging Face hub shows it.

Every number in it is from the run's own records: config.json, metrics.jsonl, starts.jsonl, and the
manifests of the token stores that the run read. The data sets on the hub are those that
tools/prepare_corpus.py recorded beside the text of a store, as long as that is there.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from retnet_jax.config import Config
from retnet_jax.config.as_json import marked
from retnet_jax.data.hub_text import RECORD
from retnet_jax.data.token_store import SPLITS, read_manifest
from retnet_jax.files import paths as files
from retnet_jax.runs.json_lines import records_in

_PAPER = "[Retentive Network](https://arxiv.org/abs/2307.08621)"
_OF_LAYOUT = {
    "fla": """\
```sh
pip install torch transformers flash-linear-attention
```

```python
import fla  # registers its models with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
```

flash-linear-attention computes with Triton and so needs a GPU. retnet-jax loads these files too:
`retnet_jax.load_pretrained("{name}")`.""",
    "own": """\
```python
from retnet_jax import load_pretrained

model = load_pretrained("{name}")
```

Or `python generate.py {name} "Once"` in a clone of retnet-jax. `transformers` does not load it.""",
}


class Exported(NamedTuple):
    """An exported model, for its card.

    Attributes:
      name: OWNER/NAME on the hub, or the last part of its directory.
      layout: "fla" or "own".
      step: Step of the checkpoint.
      license: Identifier of its licence, such as apache-2.0; None: none is given.
      has_tokenizer: Whether `transformers` can load the tokenizer.
    """

    name: str
    layout: str
    step: int
    license: str | None
    has_tokenizer: bool


def model_card(workdir: epath.Path, config: Config, model: Exported) -> str:
    """The text of README.md.

    Args:
      workdir: Directory of the run.
      config: Config of the run.
      model: The exported model.
    """
    stores = [_Store.of(config, directory, share) for directory, share in _shares(config).items()]
    kind = "Transformer" if config.model.mixer == "attention" else "RetNet"
    title = model.name.rpartition("/")[2]
    usage = _OF_LAYOUT[model.layout].replace("{name}", model.name)
    if model.layout == "fla" and not model.has_tokenizer:
        usage += (
            "\n\n`transformers` does not load the tokenizer from these files; retnet-jax does: "
            f'`retnet_jax.pretrained.read_pretrained("{model.name}")[1]`.'
        )
    sections = {
        "Use": usage,
        "Training data": _data(config, stores),
        "Training": _training(workdir, config, model.step),
        "Held-out results": _results(workdir, config, model.step),
        "What it is not good for": _limits(config, model.step),
    }
    head = (
        f"# {title}\n\nA {kind} language model ({_PAPER}) of {config.model.parameter_count():,} "
        "parameters, trained with retnet-jax. This card was written from the records of the "
        "training run."
    )
    body = [head, *(f"## {name}\n\n{text}" for name, text in sections.items())]
    return _header(config, model, stores) + "\n\n".join(body) + "\n"


class _Origin(NamedTuple):
    """A data set on the Hugging Face hub."""

    path: str  # NAME:SUBSET:SPLIT
    commit: str
    license: str  # on its page there


class _Store(NamedTuple):
    """A token store that the run reads."""

    directory: str
    share: float
    options: dict[str, Any]  # those it was built with
    splits: dict[str, dict[str, int]] | None  # None: there is no manifest
    origins: list[_Origin | None]  # of its text from the Hugging Face hub; None: some is not

    @classmethod
    def of(cls, config: Config, directory: str, share: float) -> _Store:
        try:
            manifest = read_manifest(files.expanded(directory))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            options = {name: getattr(config.data, name[5:]) for name in marked("in_store")}
            return cls(directory, share, {} if config.data.mixture else options, None, [])
        return cls(directory, share, manifest["options"], manifest["splits"], _origins(manifest))

    @property
    def corpus(self) -> str:
        """What it was built from."""
        source, path = (self.options.get(f"data.{name}", "") for name in ("source", "path"))
        if source == "stdlib":
            return f"Python {self.options.get('python', '')}'s standard library".replace(" '", "'")
        here = f"{source}: {path}" if source else "not recorded"
        return "; ".join(
            f"{x.path} on the Hugging Face hub, commit {x.commit}, licence there: {x.license}"
            if x
            else here
            for x in self.origins or [None]
        )

    @property
    def hub_names(self) -> list[str]:
        """The names of its data sets on the Hugging Face hub."""
        paths = [x.path for x in self.origins if x]
        if self.options.get("data.source") == "hf":
            paths.append(self.options["data.path"])
        return [path.partition(":")[0].partition("@")[0] for path in paths]


def _origins(manifest: dict[str, Any]) -> list[_Origin | None]:
    """What tools/prepare_corpus.py recorded beside the files of a store; None for other text."""
    if manifest["options"].get("data.source") != "jsonl":
        return []
    found: dict[_Origin | None, None] = {}
    for directory in dict.fromkeys(Path(x["path"]).parent for x in manifest.get("sources", ())):
        origin = None
        # There is no such file, or it is another program's.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
            origin = _Origin(record["origin"]["data set"], record["commit"], record["license"])
        found[origin] = None
    return list(found)


def _shares(config: Config) -> dict[str, float]:
    """The share of each store in the windows."""
    given = config.data.mixture or {config.data.store: 1.0}
    return {directory: share / sum(given.values()) for directory, share in given.items()}


def _header(config: Config, model: Exported, stores: list[_Store]) -> str:
    """The YAML between lines of hyphens that the hub reads."""
    values: dict[str, Any] = {} if model.license is None else {"license": model.license}
    tags = ["transformer" if config.model.mixer == "attention" else "retnet", "retnet-jax"]
    if model.layout == "fla":
        values["library_name"] = "transformers"
        tags.append("flash-linear-attention")
    values |= {"pipeline_tag": "text-generation", "tags": tags}
    names = {name for store in stores for name in store.hub_names}
    if names:
        values["datasets"] = sorted(names)
    # JSON is YAML: every text is quoted, so that none is read as a number or a truth value.
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---", "", ""])


def _data(config: Config, stores: list[_Store]) -> str:
    rows = ["| corpus | share of the windows | documents | tokens | held out, tokens |"]
    rows.append("|---|---|---|---|---|")
    for store in stores:
        counts = ["not recorded"] * 3
        if store.splits is not None:
            train, held_out = (store.splits[split] for split in SPLITS)
            counts = [f"{x:,}" for x in (train["documents"], train["tokens"], held_out["tokens"])]
        corpus = store.corpus.replace("|", "\\|")
        rows.append(" | ".join([f"| {corpus}", f"{store.share:.1%}", *counts]) + " |")
    filters = [
        f"`{name.removeprefix('data.')}={value!r}`"
        for store in stores
        for name, value in store.options.items()
        if name in _FILTERS and value
    ]
    text = "\n".join(rows)
    if filters:
        text += f"\n\nFilters: {', '.join(dict.fromkeys(filters))}."
    return f"{text}\n\nTokenizer: `{config.data.tokenizer}`, {config.model.vocab_size:,} ids."


_FILTERS = ("data.min_bytes", "data.extensions", "data.languages", "data.licenses")


def _training(workdir: epath.Path, config: Config, step: int) -> str:
    optimizer = config.optimizer
    lines = {
        "steps": f"{step:,} of {config.train.steps:,}",
        "tokens read": f"{_tokens(config, step):,}: {config.train.batch_size:,} windows of "
        f"{config.data.sequence_length:,} in each step",
        "optimiser": f"{optimizer.name}, learning rate {optimizer.learning_rate:g} "
        f"({optimizer.schedule}), weight decay {optimizer.weight_decay:g}",
        "model": f"{config.model.n_layers} layers, width {config.model.d_model}, "
        f"{config.model.n_heads} heads, activations in {config.model.dtype}",
    }
    if config.init_from:
        lines["begun from"] = f"`{config.init_from}`"
    starts = records_in(workdir / "starts.jsonl")
    devices = [f"{x['devices']} x {x['device']}" for x in starts if {"devices", "device"} <= {*x}]
    if devices:
        lines["devices"] = ", ".join(dict.fromkeys(devices))
    rows = "\n".join(f"| {name} | {value} |" for name, value in lines.items())
    return f"| | |\n|---|---|\n{rows}\n\nAll options are in `training_config.json`."


def _results(workdir: epath.Path, config: Config, step: int) -> str:
    """The last evaluation of held-out windows up to a step."""
    records = [x for x in records_in(workdir / "metrics.jsonl") if "held_out_loss" in x]
    record = max((x for x in records if x["step"] <= step), key=lambda x: x["step"], default=None)
    if record is None:
        return "The run has recorded no evaluation up to this step."
    rows = ["| store | loss, nats per token | perplexity | bits per byte |", "|---|---|---|---|"]
    for key in record:
        if key.startswith("held_out_loss/"):
            name = key.partition("/")[2]
            kinds = ("loss", "perplexity", "bits_per_byte")
            values = [record.get(f"held_out_{kind}/{name}") for kind in kinds]
            cells = [name, *("-" if x is None else f"{x:.4f}" for x in values)]
            rows.append("| " + " | ".join(cells) + " |")
    most = config.train.eval_batches * config.train.batch_size
    return "\n".join(rows) + (
        f"\n\nAfter {record['step']:,} steps, on documents or ends of documents that were held out "
        f"from training: at most the first {most:,} windows of {config.data.sequence_length:,} "
        "tokens of each store, each read without the text before it. No benchmark is recorded here."
    )


def _limits(config: Config, step: int) -> str:
    tokens, parameters = _tokens(config, step), config.model.parameter_count()
    lines = [
        "Instructions and conversations: it was trained only to continue text.",
        "Facts and advice: nothing in the run checked whether its texts are true, harmful or "
        "biased, and they may repeat passages of the training data.",
        "Languages and kinds of text that are not in the training data.",
        f"Texts of more than {config.data.sequence_length:,} tokens: it was trained on windows of "
        "that length, and the run has no results on longer ones.",
    ]
    if tokens < 20 * parameters:
        lines.append(
            f"Anything where quality matters: it has read {tokens / parameters:.2g} tokens for "
            "each parameter, less than the 20 of [arXiv 2203.15556](https://arxiv.org/abs/2203.15556)."
        )
    return "\n".join(f"- {line}" for line in lines)


def _tokens(config: Config, step: int) -> int:
    return step * config.train.batch_size * config.data.sequence_length
