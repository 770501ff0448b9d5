"""Experiments: questions about RetNet, each answered by runs that anyone can repeat.

    python -m experiments                     lists the experiments and how much of each is done
    python -m experiments.recipe              makes the runs that are missing, one by one
    python -m experiments.recipe --plot_only  draws the figures again

A module is one experiment; its docstring has the question, the budgets and the time they take.
Runs are trained with `retnet_jax.train`. The record of each is added to
`experiments/results/NAME_BUDGET.json` when it ends. A run whose record is there is not made again,
and a run that was stopped resumes from its checkpoint.
"""
