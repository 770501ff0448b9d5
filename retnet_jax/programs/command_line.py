"""The command line of the programs: common flags, parsing, and errors that a user can act on.

A program defines its flags with absl and calls `run(main)`. An error in the user's input ends the
program with its message and exit status 2. Any other error is a bug and keeps its traceback.
"""

import copy
import itertools
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from logging import CRITICAL, getLogger
from pathlib import Path
from types import MappingProxyType
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

import retnet_jax.configs
from retnet_jax.config import Config
from retnet_jax.config.as_json import config_differences
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files.hub import hub_name
from retnet_jax.files.paths import place
from retnet_jax.pretrained import is_run
from retnet_jax.programs import overrides
from retnet_jax.programs.corpus_fit import fitted_to_corpus
from retnet_jax.programs.help_text import help_text
from retnet_jax.programs.output import forgiving_output
from retnet_jax.programs.run_directories import newest_run


def group(title: str) -> None:
    """Begins a group of flags in `--help`. Flags that are defined after it are in this group."""
    _groups.append((title, len(flags.FLAGS)))


_groups: list[tuple[str, int]] = []  # title, and the number of flags defined before the group


def define_config(required: bool = True, default: str | None = None) -> None:
    """Defines --config=FILE[:ARGUMENT], with the overrides --config.SECTION.FIELD=VALUE.

    Args:
      required: Whether it must be given.
      default: Config that is used where none is given.
    """
    config_flags.DEFINE_config_file(
        "config",
        None,
        f"config of the experiment: a Python file, or one of {', '.join(_packaged_configs())}; "
        "ARGUMENT is passed to its get_config" + (f"; default: {default}" if default else ""),
        sys_argv=[""],  # because `_parse` reads the overrides
    )
    _given.default_config = default
    if required and default is None:
        flags.mark_flag_as_required("config")


class _Given:
    """What the command line says of the config."""

    default_config: str | None = None
    config: str | None = None  # the value of --config as it was typed
    options: Set[str] = frozenset()  # names of the options that the command line sets
    changes: Mapping[str, Any] = MappingProxyType({})  # those with another value than the config's


_given = _Given()


def config_name() -> str:
    """The value of --config as it was typed, or its default."""
    return _given.config or ""


def config_changes() -> Mapping[str, Any]:
    """The options that the command line sets to another value than the config's, by their names."""
    return _given.changes


def define_model_directory() -> None:
    """Defines --workdir and --checkpoint, for `find_model`."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of a training run, also as the first argument without a name; default: the "
        "newest run under runs/",
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Directory of any other trained model, of this project or another; or its name on the "
        "Hugging Face hub: OWNER/NAME, or hf://OWNER/NAME@REVISION",
    )


def find_model() -> None:
    """Sets --workdir or --checkpoint: to the newest run if neither is given, which is said."""
    given = flags.FLAGS
    if given.workdir is not None and given.checkpoint is not None:
        raise ConfigError(
            f"--workdir={given.workdir} and --checkpoint={given.checkpoint}: give only one of them"
        )
    if given.workdir is None and given.checkpoint is None:
        given.workdir = str(newest_run())
        print(f"{sys.argv[0]}: {given.workdir} is used, the newest run", file=sys.stderr)
    elif given.workdir is not None and not _names_run(given.workdir):
        given.workdir, given.checkpoint = None, given.workdir


def _names_run(model: str) -> bool:
    """Whether a model is a training run. One on the Hugging Face hub is not, and not downloaded."""
    return hub_name(model) is None and is_run(place(model))


def define_processes() -> None:
    """Defines the flags that connect several processes where no cluster is recognised."""
    group("Several processes")
    flags.DEFINE_string("coordinator_address", None, "address of process 0, HOST:PORT")
    flags.DEFINE_integer("num_processes", None, "number of processes", 1)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", 0)
    flags.DEFINE_integer("connect_seconds", 300, "seconds to wait for the other processes", 1)


def define_dtype() -> None:
    """Defines --dtype for programs that use a trained model."""
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "dtype of activations; default: the run's, or float32 for other checkpoints",
    )


def given_dtype() -> dict[str, Any]:
    """The options of the model that --dtype changes: none if it is not given."""
    return {} if flags.FLAGS.dtype is None else {"dtype": flags.FLAGS.dtype}


def run(
    main: Callable[[], int | None],
    when_output_ends: Callable[[], object] = lambda: None,
    positional: Sequence[str] = (),
) -> None:
    """Parses the command line, calls `main` and exits with the status it returns.

    Args:
      main: The program.
      when_output_ends: Called when the program's output is no longer read, as after `| head`;
        further output is dropped.
      positional: Flags that are set by arguments without a name, in this order.
    """
    show, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        with forgiving_output(when_output_ends):
            app.run(
                lambda _: _reporting(main),
                flags_parser=lambda argv: _reporting(_parse, argv, positional, main.__module__),
            )
    finally:
        warnings.formatwarning = show
        _groups.clear()
        _given.default_config = None


def _one_line(message: Warning | str, category: type[Warning], *where: object) -> str:
    """A warning as one line. Those of other libraries have their place in the code."""
    if category is UserWarning:
        return f"{sys.argv[0]}: {message}\n"
    return f"{where[0]}:{where[1]}: {category.__name__}: {message}\n"


def prepare_command() -> str:
    """The command that builds the store of this program's config, with the same config flags."""
    return command_with_config("tools/prepare_data.py", "retnet-prepare")


def command_with_config(
    script: str, installed: str, before: Sequence[str] = (), after: Sequence[str] = ()
) -> str:
    """The command of another program, with the config flags of this one.

    Args:
      script: The program in a clone, such as "train.py".
      installed: Its name where a wheel is installed.
      before: Arguments before the config flags.
      after: Arguments after them.
    """
    options, taken = [], False
    for argument in flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False):
        if argument.startswith("-"):
            taken = argument.lstrip("-").startswith("config")
        if taken:  # "--config=FILE", or "--config" and "FILE"
            options.append(argument)
    if not any(option.lstrip("-").split("=")[0] == "config" for option in options):
        options.insert(0, f"--config={_given.config}")
    is_installed = Path(sys.argv[0]).name.startswith("retnet-")
    program = [installed] if is_installed else ["python", script]
    return shlex.join([*program, *before, *options, *after])


def given_config() -> Config:
    """The checked config that --config names, fitted to the corpus that the command line names.

    Raises:
      ConfigError: if the file cannot be loaded or does not return a `Config`, and as
        `Config.check`.
    """
    return fitted_to_corpus(unfitted_config(), config_name(), _given.options)


def config_for_corpus(source: str, path: str) -> Config:
    """As `given_config` if the command line had set `data.source` and `data.path` to these."""
    config = copy.deepcopy(unfitted_config())
    config.data.source, config.data.path = source, path
    given = {*_given.options, "data.source", "data.path"}
    return fitted_to_corpus(config, config_name(), given)


def unfitted_config() -> Config:
    """The checked config that --config names with the options of the command line."""
    config = flags.FLAGS.config
    if not isinstance(config, Config):
        try:
            kind = type(config.model)
        except (OSError, AttributeError) as error:
            raise ConfigError(f"--config: {error}") from error
        raise ConfigError(f"--config: get_config() must return a retnet_jax.Config, not {kind}")
    config.check()
    return config


def config_options() -> Set[str]:
    """Names of the options of the config that the command line sets."""
    return _given.options


def _parse(arguments: Sequence[str], positional: Sequence[str], module: str) -> list[str]:
    expanded = flags.FLAGS.read_flags_from_files(list(arguments[1:]), force_gnu=False)
    given: list[tuple[str, Any]] = []
    if "config" in flags.FLAGS:
        expanded, given = overrides.taken_out(expanded)
    arguments = [arguments[0], *map(_with_underscores, expanded)]
    _given.config, _given.changes = None, {}
    _given.options = {name for name, _ in given}
    asks_for_help = bool(_HELP & set(arguments))
    named = any(argument.partition("=")[0] == "--config" for argument in arguments)
    if _given.default_config and not named and not asks_for_help:
        arguments.insert(1, f"--config={_given.default_config}")
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            _given.config = argument.removeprefix("--config=")
            arguments[index] = "--config=" + _config_file(_given.config)
        elif argument == "--config" and index + 1 < len(arguments):
            _given.config = arguments[index + 1]
            arguments[index + 1] = _config_file(_given.config)
    if asks_for_help:
        _print_help(arguments, given, sys.modules[module].__doc__ or "")
        sys.exit(0)
    rest = flags.FLAGS(arguments)
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs every array that it writes, and a stack trace for each that it cannot write.
        # The error also reaches us as an exception.
        logging.set_verbosity(logging.FATAL)
        getLogger("asyncio").setLevel(CRITICAL)
        # It has a handler of its own, so absl would print each of its lines a second time.
        getLogger("huggingface_hub").propagate = False
    if len(rest) > 1 + len(positional):
        surplus = rest[1 + len(positional)]
        raise ConfigError(f"{surplus!r} is not a flag; options are given as --name=value")
    for name, value in zip(positional, rest[1:], strict=False):
        if flags.FLAGS[name].present:
            raise ConfigError(
                f"{value!r} and --{name}={flags.FLAGS[name].value!r}: give only one of them"
            )
        flags.FLAGS[name].parse(value)
    if given and flags.FLAGS.config is None:
        raise ConfigError(f"--config.{given[0][0]} changes a config: give --config=FILE too")
    if given and isinstance(flags.FLAGS.config, Config):  # else `given_config` raises an error
        of_file = copy.deepcopy(flags.FLAGS.config)
        overrides.apply(flags.FLAGS.config, given)
        changed = config_differences(of_file, flags.FLAGS.config)
        _given.changes = {name: value for name, (_, value) in changed.items()}
    return rest


_HELP = {"--help", "-h", "-help", "--helpfull", "--helpshort"}


def _print_help(
    arguments: Sequence[str], given: Sequence[tuple[str, Any]], description: str
) -> None:
    """Prints the text of `--help`, with the values of the config if --config is given."""
    config = None
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, _, value = argument.partition("=")
        if name == "--config":
            flags.FLAGS["config"].parse(value or following)
            config = flags.FLAGS["config"].value
    if config is not None:
        overrides.apply(config, given)
    print(help_text(description, _grouped_flags(), config))


def _grouped_flags() -> Iterator[tuple[str, list[str]]]:
    """The title and flags of each group. Flags before the first group come first, as "Flags"."""
    names, module_of = list(flags.FLAGS), flags.FLAGS.find_module_defining_flag
    for (title, start), (_, end) in itertools.pairwise([("Flags", 0), *_groups, ("", len(names))]):
        ours = [
            name
            for name in names[start:end]
            if str(module_of(name)).startswith(("retnet_jax", sys.argv[0]))
        ]
        if ours:
            yield title, ours


def _config_file(value: str) -> str:
    """The file that --config names; a name such as "quickstart" is a config of the package.

    A config file may import modules from its own directory, from the parent directory (as
    `configs.shared`) and from the working directory, so these are added to sys.path.

    Raises:
      ConfigError: for a name that is not a config of the package, and a file that does not exist.
    """
    name, colon, argument = value.partition(":")
    configs = _packaged_configs()
    if name.endswith(".py") or os.sep in name:
        if not Path(name).is_file():
            raise ConfigError(
                f"--config={value}: there is no file {name} (from {os.getcwd()}); give one, or one "
                "of " + ", ".join(configs)
            )
        beside = Path(name).absolute().parent
        sys.path += [os.getcwd(), str(beside), str(beside.parent)]
        return value
    if name not in configs:
        raise ConfigError(
            f"--config={value}: no such config; give a file, such as my_config.py, or one of "
            + ", ".join(configs)
        )
    return f"{configs[name]}{colon}{argument}"


def _packaged_configs() -> dict[str, Path]:
    """The files in `retnet_jax/configs` that define a config, by name."""
    files = sorted(Path(retnet_jax.configs.__file__).parent.glob("*.py"))
    helpers = ("__init__", "paper_settings")
    return {file.stem: file for file in files if file.stem not in helpers}


def _with_underscores(argument: str) -> str:
    """A flag written with hyphens, such as --save-state=FILE, as --save_state=FILE."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or "." in name:
        return argument
    return "--" + name[2:].replace("-", "_") + equals + value


def _reporting(function: Callable, *arguments):
    """Calls a function. An error in the input prints its message and exits with status 2."""
    try:
        return function(*arguments)
    except (flags.Error, ConfigError, CheckpointError) as error:
        print(f"{sys.argv[0]}: {_of_config_file(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
        sys.exit(130)  # as a shell reports SIGINT


def _of_config_file(error: Exception) -> BaseException:
    """The `ConfigError` of a config file, which reaches us as a flag's error with a traceback."""
    chain: list[BaseException] = [error]
    while isinstance(error, flags.Error) and chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return next((x for x in reversed(chain) if isinstance(x, ConfigError)), error)
