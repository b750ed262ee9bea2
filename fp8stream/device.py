"""Where slabs are quantized: the buffers they go through, and who may touch them when.

A worker has a ring of slots. A slot is filled by reading, launched, and awaited before what it
holds is written and it is filled again. On a CPU the device's buffers are the host's and a launch
is done when it returns; there is one slot. On a GPU the host's are pinned, and a launch queues
copies in, kernels and copies out on three streams with an event between one and the next, so that
one slot is read into while the other is on the device.
"""

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fp8stream.errors import CheckpointError, DeviceError, DeviceMemoryError
from fp8stream.fp8 import Quantizer, is_finite
from fp8stream.header import TensorSpec
from fp8stream.memory import SMALLEST_SCRATCH, Workspace
from fp8stream.plan import Batch
from fp8stream.scheme import Granularity

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Those of tensors that are not quantized.
_OTHER_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in {**_OTHER_DTYPES, **TORCH_DTYPES}.items()}


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """The torch dtype of a checkpoint tensor. Raises CheckpointError for one that torch lacks."""
    found = TORCH_DTYPES.get(spec.dtype) or _OTHER_DTYPES.get(spec.dtype)
    if found is None:
        raise CheckpointError(f"{spec.file}: tensor {spec.name!r}: {spec.dtype} cannot be loaded")
    return found


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Waits until everything queued before it is done."""


class Stream(Protocol):
    """Work that a device does in order."""

    def run(self, work: Callable[[], object]) -> None:
        """Queues `work`."""

    def record(self) -> Event:
        """An event after all that is queued."""

    def wait(self, event: Event) -> None:
        """Lets what is queued from now on start after `event`."""


class CudaStream:
    """A stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> Event:
        event: Event = self._stream.record_event()
        return event

    def wait(self, event: Any) -> None:
        self._stream.wait_event(event)


class Lane:
    """One worker's ring of slots on a device, its scratch, and the three streams in between."""

    def __init__(
        self, workspace: Workspace, device: torch.device, streams: Sequence[Stream] = ()
    ) -> None:
        """`streams`: for copies in, kernels and copies out; none where host and device are one."""
        count, slab, codes = workspace.slots, workspace.slab_bytes, workspace.codes_bytes
        apart = bool(streams)
        pinned = apart and device.type == "cuda"
        sources = torch.empty((count, slab), dtype=torch.uint8, pin_memory=pinned)
        results = torch.empty((count, codes), dtype=torch.uint8, pin_memory=pinned)
        there = [torch.empty_like(pool, device=device) for pool in (sources, results) if apart]
        buffers = zip(sources, results, *(there or (sources, results)), strict=True)
        self.device = device
        self.quantizer = Quantizer(device, workspace.scratch_elements)
        self.slots = tuple(Slot(self.quantizer, streams, *four) for four in buffers)
        self._next = 0

    def take(self) -> "Slot":
        """The slot that was taken longest ago. Whatever it still holds is the caller's to await."""
        slot = self.slots[self._next]
        self._next = (self._next + 1) % len(self.slots)
        return slot


class Slot:
    """The buffers of one batch, in host memory and on the device."""

    def __init__(
        self,
        quantizer: Quantizer,
        streams: Sequence[Stream],
        host_source: Tensor,
        host_codes: Tensor,
        device_source: Tensor,
        device_codes: Tensor,
    ) -> None:
        self._quantizer = quantizer
        self._streams = streams
        self._host_source, self._host_codes = host_source, host_codes
        self._device_source, self._device_codes = device_source, device_codes
        self._result: Tensor | None = None
        self._done: Event | None = None
        self.source_bytes = bytes_of(host_source)
        self.codes_bytes = bytes_of(host_codes)

    def source(self, batch: Batch) -> Tensor:
        """The batch [rows, columns] in its own dtype, on the device; a view, perhaps transposed."""
        weight = batch.slabs[0].weight
        view = self._device_source[: batch.nbytes].view(TORCH_DTYPES[weight.spec.dtype])
        if weight.source.transposed:
            return view.view(batch.columns, -1)[:, :: weight.source.row_step].T
        return view.view(batch.rows, batch.columns)

    def codes(self, batch: Batch) -> Tensor:
        """Where the batch's codes [rows, columns] go, on the device."""
        codes = self._device_codes[: batch.rows * batch.columns]
        return codes.view(torch.float8_e4m3fn).view(batch.rows, batch.columns)

    def quantize(self, batch: Batch, scale: Tensor | None) -> None:
        """Launches the batch that was read into `source_bytes`; a tensor scale may be given."""
        source, codes = self.source(batch), self.codes(batch)
        granularity = batch.granularity
        self._launch(
            batch, lambda: self._quantizer.quantize(source, granularity, codes, scale), codes
        )

    def amax(self, batch: Batch) -> None:
        """Launches the search for the batch's largest magnitude."""
        source = self.source(batch)
        self._launch(batch, lambda: self._quantizer.amax(source, Granularity.TENSOR))

    def _launch(
        self, batch: Batch, kernels: Callable[[], Tensor], codes: Tensor | None = None
    ) -> None:
        def compute() -> None:
            self._result = kernels()

        if not self._streams:
            return compute()
        copies_in, kernel_stream, copies_out = self._streams
        size = batch.nbytes
        host, there = self._host_source[:size], self._device_source[:size]
        copies_in.run(lambda: there.copy_(host, non_blocking=True))
        kernel_stream.wait(copies_in.record())
        kernel_stream.run(compute)
        last = kernel_stream
        if codes is not None:
            count = codes.numel()
            back, found = self._host_codes[:count], self._device_codes[:count]
            copies_out.wait(kernel_stream.record())
            copies_out.run(lambda: back.copy_(found, non_blocking=True))
            last = copies_out
        self._done = last.record()

    def result(self) -> Tensor:
        """What was launched last, on the device, once all of it is done and back: the slot's host
        buffers may be read, and filled again."""
        if self._done:
            self._done.synchronize()
            self._done = None
        result, self._result = self._result, None
        if result is None:
            raise RuntimeError("nothing was launched")
        return result


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor, without a copy; the tensor must outlive it."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def open_lane(workspace: Workspace, device: torch.device) -> Lane:
    """A worker's lane on `device`, for the thread that calls."""
    if device.type != "cuda":
        return Lane(workspace, device)
    torch.cuda.set_device(device)  # or pinned memory would belong to the first one
    return Lane(workspace, device, [CudaStream(device) for _ in range(3)])


@contextmanager
def running_out_of_memory() -> Iterator[None]:
    """Turns what torch and Python say of too little memory into a DeviceMemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # Torch has a class for the device's memory; of the host's, pinned or not, the text tells.
        told = ("out of memory", "allocate memory", "not enough memory")
        if isinstance(error, MemoryError) or any(text in str(error).lower() for text in told):
            raise DeviceMemoryError("out of memory") from error
        raise


def find_devices(name: str) -> tuple[torch.device, ...]:
    """What `auto`, `cpu`, `cuda` (all there are) or `cuda:N` means. Raises DeviceError."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("cpu", "cpu:0") or (name == "auto" and not available):
        return (torch.device("cpu"),)
    if not re.fullmatch(r"auto|cuda(:\d+)?", name):
        raise DeviceError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    number = name.partition(":")[2]
    if not available or int(number or 0) >= available:
        raise DeviceError(
            f"--device {name}: expected a CUDA device, found {available}; use --device cpu"
        )
    numbers = [int(number)] if number else range(available)
    return tuple(torch.device("cuda", n) for n in numbers)


def device_peak(devices: Sequence[torch.device]) -> tuple[int, int]:
    """Peak bytes that were allocated and reserved on all `devices`; zeros on a CPU."""
    gpus = [device for device in devices if device.type == "cuda"]
    return (
        sum(torch.cuda.max_memory_allocated(device) for device in gpus),
        sum(torch.cuda.max_memory_reserved(device) for device in gpus),
    )


def warm_up(devices: Sequence[torch.device]) -> None:
    """Runs every kernel once, so that what they load counts as start-up and not as the run's."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        quantizer = Quantizer(device, SMALLEST_SCRATCH)
        for dtype in TORCH_DTYPES.values():
            weight = torch.zeros((1, 1), dtype=dtype, device=device)
            for granularity in Granularity:
                codes = torch.empty((1, 1), dtype=torch.float8_e4m3fn, device=device)
                is_finite(quantizer.quantize(weight, granularity, codes))
