"""What the programs share: flags, and errors a person can act on.

A program defines its flags with absl and calls `run(main)`. An error that names what is wrong with
the input ends it with its message and exit status 2; all else is a bug and keeps its traceback.
"""

import itertools
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

import retnet_jax.configs
from retnet_jax.config import Config
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.programs import overrides
from retnet_jax.programs.help_text import help_text
from retnet_jax.programs.output import forgiving_output


def group(title: str) -> None:
    """Begins a group of flags in `--help`: those that are defined from here on."""
    _groups.append((title, len(flags.FLAGS)))


_groups: list[tuple[str, int]] = []  # titles, and the number of flags before


def define_config(required: bool = True) -> None:
    """The flag --config=FILE[:ARGUMENT]; `overrides` are --config.SECTION.FIELD=VALUE."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        f"experiment: a file, or one of {', '.join(_packaged_configs())}",
        sys_argv=[""],  # overrides are read here and not there
    )
    if required:
        flags.mark_flag_as_required("config")


def define_processes() -> None:
    """The flags of a program that runs in several processes, where nothing else says how many."""
    group("Several processes")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, for all processes")
    flags.DEFINE_integer("num_processes", None, "processes that work together", 1)
    flags.DEFINE_integer("process_id", None, "number of this one, from 0", 0)
    flags.DEFINE_integer("connect_seconds", 300, "to wait for the other processes", 1)


def define_dtype() -> None:
    """The flag --dtype of programs that use a trained model."""
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "of activations; if not given that of the run, for other checkpoints float32",
    )


def given_dtype() -> dict[str, Any]:
    """What --dtype changes in a model's config: nothing, if it is not given."""
    return {} if flags.FLAGS.dtype is None else {"dtype": flags.FLAGS.dtype}


def run(
    main: Callable[[], int | None],
    when_output_ends: Callable[[], object] = lambda: None,
    positional: Sequence[str] = (),
) -> None:
    """Parses the command line, calls `main` and exits with the status it returns.

    Args:
      main: the program.
      when_output_ends: called when nobody reads what the program prints any more, as after
        `| head`; what it prints is dropped then.
      positional: the flags that arguments without a name set, in this order.
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


def _one_line(message: Warning | str, category: type[Warning], *where: object) -> str:
    """A warning of ours as a line of the program; others say where they come from."""
    if category is UserWarning:
        return f"{sys.argv[0]}: {message}\n"
    return f"{where[0]}:{where[1]}: {category.__name__}: {message}\n"


def prepare_command() -> str:
    """The command that prepares the store of this program's config: its config flags are kept."""
    options, taken = [], False
    for argument in flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False):
        if argument.startswith("-"):
            taken = argument.lstrip("-").startswith("config")
        if taken:  # "--config=FILE", or "--config" and "FILE"
            options.append(argument)
    installed = Path(sys.argv[0]).name.startswith("retnet-")
    program = ["retnet-prepare"] if installed else ["python", "tools/prepare_data.py"]
    return shlex.join([*program, *options])


def given_config() -> Config:
    """The checked config that the flags name.

    Raises:
      ConfigError: if the file cannot be loaded or returns no `Config`, and as `Config.check`.
    """
    config = flags.FLAGS.config
    if not isinstance(config, Config):
        try:
            kind = type(config.model)
        except (OSError, AttributeError) as error:
            raise ConfigError(f"--config: {error}") from error
        raise ConfigError(f"--config: get_config() must return a retnet_jax.Config, not {kind}")
    config.check()
    return config


def _parse(arguments: Sequence[str], positional: Sequence[str], module: str) -> list[str]:
    expanded = flags.FLAGS.read_flags_from_files(list(arguments[1:]), force_gnu=False)
    given: list[tuple[str, Any]] = []
    if "config" in flags.FLAGS:
        expanded, given = overrides.taken_out(expanded)
    arguments = [arguments[0], *map(_with_underscores, expanded)]
    for place, argument in enumerate(arguments):
        if argument.startswith("--config="):
            arguments[place] = "--config=" + _config_file(argument.removeprefix("--config="))
        elif argument == "--config" and place + 1 < len(arguments):
            arguments[place + 1] = _config_file(arguments[place + 1])
    if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(arguments):
        _print_help(arguments, given, sys.modules[module].__doc__ or "")
        sys.exit(0)
    rest = flags.FLAGS(arguments)
    if not flags.FLAGS["verbosity"].present:
        # Orbax tells of every array it writes, and where one cannot be written logs a stack trace
        # for each. What matters reaches us as one exception.
        logging.set_verbosity(logging.FATAL)
        getLogger("asyncio").setLevel(CRITICAL)
    if len(rest) > 1 + len(positional):
        surplus = rest[1 + len(positional)]
        raise ConfigError(f"{surplus!r} is not a flag; options are given as --name=value")
    for name, value in zip(positional, rest[1:], strict=False):
        if flags.FLAGS[name].present:
            raise ConfigError(f"{value!r} and --{name}={flags.FLAGS[name].value!r}: give one")
        flags.FLAGS[name].parse(value)
    if given and flags.FLAGS.config is None:
        raise ConfigError(f"--config.{given[0][0]} changes a config: give --config=FILE as well")
    if given and isinstance(flags.FLAGS.config, Config):  # else `given_config` says what it is
        overrides.apply(flags.FLAGS.config, given)
    return rest


def _print_help(
    arguments: Sequence[str], given: Sequence[tuple[str, Any]], description: str
) -> None:
    """Prints the text of `--help`, with the values of a config if --config is there too."""
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
    """The title and the flags of each group; first those of a program that has no groups."""
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
    """What --config names as a file: "quickstart:transformer" is in the package.

    A file may import what is beside it or, as `configs.shared`, what is beside its directory; a
    program in tools/ has only its own directory to import from.

    Raises:
      ConfigError: for a name that is no config of the package.
    """
    name, colon, argument = value.partition(":")
    if not name or name.endswith(".py") or os.sep in name:
        beside = Path(name).absolute().parent
        sys.path += [os.getcwd(), str(beside), str(beside.parent)]
        return value
    configs = _packaged_configs()
    if name not in configs:
        raise ConfigError(
            f"--config={name}: no such config; name a file, such as my_config.py, or one of "
            + ", ".join(configs)
        )
    return f"{configs[name]}{colon}{argument}"


def _packaged_configs() -> dict[str, Path]:
    """The files of `retnet_jax/configs` that define a config, by their names."""
    files = sorted(Path(retnet_jax.configs.__file__).parent.glob("*.py"))
    helpers = ("__init__", "paper_settings")
    return {file.stem: file for file in files if file.stem not in helpers}


def _with_underscores(argument: str) -> str:
    """--save-state=FILE as --save_state=FILE."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or "." in name:
        return argument
    return "--" + name[2:].replace("-", "_") + equals + value


def _reporting(function: Callable, *arguments):
    """Calls a function; an error about the input becomes its message and exit status 2."""
    try:
        return function(*arguments)
    except (flags.Error, ConfigError, CheckpointError) as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
        sys.exit(130)  # as a shell reports SIGINT
