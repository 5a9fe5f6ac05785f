"""Memory that peers on one host map, so that they copy blocks into it themselves.

UCX writes to another process's memory through the kernel, page by page.  What
both have mapped is copied as fast as within one process.  NIXL still carries
what is said about it.

The memory is a Linux memfd: it has no name in any file system and goes with the
last process that maps it, however that ends.  A peer opens it through /proc,
which needs the same PID namespace and the right to look at the process: its user's,
or root's.  Each end decides so for itself; one may map where the other may not.
Pages are there when they are first written to, as with other memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import secrets
import weakref
from array import array

import attrs
import numpy as np
from numpy.typing import NDArray

from ...errors import TransferError
from ...transport.handshake import Address
from ...transport.outbox import Blocks
from .blocks import CopyBlocks, copy_for, packed, some

# Nobody can shrink it under a process that copies into it.
_SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")


_LARGE_PAGE = 1 << 21


@attrs.define(eq=False)
class SharedMemory:
    """Zeroed memory of this process that others of this host can map.

    A child that is forked shares it too, where it would have a copy of other memory.

    Attributes:
        bytes: Of it.
        array: It, shape (bytes,); whoever keeps it keeps the memory.

    >>> SharedMemory(1 << 16).array.sum()
    np.uint64(0)
    """

    bytes: int
    array: NDArray[np.uint8] = attrs.field(init=False, repr=False)
    _name: str = attrs.field(init=False)
    _descriptor: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        if self.bytes < 1:
            raise TransferError(f"{self.bytes} bytes cannot be shared")
        if not hasattr(os, "memfd_create"):
            raise TransferError("this system has no memory to share by memfd_create")
        self._name = f"llmd-{secrets.token_hex(16)}"
        try:
            flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
            self._descriptor = os.memfd_create(self._name, flags)
            weakref.finalize(self, os.close, self._descriptor)
            os.ftruncate(self._descriptor, self.bytes)
            seals = sum(getattr(fcntl, seal) for seal in _SEALS)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
            self.array = _mapped(self._descriptor, self.bytes)
        except (OSError, OverflowError) as error:
            why = f"{self.bytes} bytes cannot be shared: {error}"
            raise TransferError(why) from error

    def holds(self, array: NDArray[np.uint8]) -> bool:
        """Say whether *array*, C-contiguous, lies in it."""
        begin = array.ctypes.data - self.array.ctypes.data
        return 0 <= begin <= begin + array.nbytes <= self.bytes

    def where(self) -> str:
        """Return what a peer needs to map it."""
        place = [os.getpid(), self._descriptor, self._name, self.array.ctypes.data]
        return json.dumps(place)


@attrs.frozen(eq=False)
class Mapped:
    """A peer's slab as this process sees it.

    Attributes:
        bases: Where each layer begins here.
        blocks: In each layer.
        block_bytes: Of each block.
        memory: What is mapped.
    """

    bases: array[int]
    blocks: int
    block_bytes: int
    memory: NDArray[np.uint8]
    _copies: tuple[CopyBlocks, CopyBlocks] = attrs.field(init=False)
    """Without checksums, and with them."""

    def __attrs_post_init__(self) -> None:
        both = [copy_for(self.block_bytes, summed=summed) for summed in (False, True)]
        object.__setattr__(self, "_copies", tuple(both))

    @classmethod
    def of(cls, address: Address) -> Mapped | None:
        """Map the slab of a peer; None if it is not there to be mapped.

        It may be on another host, in another PID namespace, of another user, or
        not be shared at all.
        """
        if not address.shared:
            return None
        try:
            memory, base = opened(address.shared)
        except (OSError, ValueError, TypeError):
            return None
        offsets = [there - base for there in address.bases]
        layer_bytes = address.blocks * address.layout.block_bytes
        if not offsets or min(offsets) < 0 or max(offsets) + layer_bytes > len(memory):
            return None
        here = memory.ctypes.data
        return cls(
            bases=packed(here + offset for offset in offsets),
            blocks=address.blocks,
            block_bytes=address.layout.block_bytes,
            memory=memory,
        )

    def copy(
        self,
        bases: array[int],
        layer: int,
        blocks: Blocks,
        to: Blocks,
        *,
        summed: bool = False,
    ) -> bytes | None:
        """Copy *blocks* *to* blocks of as many layers from *layer* on.

        Args:
            bases: Where block 0 of each layer is here.
            layer: The first.
            blocks: Which, shape (n,).
            to: Where each goes, shape (n,).
            summed: Checksum what is copied.

        Returns:
            The checksums, if so, 8 bytes each, layer by layer.

        Raises:
            ValueError: There is no such block there; nothing is copied.
        """
        there = some(self.bases, layer, layer + len(bases))
        size, limit = self.block_bytes, self.blocks
        copy = self._copies[summed]
        return copy(bases, blocks, there, to, size, limit, summed)


def opened(where: str) -> tuple[NDArray[np.uint8], int]:
    """Map what is *where* another process says; and return its address there.

    Raises:
        OSError: It is not there, or not to be had from here.
        ValueError, TypeError: *where* is none.
    """
    process, descriptor, name, base = json.loads(where)
    return _opened(int(process), int(descriptor), str(name)), int(base)


def _opened(process: int, descriptor: int, name: str) -> NDArray[np.uint8]:
    """Map what another process shares, if it is what it says it is."""
    path = f"/proc/{process}/fd/{descriptor}"
    _expect(path, name)  # before, as to open a device may do things
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _expect(f"/proc/self/fd/{opened}", name)
        if not fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise OSError(f"{path} could shrink")
        return _mapped(opened, os.fstat(opened).st_size)
    finally:
        os.close(opened)


def _expect(path: str, name: str) -> None:
    # The name is not to be guessed: no other memory can be taken for it, not even
    # that of a process which has this number in another namespace.
    if os.readlink(path) != f"/memfd:{name} (deleted)":
        raise OSError(f"{path} is something else")


def _mapped(descriptor: int, length: int) -> NDArray[np.uint8]:
    memory = mmap.mmap(descriptor, length)
    # Where Linux is asked for large pages, fewer have to be found one by one.
    if length >= _LARGE_PAGE:
        with contextlib.suppress(AttributeError, OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
