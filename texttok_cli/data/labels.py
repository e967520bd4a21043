"""Classes by name, and which of them a set of samples has."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence

from texttok_cli.errors import DataError

CLASS_TEXT = "a photo of a {}"  # Table 4a, "class text", of "a short text template" (Sec. 4.7); which one is not said: [I] ours
WORDNET_ID = re.compile(r"n\d{8}")  # ImageNet's folders


def find_class(asked: str | int, names: Sequence[str] | None, num_classes: int) -> int:
    """The id of a class by its name, by the part of it behind the last `/`, or by the id itself.

    `names` are in the order of ids, None if there are none. DataError for a class that isn't there and for a part that several share.
    """
    name, known = str(asked), names or []
    if isinstance(asked, str) and name in known:  # a number that came as text may be a name
        return known.index(name)
    if isinstance(asked, int) or name.isdecimal():
        if 0 <= int(asked) < num_classes:
            return int(asked)
        raise DataError(f"class {name}: the ids are 0 to {num_classes - 1}")
    bare = [i for i, whole in enumerate(known) if _bare(whole) == name]
    if len(bare) > 1:
        raise DataError(f"class {name!r} is ambiguous: {' or '.join(known[i] for i in bare)}")
    if not bare:
        raise DataError(f"no class {name!r}: {_nearest(name, known, num_classes)}")
    return bare[0]


def ids_among(classes: Sequence[str], named: Iterable[tuple[str, str | None]]) -> list[int]:
    """Of (image, class) pairs the ids: places of the classes among `classes`. DataError names an image without one of these."""
    ids, found = {name: i for i, name in enumerate(classes)}, list[int]()
    for image, name in named:
        if name is None:
            raise DataError(f"{image}: has no class: lay images in folders by class, or name it as `class` in a shard or manifest")
        if name not in ids:
            raise DataError(f"{image}: class {name!r} is not among the {len(ids):,} training classes, such as {next(iter(ids))!r}")
        found.append(ids[name])
    return found


def spread_labels(weights: Sequence[int], n: int) -> list[int]:
    """n class ids: of each as many as its weight's share, to the nearest whole number, and evenly mixed.

    Mixed, because some evaluators take scores over consecutive blocks of images.
    """
    total = sum(weights)
    counts = [n * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(n * weights[i] % total), i))
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return [i for _, i in sorted(((k + 0.5) / count, i) for i, count in enumerate(counts) for k in range(count))]


def draw_label(num_classes: int, seed: int) -> int:
    """The class id of the image with this seed, each class as likely: the same however many images there are, as ADM and DiT draw them."""
    digest = hashlib.sha256(f"class of {seed}".encode()).digest()  # apart from what else is drawn by the seed: the noise, a caption
    return int.from_bytes(digest[:8], "big") % num_classes


def class_text(class_name: str, template: str = CLASS_TEXT) -> str:
    """The last part of a class's name in a template with {}. DataError for a WordNet id or a number, which are no words."""
    name = _bare(class_name)
    if WORDNET_ID.fullmatch(name) or name.isdecimal():
        raise DataError(f"class {class_name}: is an id, not a word; name the classes in a manifest's `class`")
    return template.replace("{}", name)


def _bare(name: str) -> str:
    return name.rpartition("/")[2]


def _nearest(name: str, known: Sequence[str], num_classes: int) -> str:
    """What to say of a class that isn't there."""
    if not known:
        return f"this generator has no names, give an id from 0 to {num_classes - 1}"
    by_bare = {_bare(whole): whole for whole in known}
    close = difflib.get_close_matches(name, [*known, *by_bare], n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(dict.fromkeys(by_bare.get(match, match) for match in close))}?"
    return f"there are {num_classes}, such as {', '.join(known[:3])}; `texttok sample --list-classes` has all"
