"""`sdcli dataset`: examine training images, and pack them into shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.options.shared import JsonOpt, ModelOpt, ModelsFileOpt, QuietOpt, VerboseOpt
from sdcli.cli.ui.buckets import bucket_fills_of, bucket_lines, bucket_row, framing_of
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.help import App
from sdcli.cli.ui.progress import counted
from sdcli.errors import BadImage, SdcliError, SomeFailed, UsageError
from sdcli.io.files import expanded, refuse_inside
from sdcli.models.registry import load_registry
from sdcli.training.settings import cache_folder

if TYPE_CHECKING:
    from sdcli.data.inspection import Inspection
    from sdcli.data.records import ImageSet

app = App(help="Examine training images before training, cache their latents, and pack them into shards.")

TINY = 64
"""Images with a shorter side, in pixels, are mentioned."""

DataArg = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Folder of images, parquet files or tar shards, pattern (shards/{00000..00099}.tar), or owner/name of the "
        "Hugging Face hub.",
    ),
]
SplitOpt = Annotated[str, typer.Option("--split", metavar="NAME", help="Split: train, validation, test or all.")]
ImageColumnOpt = Annotated[
    str | None,
    typer.Option(
        "--image-column",
        metavar="NAME",
        help="Column of the images or their file names.",
        show_default="image or file_name",
    ),
]
CaptionColumnOpt = Annotated[
    str | None,
    typer.Option("--caption-column", metavar="NAME", help="Column of the captions.", show_default="text or caption"),
]
CaptionExtensionOpt = Annotated[
    str, typer.Option("--caption-extension", metavar=".EXT", help="Extension of caption files.")
]
ResolutionOpt = Annotated[
    str | None,
    typer.Option("--resolution", metavar="N|WxH", help="Show the aspect-ratio buckets for this size in pixels."),
]
BucketStepOpt = Annotated[
    int | None,
    typer.Option(
        "--bucket-reso-steps",
        min=8,
        metavar="PIXELS",
        show_default="1/8 of the resolution",
        help="Step between the sides of buckets.",
    ),
]
BatchSizeOpt = Annotated[
    int | None,
    typer.Option(
        "--train-batch-size",
        min=1,
        help="Show the buckets of training with so many samples a step (over all processes and micro-batches): without "
        "the images held out for validation, and with small buckets merged.",
    ),
]
ValidationSplitOpt = Annotated[
    float | None,
    typer.Option(
        "--validation-split", min=0, max=0.99, show_default="0.05", help="Share of images that training holds out."
    ),
]
WorkersOpt = Annotated[
    int | None, typer.Option("--workers", min=1, max=256, help="Threads that read images.", show_default="one per CPU")
]


@app.command()
def check(
    data: DataArg,
    split: SplitOpt = "train",
    image_column: ImageColumnOpt = None,
    caption_column: CaptionColumnOpt = None,
    caption_extension: CaptionExtensionOpt = ".txt",
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Accept missing captions.")] = False,
    resolution: ResolutionOpt = None,
    bucket_reso_steps: BucketStepOpt = None,
    train_batch_size: BatchSizeOpt = None,
    validation_split: ValidationSplitOpt = None,
    workers: WorkersOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Check every image and caption; exit 1 if training would drop any.

    Nothing is changed. Duplicates, tiny images and repeats of images in buckets are listed, and are no failure.
    """
    from sdcli.data.duplicates import same_bytes, similar

    console = Console(quiet=quiet, verbose=verbose, json=json)
    framing = framing_of(resolution, bucket_reso_steps, train_batch_size, validation_split)
    images = _open(data, split, image_column, caption_column, caption_extension)
    found = _examined(images, console, workers)
    lost_captions = 0 if unconditional else len(found.uncaptioned)
    equal = same_bytes(found.digests, found.used)
    alike = similar(found.hashes, found.sizes, found.digests, found.used)
    captions = Counter(images[index].captions for index in _every(found) if images[index].captions)
    repeated = {texts: count for texts, count in captions.items() if count > 1} if not images.classes else {}
    tiny = [index for index in _every(found) if 0 < found.sizes[index].min() < TINY and images.kind == "pictures"]
    fills = bucket_fills_of(images, found, framing)
    problems = _problems(len(found.dropped), lost_captions, len(found.used), lost=0 if unconditional else found.lost)
    if json:
        names = lambda groups: [[images[index].name for index in group] for group in groups]  # noqa: E731
        console.result(
            "",
            ok=not problems,
            problems=problems,
            **found.as_dict(),
            equal=names(equal),
            similar=names(alike),
            repeated_captions=[{"captions": list(texts), "pictures": count} for texts, count in repeated.items()],
            tiny=[images[index].name for index in tiny],
            buckets=[bucket_row(fill) for fill in fills],
        )
    else:
        for line in found.report():
            console.result(line)
        for text, groups in (("identical byte for byte", equal), ("nearly identical", alike)):
            if groups:
                shown = "; ".join(" = ".join(images[index].name for index in group[:3]) for group in groups[:3])
                console.result(f"  note {sum(map(len, groups)):,} images are {text}: {shown}")
        if repeated:
            texts, count = max(repeated.items(), key=lambda entry: entry[1])
            console.result(f"  note {sum(repeated.values()):,} share their caption; {count:,} have {texts[0]!r}")
        if tiny:
            shown = ", ".join(images[index].name for index in tiny[:3])
            console.result(f"  note {len(tiny):,} are less than {TINY} pixels wide or high: {shown}")
        for line in bucket_lines(fills, train_batch_size):
            console.result(line)
        if not problems:
            console.result("no problems")
    if problems:
        raise SdcliError(f"{data}: {' and '.join(problems)}")


@app.command()
def stats(
    data: DataArg,
    split: SplitOpt = "train",
    image_column: ImageColumnOpt = None,
    caption_column: CaptionColumnOpt = None,
    caption_extension: CaptionExtensionOpt = ".txt",
    resolution: ResolutionOpt = None,
    bucket_reso_steps: BucketStepOpt = None,
    train_batch_size: BatchSizeOpt = None,
    validation_split: ValidationSplitOpt = None,
    model: ModelOpt = None,
    models_file: ModelsFileOpt = None,
    workers: WorkersOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Print statistics of a data set: image sizes, buckets, classes, and lengths of captions.

    With -m MODEL caption lengths are also counted in tokens of its text encoder.
    """
    console = Console(quiet=quiet, verbose=verbose, json=json)
    framing = framing_of(resolution, bucket_reso_steps, train_batch_size, validation_split)
    tokenizer = None
    if model is not None:
        from sdcli.encoders.tokenizer import load_tokenizer
        from sdcli.models.hub.folders import tokenizer_folder

        tokenizer = load_tokenizer(tokenizer_folder(load_registry(models_file).find(model)))
    images = _open(data, split, image_column, caption_column, caption_extension)
    found = _examined(images, console, workers)
    captions = [caption for index in _every(found) for caption in images[index].captions]
    classes = Counter(label for index in _every(found) if (label := images[index].label) is not None)
    words = _spread([len(caption.split()) for caption in captions])
    tokens: dict[str, Any] | None = None
    if tokenizer is not None:
        counts = [tokenizer(caption).count for caption in captions]
        cut = sum(count > tokenizer.max_length - 2 for count in counts)
        tokens = {**_spread(counts), "limit": tokenizer.max_length - 2, "cut": cut}
    fills = bucket_fills_of(images, found, framing)
    if json:
        console.result(
            "",
            **found.as_dict(),
            captions={"total": len(captions), "words": words, "tokens": tokens},
            classes=dict(sorted(classes.items())),
            buckets=[bucket_row(fill) for fill in fills],
        )
        return
    for line in found.report():
        console.result(line)
    console.result(f"captions: {len(captions):,}{f', words {_spread_text(words)}' if captions else ''}")
    if tokens is not None and captions:
        share = 100 * tokens["cut"] / len(captions)
        console.result(
            f"tokens of {model}: {_spread_text(tokens)}; {tokens['cut']:,} ({share:.1f} %) have more than "
            f"{tokens['limit']} and are cut"
        )
    if classes:
        console.result(f"classes: {len(classes):,}")
        for name, count in classes.most_common():
            console.result(f"  {count:>8,}  {name}")
    for line in bucket_lines(fills, train_batch_size):
        console.result(line)


@app.command()
def shard(
    data: DataArg,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="New folder for the shards 00000.tar, 00001.tar and so on."),
    ],
    split: SplitOpt = "train",
    image_column: ImageColumnOpt = None,
    caption_column: CaptionColumnOpt = None,
    caption_extension: CaptionExtensionOpt = ".txt",
    shard_size: Annotated[
        float, typer.Option("--shard-size", min=0.02, metavar="MB", help="Maximum size of a shard in megabytes.")
    ] = 500.0,
    shard_pictures: Annotated[
        int, typer.Option("--shard-pictures", min=1, help="Maximum number of images in a shard.")
    ] = 10_000,
    shuffle: Annotated[
        bool | None,
        typer.Option(
            "--shuffle/--no-shuffle",
            help="Shuffle the images.",
            show_default="on, unless DATA is a stream",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of --shuffle.")] = 0,
    workers: WorkersOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Pack images with their captions, classes and names into WebDataset tar shards, and print their paths.

    Equal input gives equal shards, byte for byte. DIR appears only when all shards are written.
    """
    from sdcli.data.write_shards import write_shards
    from sdcli.io.rng import permutation

    console = Console(quiet=quiet, verbose=verbose, json=json)
    target = expanded(output).resolve()
    refuse_inside(output, data, choose="another folder")
    images = _open(data, split, image_column, caption_column, caption_extension)
    if images.kind != "pictures":
        raise UsageError(f"{data} holds latents; shards hold images")
    found = _examined(images, console, workers)
    warnings = found.warnings()
    for line in warnings:
        console.warn(line)
    for line in found.report():
        if line.strip() not in warnings:
            console.note(line)
    if not len(found.used):
        raise BadImage(f"{data} has no usable image")
    mixed = not images.streamed if shuffle is None else shuffle
    order = found.used[permutation(seed, 0, "shard", len(found.used))] if mixed else found.used
    shards = list(
        write_shards(
            images,
            target,
            indices=order.tolist(),
            max_bytes=round(shard_size * 1e6),
            max_pictures=shard_pictures,
        )
    )
    for written in shards:  # reported at the end, when all exist
        path = output / written.name
        console.result(path, path=str(path), pictures=written.images, bytes=written.size)
    if found.dropped:
        total = len(found.used) + len(found.dropped)
        raise SomeFailed(f"{len(found.dropped):,} of {total:,} images were dropped; the others are in the shards")


# Shared by the commands


def _open(data: str, split: str, image: str | None, caption: str | None, extension: str) -> ImageSet:
    from sdcli.data.sources import open_images

    return open_images(data, image_column=image, caption_column=caption, caption_extension=extension, split=split)


def _examined(images: ImageSet, console: Console, workers: int | None) -> Inspection:
    from sdcli.data.inspection import inspect, summarize

    seen = inspect(images, facts_folder=cache_folder() / "examined", workers=workers)
    return summarize(images, counted(seen, len(images), console))


def _every(found: Inspection) -> list[int]:
    return [int(index) for index in found.used]


def _problems(dropped: int, uncaptioned: int, used: int, *, lost: int) -> list[str]:
    problems = [f"{dropped:,} dropped"] if dropped else []
    problems += [f"{lost:,} caption files or tables not read"] if lost else []
    problems += [f"{uncaptioned:,} without a caption (--unconditional allows that)"] if uncaptioned else []
    return problems or ([] if used else ["no images"])


# Numbers


def _spread(numbers: Sequence[int]) -> dict[str, Any]:
    if not numbers:
        return {"least": None, "median": None, "most": None}
    ordered = sorted(numbers)
    return {"least": ordered[0], "median": ordered[len(ordered) // 2], "most": ordered[-1]}


def _spread_text(spread: dict[str, Any]) -> str:
    return f"{spread['least']} to {spread['most']}, median {spread['median']}"
