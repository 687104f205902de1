"""Make a training set of captioned emoji images, from drawings and names in npm packages.

The drawings come from an @iconify-json package, names and tags from emojibase-data. `npm pack` downloads both; nothing
else uses the network. With --packages, the script reads packages that you have downloaded. The drawings are SVG and
are rasterised by resvg-py, which only this script needs:

    pip install resvg-py
    python scripts/make_emoji_dataset.py emoji --groups animals-nature,food-drink
    sdcli train-vae emoji -o emoji-vae

The same packages and options give the same files. emoji/SOURCES.md names the packages and their licences.
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
"""Package -> the version to download."""
STYLES = {
    "fluent-emoji-flat": "flat style",
    "fluent-emoji": "glossy style",
    "noto": "cartoon style",
    "twemoji": "simple style",
}
"""Package under @iconify-json -> the name of its style in captions."""
OVERSAMPLING = 4
"""Factor by which drawings are rasterised larger than the images written."""


@dataclass(frozen=True)
class Emoji:
    """A concept: its code points in hexadecimal, its group, its name, and its tags, the most general first."""

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
    parser.add_argument("out", type=Path, help="the folder to write; it must be empty or not exist")
    parser.add_argument(
        "--style", action="append", choices=STYLES, help="drawing style; can be repeated (fluent-emoji-flat)"
    )
    parser.add_argument(
        "--groups",
        type=lambda text: text.split(","),
        help="only these, comma-separated: groups of emojibase (animals-nature, food-drink, travel-places, activities, "
        "objects, smileys-emotion, people-body, symbols, flags) and subgroups (animal-bird, tool, ...)",
    )
    parser.add_argument("--size", type=int, default=64, help="width and height in pixels, 8 to 1024 (%(default)s)")
    parser.add_argument("--margin", type=float, default=0.04, help="fraction left empty at each side (%(default)s)")
    parser.add_argument("--transparent", action="store_true", help="keep transparency instead of a white background")
    parser.add_argument(
        "--captions",
        choices=["metadata", "txt"],
        default="metadata",
        help="metadata: one metadata.jsonl; txt: a .txt file per image, one wording per line (%(default)s)",
    )
    parser.add_argument("--limit", type=int, help="maximum number of concepts, spread evenly over the groups")
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.0,
        help="fraction of the concepts that goes into validation/, the rest into train/ (0: no such folders)",
    )
    parser.add_argument("--packages", type=Path, help="a folder with the packages, from `npm pack` or `npm install`")
    chosen = parser.parse_args()
    if not 8 <= chosen.size <= 1024 or not 0 <= chosen.margin < 0.5 or not 0 <= chosen.hold_out < 1:
        parser.error(
            "--size must be 8 to 1024, --margin and --hold-out at least 0, --margin below 0.5, --hold-out below 1"
        )
    if chosen.limit is not None and chosen.limit < 1:
        parser.error("--limit must be at least 1")
    if chosen.out.exists() and (not chosen.out.is_dir() or any(chosen.out.iterdir())):
        parser.error(f"{chosen.out} exists and is not empty")
    styles = list(dict.fromkeys(chosen.style or ["fluent-emoji-flat"]))
    wanted = [NAMES, *(f"@iconify-json/{style}" for style in styles)]
    with tempfile.TemporaryDirectory() as scratch:
        packages = chosen.packages or fetch(wanted, Path(scratch))
        emoji = spread(select(read(packages, NAMES, "en/data.json"), read(packages, NAMES, "meta/groups.json"),
                              chosen.groups), chosen.limit)  # fmt: skip
        drawn = [drawing for style in styles for drawing in drawings(packages, style, emoji)]
        sources = [source(packages, name) for name in wanted]
    if not drawn:
        sys.exit("the packages have no drawing of these emoji")
    write(drawn, chosen.out, sources, size=chosen.size, margin=chosen.margin, transparent=chosen.transparent,
          captions=chosen.captions, hold_out=chosen.hold_out)  # fmt: skip
    print(chosen.out)


# Packages


def fetch(names: Sequence[str], folder: Path) -> Path:
    """Download packages with `npm pack` as tarballs into a folder, and return the folder."""
    if shutil.which("npm") is None:
        sys.exit("npm is needed to download the packages; --packages names a folder that already has them")
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
    """Read a JSON file of a package, from its folder (`npm install`) or from its tarball (`npm pack`)."""
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
    """The line of SOURCES.md for a package."""
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
    """The emoji of these groups, or of all groups except components, in Unicode's order.

    Emojibase has no separate entries for skin tones, so no emoji occurs twice.
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
"""Typographic punctuation -> what people type in prompts."""


def spread(emoji: list[Emoji], limit: int | None) -> list[Emoji]:
    """At most `limit` of them, evenly spaced."""
    if limit is None or limit >= len(emoji):
        return emoji
    return [emoji[index * len(emoji) // limit] for index in range(limit)]


def drawings(packages: Path, style: str, emoji: list[Emoji]) -> Iterator[Drawing]:
    """A style's drawings of these emoji. Icons are found by code point, else by name."""
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
    """An icon as an SVG document; the package gives the sizes that the icon lacks."""
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def plain_code(code: str) -> str:
    """A code without the variation selector for coloured display, which packages use inconsistently."""
    return code.lower().replace("-fe0f", "")


def slug(label: str) -> str:
    """A name in iconify's form, also a safe file name: lower case letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['.]", "", plain)).strip("-")


# Images


def rasterise(
    drawing: Drawing, *, size: int, margin: float, transparent: bool, oversampling: int = OVERSAMPLING
) -> Image.Image | None:
    """Rasterise a drawing to a square image, cropped to its visible part and centred; None if nothing is visible."""
    try:
        import resvg_py  # type: ignore[import-not-found]
    except ImportError:
        sys.exit("resvg-py is needed to rasterise the drawings: pip install resvg-py")
    data = resvg_py.svg_to_bytes(svg_string=drawing.svg, width=size * oversampling, skip_system_fonts=True)
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
    # Pillow premultiplies RGBA, resizes and divides again, which is right for this image with straight alpha.
    # Unlike Lanczos, Hamming leaves no ringing on the white around a hard edge.
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
"""Name, and the range of hue in degrees; people disagree on the names of the hues in between."""
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
    """The name of the image's dominant colour, or None if there is none on which people would agree."""
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
                # Dark or pale orange is brown or skin, with no clear border: neither is named.
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
"""Everyday words for emoji with technical names or a second name."""
PLURALS = {"maracas", "paw prints", "skis"}
UNCOUNTED = {
    "bacon", "badminton", "baguette bread", "beans", "bowling", "bread", "broccoli", "butter", "camping", "canned food",
    "construction", "cooked rice", "cooking", "coral", "cricket game", "curry rice", "custard", "dango", "falafel",
    "field hockey", "fire", "fog", "foggy", "fondue", "food", "garlic", "ginger root", "herb", "high voltage", "ice",
    "ice hockey", "lacrosse", "leafy green", "light rail", "mate", "metro", "milk", "milky way", "money", "mount fuji",
    "oden", "ping pong", "popcorn", "pouring liquid", "sake", "salt", "shaved ice", "soap", "spaghetti", "sushi",
    "tennis", "wood", "yarn",
}  # fmt: skip
"""Uncountable names, which take no article."""
TEMPLATES = ("a picture of {}", "an emoji of {}", "clip art of {}", "a drawing of {}", "an icon of {}")


def wordings(drawing: Drawing, colour: str | None, *, name_style: bool) -> list[str]:
    """Five to eight different wordings for a drawing, the plainest first."""
    label = drawing.emoji.label
    face = face_of(drawing.emoji)
    named = with_article(label) if face is None else f"the face of {with_article(face)}"
    texts = [named, label, *(template.format(named) for template in TEMPLATES[:3])]
    tags = [tag for tag in drawing.emoji.tags if tag not in words(label) and tag.rstrip("s") not in words(label)]
    texts += [f"{label}, {', '.join(tags[:3])}"] if tags else []
    texts += [with_article(other) for other in (*ALIASES.get(label, ()), *shortened(drawing.emoji))][:2]
    if colour is not None and not words(label) & COLOUR_WORDS and len(label.split()) < 3:
        texts.append(with_article(f"{colour} {face or label}", like=face or label))
    if len(set(texts)) < 5:  # a name without an article and without other words
        texts += [template.format(named) for template in TEMPLATES[3:]]
    if name_style:
        texts = [text if place % 2 else f"{text}, {STYLES[drawing.style]}" for place, text in enumerate(texts)]
    return list(dict.fromkeys(texts))[:8]


def shortened(emoji: Emoji) -> list[str]:
    """Shorter names: an apple for a red apple, a dog for a dog's face."""
    first, _, rest = emoji.label.partition(" ")
    if first in COLOUR_WORDS and rest:
        return [rest]
    face = face_of(emoji)
    return [face] if face is not None else []


def face_of(emoji: Emoji) -> str | None:
    """The animal whose face an emoji shows, or None; "grinning face" is not the face of an animal."""
    name, _, last = emoji.label.rpartition(" ")
    return name if last == "face" and emoji.group == "animals-nature" else None


def with_article(name: str, *, like: str | None = None) -> str:
    """A name with "a" or "an" if it is countable and singular, which `like` decides if given."""
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
    """The words of a text in lower case, with and without a plural s."""
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
        image = rasterise(drawing, size=size, margin=margin, transparent=transparent)
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
    print(count + (f"; {blank} empty drawings were skipped" if blank else ""), file=sys.stderr)


def split_of(label: str, hold_out: float) -> str:
    """The folder of a concept, independent of the rest of the data set; "" if nothing is held out."""
    if not hold_out:
        return ""
    place = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") / 2**64
    return "validation" if place < hold_out else "train"


if __name__ == "__main__":
    main()
