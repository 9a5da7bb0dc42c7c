"""Which process this is, and how it was started: plain python, torchrun or the DeepSpeed launcher."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError
from .kernels.cpu import FAST_BF16

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
DISK_ADVICE = "Make room or mend the permissions. Complete checkpoints are intact, and the same command resumes."
PEER_ADVICE = (
    "If the text above speaks of a closed or reset connection, another rank ended first: look for its last words. The "
    "same command resumes from the last checkpoint."
)
# How long a rank waits for another, which may be preparing data; a training's watchdog (--hang-after) ends it sooner.
PATIENCE = timedelta(days=1)
after_failure: list[Callable[[], None]] = []  # called when a command ends with a UserError
_left = False  # this process was a rank: see World.leave
_T = TypeVar("_T")
PR_SET_PDEATHSIG = 1  # of Linux' prctl
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_CAPABILITY = 8, 0  # of NVIDIA's GPUs, the first that multiply bf16


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item()) if self.size > 1 else flag

    def first(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        return int(self.sum(torch.tensor(number if self.rank == 0 else 0, device=self.device)).item())

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which are of one shape, in the order of the ranks."""
        if self.size == 1:
            return [x]
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous())
        return found

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def gather_objects(self, thing: _T) -> list[_T]:
        """The things of all ranks, pickled on their way, in the order of the ranks."""
        found = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(found, thing)
        return found

    def from_rank_0(self, find: Callable[[], _T]) -> _T:
        """What ``find`` returns on rank 0, which only it calls, however long that takes: see ``PATIENCE``."""
        found: list[Any] = [find() if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(found)
        thing: _T = found[0]
        return thing

    def leave(self) -> None:
        """The end of the common work: what follows is one rank's, and the others need not wait for it."""
        global _left
        if in_a_group():
            dist.barrier()
            dist.destroy_process_group()
            _left = True


ONE = World(0, 1, torch.device("cpu"))  # a process by itself


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of returning it to the kernel.

    On the CPU every large activation is otherwise mapped, filled with zeros page by page and unmapped again in every
    step, which can cost as much as the arithmetic.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        return  # another C library: nothing lost but speed


def local_ranks() -> int:
    """How many ranks a launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def own_cores() -> int:
    """The cores of this rank: those that it may use, divided by the ranks on this machine."""
    return max(len(os.sched_getaffinity(0)) // local_ranks(), 1)


def share_cores() -> None:
    """Several ranks on a machine divide its cores; a single one keeps torch's default, all of them.

    The DeepSpeed launcher leaves every rank all cores, torchrun leaves it one: both cost most of the speed. A number of
    threads that the user chose (OMP_NUM_THREADS, which torchrun itself sets to 1) is kept.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if local_ranks() > 1 and (chosen is None or (chosen == "1" and "TORCHELASTIC_RUN_ID" in os.environ)):
        torch.set_num_threads(own_cores())


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for fp32. auto: bf16 where the hardware multiplies bf16 matrices, fp16 on GPUs that
    only multiply such (V100, T4)."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        modern = torch.version.hip or torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
        return torch.bfloat16 if modern else torch.float16
    return torch.bfloat16 if FAST_BF16 else None


def start(device: str) -> World:
    """Join the other ranks if a launcher set RANK and WORLD_SIZE; pick this rank's device."""
    cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    if device == "cuda" and not cuda:
        raise UserError("--device cuda was asked for, but torch sees no GPU. Use --device cpu, or install a GPU torch.")
    if device == "cpu":
        keep_freed_memory()
        share_cores()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    # Collectives are called by names that torch 2.7 knows too (DeepSpeed's are); newer ones complain at every call.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    if "RANK" in os.environ and not dist.is_initialized():
        end_with_launcher()
        try:
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            taken = f"Port {os.environ['MASTER_PORT']} is taken, as by another training on this machine."
            raise UserError(f"{taken} Give the launcher another: deepspeed --master_port PORT ...") from None
    return World(rank, size, torch.device(device, local_rank) if device == "cuda" else torch.device(device))


def end_with_launcher() -> None:
    """Get SIGTERM, which saves and stops, when the launcher that started this rank dies, whatever killed it.

    A rank that lived on would hold the run folder, and the same command started again would be refused.
    """
    with contextlib.suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Console:
    """stdout or stderr that may go away without an error: what can no longer be written is dropped.

    A reader may end first (``| tee`` gets the Ctrl-C, too), a terminal be closed, a disk behind ``>`` be full: none of
    it is a reason to lose a training.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (python >&- has none)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._gone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._gone():
            self._stream.flush()

    @contextlib.contextmanager
    def _gone(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # From here on into nothing, and so is what the stream still holds, which Python writes when it ends.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())


def run_main(main: Callable[[], int | None]) -> None:
    """``_run_main`` on a ``Console``."""
    after_failure.clear()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = consoles = Console(sys.stdout), Console(sys.stderr)
    try:
        _run_main(main)
    finally:
        for console in consoles:  # what Python cannot write when it ends would change the exit code
            console.flush()
        sys.stdout, sys.stderr = streams


def _run_main(main: Callable[[], int | None]) -> None:
    """Run a command: a UserError becomes one paragraph and exit code 2, and ranks leave together.

    Ranks end by os._exit: when the interpreter is torn down, gloo's threads may still hold the last reference to a
    tensor, whose Python object they then cannot free: waiting for the interpreter's lock ends such a thread by force,
    inside a destructor, and the process aborts ("terminate called without an active exception") after all work is done.
    """
    try:
        code = main() or 0
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        for clean_up in after_failure:
            clean_up()
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        code = 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            print(f"\nerror: a file could not be written or read: {error}. {DISK_ADVICE}", file=sys.stderr)
            code = 2
        elif not in_a_group():
            raise
        else:
            traceback.print_exc()
            print(f"\nerror: rank {dist.get_rank()} ends here. {PEER_ADVICE}", file=sys.stderr)
            code = 1
    if in_a_group() or _left:
        if code == 0 and not _left:
            dist.barrier()
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def in_a_group() -> bool:
    """Whether there is a process group, be it of one rank."""
    return dist.is_available() and dist.is_initialized()
