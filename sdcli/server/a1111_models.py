"""Bodies and answers of AUTOMATIC1111's /sdapi/v1, as pydantic models. `a1111_fields.py` says what they mean here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from sdcli.request.fields import check_number
from sdcli.request.schema import MAX_SEED

MAX_IMAGES = 1000
Seed = Annotated[int | None, Field(ge=-1, le=MAX_SEED)]
Switch = Literal[True, False, 1, 0] | None
"""A boolean that clients write as a number, too."""


def _plain(text: str | None) -> str | None:
    """A text whose characters are whole. Raises ValueError."""
    if text is not None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("has half a character (not valid UTF-8 text)") from None
    return text


Text = Annotated[str | None, AfterValidator(_plain)]


class _Body(BaseModel):
    """null is the same as a field that is omitted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    _check_number = field_validator("*", mode="before")(check_number)


class Txt2Img(_Body):
    """The web UI's fields. What is omitted is left to the model: its size, steps, guidance scale and scheduler."""

    prompt: Text = None
    negative_prompt: Text = None
    styles: list[str] | None = None
    seed: Seed = Field(None, description="-1: random")
    subseed: Seed = Field(None, description="seed of the variation; -1: random")
    subseed_strength: float | None = Field(None, ge=0, le=1)
    seed_resize_from_h: int | None = None
    seed_resize_from_w: int | None = None
    sampler_name: str | None = Field(None, description="a name of GET /sdapi/v1/samplers")
    sampler_index: str | None = Field(None, description="the older name of sampler_name")
    scheduler: str | None = Field(None, description="a name or label of GET /sdapi/v1/schedulers")
    batch_size: int | None = Field(None, ge=1, le=MAX_IMAGES)
    n_iter: int | None = Field(None, ge=1, le=MAX_IMAGES)
    steps: int | None = Field(None, ge=1, le=1000)
    cfg_scale: float | None = Field(None, ge=0, le=100)
    distilled_cfg_scale: float | None = None
    width: int | None = Field(None, ge=8, le=8192)
    height: int | None = Field(None, ge=8, le=8192)
    restore_faces: bool | None = None
    tiling: bool | None = None
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    eta: float | None = None
    denoising_strength: float | None = Field(None, ge=0, le=1)
    s_min_uncond: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    disable_extra_networks: bool | None = None
    firstpass_image: str | None = None
    comments: dict[str, Any] | None = None
    script_name: str | None = None
    script_args: list[Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool | None = None
    save_images: bool | None = None
    force_task_id: str | None = Field(None, max_length=200, description="names the job for progress")
    infotext: str | None = None
    clip_skip: int | None = Field(None, ge=1, le=100, description="SD.Next's name of CLIP_stop_at_last_layers")
    url: str | None = Field(None, description="SillyTavern's own; not used")
    auth: str | None = Field(None, description="SillyTavern's own; not used")

    enable_hr: bool | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    hr_scale: float | None = None
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_checkpoint_name: str | None = None
    hr_additional_modules: list[str] | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = None
    hr_negative_prompt: str | None = None
    hr_cfg: float | None = None
    hr_distilled_cfg: float | None = None


class Img2Img(Txt2Img):
    """The fields of txt2img, an image to start from, and a mask that is white where to generate."""

    init_images: list[str] | None = Field(None, description="one image, base64")
    resize_mode: int | None = Field(None, description="0: stretch, 1: crop")
    image_cfg_scale: float | None = Field(None, description="of pix2pix models, which this server has none of")
    mask: str | None = None
    mask_blur: int | None = Field(None, ge=0, le=256)
    mask_blur_x: int | None = None
    mask_blur_y: int | None = None
    mask_round: bool | None = None
    inpainting_fill: int | None = Field(None, description="0: fill from around, 1: the original")
    inpaint_full_res: Switch = None
    inpaint_full_res_padding: int | None = None
    inpainting_mask_invert: Switch = None
    initial_noise_multiplier: float | None = None
    latent_mask: str | None = None
    include_init_images: bool | None = None


class Images(BaseModel):
    """The images of a call, base64, and the settings of each as JSON in a text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str = Field(description="a JSON text: seed, all_seeds, infotexts ...")


class State(BaseModel):
    """What the job does."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class ProgressAnswer(BaseModel):
    """How far a job is: the one of `id_task`, or else the running one of this client, or of anyone."""

    progress: float = 0.0
    eta_relative: float = 0.0
    state: State = State()
    current_image: str | None = None
    textinfo: str | None = None


class TaskQuestion(_Body):
    """Which job."""

    id_task: str | None = Field(None, max_length=200)
    id_live_preview: int | None = -1
    live_preview: bool | None = True


class TaskProgress(BaseModel):
    """How far the job of a task id is."""

    active: bool
    queued: bool
    completed: bool
    progress: float | None = None
    eta: float | None = None
    live_preview: str | None = None
    id_live_preview: int | None = None
    textinfo: str | None = None


class PendingTasks(BaseModel):
    """The task ids that wait."""

    size: int
    tasks: list[str]


class PngInfoQuestion(_Body):
    """An image, base64."""

    image: str


class PngInfo(BaseModel):
    """What an image file says about how it was made."""

    info: str
    items: dict[str, Any]
    parameters: dict[str, Any]


class SamplerEntry(BaseModel):
    name: str
    aliases: list[str]
    options: dict[str, str]


class Schedule(BaseModel):
    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float = -1
    need_inner_model: bool = False


class Checkpoint(BaseModel):
    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class Vae(BaseModel):
    model_name: str
    filename: str


class Lora(BaseModel):
    name: str
    alias: str
    path: str
    metadata: dict[str, Any]


class Upscaler(BaseModel):
    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float = 4


class LatentUpscaler(BaseModel):
    name: str


class Scripts(BaseModel):
    txt2img: list[str] = []
    img2img: list[str] = []


class EmbeddingList(BaseModel):
    loaded: dict[str, Any] = {}
    skipped: dict[str, Any] = {}


class Memory(BaseModel):
    ram: dict[str, Any]
    cuda: dict[str, Any]


class Nothing(BaseModel):
    """{}"""


class A1111Error(BaseModel):
    """The body of every failure."""

    error: str
    detail: str
    body: str
    errors: str
