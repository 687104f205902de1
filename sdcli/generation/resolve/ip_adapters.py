"""The image prompts of a request, as far as they shape it: that they can have an effect, and which files they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sdcli.errors import BadWeights, NotFound, UsageError
from sdcli.generation.resolve.init_image import identified
from sdcli.models.layout import ModelKind
from sdcli.request.fields import FileRef
from sdcli.request.input_files import check_same_file, digest_of
from sdcli.request.schema import GenerationRequest


def image_prompts_filled(request: GenerationRequest, kind: ModelKind, *, model: str) -> dict[str, Any]:
    """The IP-Adapters with the digests of their files and images.

    Raises UsageError for what would have no effect with this `kind` of model, and what reading the files raises.
    """
    if not request.ip_adapters:
        return {}
    if kind.conditioning != "text":
        raise UsageError(f"{model} takes no captions, and IP-Adapters are made for models that do")
    pinned = (
        one.model_copy(update={"adapter": pinned_adapter(one.adapter), "image": identified(one.image)})
        for one in request.ip_adapters
    )
    return {"ip_adapters": tuple(pinned)}


def pinned_adapter(ref: FileRef) -> FileRef:
    """The reference to an adapter's weights with the digest of the file.

    Raises NotFound, UsageError for a pickle and for another file than the reference's own digest says, and BadWeights.
    """
    path = adapter_path(ref)
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"{path} is no .safetensors file, the only kind of IP-Adapter that sdcli reads")
    if not os.path.isfile(path):
        raise NotFound(f"no file {path}")
    try:
        digest = digest_of(path)
    except OSError as error:
        raise BadWeights(f"cannot read {path}: {error.strerror}") from None
    check_same_file(digest, ref.sha256, what=f"the IP-Adapter {path}")
    return ref.model_copy(update={"sha256": digest})


def adapter_path(ref: FileRef) -> Path:
    """Where the weights are; from the root, so that their folder's parent has a name."""
    return Path(os.path.abspath(os.path.expanduser(ref.path)))
