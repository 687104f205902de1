"""The layout of a diffusers folder, read without opening the weights: its parts, its conditioning, its sizes.

    pipeline in model_index.json    generates on        parts
    StableDiffusionPipeline         latents          unet (UNet2DConditionModel), vae, text_encoder, tokenizer
    LatentConsistencyModelPipeline  latents          the same
    LDMPipeline                     latents          unet (UNet2DModel), vae in the folder `vqvae`
    DDPMPipeline, DDIMPipeline      pixels           unet (UNet2DModel)
    StableDiffusionXLPipeline       latents          as StableDiffusionPipeline, text_encoder_2 and tokenizer_2
    StableDiffusionXLImg2ImgPipeline  latents        the same; a refiner has no text_encoder and no tokenizer
    StableDiffusion3Pipeline        latents          unet (SD3Transformer2DModel) in the folder `transformer`, vae, two
                                                     text encoders and perhaps a third, text_encoder_3 and tokenizer_3

Each has a scheduler as well. A UNet2DModel generates without a prompt, or, with `num_class_embeds`, from the name of a
class. diffusers' own LDMPipeline was made for a VQModel, hence its folder's name; it loads an AutoencoderKL there as
well (and remarks on it), and uses it in the same way.

Two files are sdcli's own, both optional: `classes.json`, a list of the classes' names in the order of their labels,
and `sdcli.json`, `{"schema": 1, "defaults": {...}}` with the fields that an entry's defaults have in models.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sdcli.errors import BadWeights, NotFound, UsageError
from sdcli.io.json_files import read_json_list, read_json_object
from sdcli.request.schedulers import Process
from sdcli.request.schema import did_you_mean
from sdcli.vae.config import cell_of

MAX_CLASSES = 100_000
SHOWN_CLASSES = 20
"""How many classes an error message lists."""


@dataclass(frozen=True)
class Layout:
    """What a kind of folder has: for each component its sub-folder and the classes it may be of.

    sdcli never looks a class up by a name from a file; these are all it knows.
    """

    components: Mapping[str, tuple[str, tuple[str, ...]]]
    optional: frozenset[str] = frozenset()
    """Components that may be absent, all of them together."""
    process: Process = "diffusion"

    def folder_of(self, component: str) -> str:
        """The sub-folder, which is also the component's name in model_index.json."""
        return self.components[component][0]

    @property
    def can_generate(self) -> bool:
        """Whether there is a UNet or a transformer; without one the folder only holds parts for other models."""
        return "unet" in self.components

    @property
    def has_text(self) -> bool:
        return bool({"text_encoder", "text_encoder_2"} & set(self.components))

    @property
    def has_vae(self) -> bool:
        return "vae" in self.components


_VAES = ("AutoencoderKL", "AutoencoderTiny")
_PIXELS = Layout({"unet": ("unet", ("UNet2DModel",))})
_LATENTS = Layout({**_PIXELS.components, "vae": ("vqvae", _VAES)})
_TEXT_TO_IMAGE = Layout(
    {
        "unet": ("unet", ("UNet2DConditionModel",)),
        "vae": ("vae", _VAES),
        "text_encoder": ("text_encoder", ("CLIPTextModel",)),
        "tokenizer": ("tokenizer", ("CLIPTokenizer", "CLIPTokenizerFast")),
    }
)
_SDXL = Layout(
    {
        **_TEXT_TO_IMAGE.components,
        "text_encoder_2": ("text_encoder_2", ("CLIPTextModelWithProjection",)),
        "tokenizer_2": ("tokenizer_2", ("CLIPTokenizer", "CLIPTokenizerFast")),
    },
    optional=frozenset({"text_encoder", "tokenizer"}),
)
_SD3 = Layout(
    {
        **_SDXL.components,
        "unet": ("transformer", ("SD3Transformer2DModel",)),
        "text_encoder": ("text_encoder", ("CLIPTextModelWithProjection",)),
        "text_encoder_3": ("text_encoder_3", ("T5EncoderModel",)),
        "tokenizer_3": ("tokenizer_3", ("T5Tokenizer", "T5TokenizerFast")),
    },
    optional=frozenset({"text_encoder_3", "tokenizer_3"}),
    process="flow",
)
LAYOUTS: dict[str, Layout] = {
    "StableDiffusionPipeline": _TEXT_TO_IMAGE,
    "StableDiffusionImg2ImgPipeline": _TEXT_TO_IMAGE,
    "StableDiffusionInpaintPipeline": _TEXT_TO_IMAGE,
    "LatentConsistencyModelPipeline": _TEXT_TO_IMAGE,
    "LDMPipeline": _LATENTS,
    "DDPMPipeline": _PIXELS,
    "DDIMPipeline": _PIXELS,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
}
"""The pipelines of model_index.json that sdcli generates with."""


INPAINTING_CHANNELS = 5
"""The mask and the masked image's latents, behind those that are denoised."""


@dataclass(frozen=True)
class ModelKind:
    """What can be asked of a model. By default text to image on latents, as of Stable Diffusion."""

    conditioning: Literal["text", "class", "none"] = "text"
    space: Literal["latent", "pixel"] = "latent"
    size_step: int = 8
    """Width and height are multiples of this."""
    smallest_size: int = 16
    classes: tuple[str, ...] = ()
    """The names of the classes, in the order of their labels."""
    null_label: int | None = None
    """The label that was learned for "no class"; None where there is none."""
    inpaints: bool = False
    """The network sees a mask, and what the mask keeps, as further channels."""
    process: Process = "diffusion"
    cell: int = 8
    """Pixels a side of a cell of the latents; 1 on pixels."""

    @property
    def can_be_guided(self) -> bool:
        """Whether there is an unconditional half to be guided away from."""
        return self.conditioning == "text" or self.null_label is not None

    def label(self, prompt: str) -> int:
        """The label of a class by its name, or else its number; of no class for an empty prompt. Raises UsageError."""
        name = prompt.strip()
        if not name and self.null_label is not None:
            return self.null_label
        if name in self.classes:
            return self.classes.index(name)
        if name.isascii() and name.isdigit() and len(name) < 10 and int(name) < len(self.classes):
            return int(name)
        problem = f"no class {name!r}{did_you_mean(name, self.classes)}" if name else "the prompt names no class"
        raise UsageError(f"{problem} (the model's classes: {self.listed_classes})")

    @property
    def listed_classes(self) -> str:
        """The names of the classes for people, the first twenty of them."""
        more = len(self.classes) - SHOWN_CLASSES
        return ", ".join(self.classes[:SHOWN_CLASSES]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class ModelFolder:
    """What a folder says about itself."""

    path: Path
    layout: Layout
    kind: ModelKind
    size: tuple[int, int] | None
    """The width and height it was trained on, in pixels, where it says."""
    defaults: Mapping[str, Any]
    """Of sdcli.json, not yet checked field by field."""

    @property
    def defaults_file(self) -> Path:
        return self.path / "sdcli.json"


def read_model_folder(path: Path) -> ModelFolder:
    """Read the small files of a diffusers folder. Raises NotFound, UsageError and BadWeights, each with a sentence."""
    layout = read_layout(path)
    if not layout.can_generate:
        cell = cell_of(network_config(path, layout, "vae")) if layout.has_vae else 8
        return ModelFolder(
            path,
            layout,
            ModelKind(size_step=cell, process=layout.process, cell=cell),
            None,
            _read_defaults(path / "sdcli.json"),
        )
    unet = network_config(path, layout, "unet")
    vae = network_config(path, layout, "vae") if layout.has_vae else None
    if layout.process == "flow":
        kind = _kind_of_transformer(unet, vae or {}, source=str(path))
        return ModelFolder(path, layout, kind, _trained_size(unet, vae), _read_defaults(path / "sdcli.json"))
    classes = read_classes(path) if not layout.has_text and unet.get("num_class_embeds") is not None else None
    kind = kind_of(unet, vae=vae, has_text=layout.has_text, classes=classes, source=str(path))
    return ModelFolder(path, layout, kind, _trained_size(unet, vae), _read_defaults(path / "sdcli.json"))


def read_layout(path: Path) -> Layout:
    """The layout that model_index.json names; the components it names are of known classes and have their folders."""
    if not path.is_dir():
        raise NotFound(f"no folder {path}")
    index = read_json_object(path / "model_index.json")
    pipeline = index.get("_class_name")
    layout = LAYOUTS.get(pipeline) if isinstance(pipeline, str) else None
    if layout is None:
        raise UsageError(f"{path} is a {pipeline}; sdcli generates with {', '.join(LAYOUTS)} so far")
    components = dict(layout.components)
    others = [
        folder for name, (folder, _) in components.items() if name != "unet" and _named(index, folder) is not None
    ]
    if (
        _named(index, layout.folder_of("unet")) is None and others
    ):  # what `train-vae` and `train-text-encoder` make: parts to build a model with
        components = {name: entry for name, entry in components.items() if entry[0] in others}
    if all(_named(index, layout.folder_of(name)) is None for name in layout.optional):
        components = {name: entry for name, entry in components.items() if name not in layout.optional}
    for folder, allowed in components.values():
        named = _named(index, folder)
        if named not in allowed:
            raise BadWeights(
                f"{path}/model_index.json names {named!r} as its {folder}; known: {', '.join(sorted(allowed))}"
            )
        if not (path / folder).is_dir():
            raise BadWeights(f"{path} has no {folder} folder; the model is incomplete")
    return replace(layout, components=components)


def _named(index: Mapping[str, Any], component: str) -> Any:
    """The class that model_index.json gives a component, [library, class]; None for an absent one, [null, null]."""
    named = index.get(component)
    return named[1] if isinstance(named, list) and len(named) == 2 else named


def network_config(path: Path, layout: Layout, component: str) -> dict[str, Any]:
    """The config.json of a component, which is of a class that the layout allows. Raises NotFound and BadWeights."""
    folder, allowed = layout.components[component]
    config = read_json_object(path / folder / "config.json")
    named = config.get("_class_name")
    if named is not None and named not in allowed:
        raise BadWeights(f"{path}/{folder}/config.json is of a {named!r}; known: {', '.join(allowed)}")
    return config


def read_classes(path: Path) -> tuple[str, ...] | None:
    """The names in a folder's classes.json, or None where it has none. Raises BadWeights."""
    file = path / "classes.json"
    if not file.exists():
        return None
    names = read_json_list(file)
    for name in names:
        if not isinstance(name, str) or name != name.strip() or not name or len(name) > 1000 or not name.isprintable():
            raise BadWeights(f"{file}: {str(name)[:60]!r} is no name of a class")
    twice = next((name for name, after in zip(sorted(names), sorted(names)[1:], strict=False) if name == after), None)
    if twice is not None:
        raise BadWeights(f"{file}: the class {twice!r} is there twice")
    return tuple(names)


def kind_of(
    unet: Mapping[str, Any],
    *,
    vae: Mapping[str, Any] | None,
    has_text: bool,
    classes: Sequence[str] | None,
    source: str,
) -> ModelKind:
    """What can be asked of networks with these configurations; `vae` is None where the UNet works on pixels.

    `classes` are the names of the classes. The class embedding has a row for each, and may have one more: "no class".
    Raises BadWeights and UsageError, whose sentences begin with `source`.
    """
    cell = 1 if vae is None else cell_of(vae)
    if has_text:
        channels, own = unet.get("in_channels", 4), 4 if vae is None else vae.get("latent_channels", 4)
        if channels not in (own, own + INPAINTING_CHANNELS):
            raise UsageError(
                f"{source}: its UNet takes {channels} channels; sdcli generates with those of the VAE ({own}), or with "
                f"{INPAINTING_CHANNELS} more of an inpainting model"
            )
        return ModelKind(size_step=cell, inpaints=channels != own, cell=cell)
    depth = len(_channels(unet, "block_out_channels", source))
    # UNet2DModel halves its input between its blocks and doubles it again, and joins the two: no half may be odd
    step = cell * 2 ** (depth - 1)
    sizes: dict[str, Any] = {"size_step": step, "smallest_size": max(8, step), "cell": cell}
    channels, out = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if vae is None:
        sizes["space"] = "pixel"
        if channels not in (1, 3):
            raise UsageError(f"{source}: its UNet takes {channels} channels; images have 1 (grey) or 3 (RGB)")
    if channels != out:
        raise UsageError(
            f"{source}: its UNet takes {channels} channels and gives {out}, which sdcli cannot generate with"
        )
    if unet.get("class_embed_type") is not None:
        raise UsageError(f"{source}: its UNet takes classes as {unet['class_embed_type']!r}, which sdcli does not know")
    rows = unet.get("num_class_embeds")
    if rows is None:
        return ModelKind("none", **sizes)
    if type(rows) is not int or not 1 <= rows <= MAX_CLASSES:
        raise BadWeights(f"{source}: its UNet cannot have {rows!r} classes")
    names = tuple(map(str, range(rows))) if classes is None else tuple(classes)
    if len(names) not in (rows - 1, rows):
        raise BadWeights(f"{source}: classes.json names {len(names)} classes, and its UNet has {rows}")
    return ModelKind("class", classes=names, null_label=len(names) if len(names) < rows else None, **sizes)


def _kind_of_transformer(transformer: Mapping[str, Any], vae: Mapping[str, Any], *, source: str) -> ModelKind:
    """That of Stable Diffusion 3, whose transformer reads latents in patches."""
    patch, channels, own = (
        transformer.get("patch_size", 2),
        transformer.get("in_channels", 16),
        vae.get("latent_channels"),
    )
    if type(patch) is not int or not 1 <= patch <= 16:
        raise BadWeights(f"{source}: its transformer cannot have patches of {patch!r} cells")
    if channels != own or transformer.get("out_channels", 16) not in (channels, None):
        raise UsageError(
            f"{source}: its transformer takes {channels} channels and its VAE makes {own}; they should be equal"
        )
    return ModelKind(size_step=cell_of(vae) * patch, process="flow", cell=cell_of(vae))


SD3_KIND = ModelKind(size_step=16, process="flow")
"""Of every published Stable Diffusion 3; its latents have cells of 8 pixels, and its patches 2x2 cells."""


def _read_defaults(file: Path) -> dict[str, Any]:
    """The defaults in a folder's sdcli.json; none where it has no such file."""
    if not file.exists():
        return {}
    data = read_json_object(file)
    unknown = set(data) - {"schema", "defaults"}
    if unknown:
        raise UsageError(f"{file}: unknown key {min(unknown)!r}; it has schema and defaults")
    if data.get("schema") != 1 or type(data["schema"]) is not int:
        raise UsageError(f"{file}: schema: {data.get('schema')!r} is not 1, the only one this sdcli knows")
    defaults = data.get("defaults", {})
    if not isinstance(defaults, dict):
        raise UsageError(f"{file}: defaults: should be an object")
    return defaults


def _trained_size(unet: Mapping[str, Any], vae: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Width and height in pixels of what the UNet was trained on; diffusers writes one side, or [height, width]."""
    cell = 1 if vae is None else cell_of(vae)
    stored = unet.get("sample_size")
    sides = [stored, stored] if type(stored) is int else stored
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int for side in sides):
        return None
    height, width = (side * cell for side in sides)
    return (width, height) if min(width, height) >= 8 and max(width, height) <= 8192 else None


def _channels(config: Mapping[str, Any], name: str, source: str) -> Sequence[int]:
    channels = config.get(name, (224, 448, 672, 896))  # diffusers' own default
    if not isinstance(channels, list | tuple) or not 1 <= len(channels) <= 10:
        raise BadWeights(f"{source}: its configuration describes no network: {name} is {str(channels)[:60]}")
    return channels
