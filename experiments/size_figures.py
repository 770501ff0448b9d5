"""The figures of `experiments/perplexity_by_size.py`."""

import numpy as np

from experiments import figures
from experiments.runs import Records
from experiments.size_fits import difference, line_of, line_of_difference
from experiments.size_tables import (
    LABELS,
    PAIRS,
    bucket_means,
    class_bits,
    fullest_size,
    losses_of,
    models_at,
    of_runs,
    pair_label,
    recall_means,
    sizes_of,
)
from experiments.token_classes import CLASSES, RARE_AT_MOST

STYLES = {  # colour, line, marker
    "retnet": ("#7fb2e5", "--", "o"),
    "retnet_conv": ("#1f5fa8", "-", "o"),
    "transformer": ("#f4a582", "--", "s"),
    "transformer_conv": ("#c4451c", "-", "s"),
    "hybrid_full": ("#2a8f4d", "-", "^"),
    "hybrid_window": ("#8fce9f", "-", "v"),
    "retnet_conv_windows": ("#1f5fa8", ":", "D"),
    "transformer_conv_windows": ("#c4451c", ":", "D"),
}
PAIR_STYLES = dict(
    zip(
        PAIRS,
        (("#999999", "--"), ("black", "-"), ("#1f5fa8", "-."), ("#c4451c", "-.")),
        strict=True,
    )
)
# The models whose use of context is drawn; the others would hide them.
DRAWN = tuple(LABELS)[:6]


def draw(budget: str, final: Records) -> None:
    """Draws all figures; those of a small budget are not among the documents'."""
    plt = figures.start()
    plt.rcParams.update({"font.family": "DejaVu Sans", "axes.grid": True})
    plt.rcParams.update({"grid.color": "0.9", "axes.axisbelow": True, "legend.fontsize": 8})
    drawn = {
        "loss_by_size": (_by_size, (11, 4.6), (1, 2)),
        "loss_by_class": (_by_class, (11, 7.4), (2, 2)),
        "use_of_context": (_use_of_context, (11, 8), (2, 2)),
        "learning_to_copy": (_learning, (12, 4.4), (1, 3)),
    }
    for name, (function, size, panels) in drawn.items():
        figure, axes = plt.subplots(*panels, figsize=size, layout="constrained", squeeze=False)
        function(figure, axes.ravel(), final)
        figures.save(figure, name, budget)
        plt.close(figure)


def _by_size(figure, axes, final: Records) -> None:
    """Loss over parameters with lines, and the differences of pairs."""
    rng = np.random.default_rng(0)
    for model in list(LABELS)[:4]:
        colour, style, marker = STYLES[model]
        sizes = sizes_of(final, model)
        if not sizes:
            continue
        losses = losses_of(final, model, sizes, "longer")
        axes[0].errorbar(
            losses.parameters,
            losses.mean,
            losses.seed_errors,
            **{"fmt": marker, "color": colour, "linestyle": "", "capsize": 3},
        )
        if len(sizes) > 2:
            found = line_of(losses, rng)
            x = np.geomspace(min(losses.parameters), max(losses.parameters), 50)
            axes[0].plot(x, found.at(x), style, color=colour)
        axes[0].plot([], [], style, color=colour, marker=marker, label=LABELS[model])
    for one, other in PAIRS:
        _difference(axes[1], final, one, other, rng)
    axes[1].axhline(0, color="0.4", linewidth=1)
    for axis in axes:
        axis.set(xscale="log", xlabel="parameters without the embedding")
        axis.xaxis.set_minor_formatter("")
        sizes = {x["size"]: x["non_embedding"] for x in final.values()}
        axis.set_xticks(list(sizes.values()), list(sizes))
    axes[0].legend()
    axes[0].set_ylabel("bits per byte")
    axes[0].set_title("held-out loss, longer contexts\n(bars: standard error over seeds)")
    axes[1].set_ylabel("difference, bits per byte")
    axes[1].set_title(
        "differences; above 0 the first is worse\n(bars: standard error; bands: 95% of lines)"
    )
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2)
    _title(figure, final, "Loss by size")


def _difference(axis, final: Records, one: str, other: str, rng: np.random.Generator) -> None:
    sizes = sizes_of(final, one, other)
    if not sizes:
        return
    losses = [losses_of(final, x, sizes, "longer") for x in (one, other)]
    found = difference(*losses)
    colour, style = PAIR_STYLES[one, other]
    label = pair_label(one, other)
    look = {"fmt": "o", "color": colour, "linestyle": "", "capsize": 3}
    axis.errorbar(found.parameters, found.mean, found.errors, **look)
    axis.plot([], [], style, color=colour, marker="o", label=label)
    if len(sizes) > 2:
        line = line_of_difference(*losses, rng)
        x = np.geomspace(min(found.parameters), max(found.parameters), 50)
        axis.plot(x, line.at(x), style, color=colour)
        axis.fill_between(x, *line.band(x), color=colour, alpha=0.12, linewidth=0)


def _by_class(figure, axes, final: Records) -> None:
    """Loss by class of token at the smallest and largest size, and the parts of the gaps."""
    sizes = sizes_of(final)
    for axis, size in zip(axes[:2], (sizes[0], sizes[-1]), strict=True):
        models = [x for x in models_at(final, size) if x in DRAWN]
        width = 0.8 / len(models)
        for number, model in enumerate(models):
            of_class = of_runs(final, model, size)[0]["classes"]
            losses = [
                class_bits(final, model, size, x).sum() / max(1, of_class[x]["tokens"])
                for x in CLASSES
            ]
            places = np.arange(len(CLASSES)) + (number - (len(models) - 1) / 2) * width
            axis.bar(places, losses, width, color=STYLES[model][0], label=LABELS[model])
        counts = [of_class[x]["tokens"] for x in CLASSES]
        names = [f"{x}\n{100 * n / sum(counts):.0f}%" for x, n in zip(CLASSES, counts, strict=True)]
        axis.set_xticks(range(len(CLASSES)), names)
        axis.set(
            title=f"loss by class of token, {size} parameters", ylabel="bits per token, in windows"
        )
        axis.set_xlabel("class of token, and its share of the tokens")
        axis.legend(ncols=2)
        axis.set_ylim(top=1.25 * axis.get_ylim()[1])
    for axis, pair in zip(axes[2:], PAIRS[:2], strict=True):
        _parts(axis, final, *pair)
    _title(figure, final, f"Where the loss lies (a rare pair: at most {RARE_AT_MOST} in training)")


def _parts(axis, final: Records, one: str, other: str) -> None:
    """The parts of a difference by class, as stacked bars over sizes."""
    sizes = sizes_of(final, one, other)
    above, below = np.zeros(len(sizes)), np.zeros(len(sizes))
    for name, colour in zip(CLASSES, ("#bbbbbb", "#e6c35c", "#8fb8a8", "#7a3b8f"), strict=True):
        parts = np.array(
            [
                (class_bits(final, one, x, name) - class_bits(final, other, x, name)).sum()
                / sum(of_runs(final, one, x)[0]["held_out"]["bytes"])
                for x in sizes
            ]
        )
        axis.bar(sizes, parts, 0.6, np.where(parts > 0, above, below), color=colour, label=name)
        above, below = above + np.maximum(parts, 0), below + np.minimum(parts, 0)
    axis.axhline(0, color="0.4", linewidth=1)
    axis.set(title=pair_label(one, other), xlabel="parameters without the embedding")
    axis.set_ylabel("parts of the difference,\nbits per byte, in windows")
    if sizes:
        axis.legend(ncols=2, loc="upper left")
        low, high = axis.get_ylim()
        axis.set_ylim(top=high + 0.25 * (high - low))


def _use_of_context(figure, axes, final: Records) -> None:
    """Synthetic recall and copying, rare pairs and loss, by distance or position."""
    size = fullest_size(final)
    for model in models_at(final, size):
        if model not in DRAWN:
            continue
        colour, style, marker = STYLES[model]
        look = {"color": colour, "linestyle": style, "marker": marker, "label": LABELS[model]}
        for axis, probe in zip(axes[:2], ("associative", "copying"), strict=True):
            found = recall_means(final, model, size, probe)
            means, errors = zip(*found.values(), strict=True)
            axis.errorbar(list(found), 100 * np.array(means), 100 * np.array(errors), **look)
        for axis, part in zip(axes[2:], ("distances", "positions"), strict=True):
            found = bucket_means(final, model, size, part)
            means, errors = zip(*found.values(), strict=True)
            axis.errorbar([last for _, last in found], means, errors, **look)
    axes[0].axhline(12.5, color="0.4", linestyle=":", label="chance")
    for axis in axes:
        axis.axvline(256, color="0.6", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
    axes[0].set(title="associative recall of 1 of 8 random pairs", ylabel="correct, %")
    axes[1].set(title="copying 8 random tokens", ylabel="spans without an error, %")
    axes[2].set(title="rare pairs seen before, held-out documents", ylabel="bits per token")
    axes[3].set(title="all tokens, held-out documents", ylabel="bits per token")
    for axis in axes[:2]:
        axis.set_xlabel("tokens in between (grey line: training window)")
        axis.set_ylim(-3, 103)
    axes[2].set_xlabel("tokens since the pair's last occurrence, up to")
    axes[3].set_xlabel("position in the document, up to")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    _title(figure, final, f"What is used of the context, {size} parameters")


def _learning(figure, axes, final: Records) -> None:
    """Classes of tokens and synthetic copying during training, at the size with most models."""
    size = fullest_size(final)
    panels = {"rare pair": "rare pairs", "new": "tokens new in the window", "copying": "copying"}
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for model in models_at(final, size):
            if model not in DRAWN:
                continue
            colour, style, _ = STYLES[model]
            for number, record in enumerate(of_runs(final, model, size)):
                steps = record["options"]["train.steps"]
                points = [x for x in record["evaluations"] if name in x]
                tokens = [x["step"] / steps * record["tokens"] / 1e6 for x in points]
                scale = 100 if name == "copying" else 1
                label = None if number else LABELS[model]
                values = [scale * x[name] for x in points]
                axis.plot(tokens, values, style, color=colour, label=label, marker=".")
        axis.set(xlabel="million tokens of training", title=title)
        axis.set_ylabel("bits per token, validation documents")
    axes[2].set_ylabel("8 tokens copied over 32 tokens, %")
    axes[2].set_ylim(-3, 103)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    _title(figure, final, f"When copying is learned, {size} parameters (a line for each seed)")


def _title(figure, final: Records, text: str) -> None:
    tokens = max(x["tokens"] for x in final.values())
    figure.suptitle(f"{text}: standard library of Python, {tokens / 1e6:.1f}M tokens of training")
