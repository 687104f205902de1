"""Make a folder of captioned images from emoji, to train on: emoji drawings and their names from npm packages.

The drawings come from an @iconify-json package, names and tags from emojibase-data; `npm pack` fetches both, nothing
else uses the network. Or fetch them yourself and give the folder with --packages. The drawings are SVG; resvg-py makes
images of them. It is needed for this script alone:

    pip install resvg-py
    python scripts/make_emoji_dataset.py emoji --groups animals-nature,food-drink
    sdcli train-vae emoji -o emoji-vae

Equal packages and options give equal files. emoji/SOURCES.md names the packages and their licences.
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

NAMES = "emojibase-data"
VERSIONS = {
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    NAMES: "17.0.0",
}
"""The packages that npm is asked for."""
STYLES = {
    "fluent-emoji-flat": "flat style",
    "fluent-emoji": "glossy style",
    "noto": "cartoon style",
    "twemoji": "simple style",
}
"""Package under @iconify-json -> what a caption calls its style."""
OVERSAMPLING = 4
"""How much larger the drawings are rasterised than they are kept."""


@dataclass(frozen=True)
class Emoji:
    """A concept: its code points in hexadecimal, its group and name, and words about it, the most general first."""

    code: str
    group: str
    label: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """One concept in one style."""

    emoji: Emoji
    style: str
    svg: str
    mirrored: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make; it must not be there, or be empty")
    parser.add_argument(
        "--style", action="append", choices=STYLES, help="whose drawings; several times for several (fluent-emoji-flat)"
    )
    parser.add_argument(
        "--groups",
        type=lambda text: text.split(","),
        help="only these, comma-separated: emojibase's groups (animals-nature, food-drink, travel-places, activities, "
        "objects, smileys-emotion, people-body, symbols, flags) and subgroups (animal-bird, tool, ...)",
    )
    parser.add_argument("--size", type=int, default=64, help="pixels a side, 8 to 1024 (%(default)s)")
    parser.add_argument("--margin", type=float, default=0.04, help="empty share at each side (%(default)s)")
    parser.add_argument("--transparent", action="store_true", help="keep transparency; else the background is white")
    parser.add_argument(
        "--captions",
        choices=["metadata", "txt"],
        default="metadata",
        help="metadata: metadata.jsonl with all wordings; txt: a .txt beside each image, a wording a line",
    )
    parser.add_argument("--limit", type=int, help="at most so many concepts, spread evenly over the groups")
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.0,
        help="share of the concepts that goes into validation/, the others into train/ (0: no such folders)",
    )
    parser.add_argument(
        "--packages", type=Path, help="a folder with the packages: what `npm pack` or `npm install` left there"
    )
    chosen = parser.parse_args()
    if not 8 <= chosen.size <= 1024 or not 0 <= chosen.margin < 0.5 or not 0 <= chosen.hold_out < 1:
        parser.error("--size is 8 to 1024, --margin 0 to 0.5, --hold-out 0 to 1")
    if chosen.limit is not None and chosen.limit < 1:
        parser.error("--limit is at least 1")
    if chosen.out.exists() and (not chosen.out.is_dir() or any(chosen.out.iterdir())):
        parser.error(f"{chosen.out} exists and is not empty")
    styles = list(dict.fromkeys(chosen.style or ["fluent-emoji-flat"]))
    wanted = [NAMES, *(f"@iconify-json/{style}" for style in styles)]
    with tempfile.TemporaryDirectory() as scratch:
        packages = chosen.packages or fetched(wanted, Path(scratch))
        emoji = spread(select(read(packages, NAMES, "en/data.json"), read(packages, NAMES, "meta/groups.json"),
                              chosen.groups), chosen.limit)  # fmt: skip
        drawn = [drawing for style in styles for drawing in drawings(packages, style, emoji)]
        sources = [source(packages, name) for name in wanted]
    if not drawn:
        sys.exit("none of these emoji is in the packages")
    write(drawn, chosen.out, sources, size=chosen.size, margin=chosen.margin, transparent=chosen.transparent,
          captions=chosen.captions, hold_out=chosen.hold_out)  # fmt: skip
    print(chosen.out)


# Packages


def fetched(names: Sequence[str], folder: Path) -> Path:
    """Fetch packages with `npm pack`, as tarballs into a folder."""
    if shutil.which("npm") is None:
        sys.exit("npm is needed to fetch the packages; or give a folder that has them with --packages")
    specs = [f"{name}@{VERSIONS[name]}" for name in names]
    print(f"npm pack {' '.join(specs)}", file=sys.stderr)
    done = subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", str(folder), *specs],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"npm pack failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return folder


def read(packages: Path, name: str, member: str) -> Any:
    """A JSON file of a package: of its folder as `npm install` makes it, or of the tarball of `npm pack`."""
    for folder in (packages / name, packages / "node_modules" / name):
        if (folder / member).is_file():
            return json.loads((folder / member).read_text(encoding="utf-8"))
    tarballs = sorted(packages.glob(f"{name.removeprefix('@').replace('/', '-')}-[0-9]*.tgz"))
    if len(tarballs) != 1:
        sys.exit(
            f"{packages} has {len(tarballs) or 'no'} {'versions' if tarballs else 'package'} of {name} with {member}"
        )
    with tarfile.open(tarballs[0]) as tarball:
        try:
            file = tarball.extractfile(f"package/{member}")
        except KeyError:
            file = None
        if file is None:
            sys.exit(f"{tarballs[0]} has no {member}")
        return json.load(file)


def source(packages: Path, name: str) -> str:
    """The line of SOURCES.md about a package."""
    package = read(packages, name, "package.json")
    author = f", {package['author']}" if isinstance(package.get("author"), str) else ""
    licence = package.get("license", "licence not named")
    if name != NAMES:
        info = read(packages, name, "info.json")
        author = f", drawn by {info['author']['name']} ({info['author'].get('url', 'no address')})"
        licence = f"{info['license']['title']}, {info['license'].get('url', 'no address')}"
    return f"- {name} {package['version']}{author}: {licence}"


# Concepts


def select(entries: list[dict[str, Any]], names: dict[str, Any], groups: Sequence[str] | None) -> list[Emoji]:
    """The emoji of these groups, or of all but components, in Unicode's order.

    Emoji in other skin tones are no entries of their own in emojibase, so none comes twice.
    """
    known = {*names["groups"].values(), *names["subgroups"].values()} - {"component", "skin-tone", "hair-style"}
    for group in groups or ():
        if group not in known:
            sys.exit(f"no group {group!r}; there are {', '.join(sorted(known))}")
    counts = Counter(tag for entry in entries for tag in entry.get("tags", ()))
    found = []
    for entry in sorted(entries, key=lambda entry: entry.get("order", 0)):
        own = {names["groups"].get(str(entry.get("group"))), names["subgroups"].get(str(entry.get("subgroup")))}
        if own & (set(groups) if groups else known):
            tags = sorted(entry.get("tags", ()), key=lambda tag: (-counts[tag], tag))
            label, *tags = (text.translate(TYPEWRITER) for text in (entry["label"], *tags))
            found.append(Emoji(entry["hexcode"], names["groups"][str(entry["group"])], label, tuple(tags)))
    return found


TYPEWRITER = str.maketrans({"’": "'", "“": None, "”": None, "–": "-"})
"""What people type in prompts for the marks that printers use."""


def spread(emoji: list[Emoji], limit: int | None) -> list[Emoji]:
    """At most `limit` of them, at even distances."""
    if limit is None or limit >= len(emoji):
        return emoji
    return [emoji[index * len(emoji) // limit] for index in range(limit)]


def drawings(packages: Path, style: str, emoji: list[Emoji]) -> Iterator[Drawing]:
    """The drawings of these emoji that a style has. Icons are found by code point, else by name."""
    package = f"@iconify-json/{style}"
    icons = read(packages, package, "icons.json")
    by_code = {plain_code(code): name for code, name in read(packages, package, "chars.json").items()}
    for one in emoji:
        for name in (by_code.get(plain_code(one.code)), slug(one.label)):
            alias = icons.get("aliases", {}).get(name, {})
            icon = icons["icons"].get(alias.get("parent", name))
            if icon is not None and not set(alias) - {"parent", "hidden", "hFlip"}:
                yield Drawing(one, style, svg(icon, icons), bool(alias.get("hFlip")))
                break


def svg(icon: dict[str, Any], icons: dict[str, Any]) -> str:
    """An icon as a document; sizes that it does not have itself are the package's."""
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def plain_code(code: str) -> str:
    """A code without the mark that asks for a coloured image, which packages write or leave out as they like."""
    return code.lower().replace("-fe0f", "")


def slug(label: str) -> str:
    """A name as iconify writes it, and as a file can be called: lower case letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['.]", "", plain)).strip("-")


# Images


def rasterised(drawing: Drawing, *, size: int, margin: float, transparent: bool) -> Image.Image | None:
    """A drawing as a square image: cropped to what is visible, centred; None where nothing is visible."""
    try:
        import resvg_py  # type: ignore[import-not-found]
    except ImportError:
        sys.exit("the drawings are SVG, and resvg-py makes images of them: pip install resvg-py")
    data = resvg_py.svg_to_bytes(svg_string=drawing.svg, width=size * OVERSAMPLING, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(data))) as image:
        whole = image.convert("RGBA")
    box = whole.getchannel("A").getbbox()
    if box is None:
        return None
    visible = ImageOps.mirror(whole.crop(box)) if drawing.mirrored else whole.crop(box)
    side = round(max(visible.size) / (1 - 2 * margin))
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(visible, ((side - visible.width) // 2, (side - visible.height) // 2))
    if not transparent:
        square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
    # Pillow multiplies RGBA by its alpha, resizes and divides again: right for this one, which is not multiplied yet.
    # Hamming's filter leaves no ripples on the white around a hard edge, as Lanczos' does.
    return square.resize((size, size), Image.Resampling.HAMMING)


COLOURS = (
    ("red", -12, 14),
    ("orange", 14, 40),
    ("yellow", 40, 65),
    ("green", 75, 165),
    ("blue", 190, 255),
    ("purple", 258, 300),
    ("pink", 305, 333),
)
"""Name, from and to degree of hue; what lies between is called differently by different people."""
COLOUR_WORDS = {
    *(name for name, _, _ in COLOURS),
    "brown",
    "black",
    "white",
    "grey",
    "gray",
    "golden",
    "rainbow",
    "pink",
}


def colour_of(image: Image.Image) -> str | None:
    """The colour that nearly all of the image has, if there is one that everybody would call so."""
    seen: Counter[str] = Counter()
    coloured = 0
    shades = image.convert("RGBA").resize((32, 32), Image.Resampling.BOX)
    data = shades.tobytes()
    for red, green, blue, alpha in (data[at : at + 4] for at in range(0, len(data), 4)):
        hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
        if alpha < 128 or (saturation < 0.1 and value > 0.95):  # background
            continue
        coloured += 1
        if saturation > 0.45 and value > 0.35:
            degree = (hue * 360 + 16) % 360 - 16
            names = [name for name, low, high in COLOURS if low <= degree < high]
            if names:
                # Dark or pale orange is brown or skin, without a line between them: none of these is named.
                seen[names[0] if names[0] != "orange" or (value > 0.9 and saturation > 0.65) else ""] += 1
    name, count = seen.most_common(1)[0] if seen else ("", 0)
    return name if name and count > 0.8 * coloured else None


# Captions

ALIASES = {
    "airplane": ("plane",),
    "automobile": ("car",),
    "baguette bread": ("baguette",),
    "beer mug": ("beer",),
    "bicycle": ("bike",),
    "birthday cake": ("cake",),
    "black bird": ("blackbird",),
    "blowfish": ("puffer fish",),
    "carpentry saw": ("saw",),
    "cheese wedge": ("piece of cheese",),
    "cloud with lightning": ("thunder cloud",),
    "cooking": ("fried egg in a pan",),
    "deciduous tree": ("tree",),
    "delivery truck": ("truck",),
    "droplet": ("drop of water",),
    "ear of corn": ("corn cob",),
    "eggplant": ("aubergine",),
    "evergreen tree": ("fir tree", "pine tree"),
    "fire engine": ("fire truck",),
    "flying saucer": ("ufo",),
    "french fries": ("fries",),
    "glass of milk": ("milk",),
    "hamburger": ("burger",),
    "hatching chick": ("chick in an egg",),
    "honeybee": ("bee",),
    "hot beverage": ("cup of coffee", "cup of tea"),
    "hot pepper": ("chili pepper",),
    "house with garden": ("house",),
    "lady beetle": ("ladybug",),
    "locomotive": ("steam train",),
    "long drum": ("conga drum",),
    "meat on bone": ("piece of meat",),
    "mobile phone": ("phone",),
    "motorcycle": ("motorbike",),
    "mouse face": ("mouse",),
    "musical keyboard": ("piano",),
    "orca": ("killer whale",),
    "pickup truck": ("truck",),
    "poultry leg": ("chicken leg",),
    "rabbit": ("bunny",),
    "racing car": ("race car",),
    "ringed planet": ("planet with rings",),
    "sailboat": ("boat",),
    "sauropod": ("dinosaur",),
    "ship": ("boat",),
    "soccer ball": ("football",),
    "soft ice cream": ("ice cream cone",),
    "sport utility vehicle": ("car", "jeep"),
    "spouting whale": ("whale",),
    "T-Rex": ("dinosaur",),
    "takeout box": ("box of noodles",),
    "tangerine": ("orange",),
    "taxi": ("cab",),
    "tram car": ("tram",),
    "wine glass": ("glass of wine",),
}  # fmt: skip
"""Everyday words for emoji whose names are none, or that have a second name."""
PLURALS = {"maracas", "paw prints", "skis"}
UNCOUNTED = {
    "bacon", "badminton", "baguette bread", "beans", "bowling", "bread", "broccoli", "butter", "camping", "canned food",
    "construction", "cooked rice", "cooking", "coral", "cricket game", "curry rice", "custard", "dango", "falafel",
    "field hockey", "fire", "fog", "foggy", "fondue", "food", "garlic", "ginger root", "herb", "high voltage", "ice",
    "ice hockey", "lacrosse", "leafy green", "light rail", "mate", "metro", "milk", "milky way", "money", "mount fuji",
    "oden", "ping pong", "popcorn", "pouring liquid", "sake", "salt", "shaved ice", "soap", "spaghetti", "sushi",
    "tennis", "wood", "yarn",
}  # fmt: skip
"""Names that take no article."""
TEMPLATES = ("a picture of {}", "an emoji of {}", "clip art of {}", "a drawing of {}", "an icon of {}")


def wordings(drawing: Drawing, colour: str | None, *, name_style: bool) -> list[str]:
    """Five to eight wordings for a drawing, the plainest first, none twice."""
    label = drawing.emoji.label
    face = face_of(drawing.emoji)
    named = with_article(label) if face is None else f"the face of {with_article(face)}"
    texts = [named, label, *(template.format(named) for template in TEMPLATES[:3])]
    tags = [tag for tag in drawing.emoji.tags if tag not in words(label) and tag.rstrip("s") not in words(label)]
    texts += [f"{label}, {', '.join(tags[:3])}"] if tags else []
    texts += [with_article(other) for other in (*ALIASES.get(label, ()), *shortened(drawing.emoji))][:2]
    if colour is not None and not words(label) & COLOUR_WORDS and len(label.split()) < 3:
        texts.append(with_article(f"{colour} {face or label}", like=face or label))
    if len(set(texts)) < 5:  # a name without an article, and no other words about it
        texts += [template.format(named) for template in TEMPLATES[3:]]
    if name_style:
        texts = [text if place % 2 else f"{text}, {STYLES[drawing.style]}" for place, text in enumerate(texts)]
    return list(dict.fromkeys(texts))[:8]


def shortened(emoji: Emoji) -> list[str]:
    """The name of what a longer name describes: an apple for a red apple, a dog for a dog's face."""
    first, _, rest = emoji.label.partition(" ")
    if first in COLOUR_WORDS and rest:
        return [rest]
    face = face_of(emoji)
    return [face] if face is not None else []


def face_of(emoji: Emoji) -> str | None:
    """Which animal's face it is, where it is one; "grinning face" is a face, but no grinning's."""
    name, _, last = emoji.label.rpartition(" ")
    return name if last == "face" and emoji.group == "animals-nature" else None


def with_article(name: str, *, like: str | None = None) -> str:
    """A name with "a" or "an", where it is one thing; `like` is the name that says whether it is."""
    thing = like or name
    head = thing.split(" with ")[0].split(" of ")[0].split(" and ")[0]
    many = head.endswith("s") and not head.endswith(("ss", "us", "is", "as", "os"))
    if many or thing in UNCOUNTED or thing in PLURALS or thing[:1].isdigit():
        return name
    vowel = re.match(r"[aeiou]", name, re.IGNORECASE) and not re.match(
        r"uni|uku|ufo|eu|ewe|one|use", name, re.IGNORECASE
    )
    return f"{'an' if vowel or name.startswith(('hour', 'x-ray')) else 'a'} {name}"


def words(text: str) -> set[str]:
    """The words of a text in lower case, and each without the s of a plural."""
    found = set(re.findall(r"[a-z0-9-]+", text.lower()))
    return found | {word.removesuffix("s") for word in found}


# Writing


def write(
    drawn: Sequence[Drawing],
    out: Path,
    sources: Sequence[str],
    *,
    size: int,
    margin: float,
    transparent: bool,
    captions: str,
    hold_out: float,
) -> None:
    """Write images, captions and SOURCES.md."""
    several = len({drawing.style for drawing in drawn}) > 1
    lines: dict[Path, list[str]] = {}
    names: set[str] = set()
    blank = 0
    for drawing in drawn:
        image = rasterised(drawing, size=size, margin=margin, transparent=transparent)
        if image is None:
            blank += 1
            continue
        folder = out / split_of(drawing.emoji.label, hold_out)
        name = slug(drawing.emoji.label) + (f"-{drawing.style}" if several else "")
        if name in names:  # "keycap: *" and "keycap: #"
            name = f"{name}-{drawing.emoji.code.lower()}"
        names.add(name)
        texts = wordings(drawing, colour_of(image), name_style=several)
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        image.save(folder / "pictures" / f"{name}.png")
        if captions == "txt":
            (folder / "pictures" / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        else:
            entry = {"file_name": f"pictures/{name}.png", "text": texts, "label": drawing.emoji.label}
            lines.setdefault(folder, []).append(json.dumps(entry, ensure_ascii=False) + "\n")
    for folder, entries in lines.items():
        (folder / "metadata.jsonl").write_text("".join(entries), encoding="utf-8")
    title = (
        f"# Sources\n\nMade by scripts/make_emoji_dataset.py from these npm packages, rasterised at {size} pixels:\n\n"
    )
    (out / "SOURCES.md").write_text(title + "\n".join(sources) + "\n", encoding="utf-8")
    count = f"{len(drawn) - blank} images of {len({drawing.emoji for drawing in drawn})} emoji"
    print(count + (f"; {blank} drawings show nothing and were left out" if blank else ""), file=sys.stderr)


def split_of(label: str, hold_out: float) -> str:
    """The folder of a concept: always the same one, whatever else is in the data set; "" without any hold-out."""
    if not hold_out:
        return ""
    place = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") / 2**64
    return "validation" if place < hold_out else "train"


if __name__ == "__main__":
    main()
