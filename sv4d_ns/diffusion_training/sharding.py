"""FSDP2: weights, their average and the optimiser's moments are sharded, so that each process holds a part of them.

accelerate's configuration asks for it (recipes/fsdp2.yaml). Checkpoints hold whole tensors all the same, so that a run
goes on with another number of processes, sharded or not.
"""

import copy
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from sv4d_ns.utils.errors import InputError


def set_up(accelerator: Accelerator, precision: str) -> bool:
    """Whether accelerate's configuration asks for FSDP; then its settings are made ready for `accelerator.prepare`.

    Raises:
        InputError: it asks for what does not go together with this trainer.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or accelerator.num_processes == 1:
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "accelerate is set to version 1 of FSDP: set fsdp_version to 2, as recipes/fsdp2.yaml does, or use_fsdp to "
            "false."
        )
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        raise InputError(
            "accelerate is set to fsdp_activation_checkpointing, which renames the weights: set it to false, and give "
            "--gradient-checkpointing."
        )
    if precision == "fp16":
        # each process would look for overflow, and leave a step out, by its own shard of the gradients
        raise InputError("--precision fp16 is not for FSDP: give bf16 or no.")
    state = accelerator.state
    if not accelerator.is_fsdp2:  # accelerate leaves FSDP out on CPUs without a word; PyTorch's runs there on gloo
        state.fsdp_plugin, state.distributed_type = FullyShardedDataParallelPlugin(), DistributedType.FSDP
    # the products' type is autocast's affair, as in one process; accelerate's policy would round norms and inputs too
    state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return True


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights are sharded, so that all processes have to call it together."""
    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered where it is sharded: then all processes have to call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that every process has, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    # `src_data_rank=None`: nothing is sent, since all have the same
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[no-any-return]


def without_weights(module: nn.Module) -> nn.Module:
    """A copy with parameters that have a shape and no storage; `load_state_dict(..., assign=True)` gives it weights."""
    stand_ins = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, stand_ins)  # type: ignore[arg-type]
