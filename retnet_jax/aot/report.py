"""The costs of a compiled step: memory, FLOPs, messages, and estimates of its time."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from retnet_jax.aot.compile_step import CompiledStep, device_bytes
from retnet_jax.aot.evaluation import evaluation_memory
from retnet_jax.aot.flops import Kernel, costs
from retnet_jax.aot.hlo import Messages, Program
from retnet_jax.parallel.chips import Chip, chip


@dataclass(frozen=True)
class Report:
    """Bytes, FLOPs and seconds of one step, for one device unless a comment says otherwise."""

    mesh: dict[str, int]
    device: str
    remat: str
    rows: int  # in a micro-batch
    tokens: int  # in a step, on all devices
    parameter_bytes: int
    optimizer_bytes: int
    temporary_bytes: int  # activations, gradients, buffers
    peak_bytes: int  # in a step
    evaluation_temporary_bytes: int  # activations and buffers of the held-out loss
    evaluation_peak_bytes: int  # in an evaluation of the held-out loss, with the training state
    memory_bytes: float | None  # memory of the device; None: no data sheet
    model_flops: float  # on all devices, by `ModelConfig.training_flops_per_token`
    flops: float  # on all devices, of the matrix products that run, including recomputation
    messages: tuple[Messages, ...]
    compute_seconds: float | None  # time of `flops` at the peak
    message_seconds: float | None  # time to receive the messages at the links' speed
    kernel_seconds: float | None  # Pallas kernels at their roofline; in `estimated_seconds` too
    estimated_seconds: float | None  # the compiler's estimate, without messages; TPUs only
    lower_seconds: float
    compile_seconds: float
    peak_flops: float | None

    @property
    def needed_bytes(self) -> int:
        """Peak memory of a run: of steps or evaluations, whichever is larger."""
        return max(self.peak_bytes, self.evaluation_peak_bytes)

    @property
    def step_seconds(self) -> float | None:
        """Estimated time of a step, with computation and messages fully overlapped.

        A lower bound where the compiler has no estimate of its own.
        """
        if self.compute_seconds is None or self.message_seconds is None:
            return None
        return max(self.estimated_seconds or self.compute_seconds, self.message_seconds)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation at `step_seconds`."""
        if self.step_seconds is None or self.peak_flops is None:
            return None
        devices = math.prod(self.mesh.values())
        return self.model_flops / (devices * self.peak_flops * self.step_seconds)

    def as_dict(self) -> dict[str, Any]:
        """The report as a dict for JSON."""
        messages = [message._asdict() for message in self.messages]
        return asdict(self) | {
            "messages": messages,
            "needed_bytes": self.needed_bytes,
            "step_seconds": self.step_seconds,
            "mfu": self.mfu,
        }

    def text(self) -> str:
        """The report as text."""
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.items())
        lines = [
            f"{math.prod(self.mesh.values())} x {self.device}, mesh {axes}; "
            f"remat {self.remat}, {self.rows} rows per device in a micro-batch",
            f"lowered in {self.lower_seconds:.1f} s, compiled in {self.compile_seconds:.1f} s",
            "",
            "memory of one device, GiB",
            *(
                f"  {name:<34}{size / 2**30:9.2f}"
                for name, size in (
                    ("parameters", self.parameter_bytes),
                    ("optimiser", self.optimizer_bytes),
                    ("activations, gradients, buffers", self.temporary_bytes),
                    ("peak of a step", self.peak_bytes),
                    ("peak of an evaluation", self.evaluation_peak_bytes),
                )
            ),
        ]
        if self.memory_bytes is not None:
            share = self.needed_bytes / self.memory_bytes
            lines.append(
                f"  the larger peak is {share:.0%} of the device's {self.memory_bytes / 2**30:.1f}"
            )
        lines += [
            "",
            f"FLOPs of a step: model {self.model_flops:.3e}, with recomputation {self.flops:.3e} "
            f"({self.flops / self.model_flops:.2f} times)",
            "",
            "messages of a step            mesh axes        count   GiB received per device",
        ]
        lines += [
            f"  {x.kind:<27} {','.join(x.axes):<15} {x.count:6} {x.bytes / 2**30:12.3f}"
            for x in self.messages
        ] or ["  none"]
        lines += ["", *self._times()]
        return "\n".join(lines)

    def _times(self) -> list[str]:
        if self.step_seconds is None:
            return [f"no estimate of the time: there is no data sheet for {self.device!r}"]
        estimate = "none"
        if self.estimated_seconds is not None:
            estimate = f"{self.estimated_seconds:.3f}"
        speed = self.tokens / self.step_seconds
        return [
            "estimated time of a step, seconds",
            f"  matrix products at the peak       {self.compute_seconds:9.3f}",
            f"  messages at the links' speed      {self.message_seconds:9.3f}",
            f"  Pallas kernels at their roofline  {self.kernel_seconds:9.3f}",
            f"  compiler's estimate, with kernels {estimate:>9}",
            f"together {self.step_seconds:.3f} s, MFU {self.mfu:.1%}, {speed:,.0f} tokens/s",
        ]


def report(step: CompiledStep) -> Report:
    """Reports on a compiled step. Also compiles the evaluation, to report its memory.

    Raises:
      DoesNotFitError: if the evaluation needs more memory than a device has.
    """
    config, mesh = step.config, step.mesh
    device = mesh.devices.flat[0]
    known = chip(device.device_kind)
    program = Program(step.compiled, mesh)
    evaluation = evaluation_memory(step)
    flops, kernels = costs(step.jaxpr, mesh.size)
    tokens = config.train.batch_size * config.data.sequence_length
    rows = config.train.batch_size // config.train.micro_batches
    kernel_seconds = estimated = None
    if known is not None:
        kernel_seconds = _kernel_seconds(kernels, known)
        if known.clock and program.estimated_cycles:
            estimated = program.estimated_cycles / known.clock + kernel_seconds
    return Report(
        mesh=dict(mesh.shape),
        device=device.device_kind,
        remat=config.model.remat,
        rows=rows // (mesh.shape["data"] * mesh.shape["fsdp"]),
        tokens=tokens,
        parameter_bytes=device_bytes(step.state.model),
        optimizer_bytes=device_bytes(step.state.optimizer),
        temporary_bytes=program.memory.temp_size_in_bytes,
        peak_bytes=program.peak_bytes,
        evaluation_temporary_bytes=evaluation.temporary_bytes,
        evaluation_peak_bytes=evaluation.peak_bytes,
        memory_bytes=None if known is None else known.memory,
        model_flops=tokens * config.model.training_flops_per_token(config.data.sequence_length),
        flops=flops,
        messages=tuple(program.messages),
        compute_seconds=None if known is None else flops / mesh.size / known.flops,
        message_seconds=None if known is None else _message_seconds(program, known),
        kernel_seconds=kernel_seconds,
        estimated_seconds=estimated,
        lower_seconds=step.lower_seconds,
        compile_seconds=step.compile_seconds,
        peak_flops=None if known is None else known.flops,
    )


def _kernel_seconds(kernels: Sequence[Kernel], known: Chip) -> float:
    return sum(
        x.count * max(x.flops / known.flops, x.bytes / known.memory_bandwidth) for x in kernels
    )


def _message_seconds(program: Program, known: Chip) -> float:
    """Messages inside a slice over its links, overlapped with those over the network."""
    network = sum(x.bytes for x in program.messages if x.axes == ("slices",))
    links = sum(x.bytes for x in program.messages) - network
    return max(links / known.links_bandwidth, network / known.network_bandwidth)
