"""Several processes, one experiment: what each does when a script is started by `torchrun` or `accelerate launch`.

A run in several processes is the same run, faster: every batch is cut into shares that keep its order, gradients are
averaged by PyTorch's DDP, normalisation takes the statistics of the whole batch, and the first process alone keeps the
ledger, writes files and prints. So losses, query counts and checkpoints are those of one process, up to rounding, and a run
may go on with another number of them. Accelerate finds the processes and their devices. One process needs nothing of this.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce  # the one that gradients go through
from tqdm import tqdm

from extraction.errors import UserError

# PyTorch's threads of this process, before it leaves some to others: OMP_NUM_THREADS, or its share of the cores.
ALL_THREADS = torch.get_num_threads()


def start(device: str = "auto") -> None:
    """Join the other processes of this run, if a launcher started several. UserError: the device can't be shared."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: several processes take the GPUs in order; pass auto or cpu")
    global ALL_THREADS
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        ALL_THREADS = int(os.environ["OMP_NUM_THREADS"])
        torch.set_num_threads(ALL_THREADS)
    on_gpus, own = device != "cpu" and torch.cuda.is_available(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_gpus and own > torch.cuda.device_count():
        raise UserError(f"{own} processes for {torch.cuda.device_count()} GPUs: start one for each, or pass --device cpu")
    from accelerate import PartialState  # here, because it takes seconds to import

    # On GPUs tensors go round by NCCL and messages by gloo, which needn't wait for what the GPU is busy with.
    PartialState(cpu=not on_gpus, **(dict(backend="cpu:gloo,cuda:nccl") if on_gpus else {}))
    gather([rank()])  # one that ended before all have joined would take the place where they meet with it
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for the rest of this process
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def end() -> None:
    """Leave the others, after the work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_process(status: int, line: str = "") -> NoReturn:
    """End this process before the work is done. One of several ends at once: in good order it might wait for one that is
    gone, or be aborted by the threads that talk to it. `line` is what torchrun, in the last lines of its own, gives as why."""
    if line and (reply := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        why = dict(message=line, extraInfo=dict(py_callstack=line, timestamp=str(int(time.time()))))
        with contextlib.suppress(OSError):
            Path(reply).write_text(json.dumps(dict(message=why)))
    if num_processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    return rank() == 0


def local_device() -> torch.device | None:
    """The device that belongs to this process; None when it is the only one."""
    if num_processes() == 1:
        return None
    from accelerate import PartialState

    return PartialState().device


def require_one_process(what: str) -> None:
    """Raise UserError when there are several processes."""
    if num_processes() > 1:
        raise UserError(f"{what} runs in one process; start it without torchrun or accelerate")


def shard(items: Sequence | Tensor) -> Any:
    """This process's part of `items`: the parts of all, in order, are `items` again."""
    if num_processes() == 1:
        return items
    return items[len(items) * rank() // num_processes() : len(items) * (rank() + 1) // num_processes()]


def gather(items: list) -> list:
    """The lists of all processes, one after the other. Plain picklable values."""
    if num_processes() == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def gather_tensor(own: Tensor) -> Tensor:
    """The tensors of all processes, of one shape, one after the other along their first axis."""
    if num_processes() == 1:
        return own
    from accelerate.utils import gather

    return gather(own.contiguous())


def all_reduce_sum(own: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if num_processes() == 1:
        return own
    from accelerate.utils import reduce

    return reduce(own, "sum")


class Ended(SystemExit):
    """The first process says why the run ends; the others, who know it from this, just end."""


def on_main_process(function: Callable[[], Any]) -> Any:
    """What `function` returns in the first process, where alone it is called. Its UserError ends all of them."""
    if num_processes() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    outcome, error = [None, ""], None
    if is_main_process():
        try:
            outcome[0] = function()
        except UserError as stop:
            error, outcome[1] = stop, str(stop)
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1]:
        raise Ended(outcome[1])
    return outcome[0]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batches of all processes, in float32.

    PyTorch's own needs a GPU, where it makes the host wait in each layer and breaks compiled graphs.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape, precision = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)], x.dtype
        x = x.float()
        own_mean = x.mean(dims)
        scatter = (x - own_mean.view(shape)).square().sum(dims)
        own = torch.cat([own_mean, scatter, x.new_tensor([x.numel() / x.shape[1]])])
        # One message: each process fills its row, and the sum is everybody's table.
        table = all_reduce(
            F.pad(own[None], (0, 0, rank(), num_processes() - rank() - 1)), "sum", dist.distributed_c10d._get_default_group()
        )
        means, scatters, counts = table.split([x.shape[1], x.shape[1], 1], dim=1)
        count = counts.sum().detach()
        mean = (counts.detach() * means).sum(0) / count
        var = (scatters + counts.detach() * (means - mean).square()).sum(0) / count
        if self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None:
            momentum = self.momentum or 0.0  # a running average, as all networks here have it
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * (count / (count - 1)), momentum)
        normal = (x - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
        return (normal * self.weight.view(shape) + self.bias.view(shape) if self.affine else normal).to(precision)


def _synchronise_batch_norms(net: nn.Module) -> None:
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            whole = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            # The same parameters and statistics, so that optimisers and state dicts stay what they are.
            whole._parameters, whole._buffers, whole.training = child._parameters, child._buffers, child.training
            setattr(net, name, whole)
        else:
            _synchronise_batch_norms(child)


def parallel(net: nn.Module) -> Callable:
    """The forward pass of `net` for training on shares of batches: its backward pass averages gradients over processes.

    `net` itself keeps its parameters and state dict; it can be scored, copied and saved as before.
    """
    if num_processes() == 1:
        return net
    _synchronise_batch_norms(net)
    # Statistics are those of the whole batch everywhere, so they need not be sent round.
    device = next(net.parameters()).device
    return nn.parallel.DistributedDataParallel(
        net, [device.index] if device.type == "cuda" else None, forward_sync_buffers=False
    )


def should_print(line: str) -> bool:
    """Whether no other process has printed `line`: what stops all of them is printed once."""
    if num_processes() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(line, 1) == 1
    except RuntimeError:  # the store went with another process
        return True


def describe_lost_process(error: BaseException) -> str | None:
    """One line for an error of the processes' talk with each other; None for any other error."""
    if num_processes() == 1 or not re.search(r"gloo|nccl|connection|broken pipe|timed? ?out|peer", str(error), re.IGNORECASE):
        return None
    reason = str(error).strip().splitlines()[0][:200]
    return (
        f"another of the {num_processes()} processes of this run ended; its own message, if any, is above "
        f"({reason}). Run the same command again: it goes on from the last checkpoint, with the cached answers"
    )
