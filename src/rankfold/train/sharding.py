"""The frozen base cut among the processes of a run."""

from __future__ import annotations

from rankfold.errors import ConfigError
from rankfold.models.choices import Stored
from rankfold.peft_surface import PeftModel
from rankfold.processes import Processes
from rankfold.train.compiling import decoder_layers


def require_several(processes: Processes, stored: Stored | None = None) -> None:
    """Raise ConfigError if there is nobody to share a base with, or it cannot be cut as it is ``stored``."""
    if stored == "nf4":
        raise ConfigError("shard_base=true cannot cut bitsandbytes' layers (stored: nf4); take q4_0 or int8")
    if processes.count == 1:
        raise ConfigError(
            "shard_base=true needs several processes: torchrun --nproc-per-node 2 -m rankfold ..."
        )


def shard_base(model: PeftModel, processes: Processes) -> None:
    """Leave each process its part of every frozen weight; a decoder layer is put together while it computes
    (FSDP2, Zhao et al. 2023, arXiv 2304.11277).

    The adapter stays whole in every process: it is small, so its gradients are summed in one exchange, and
    it is saved as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model()
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for part in [*decoder_layers(model), base]:
        fully_shard(part, mesh=mesh, ignored_params=whole)
