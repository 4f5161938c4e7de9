"""A process that writes staged tensors, so that writing takes no time of the interpreter that trains.

It is neither a fork (which would copy locks that threads hold) nor spawned by multiprocessing (which would
import the running script anew): it is this module, run by itself. Tensors reach it as shared memory, all else
as JSON; nothing is pickled. When its socket closes, because the trainer has closed it or died, it ends.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from patchers.errors import CheckpointError
from sharded_ckpt.checkpoint.contents import RankRecord
from sharded_ckpt.checkpoint.transaction import Transaction
from sharded_ckpt.training.host_buffers import HostBuffers
from sharded_ckpt.training.tensor_groups import Groups, TensorWriter, write_groups

_EXIT_SECONDS: Final = 10.0
_LENGTH: Final = 8  # bytes before each message, which say how long it is


class WriterProcess:
    """The trainer's end. The process starts at the first write, and serves until it is closed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def writing(self, buffers: HostBuffers) -> TensorWriter:
        """Return what stands in for `write_groups`, for tensors that are in shared buffers.

        It returns when everything is written.
        """

        def write(save: Transaction, groups: Groups, max_shard_size: int | str | None) -> None:
            if buffers.fd is None:  # not one byte
                write_groups(save, groups, max_shard_size)
                return
            places = {stem: _places(tensors, buffers) for stem, tensors in groups.items()}
            task = {"lent": save.lend(), "groups": places, "max_shard_size": max_shard_size}
            save.settle(self._ask(task, buffers.fd))

        return write

    def close(self) -> None:
        """End the process."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _ask(self, task: Mapping[str, Any], memory: int) -> RankRecord:
        answer = self._exchange(json.dumps(task).encode(), memory)
        if "record" in answer:
            return RankRecord.from_json(answer["record"].encode())
        if answer["errno"] is not None:
            raise OSError(answer["errno"], answer["text"], answer["file"])
        raise CheckpointError(f"the process that writes failed: {answer['text']}")

    def _exchange(self, message: bytes, memory: int) -> Any:
        if self._socket is None:
            self._socket = self._start()
        try:
            socket.send_fds(self._socket, [len(message).to_bytes(_LENGTH, "little")], [memory])
            self._socket.sendall(message)
            return json.loads(
                _receive(self._socket, int.from_bytes(_receive(self._socket, _LENGTH), "little"))
            )
        except (EOFError, OSError):
            process = self._process
            self.close()
            code = None if process is None else process.returncode
            raise CheckpointError(
                f"the process that writes has ended with exit code {code}; see what it printed"
            ) from None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join(path for path in sys.path if path)  # a notebook may have added some
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )
        return ours


# The process ------------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Write what is asked for until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends this process
    while True:
        try:
            head, fds, *_ = socket.recv_fds(connection, _LENGTH, 1)
            if not head:
                return
            message = _receive(connection, int.from_bytes(head, "little"))
        except (EOFError, OSError):
            return
        answer = json.dumps(_answer(json.loads(message), fds[0])).encode()
        try:
            connection.sendall(len(answer).to_bytes(_LENGTH, "little") + answer)
        except OSError:
            return


def _answer(task: Mapping[str, Any], fd: int) -> dict[str, Any]:
    try:
        with open(fd, "rb") as file:
            memory = torch.frombuffer(mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE), dtype=torch.uint8)
        groups = {
            stem: {name: _tensor(memory, *place) for name, place in places.items()}
            for stem, places in task["groups"].items()
        }
        save = Transaction.borrow(task["lent"])
        write_groups(save, groups, task["max_shard_size"])
        return {"record": save.close().to_json().decode()}
    except OSError as error:
        return {"errno": error.errno, "text": error.strerror or str(error), "file": error.filename}
    except Exception as error:
        return {"errno": None, "text": f"{type(error).__name__}: {error}"}


def _places(tensors: Mapping[str, Tensor], buffers: HostBuffers) -> dict[str, list[Any]]:
    """Return what `_tensor` needs of each tensor."""
    return {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), buffers.offset_of(tensor)]
        for name, tensor in tensors.items()
    }


def _tensor(memory: Tensor, dtype: str, shape: list[int], begin: int) -> Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    nbytes = torch.empty(shape, dtype=kind, device="meta").nbytes
    return memory[begin : begin + nbytes].view(kind).view(shape)


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    parts = []
    while nbytes:
        part = connection.recv(min(nbytes, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as end:
        serve(end)
