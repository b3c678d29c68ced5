"""Pruned models that are saved and loaded as those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ._folder import save_into
from ._load import load
from ._model import PrunedModel


class SavedModel(PrunedModel):
    """A pruned model with a folder of its own format."""

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the model as it is now to a folder, which may exist already, as transformers' models do.

        The files are complete before the first of them takes its place. See
        :meth:`fasp_fx.hf.Pruned.save_pretrained` for a folder that appears whole or not at all, with the
        tokenizer.

        Args:
            state_dict: weights to write instead of the model's own, by the same names.

        Raises:
            StoreError: the folder cannot be written, or a weight no longer fits the program.
        """
        if is_main_process:
            save_into(self, Path(save_directory), state_dict)
        if push_to_hub:
            raise ArgumentError(
                "push_to_hub=True is not served; call save_pretrained(folder), then"
                " huggingface_hub.upload_folder"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a folder that ``save_pretrained`` wrote, or a repository on the hub that holds one.

        Args:
            pretrained_model_name_or_path: the folder, or a hub id.
            dtype: ``None``, ``"auto"`` or the dtype that the model was captured in; another one is refused.
            device_map: ``None``, ``"auto"`` (the accelerator if there is one), a device, or ``{"": device}``.

        Raises:
            StoreError: a file is missing, damaged or of another version.
            ArgumentError: an argument cannot be honoured.
        """
        return load(cls, pretrained_model_name_or_path, **kwargs)


__all__ = ["SavedModel"]
