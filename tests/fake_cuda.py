"""A stand-in for `cuda.bindings.driver` on a machine without a GPU: the functions that hogwild calls, over memfds.

It holds callers to what the driver's documentation says (granularity, what has to be reserved, mapped or current
before, what keeps memory alive) and keeps account of all that is handed out. Memory is real and shared by processes: a
handle is a memfd, an address a mapping of it. New memory is full of garbage and descriptors are inheritable, because
nothing promises the opposite. What it cannot show is whether the driver does what its documentation says.
"""
# ruff: noqa: N802, ARG002, N801  # the names and arguments are the driver's

import ctypes
import mmap
import os
from collections.abc import Callable
from enum import IntEnum
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

GRANULARITY = 2 << 20
CAPACITY = 1 << 30
NAME = b"Fake GPU"
UUIDS = [bytes([0xA0 + index] * 16) for index in range(2)]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FIXED, _NONE = 0x10, 0  # MAP_FIXED, PROT_NONE: not in the module mmap
_EMPTY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_PERMITTED = 800
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_UNKNOWN = 999


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = 41
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102
    CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103


class CUmemAllocationType(IntEnum):
    CU_MEM_ALLOCATION_TYPE_PINNED = 1


class CUmemAllocationHandleType(IntEnum):
    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1


class CUmemLocationType(IntEnum):
    CU_MEM_LOCATION_TYPE_DEVICE = 1


class CUmemAccess_flags(IntEnum):
    CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3


class CUmemAllocationGranularity_flags(IntEnum):
    CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0


class CUipcMem_flags(IntEnum):
    CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1


ENUMS = [
    CUresult, CUdevice_attribute, CUmemAllocationType, CUmemAllocationHandleType, CUmemLocationType, CUmemAccess_flags,
    CUmemAllocationGranularity_flags, CUipcMem_flags,
]  # fmt: skip
UNDOING = {
    "cuMemRelease", "cuMemUnmap", "cuMemAddressFree", "cuCtxPopCurrent", "cuDevicePrimaryCtxRelease", "cuMemFree",
    "cuIpcCloseMemHandle",
}  # fmt: skip


class _Refused(Exception):  # noqa: N818  # what a function of the driver returns first
    def __init__(self, error: CUresult = CUresult.CUDA_ERROR_INVALID_VALUE) -> None:
        self.error = error


def _function(values: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of the driver that gives so many values beside its error code."""

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(body)
        def function(self: "Driver", *arguments: Any) -> tuple[Any, ...]:
            self.calls.append(body.__name__)
            fails = len(self.calls) == self.fail_at
            try:
                if fails and body.__name__ not in UNDOING:
                    raise _Refused(self.failure)
                given = body(self, *arguments)
                if fails:  # like close(2): what was to be given back is gone all the same
                    raise _Refused(self.failure)
            except _Refused as refused:
                return (refused.error, *[None] * values)
            return (CUresult.CUDA_SUCCESS, *([] if values == 0 else given if values > 1 else [given]))

        return function

    return decorate


class Driver:
    """The driver of one process.

    Attributes:
        calls: the functions called so far.
        fail_at, failure: the call that fails, counted from 1, and how. A function that gives something back does so
            and then fails.
        attributes: what each device has.
        devices: those that anything was asked of; there are two.
        visible: which of the two this process sees, in that order, as CUDA_VISIBLE_DEVICES has it.
    """

    CUdevice_attribute = CUdevice_attribute
    CUmemAllocationType = CUmemAllocationType
    CUmemAllocationHandleType = CUmemAllocationHandleType
    CUmemLocationType = CUmemLocationType
    CUmemAccess_flags = CUmemAccess_flags
    CUmemAllocationGranularity_flags = CUmemAllocationGranularity_flags
    CUipcMem_flags = CUipcMem_flags

    def __init__(self, granularity: int = GRANULARITY) -> None:
        self.calls: list[str] = []
        self.fail_at, self.failure = 0, CUresult.CUDA_ERROR_UNKNOWN
        self.attributes = {int(attribute): 1 for attribute in CUdevice_attribute}
        self._granularity, self._ready, self._last = granularity, False, 0
        self.devices: set[int] = set()
        self.visible = [0, 1]
        self._retained: list[int] = []
        self.contexts: list[str] = []  # of the calling thread; nobody here has two
        self.handles: dict[int, int] = {}  # handle: memfd
        self.reserved: dict[int, int] = {}  # address: bytes
        self.mapped: dict[int, int] = {}
        self.accessible: set[int] = set()
        self.allocated: dict[int, int] = {}  # address: memfd
        self.opened: dict[bytes, tuple[int, int]] = {}  # handle: address, times

    def left(self) -> list[str]:
        """What has been handed out and not given back."""
        return [
            *(f"context of {device}" for device in self._retained),
            *(f"current {context}" for context in self.contexts),
            *(
                f"{kind} {key:#x}"
                for kind in ("handles", "reserved", "mapped")
                for key in getattr(self, kind)
            ),
        ]

    def sizes(self) -> list[int]:
        """Of every mapping."""
        return list(self.mapped.values())

    @staticmethod
    def CUmemAllocationProp() -> SimpleNamespace:
        return SimpleNamespace(type=0, requestedHandleTypes=0, location=SimpleNamespace(type=0, id=0))

    @staticmethod
    def CUmemAccessDesc() -> SimpleNamespace:
        return SimpleNamespace(flags=0, location=SimpleNamespace(type=0, id=0))

    @staticmethod
    def CUipcMemHandle() -> SimpleNamespace:
        return SimpleNamespace(reserved=bytes(64))

    # --- device and context ---

    @_function(0)
    def cuInit(self, flags: int) -> None:
        _demand(flags == 0)
        self._ready = True

    @_function(1)
    def cuDeviceGetCount(self) -> int:
        _demand(self._ready, CUresult.CUDA_ERROR_NOT_INITIALIZED)
        return len(self.visible)

    @_function(1)
    def cuDeviceGet(self, ordinal: int) -> int:
        _demand(self._ready, CUresult.CUDA_ERROR_NOT_INITIALIZED)
        _demand(ordinal in range(len(self.visible)), CUresult.CUDA_ERROR_INVALID_DEVICE)
        return ordinal

    @_function(1)
    def cuDeviceGetUuid(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(bytes=UUIDS[self.visible[device]])

    @_function(1)
    def cuDeviceGetName(self, length: int, device: int) -> bytes:
        return NAME.ljust(length, b"\0")

    @_function(1)
    def cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        return self.attributes[attribute]

    @_function(1)
    def cuDevicePrimaryCtxRetain(self, device: int) -> str:
        self.devices.add(device)
        self._retained.append(device)
        return f"primary of {device}"

    @_function(0)
    def cuDevicePrimaryCtxRelease(self, device: int) -> None:
        _demand(device in self._retained and not self.contexts, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self._retained.remove(device)

    @_function(0)
    def cuCtxPushCurrent(self, context: str) -> None:
        known = [f"primary of {device}" for device in self._retained]
        _demand(context in known, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self.contexts.append(context)

    @_function(1)
    def cuCtxPopCurrent(self) -> str:
        self._demand_context()
        return self.contexts.pop()

    @_function(0)
    def cuCtxSynchronize(self) -> None:
        self._demand_context()

    @_function(2)
    def cuMemGetInfo(self) -> tuple[int, int]:
        self._demand_context()
        return CAPACITY - self._taken(), CAPACITY

    @_function(1)
    def cuGetErrorName(self, error: int) -> bytes:
        return CUresult(error).name.encode()

    @_function(1)
    def cuGetErrorString(self, error: int) -> bytes:
        return b"the words for " + CUresult(error).name.encode()

    # --- memory ---

    @_function(1)
    def cuMemGetAllocationGranularity(self, properties: Any, option: int) -> int:
        self._demand_exportable(properties)
        return self._granularity

    @_function(1)
    def cuMemCreate(self, size: int, properties: Any, flags: int) -> int:
        self._demand_size(size)
        self._demand_exportable(properties)
        _demand(size <= CAPACITY - self._taken(), CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        fd = os.memfd_create("fake-cuda")
        os.ftruncate(fd, size)
        os.pwrite(fd, b"\xa5" * size, 0)
        return self._new_handle(fd)

    @_function(0)
    def cuMemRelease(self, handle: int) -> None:
        _demand(handle in self.handles)
        os.close(self.handles.pop(handle))

    @_function(1)
    def cuMemExportToShareableHandle(self, handle: int, kind: int, flags: int) -> int:
        _demand(handle in self.handles and kind == 1 and flags == 0)
        fd = os.dup(self.handles[handle])
        os.set_inheritable(fd, True)
        return fd

    @_function(1)
    def cuMemImportFromShareableHandle(self, fd: int, kind: int) -> int:
        name = str((Path("/proc/self/fd") / str(fd)).readlink())
        _demand(kind == 1 and name.startswith("/memfd:fake-cuda"))
        return self._new_handle(os.dup(fd))

    @_function(1)
    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> int:
        self._demand_size(size)
        _demand(alignment == address == flags == 0)
        wide = _libc.mmap(None, size + GRANULARITY, _NONE, _EMPTY, -1, 0)
        start = -(-wide // GRANULARITY) * GRANULARITY  # keeps an aligned part, gives the rest back
        if start > wide:
            _libc.munmap(wide, start - wide)
        _libc.munmap(start + size, wide + GRANULARITY - start)
        self.reserved[start] = size
        return start

    @_function(0)
    def cuMemAddressFree(self, address: int, size: int) -> None:
        _demand(self.reserved.get(address) == size and not self._overlapping(address, size))
        del self.reserved[address]
        _libc.munmap(address, size)

    @_function(0)
    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> None:
        self._demand_size(size)
        _demand(any(start <= address and address + size <= start + n for start, n in self.reserved.items()))
        _demand(not self._overlapping(address, size) and handle in self.handles)
        _demand(offset == flags == 0 and size <= os.fstat(self.handles[handle]).st_size)
        _libc.mmap(address, size, _NONE, mmap.MAP_SHARED | _FIXED, self.handles[handle], 0)
        self.mapped[address] = size

    @_function(0)
    def cuMemSetAccess(self, address: int, size: int, descriptions: list[Any], count: int) -> None:
        _demand(self.mapped.get(address) == size and len(descriptions) == count == 1)
        _demand(descriptions[0].flags == 3)
        self._demand_location(descriptions[0].location)
        _libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
        self.accessible.add(address)

    @_function(0)
    def cuMemUnmap(self, address: int, size: int) -> None:
        _demand(self.mapped.get(address) == size)
        del self.mapped[address]
        self.accessible.discard(address)
        _libc.mmap(address, size, _NONE, _EMPTY | _FIXED, -1, 0)

    @_function(0)
    def cuMemsetD8(self, address: int, value: int, count: int) -> None:
        self._demand_context()
        _demand(address in self.accessible and count <= self.mapped[address])
        ctypes.memset(address, value, count)

    # --- legacy memory, and its IPC ---

    @_function(1)
    def cuMemAlloc(self, size: int) -> int:
        self._demand_context()
        if not 0 <= size < 2**64:
            raise OverflowError("Python int too large to convert to C size_t")
        _demand(size > 0)
        _demand(size <= CAPACITY - self._taken(), CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        fd = os.memfd_create("fake-cuda-legacy")
        os.ftruncate(fd, size)
        os.pwrite(fd, b"\xa5" * size, 0)
        address = self._map_shared(fd, size)
        self.allocated[address] = fd
        return address

    @_function(0)
    def cuMemFree(self, address: int) -> None:
        self._demand_context()
        _demand(address in self.allocated)
        fd = self.allocated.pop(address)
        os.pwrite(fd, b"\xdd" * self.mapped[address], 0)  # whoever has it open reads garbage
        self._unmap_shared(address)
        os.close(fd)

    @_function(1)
    def cuIpcGetMemHandle(self, address: int) -> SimpleNamespace:
        _demand(address in self.allocated)
        fd = self.allocated[address]
        name = f"{os.getpid()} {fd} {os.fstat(fd).st_ino}"
        return SimpleNamespace(reserved=name.encode().ljust(64, b"\0"))

    @_function(1)
    def cuIpcOpenMemHandle(self, handle: Any, flags: int) -> int:
        self._demand_context()
        _demand(flags == 1 and len(handle.reserved) == 64)
        address, times = self.opened.get(handle.reserved, (0, 0))
        if not times:
            address = self._open_legacy(handle.reserved.rstrip(b"\0").decode(errors="replace").split())
        self.opened[handle.reserved] = address, times + 1
        return address

    @_function(0)
    def cuIpcCloseMemHandle(self, address: int) -> None:
        self._demand_context()
        found = [handle for handle, (start, _times) in self.opened.items() if start == address]
        _demand(bool(found))
        times = self.opened.pop(found[0])[1] - 1
        if times:
            self.opened[found[0]] = address, times
        else:
            self._unmap_shared(address)

    def _open_legacy(self, name: list[str]) -> int:
        _demand(len(name) == 3 and all(word.isdigit() for word in name))
        pid, number, inode = map(int, name)
        _demand(pid != os.getpid(), CUresult.CUDA_ERROR_INVALID_CONTEXT)  # the owner may not open its own
        try:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        except OSError:
            raise _Refused from None
        try:
            status = os.fstat(fd)
            _demand(status.st_ino == inode)
            return self._map_shared(fd, status.st_size)
        finally:
            os.close(fd)

    def _map_shared(self, fd: int, size: int) -> int:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = int(_libc.mmap(None, size, access, mmap.MAP_SHARED, fd, 0))
        self.mapped[address] = size
        self.accessible.add(address)
        return address

    def _unmap_shared(self, address: int) -> None:
        _libc.munmap(address, self.mapped.pop(address))
        self.accessible.discard(address)

    def _new_handle(self, fd: int) -> int:
        self._last += 1
        self.handles[self._last] = fd
        return self._last

    def _overlapping(self, address: int, size: int) -> bool:
        return any(start < address + size and address < start + n for start, n in self.mapped.items())

    def _taken(self) -> int:
        return sum(self.mapped.values())

    def _demand_context(self) -> None:
        _demand(bool(self.contexts), CUresult.CUDA_ERROR_INVALID_CONTEXT)

    def _demand_size(self, size: int) -> None:
        if not 0 <= size < 2**64:
            raise OverflowError("Python int too large to convert to C size_t")  # as Cython says it
        _demand(size > 0 and size % self._granularity == 0)

    def _demand_exportable(self, properties: Any) -> None:
        _demand((properties.type, properties.requestedHandleTypes) == (1, 1))
        self._demand_location(properties.location)

    def _demand_location(self, location: Any) -> None:
        _demand(location.type == 1 and location.id in (0, 1))
        self.devices.add(location.id)


def _demand(condition: bool, error: CUresult = CUresult.CUDA_ERROR_INVALID_VALUE) -> None:
    if not condition:
        raise _Refused(error)


def wrap(mapping: Any) -> torch.Tensor:
    """In the place of `cuda_memory._wrap`: the same memory as a tensor of the CPU."""
    interface = mapping.__cuda_array_interface__
    address, read_only = interface["data"]
    assert interface["typestr"] == "|u1"
    assert not read_only
    memory: Any = (ctypes.c_char * interface["shape"][0]).from_address(address)
    memory.owner = mapping
    return torch.frombuffer(memory, dtype=torch.uint8)
