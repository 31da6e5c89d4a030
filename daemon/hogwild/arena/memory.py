"""Memory that is held by file descriptors, so that it outlives the process that made it.

On a CPU that is a sealed memfd: mapped shared by every process that holds its descriptor, gone when the last mapping
and the last descriptor are gone. (On a GPU: cuda_memory.py, the same interface with another allocator.)
"""

import abc
import fcntl
import mmap
import os

import torch

from hogwild.errors import ArenaError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # a truncated file would be SIGBUS in whoever reads it next


class Held(abc.ABC):
    """Shared memory, mapped into this process at one range of addresses: what is the same on every device.

    Attributes:
        nbytes: size in bytes.
        parts: bytes of the allocations that it consists of, one after the other without a gap; they add up to `nbytes`
            or a little more. On a CPU there is one.
        fds: a descriptor for each part, which keeps it alive; owned by this object, and closed with it. Empty after
            `close`.
        device: where torch's tensors of it are.
        device_id: "cpu", or the name of the GPU that does not depend on who looks: "GPU-" and its UUID.
        handle: in hex, what opens memory that has no descriptors and lives only as long as the process that made it
            (cuda_ipc.py). Empty: descriptors keep it alive.
    """

    nbytes: int
    parts: tuple[int, ...]
    fds: tuple[int, ...] = ()
    device: torch.device
    device_id: str
    handle: str = ""

    @property
    def fd(self) -> int:
        """The descriptor of the first part, -1 once it is closed."""
        return self.fds[0] if self.fds else -1

    @property
    @abc.abstractmethod
    def base(self) -> int:
        """Address of the first byte in this process."""

    @abc.abstractmethod
    def tensor(
        self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """A view: `offset` in bytes, a multiple of the item size; `stride` in elements. No copy.

        Every call gives a tensor with a version counter of its own, so that autograd in one thread does not see
        the in-place writes of another (which is what HOGWILD! wants), and one that keeps the mapping alive.

        Raises:
            RuntimeError: it would leave the segment.
        """

    def inode(self) -> tuple[int, int]:
        """(device, inode) of the memory behind the first descriptor: the same in every process that maps it.

        On a GPU it is the driver's file, perhaps the same for every allocation: for logs only.
        """
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def ensure_alive(self) -> None:
        """After reading, and before what was read is kept: see that it was still this memory.

        Returns at once where the memory outlives its maker, and otherwise a little later.

        Raises:
            ArenaError: the process that it belongs to has begun to end: what was read may be anything.
        """
        return

    def close(self) -> None:
        """Let go of the descriptors. The mapping lives on until the last tensor made from it is gone."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)

    def __del__(self) -> None:
        # Of this class: nothing else of a segment ends with it, for tensors may still use the mapping.
        Held.close(self)


class Segment(Held):
    """One shared allocation of the host, mapped into this process.

    Attributes:
        bytes: the whole segment, uint8 (nbytes,). Tensors made from it keep the mapping alive.
    """

    device, device_id = torch.device("cpu"), "cpu"

    def __init__(self, fd: int, nbytes: int) -> None:
        self.parts, self.nbytes = (nbytes,), nbytes
        self.mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.bytes = torch.frombuffer(self.mapping, dtype=torch.uint8)
        self.fds = (fd,)  # last: until then it is the caller's, also where this fails

    @classmethod
    def allocate(cls, nbytes: int, name: str = "hogwild-weights") -> "Segment":
        """Make a new zero-filled segment.

        Pages become resident when they are first written.

        Raises:
            ArenaError: the kernel refused.
        """
        fd = -1
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, nbytes)
        except (OSError, OverflowError) as error:
            if fd >= 0:
                os.close(fd)
            raise ArenaError(
                f"cannot allocate {nbytes / 2**30:.2f} GiB of shared memory: {error}. "
                "Free memory, or raise the memory limit of this process (ulimit -v, MemoryMax=)."
            ) from error

    @classmethod
    def from_fd(cls, fd: int, nbytes: int) -> "Segment":
        """Map a segment that another process made. Takes ownership of `fd`, also when it raises.

        Raises:
            ArenaError: the descriptor is not a sealed memfd of that size.
        """
        try:
            actual, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if actual != nbytes or seals & _SEALS != _SEALS:
                raise ArenaError(
                    f"the peer announced {nbytes} bytes of sealed memory, the descriptor has {actual} bytes "
                    f"and seals {seals:#x}: refusing to map memory that could shrink under a reader"
                )
            return cls(fd, nbytes)
        except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
            os.close(fd)
            raise ArenaError(f"cannot map the descriptor that the peer sent: {error}") from error
        except ArenaError:
            os.close(fd)
            raise

    @property
    def base(self) -> int:
        """See Held."""
        return self.bytes.data_ptr()

    def tensor(
        self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """See Held."""
        flat = torch.frombuffer(self.mapping, dtype=dtype, count=self.nbytes // dtype.itemsize)
        return torch.as_strided(flat, shape, stride, offset // dtype.itemsize)
