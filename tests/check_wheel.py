"""Run by `make test-wheel`, with the Python of an environment that has the wheel and nothing else.

From an empty directory it trains the quickstart's model for ten steps, evaluates it and samples
from it: by the commands, then from Python, which has to give the same numbers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

COMMANDS = Path(sys.executable).parent
STEPS = ["--config.train.steps=10", "--config.optimizer.warmup_steps=2"]


def run(command: str, *arguments: str) -> str:
    done = subprocess.run(
        [COMMANDS / command, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main() -> None:
    import retnet_jax

    here = Path.cwd()
    assert not list(here.iterdir()), f"{here} is not empty"
    installed = Path(retnet_jax.__file__)
    assert Path(sys.prefix) in installed.parents, f"{installed} is not the wheel's"
    assert (installed.parent / "ops/retention/mosaic_gpu/tuned.json").exists()
    heavy = {"orbax.checkpoint", "grain", "jax"} & set(sys.modules)
    assert not heavy, f"`import retnet_jax` imports {heavy}"

    os.environ["XDG_CACHE_HOME"] = str(here / "cache")  # of compiled programs
    prepared = run("retnet-prepare", "--config=quickstart")
    assert "bytes/token" in prepared, prepared
    run("retnet-train", "--config=quickstart", "--workdir=run", *STEPS)
    assert list(here.glob("cache/retnet_jax/*/jit_train_step-*-cache")), "the step is not kept"
    run("retnet-eval", "--workdir=run", "--protocol=window", "--output=result.json")
    text = run("retnet-generate", "--workdir=run", "--prompt=def main(", "--max_tokens=8")
    assert text.startswith("def main("), text

    from retnet_jax import evaluate, generate, load_pretrained, train
    from retnet_jax.config.as_json import read_config

    config = read_config(here / "run" / "config.json")
    result = train(config, "again")
    assert (result.status, result.step) == ("finished", 10)
    losses = [
        [json.loads(line).get("loss") for line in (here / name / "metrics.jsonl").open()]
        for name in ("run", "again")
    ]
    assert losses[0] == losses[1], losses
    found = evaluate("again", protocols=("window",))
    expected = json.loads((here / "result.json").read_text())
    assert found["protocols"] == expected["protocols"], (found["protocols"], expected["protocols"])
    (generated,) = generate(load_pretrained("again"), [[0, 70, 71]], max_tokens=8)
    assert len(generated.tokens) == 8
    print("the wheel trains, evaluates and samples, by its commands and from Python")


if __name__ == "__main__":
    main()
