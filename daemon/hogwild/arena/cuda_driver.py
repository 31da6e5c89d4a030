"""The CUDA driver, as far as the arena needs it: every call checked, every error said to a person.

`cuda.bindings.driver` is imported when the first device is opened, so that this module can be imported anywhere.
"""

import logging
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from hogwild.errors import ArenaError, UnshareableError

log = logging.getLogger(__name__)

_UNSHAREABLE = {"CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_NOT_PERMITTED"}
_SHARING = {
    "cuMemGetAllocationGranularity", "cuMemCreate", "cuMemExportToShareableHandle", "cuMemImportFromShareableHandle",
    "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess",
}  # fmt: skip
_ADVICE = {  # by the name of the error, then by the function that failed
    "CUDA_ERROR_OUT_OF_MEMORY": "Stop what else uses the GPU (`nvidia-smi` lists it), choose a smaller model, or "
    "raise the limit on this process's addresses (ulimit -v) if there is one.",
    "CUDA_ERROR_NO_DEVICE": "Is CUDA_VISIBLE_DEVICES empty, or /dev/nvidia* closed to this user or unit? "
    "Try `nvidia-smi`.",
    "CUDA_ERROR_INVALID_DEVICE": "`nvidia-smi -L` lists the GPUs, CUDA_VISIBLE_DEVICES chooses among them.",
    "cuMemImportFromShareableHandle": "The descriptor is of no memory that this GPU can use: daemon and server "
    "have to see the same GPU (compare their CUDA_VISIBLE_DEVICES).",
    "cuIpcOpenMemHandle": "Daemon and server have to be two processes on one machine, with the same GPU.",
    "cuMemMap": "The peer's allocation is smaller than that: start daemon and server from the same version of hogwild.",
}
_ADVICE_OTHERWISE = "`nvidia-smi` and `dmesg | grep NVRM` say how the driver is."


def load() -> Any:
    """The module `cuda.bindings.driver`; tests without a device replace it.

    Raises:
        ArenaError: it is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ArenaError(
            f"sharing the memory of a GPU needs cuda-bindings ({error}): pip install 'hogwild[cuda]'"
        ) from error
    return driver


def find(device_id: str, task: str) -> int:
    """The number N, as in torch's `cuda:N`, that this process has for a GPU: CUDA_VISIBLE_DEVICES renumbers them.

    Args:
        device_id: "GPU-" and its UUID, as `Gpu.device_id`.
        task: as in `Gpu`.

    Raises:
        ArenaError: this process does not see it. Names those that it sees, and what to set.
    """
    count = int(_Calls("the GPU that it is on", task).call("cuDeviceGetCount"))
    seen = [Gpu(index, task).device_id for index in range(count)]
    if device_id not in seen:
        raise ArenaError(
            f"{task}: it is on {device_id}, and this process sees {', '.join(seen) or 'no GPU'}. Daemon and server "
            f"have to use the same GPU: start this one with CUDA_VISIBLE_DEVICES={device_id} (or the other one with "
            "the GPU that is meant; `nvidia-smi -L` lists them)."
        )
    return seen.index(device_id)


class _Calls:
    """Calls of the driver, checked."""

    def __init__(self, name: str, task: str) -> None:
        """As for Gpu. Initialises the driver, which may be done any number of times."""
        self.name, self.task, self._driver = name, task, load()
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of the driver gives beside its error code.

        Raises:
            UnshareableError: this is no way to share memory of that device.
            ArenaError: it failed in another way. Says on which device, with how much memory free, and what to do.
        """
        values, problem, error = self._attempt(function, *arguments)
        if problem:
            advice = _ADVICE.get(error) or _ADVICE.get(function, _ADVICE_OTHERWISE)
            unshareable = function in _SHARING and error in _UNSHAREABLE
            raise (UnshareableError if unshareable else ArenaError)(
                f"{self.task} on {self.name}: {function} failed with {problem}{self._free()}. {advice}"
            )
        return values[0] if values else None

    def undo(self, function: str, *arguments: Any) -> bool:
        """Call a function on the way out. A failure is logged, for nothing better can be done about it."""
        _values, problem, _error = self._attempt(function, *arguments)
        if problem:
            log.error("%s failed with %s, while letting go of memory of %s", function, problem, self.name)
        return not problem

    def _attempt(self, function: str, *arguments: Any) -> tuple[list[Any], str, str]:
        """What a function gives; what went wrong, if something did; and the driver's name for that, if it has one."""
        try:
            error, *values = getattr(self._driver, function)(*arguments)
        except (RuntimeError, OverflowError, ValueError) as problem:
            # cuda-bindings: no driver, or too old for this function; no such size; an error that is news to it
            return [], f"{type(problem).__name__}: {problem}", ""
        if not error:
            return values, "", ""
        name, text = (self._word(what, error) for what in ("cuGetErrorName", "cuGetErrorString"))
        return [], f"{name} ({text})", name

    def _word(self, function: str, error: Any) -> str:
        unknown, word = getattr(self._driver, function)(error)
        return f"error {int(error)}" if unknown else bytes(word).decode()

    def _free(self) -> str:
        values, problem, _error = self._attempt("cuMemGetInfo")
        if problem:
            return ""  # there is no context yet, or the device does not answer any more
        free, total = values
        return f"; {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free"


class Gpu(_Calls):
    """One device: what it is made to do is checked, what is to be undone is put on an ExitStack.

    Attributes:
        index: its number N, as in torch's `cuda:N`.
        name: for messages, such as "GPU 0 (NVIDIA H100 80GB HBM3)".
        device_id: "GPU-" and its UUID, as `nvidia-smi -L` has it: the same in every process.
        task: how the message of an error begins.
    """

    def __init__(self, index: int, task: str) -> None:
        """`task`: such as "cannot allocate 4.00 GiB of shared memory".

        Raises:
            ArenaError: there is no such device.
        """
        self.index = index
        super().__init__(f"GPU {index}", task)
        self._device = self.call("cuDeviceGet", index)
        name: bytes = self.call("cuDeviceGetName", 256, self._device)
        self.name += f" ({name.split(bytes(1))[0].decode()})"  # a C string in a longer buffer
        self.device_id = f"GPU-{uuid.UUID(bytes=bytes(self.call('cuDeviceGetUuid', self._device).bytes))}"

    def demand(self, needed: Mapping[str, str]) -> None:
        """See that the device has what it needs: its attributes by name, and what to say where one is 0.

        Raises:
            UnshareableError: it has not.
        """
        for attribute, lack in needed.items():
            number = getattr(self._driver.CUdevice_attribute, attribute)
            if not self.call("cuDeviceGetAttribute", number, self._device):
                raise UnshareableError(
                    f"{self.task}: {self.name} {lack} ({attribute} is 0), as under WSL and on some virtual GPUs. "
                    "Use another GPU, or serve and train on the CPU (`hogwild[cpu]`)."
                )

    def enter(self, kept: ExitStack, passing: ExitStack) -> None:
        """Retain the primary context, the one that torch uses, until `kept` ends; current until `passing` ends."""
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)
        kept.callback(self.undo, "cuDevicePrimaryCtxRelease", self._device)
        self.call("cuCtxPushCurrent", self._context)
        passing.callback(self.undo, "cuCtxPopCurrent")

    @property
    def fd_type(self) -> Any:
        return self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    @property
    def lazy_peer_access(self) -> Any:
        """The one flag that `cuIpcOpenMemHandle` takes."""
        return self._driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS

    def ipc_handle(self, raw: bytes) -> Any:
        """The handle of 64 bytes as the driver takes it."""
        handle = self._driver.CUipcMemHandle()
        handle.reserved = raw
        return handle

    def properties(self) -> Any:
        """Of the allocations that are made here: device memory that can be exported."""
        properties = self._driver.CUmemAllocationProp()
        properties.type = self._driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = self.fd_type
        self._locate(properties.location)
        return properties

    def round_up(self, nbytes: int) -> int:
        """The bytes that an allocation of `nbytes` takes."""
        minimum = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = int(self.call("cuMemGetAllocationGranularity", self.properties(), minimum))
        return -(-nbytes // granularity) * granularity

    def reserve(self, size: int, kept: ExitStack) -> int:
        """Take `size` bytes of addresses until `kept` ends; the first one."""
        address = int(self.call("cuMemAddressReserve", size, 0, 0, 0))
        kept.callback(self.undo, "cuMemAddressFree", address, size)
        return address

    def map(self, address: int, handle: Any, size: int, kept: ExitStack) -> None:
        """Map an allocation of `size` bytes at a reserved address, readable and writable here, until `kept` ends."""
        self.call("cuMemMap", address, size, 0, handle, 0)
        kept.callback(self.undo, "cuMemUnmap", address, size)
        access = self._driver.CUmemAccessDesc()
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._locate(access.location)
        self.call("cuMemSetAccess", address, size, [access], 1)

    def idle(self) -> bool:
        """Wait for everything that runs in the primary context; from any thread. False if that failed."""
        return self.undo_inside("cuCtxSynchronize")

    def undo_inside(self, function: str, *arguments: Any) -> bool:
        """As `undo`, with the primary context current; from any thread."""
        if not self.undo("cuCtxPushCurrent", self._context):
            return False
        done = self.undo(function, *arguments)
        self.undo("cuCtxPopCurrent")
        return done

    def _locate(self, location: Any) -> None:
        location.type = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self.index
