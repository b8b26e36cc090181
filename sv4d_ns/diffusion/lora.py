"""Low-rank adapters (LoRA) of the network, through PEFT and diffusers' own functions."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import is_peft_available
from torch import Tensor

from sv4d_ns.utils.errors import InputError, install_extra

PREFIX = "unet"


def require_peft() -> None:
    """Raise InputError where PEFT is not installed."""
    if not is_peft_available():
        raise InputError(f"LoRA needs the package peft, which is not installed: {install_extra('lora')}.")


class LoraLoader(LoraBaseMixin):  # type: ignore[misc]
    """Load, save, fuse and unload adapters; the other functions are those of diffusers' LoraBaseMixin."""

    _lora_loadable_modules: Any = (PREFIX,)
    unet: Any

    def load_lora_weights(  # type: ignore[override]
        self,
        pretrained_model_name_or_path_or_dict: str | PathLike[str] | dict[str, Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to the network and make it active.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, file or hub id with `pytorch_lora_weights.safetensors` as
                `save_lora_weights` writes it, or its tensors.
            adapter_name: name for `set_adapters` and `delete_adapters`.
            kwargs: as of diffusers' `load_lora_adapter`, for example `weight_name`.

        Raises:
            InputError: when PEFT is missing, or nothing in the file belongs to this network.
        """
        require_peft()
        kwargs.setdefault("use_safetensors", True)
        before = set(getattr(self.unet, "peft_config", {}))
        self.unet.load_lora_adapter(
            pretrained_model_name_or_path_or_dict, prefix=PREFIX, adapter_name=adapter_name, _pipeline=self, **kwargs
        )
        if set(getattr(self.unet, "peft_config", {})) == before:
            raise InputError(
                f"The LoRA has no tensors whose names start with '{PREFIX}.': give one that was made for this network."
            )

    @classmethod
    def save_lora_weights(  # type: ignore[override]
        cls, save_directory: str | PathLike[str], unet_lora_layers: Mapping[str, Tensor], **kwargs: Any
    ) -> None:
        """Write adapter tensors (of `peft.get_peft_model_state_dict(pipeline.unet)`) as a safetensors file."""
        cls._save_lora_weights(
            save_directory=save_directory, lora_layers={PREFIX: dict(unet_lora_layers)}, lora_metadata={}, **kwargs
        )

    def fuse_lora(  # type: ignore[override]
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Add the adapters to the weights themselves; `unfuse_lora` undoes it."""
        super().fuse_lora(
            components=[PREFIX], lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names, **kwargs
        )

    def unfuse_lora(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Undo `fuse_lora`."""
        super().unfuse_lora(components=[PREFIX], **kwargs)
