"""How the processes hold one model: each a copy of it (DDP), or each a part of its weights (FSDP2).

Either way a backward pass leaves the mean of all processes' gradients, exchanged in the weights' float32, and only the
last pass of a step exchanges them.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from types import MethodType
from typing import Any, Literal

import torch.distributed as dist
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer

from fastm3ae.model.build import Model
from fastm3ae.model.fusion import CoAttentionLayer
from fastm3ae.training.distributed import Processes

__all__ = ["Copy", "Replicated", "Sharded", "share"]

LAYERS = (Block, SwinTransformerBlock, BertLayer, RobertaLayer, CoAttentionLayer)
"""Modules whose weights are gathered and let go one after another."""

# What a layer returns is nowhere changed in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

# The old name warns where there is the new one (from torch 2.14 on).
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class Copy:
    """A process that trains alone.

    Attributes:
        model: The model, on the process's device.
        forward: Makes a pass over it, as the model itself does.
        num_passes: How many passes of a step all processes make at least.
    """

    num_passes = 1

    def __init__(self, model: Model) -> None:
        self.model: Model = model
        self.forward: Callable[..., dict[str, Any]] = model

    def in_pass(self, is_last: bool) -> AbstractContextManager:
        """Returns the context of a pass of a step; gradients are exchanged in the last one."""
        return nullcontext()

    def whole(self) -> AbstractContextManager:
        """Returns a context in which every process has all weights, and may use the model by itself."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """Returns the model's state dict, whole: in the first process, maybe nothing in others. All must ask."""
        return self.model.state_dict()


class Replicated(Copy):
    """Each process has a copy of the model.

    Args:
        model: The model, on the process's device.
        processes: Those that train together.
    """

    def __init__(self, model: Model, processes: Processes) -> None:
        super().__init__(model)
        self.forward = DistributedDataParallel(
            model,
            device_ids=[processes.device] if processes.device.type == "cuda" else None,
            find_unused_parameters=model.leaves_some_alone,
            gradient_as_bucket_view=True,
            **{_SYNC_BUFFERS: False},  # there are none that change
        )

    def in_pass(self, is_last: bool) -> AbstractContextManager:
        """Returns the context of a pass of a step; gradients are exchanged in the last one."""
        return nullcontext() if is_last else self.forward.no_sync()


class Sharded(Copy):
    """Each process has a part of every weight, its gradient and its optimiser state.

    Layers are gathered one after another, in the forward and the backward pass. On several machines the parts are
    divided among the processes of each, and the machines have copies: what is exchanged within a layer stays on the
    machine.

    Args:
        model: The model, on the process's device; it is changed in place.
        processes: Those that train together.
        num_passes: How many passes of a step the process with the most makes. Each gathers the weights, so that all
            must make as many.
    """

    def __init__(self, model: Model, processes: Processes, num_passes: int) -> None:
        super().__init__(model)
        self.num_passes = num_passes
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
        num_machines, rest = divmod(processes.number, processes.number_here)
        kind = processes.device.type
        if rest or num_machines == 1:
            mesh = init_device_mesh(kind, (processes.number,))
        else:
            names = ("machine", "part")
            mesh = init_device_mesh(kind, (num_machines, processes.number_here), mesh_dim_names=names)
        layers = [module for module in model.modules() if isinstance(module, LAYERS)]
        for layer in layers:
            fully_shard(layer, mesh=mesh)
            layer.enter = MethodType(_enter, layer)  # what the packed step calls: see fastm3ae.model.packed.call
            register_fsdp_forward_method(layer, "enter")
        fully_shard(model, mesh=mesh)
        # What is gathered ahead in the backward pass is said here. Else it would be guessed from the forward passes
        # before, of which a validation makes more in some processes than in others.
        for before, layer in pairwise([layers[0], *layers, model]):
            layer.set_modules_to_backward_prefetch([before])

    def in_pass(self, is_last: bool) -> AbstractContextManager:
        """Returns the context of a pass of a step; gradients are exchanged in the last one."""
        self.model.set_requires_gradient_sync(is_last)
        return nullcontext()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Returns a context in which every process has all weights, and may use the model by itself."""
        parts = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.unshard()
        self._let_go_after_forward(False)
        try:
            yield
        finally:
            self._let_go_after_forward(True)
            for part in parts:
                part.reshard()

    def _let_go_after_forward(self, do: bool) -> None:
        """Sets whether a layer's weights are let go when its forward pass ends; the rest always stays until then."""
        for module in self.model.modules():
            if isinstance(module, LAYERS):
                module.set_reshard_after_forward(do, recurse=False)

    def weights(self) -> dict[str, Tensor]:
        """Returns the model's state dict, whole, in the first process, nothing in others. All must ask."""
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def share(model: Model, processes: Processes, how: Literal["ddp", "fsdp"], num_passes: int) -> Copy:
    """Returns how the processes hold the model.

    Args:
        model: The model, on the process's device; the first process's weights become those of all.
        processes: Those that train together.
        how: ``TrainConfig.parallel``. A process that trains alone has the model to itself.
        num_passes: How many passes of a step the process with the most makes.
    """
    if processes.number == 1:
        return Copy(model)
    return Sharded(model, processes, num_passes) if how == "fsdp" else Replicated(model, processes)


def _enter(layer: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(layer, *arguments)
