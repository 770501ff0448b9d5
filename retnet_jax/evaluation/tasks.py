"""The seven tasks of the paper: how a row of each becomes texts that a model compares.

A row asks which of its choices is most likely. For choice i the model reads `contexts[i]`, or
`contexts[0]` if all share it, and scores `continuations[i]`, or `continuations[0]`, after it. In
WSC273 and Winogrande the contexts differ (partial evaluation, arXiv 1806.02847).

    lm_eval   exactly the texts of lm-evaluation-harness 0.4.13, which puts a space between context
              and continuation even if there is one already, or if there should be none
    clean     single spaces, and correctly written sentences
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

VARIANTS = ("lm_eval", "clean")

Row = Mapping[str, Any]


class Question(NamedTuple):
    """A row as texts: the contexts, and the continuations to score after them."""

    contexts: list[str]
    continuations: list[str]  # with the space before them
    label: int  # index of the correct choice

    def texts(self, choice: int) -> tuple[str, str]:
        """The context and the continuation of a choice."""
        context = self.contexts[choice % len(self.contexts)]
        return context, self.continuations[choice % len(self.continuations)]

    @property
    def choices(self) -> int:
        """The number of choices."""
        return max(len(self.contexts), len(self.continuations))

    @property
    def solved(self) -> str:
        """The text with the correct choice, to show as an example before other rows."""
        return "".join(self.texts(self.label))


@dataclass(frozen=True)
class Task:
    """A multiple-choice data set.

    Attributes:
      name: Name as in lm-evaluation-harness.
      hub: Path and configuration on the Hugging Face hub.
      fields: Used fields of a row, and their types.
      parts: Function of a row and of whether the variant is "clean"; returns the contexts, the
        continuations (without the space between) and the label.
      split: Split that is evaluated.
      shots_from: Split from which examples are drawn.
      choices: Number of choices of each row.
      tfds: Name in tensorflow_datasets, if the fields have the same names there.
      normalized: Whether accuracy by log-likelihood per character (acc_norm) is reported too.
      spare_shot: Whether one more example is drawn than needed, as lm-evaluation-harness does if
        examples might come from the evaluated split.
    """

    name: str
    hub: tuple[str, str | None]
    fields: Mapping[str, type | tuple[type, ...]]
    parts: Callable[[Row, bool], tuple[list[str], list[str], int]]
    split: str
    shots_from: str
    choices: int = 2
    tfds: str | None = None
    normalized: bool = False
    spare_shot: bool = True

    def question(self, row: Row, variant: str) -> Question:
        """The texts of a row, whose fields must have been checked."""
        clean = variant == "clean"
        contexts, continuations, label = self.parts(row, clean)
        if clean:
            contexts = [_single_spaces(x).rstrip(" ") for x in contexts]
            continuations = [_single_spaces(x) for x in continuations]
        else:
            continuations = [" " + x for x in continuations]
        return Question(contexts, continuations, label)


def _single_spaces(text: str) -> str:
    return re.sub(" {2,}", " ", text)


def _answers(texts: list[str], clean: bool) -> list[str]:
    """Choices that follow a context after a space."""
    return [" " + text.strip() for text in texts] if clean else texts


def _hellaswag(row, clean):
    def without_brackets(text):
        # Parts from WikiHow have marks such as [header] and [title].
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [without_brackets(ending) for ending in row["endings"]]
    return [without_brackets(context)], _answers(endings, clean), int(row["label"])


def _boolq(row, clean):
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return [context], _answers(["no", "yes"], clean), int(row["label"])


def _copa(row, clean):
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    context = f"{row['premise'].strip()[:-1]} {connector}"
    # lm-evaluation-harness has this space in addition to the one between context and continuation.
    choices = [f" {x[0].lower()}{x[1:]}" for x in (row["choice1"], row["choice2"])]
    return [context], _answers(choices, clean), int(row["label"])


def _piqa(row, clean):
    context = f"Question: {row['goal']}\nAnswer:"
    return [context], _answers([row["sol1"], row["sol2"]], clean), int(row["label"])


def _storycloze(row, clean):
    context = " ".join(row[f"input_sentence_{i}"] for i in (1, 2, 3, 4))
    endings = _answers([row["sentence_quiz1"], row["sentence_quiz2"]], clean)
    return [context], endings, int(row["answer_right_ending"]) - 1


def _winogrande(row, clean):
    before, rest = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return contexts, [rest if clean else rest.strip()], int(row["answer"]) - 1


def _wsc273(row, clean):
    text, place, pronoun = row["text"], row["pronoun_loc"], row["pronoun"]
    if not clean:
        text = text.replace("  ", " ")  # as the harness does, without adjusting `place`
    possessive = pronoun.lower() in ("my", "his", "her", "our", "their")
    begins_sentence = text[place - 2] == "." or (clean and place == 0)

    def filled(option):
        option += "'s" if possessive else ""
        first = option.split()[0]
        if first in _CAPITALIZED and not begins_sentence:
            option = option.replace(first, first.lower())
        return text[:place] + option

    return [filled(x) for x in row["options"]], [text[place + len(pronoun) :]], int(row["label"])


_CAPITALIZED = ("A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their")

_NUMBER = (int, str)  # the type differs between releases of a data set
TASKS = {
    task.name: task
    for task in (
        Task(
            "hellaswag",
            hub=("Rowan/hellaswag", None),
            fields={"activity_label": str, "ctx_a": str, "ctx_b": str}
            | {"endings": list, "label": _NUMBER},
            parts=_hellaswag,
            split="validation",
            shots_from="train",
            choices=4,
            normalized=True,
        ),
        Task(
            "boolq",
            hub=("aps/super_glue", "boolq"),
            fields={"passage": str, "question": str, "label": (bool, *_NUMBER)},
            parts=_boolq,
            split="validation",
            shots_from="train",
            tfds="super_glue/boolq",
        ),
        Task(
            "copa",
            hub=("aps/super_glue", "copa"),
            fields=dict.fromkeys(("premise", "question", "choice1", "choice2"), str)
            | {"label": _NUMBER},
            parts=_copa,
            split="validation",
            shots_from="train",
            tfds="super_glue/copa",
        ),
        Task(
            "piqa",
            hub=("baber/piqa", None),
            fields={"goal": str, "sol1": str, "sol2": str, "label": _NUMBER},
            parts=_piqa,
            split="validation",
            shots_from="train",
            tfds="piqa",
            normalized=True,
        ),
        Task(
            "wsc273",
            hub=("lighteval/winograd_wsc", "wsc273"),
            fields={"text": str, "pronoun": str, "pronoun_loc": int, "options": list}
            | {"label": _NUMBER},
            parts=_wsc273,
            split="test",
            shots_from="test",
        ),
        Task(
            "winogrande",
            hub=("allenai/winogrande", "winogrande_xl"),
            fields=dict.fromkeys(("sentence", "option1", "option2"), str) | {"answer": _NUMBER},
            parts=_winogrande,
            split="validation",
            shots_from="train",
        ),
        Task(
            "storycloze_2016",
            hub=("LSDSem/story_cloze", "2016"),
            fields=dict.fromkeys((f"input_sentence_{i}" for i in (1, 2, 3, 4)), str)
            | {"sentence_quiz1": str, "sentence_quiz2": str, "answer_right_ending": _NUMBER},
            parts=_storycloze,
            split="test",
            shots_from="validation",
            spare_shot=False,
        ),
    )
}
