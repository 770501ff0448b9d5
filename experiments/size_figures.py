"""The figures of `experiments/perplexity_by_size.py`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import figures
from experiments.figures import BLUE, GREEN, GREY, ORANGE, SKY, SMALL, VERMILLION, in_thousands
from experiments.runs import Records
from experiments.size_fits import difference
from experiments.size_records import (
    LABELS,
    PAIRS,
    bits_of_class,
    bucket_means,
    fullest_size,
    gap_part,
    losses_of,
    models_at,
    of_runs,
    pair_label,
    paired_losses,
    recall_means,
    seed_differences,
    sizes_of,
    sizes_of_pair,
)
from experiments.token_classes import CLASSES, RARE_AT_MOST
from experiments.use_of_context import CONTEXT, WATCHED_DISTANCE, WATCHED_TRIALS
from retnet_jax.evaluation.statistics import standard_error

# Colour, line and marker; a hollow marker: trained in windows of another length.
STYLES = {
    "retnet": (SKY, "--", "o"),
    "retnet_conv": (BLUE, "-", "o"),
    "transformer": (ORANGE, "--", "s"),
    "transformer_conv": (VERMILLION, "-", "s"),
    "hybrid_full": (GREEN, "-", "^"),
    "hybrid_window": (GREEN, ":", "v"),
    "retnet_conv_windows": (BLUE, ":", "D"),
    "transformer_conv_windows": (VERMILLION, ":", "D"),
}
# The models whose classes and use of context are drawn; the others would hide them.
DRAWN = tuple(model for model in STYLES if not model.endswith("_windows"))
PAIR_STYLES = dict(
    zip(
        PAIRS,
        ((GREY, "--", "D"), ("black", "-", "P"), (BLUE, "-.", "o"), (VERMILLION, "-.", "s")),
        strict=True,
    )
)
CLASS_COLOURS = dict(zip(CLASSES, ("0.85", "0.6", "#DDAACC", "#7B2D6B"), strict=True))
CLASS_MEANINGS = {
    "new": f"the token has not occurred so far in the window of {CONTEXT} tokens",
    "seen": "it has, but never after the token that precedes it here",
    "common pair": "the preceding token and it have occurred as a pair in the window, and more "
    f"than {RARE_AT_MOST} times in the training data",
    "rare pair": "the same, but the pair occurs at most "
    f"{RARE_AT_MOST} times in the training data, so it must be recalled from the context",
}


def draw(budget: str, final: Records) -> None:
    """Draws all figures; those of a small budget are not among the documents'."""
    plt = figures.start()
    plt.rcParams.update({"font.family": "DejaVu Sans", "axes.grid": True})
    plt.rcParams.update({"grid.color": "0.9", "axes.axisbelow": True})
    drawn = {
        "loss_by_size": (_by_size, 5.6, (1, 2)),
        "loss_by_class": (_by_class, 8.6, (2, 2)),
        "use_of_context": (_use_of_context, 7.6, (2, 2)),
        "learning_to_recall": (_learning_to_recall, 4.4, (1, 3)),
    }
    for name, (function, height, panels) in drawn.items():
        size = figures.WIDTH, height
        figure, axes = plt.subplots(*panels, figsize=size, layout="constrained", squeeze=False)
        function(figure, axes.ravel(), final)
        figures.save(figure, name, budget)
        plt.close(figure)


def _look(model: str) -> dict[str, Any]:
    colour, style, marker = STYLES[model]
    hollow = "white" if model.endswith("_windows") else colour
    return {"color": colour, "linestyle": style, "marker": marker, "markerfacecolor": hollow}


def _by_size(figure, axes, final: Records) -> None:
    """Loss over parameters, and the differences of pairs, as measured points."""
    models = [model for model in LABELS if sizes_of(final, model)]
    for number, model in enumerate(models):
        losses = losses_of(final, model, sizes_of(final, model), "longer")
        beside = losses.parameters * 1.03 ** (number - 1.5)
        errors = losses.shown_errors
        axes[0].errorbar(
            beside, losses.mean, errors, label=LABELS[model], capsize=2, ms=5, **_look(model)
        )
        for place, bits in zip(beside, losses.bits, strict=True):
            each = bits.sum(1) / losses.byte_counts.sum()
            axes[0].plot([place] * len(each), each, ".", color=_look(model)["color"], ms=4)
    for number, (one, other) in enumerate(PAIRS):
        sizes = sizes_of_pair(final, one, other)
        if not sizes:
            continue
        found = difference(*paired_losses(final, one, other, sizes, "longer"))
        colour, style, marker = PAIR_STYLES[one, other]
        axes[1].errorbar(
            found.parameters * 1.03 ** (number - 1.5),
            found.mean,
            found.shown_errors,
            **{"color": colour, "linestyle": style, "marker": marker, "ms": 5, "capsize": 2},
            label=pair_label(one, other),
        )
        for size, place in zip(sizes, found.parameters * 1.03 ** (number - 1.5), strict=True):
            each = seed_differences(final, one, other, size, "longer")
            axes[1].plot([place] * len(each), each, ".", color=colour, ms=4)
    axes[1].axhline(0, color="0.4", linewidth=1)
    for axis in axes:
        sizes = {x["size"]: x["non_embedding"] for x in final.values()}
        axis.set(xscale="log", xlabel="parameters without the embedding")
        axis.set_xticks(list(sizes.values()), list(sizes))
        axis.minorticks_off()
        axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.15), ncols=2 - (axis is axes[1]))
    axes[0].set(ylabel="bits per byte", title="held-out loss, longer contexts")
    axes[1].set_ylabel("difference, bits per byte")
    axes[1].set_title("differences on the same documents\n(above 0: the first is worse)")
    _title(
        figure,
        final,
        "Loss by size",
        "bars: standard error over documents and seeds (of two seeds, with the deviation of all "
        "models of the size); dots: each seed;\npoints of one size are shifted sideways. Documents "
        "are easy or hard for all models alike, so differences (right)\nare surer than the bars on "
        "the left suggest",
    )


def _by_class(figure, axes, final: Records) -> None:
    """Loss by class of token at the smallest and largest size, and the parts of the gaps."""
    sizes = sizes_of(final)
    for axis, size in zip(axes[:2], (sizes[0], sizes[-1]), strict=True):
        models = [x for x in models_at(final, size) if x in DRAWN]
        width = 0.8 / len(models)
        for number, model in enumerate(models):
            of_class = of_runs(final, model, size)[0]["classes"]
            counts = [of_class[x]["tokens"] for x in CLASSES]
            each = [
                bits_of_class(final, model, size, x).sum(1) / max(1, n)
                for x, n in zip(CLASSES, counts, strict=True)
            ]
            places = np.arange(len(CLASSES)) + (number - (len(models) - 1) / 2) * width
            axis.bar(
                places,
                [x.mean() for x in each],
                width,
                yerr=[np.nan_to_num(standard_error(x)) for x in each],
                ecolor="black",
                color=STYLES[model][0],
                edgecolor="white",
                hatch="//" if model == "hybrid_window" else "",
                label=LABELS[model],
            )
        shares = [f"{100 * n / sum(counts):.0f}%" for n in counts]
        names = [f"{x}\n{share}" for x, share in zip(CLASSES, shares, strict=True)]
        axis.set_xticks(range(len(CLASSES)), names)
        axis.set(title=f"loss by class of token, {size} parameters", ylabel="bits per token")
        axis.set_xlabel("class of token, and its share of the tokens")
    _one_range(axes[:2], room=0.3)
    axes[0].legend(ncols=2, loc="upper left")
    for axis, pair in zip(axes[2:], PAIRS[:2], strict=True):
        _parts(axis, final, *pair)
    _one_range(axes[2:], room=0.25)
    axes[2].legend(ncols=3, loc="upper left", columnspacing=1)
    meanings = "\n".join(f"{name}: {meaning}" for name, meaning in CLASS_MEANINGS.items())
    figure.supxlabel(meanings, x=0.06, ha="left", fontsize=SMALL)
    _title(
        figure,
        final,
        "Where the loss lies",
        f"read in windows of the training length; bars: standard error{_seeds_text(final)}, "
        "below over documents too",
    )


def _seeds_text(final: Records) -> str:
    several = any(x["seed"] > 0 for x in final.values())
    return " over seeds, where there are several" if several else " over seeds (none has several)"


def _parts(axis, final: Records, one: str, other: str) -> None:
    """The parts of a difference by class, side by side over sizes, and their sum."""
    sizes = sizes_of_pair(final, one, other)
    places, width = np.arange(len(sizes)), 0.17
    for number, (name, colour) in enumerate(CLASS_COLOURS.items()):
        found = [gap_part(final, one, other, size, [name]) for size in sizes]
        axis.bar(
            places + (number - 2) * width,
            [mean for mean, _ in found],
            width,
            yerr=[error for _, error in found],
            color=colour,
            label=name,
            error_kw={"linewidth": 1},
        )
    found = [gap_part(final, one, other, size, CLASSES) for size in sizes]
    means, errors = zip(*found, strict=True) if found else ((), ())
    axis.errorbar(places + 2 * width, means, errors, fmt="kD", ms=5, label="all tokens")
    axis.axhline(0, color="0.4", linewidth=1)
    axis.set_xticks(places, sizes)
    axis.set(title=f"{pair_label(one, other)}\n(above 0: the RetNet is worse)")
    axis.set(xlabel="parameters without the embedding", ylabel="part of the difference, bits/byte")


def _one_range(axes, room: float) -> None:
    """Gives panels the same y-axis, with room for a legend at its upper end."""
    lows, highs = zip(*(axis.get_ylim() for axis in axes), strict=True)
    low, high = min(lows), max(highs)
    for axis in axes:
        axis.set_ylim(low, high + room * (high - low))


def _use_of_context(figure, axes, final: Records) -> None:
    """Synthetic recall and copying, rare pairs and loss, by distance or position."""
    size = fullest_size(final)
    models = [x for x in models_at(final, size) if x in DRAWN]
    for number, model in enumerate(models):
        aside = 2 ** (0.07 * (number - (len(models) - 1) / 2))
        look = _look(model) | {"label": LABELS[model], "markersize": 5, "elinewidth": 1}
        found = recall_means(final, model, size, "associative")
        means, errors = zip(*found.values(), strict=True)
        at = aside * np.array(list(found))
        axes[0].errorbar(at, 100 * np.array(means), 100 * np.array(errors), **look)
        found = _copying_bits(final, model, size)
        axes[1].errorbar(aside * np.array(list(found)), list(found.values()), **look)
        for axis, part in zip(axes[2:], ("distances", "positions"), strict=True):
            found = {last: x for (_, last), x in bucket_means(final, model, size, part).items()}
            means, errors = zip(*found.values(), strict=True)
            axis.errorbar(aside * np.array(list(found)), means, errors, **look)
    vocabulary = max(x["options"].get("model.vocab_size", 0) for x in final.values())
    for axis, guess in zip(axes[:2], (12.5, math.log2(max(2, vocabulary))), strict=True):
        axis.axhline(guess, color="black", linestyle=(0, (1, 3)), label="a guess")
        axis.set_xlabel("tokens in between")
    for axis in axes:
        axis.axvline(CONTEXT, color="0.6", lw=1.2, label=f"window in training, {CONTEXT} tokens")
        axis.set_xscale("log", base=2)
        ticks = (16, 64, 256, 1024, 4096, 16_384) if axis in axes[2:] else (16, 64, 128, 256, 512)
        axis.set_xticks(ticks, [in_thousands(x) for x in ticks])
    axes[0].set(title="associative recall: 1 of 8 random pairs", ylabel="correct, %")
    axes[0].set_ylim(bottom=0)
    axes[1].set(title="copying 8 random tokens", ylabel="bits per copied token (0: sure)")
    axes[1].set_ylim(bottom=0)
    axes[1].text(0.03, 0.36, _exact_copies(final, size, models), transform=axes[1].transAxes)
    axes[2].set(title=f"rare pairs (at most {RARE_AT_MOST} in training)\nthat occurred before")
    axes[2].set(
        ylabel="bits per token, held-out documents",
        xlabel="tokens since the last occurrence, up to",
    )
    axes[3].set(title="all tokens")
    axes[3].set(
        ylabel="bits per token, held-out documents", xlabel="position in the document, up to"
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    _title(
        figure,
        final,
        f"What is used of the context, {size} parameters",
        "bars: standard error, above over trials (of copying none), below over documents; points "
        "are shifted sideways",
    )


def _copying_bits(final: Records, model: str, size: str) -> dict[int, float]:
    """The mean loss on copied tokens over seeds, in bits, by distance."""
    each: dict[int, list[float]] = {}
    for record in of_runs(final, model, size):
        for x in record["recall"]:
            if x["probe"] == "copying":
                each.setdefault(x["distance"], []).append(x["nll_per_token"] / math.log(2))
    return {distance: float(np.mean(found)) for distance, found in each.items()}


def _exact_copies(final: Records, size: str, models: Sequence[str]) -> str:
    """The models that ever copy all eight tokens, with how often, as text."""
    lines, never = [], 0
    for model in models:
        shares = [mean for mean, _ in recall_means(final, model, size, "copying").values()]
        never += not any(shares)
        if any(shares):
            percents = ", ".join(f"{100 * x:.0f}" for x in shares)
            lines.append(f"{LABELS[model]}: {percents}%")
    lines += ["all others: 0%"] if lines and never else ["all models: 0%"] if never else []
    return "\n".join(["all 8 right, by distance:", *lines])


def _learning_to_recall(figure, axes, final: Records) -> None:
    """Classes of tokens and associative recall during training, at the size with most models."""
    size = fullest_size(final)
    panels = {
        "rare pair": f"rare pairs (at most {RARE_AT_MOST}\nin training)",
        "new": "tokens new in the window",
    }
    panels["associative"] = f"associative recall\nover {WATCHED_DISTANCE} tokens"
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        scale = 100 if name == "associative" else 1
        for model in models_at(final, size):
            if model not in DRAWN:
                continue
            each = of_runs(final, model, size)
            tokens, values = _course(each, name)
            look = _look(model)
            if len(each) > 1:
                thin = {"color": look["color"], "linestyle": look["linestyle"], "lw": 0.7}
                axis.plot(tokens, scale * values.T, alpha=0.5, **thin)
            mean = values.mean(0)
            axis.plot(tokens, scale * mean, markersize=4, label=LABELS[model], **look)
            if name == "associative":
                error = np.sqrt(mean * (1 - mean) / (WATCHED_TRIALS * len(each)))
                low, high = scale * (mean - error), scale * (mean + error)
                axis.fill_between(tokens, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel="million tokens of training", title=title, ylabel="bits per token")
    axes[2].axhline(12.5, color="black", linestyle=(0, (1, 3)), label="a guess (1 of 8)")
    axes[2].set(ylabel="correct, %")
    axes[2].set_ylim(bottom=0)
    handles, labels = axes[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    several = any(len(of_runs(final, model, size)) > 1 for model in DRAWN)
    _title(
        figure,
        final,
        f"When recall is learned, {size} parameters",
        ("thin lines: each seed, where there are several; " if several else "one seed; ")
        + "shaded: standard error over trials; left and middle: validation documents",
    )


def _course(records: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A number during training by seed and evaluation, at how many million tokens."""
    each = [[x for x in of.get("evaluations", ()) if name in x] for of in records]
    shortest = min(map(len, each))
    steps = records[0]["options"]["train.steps"]
    tokens = [x["step"] / steps * records[0]["tokens"] / 1e6 for x in each[0][:shortest]]
    return np.array(tokens), np.array([[x[name] for x in of[:shortest]] for of in each])


def _title(figure, final: Records, text: str, note: str) -> None:
    tokens = max(x["tokens"] for x in final.values())
    figure.suptitle(
        f"{text}: standard library of Python, {tokens / 1e6:.2f}M tokens of training\n{note}",
        fontsize=SMALL + 0.5,
    )
