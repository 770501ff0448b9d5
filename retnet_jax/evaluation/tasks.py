"""The seven tasks of the paper as data: how a row of each becomes texts that a model compares.

A row asks which of its choices is likeliest. For choice i the model is given `contexts[i]`, or
`contexts[0]` where all have the same, and scores `continuations[i]` or `continuations[0]` after it.
In WSC273 and Winogrande it is the contexts that differ (partial evaluation, arXiv 1806.02847).

    lm_eval   the texts of lm-evaluation-harness 0.4.13, letter for letter: it puts a space between
              the two also where there is one already, or where there should be none
    clean     single spaces, and a filled-in sentence as it is written
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

VARIANTS = ("lm_eval", "clean")

Row = Mapping[str, Any]


class Question(NamedTuple):
    """A row as texts. Scored is what `text(i)` has after its context."""

    contexts: list[str]
    continuations: list[str]  # with the space before them
    label: int  # of the right choice

    def texts(self, choice: int) -> tuple[str, str]:
        """The context and the continuation of a choice."""
        context = self.contexts[choice % len(self.contexts)]
        return context, self.continuations[choice % len(self.continuations)]

    @property
    def choices(self) -> int:
        """How many there are."""
        return max(len(self.contexts), len(self.continuations))

    @property
    def solved(self) -> str:
        """The text with the right choice: a row as an example for others."""
        return "".join(self.texts(self.label))


@dataclass(frozen=True)
class Task:
    """A data set of multiple choice.

    Attributes:
      name: as in lm-evaluation-harness.
      hub: its path and configuration on the Hugging Face hub.
      fields: those of a row that are used, and their types.
      parts: contexts, continuations and label of a row, where two of them are to be separated by a
        space. The second argument is whether spaces are to be clean.
      split: the rows that are evaluated.
      shots_from: the split from which examples are drawn.
      choices: of each row.
      tfds: its name in tensorflow_datasets, where the fields have the same names there.
      normalized: whether accuracy by log-likelihood per character is usual too (acc_norm).
      spare_shot: whether one more example is drawn than needed, as lm-evaluation-harness does where
        it does not know for certain that examples are from another split.
    """

    name: str
    hub: tuple[str, str | None]
    fields: dict[str, type | tuple[type, ...]]
    parts: Callable[[Row, bool], tuple[list[str], list[str], int]]
    split: str
    shots_from: str
    choices: int = 2
    tfds: str | None = None
    normalized: bool = False
    spare_shot: bool = True

    def question(self, row: Row, variant: str) -> Question:
        """A row, whose fields have been checked, as texts."""
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
    # The space is lm-evaluation-harness's own, before the one that it puts between any two parts.
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
        text = text.replace("  ", " ")  # which moves the place of the pronoun, but not `place`
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

_NUMBER = (int, str)  # releases of a data set differ in it
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
