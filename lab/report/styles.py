"""How the figures draw a variant: one colour, line and marker each, the same in every figure.

The kind of a variant has the colour. Its endings, such as -one, change line and marker. Both also differ in a grey print.
"""

STYLES = [  # colour, line, marker; also of what is no variant, in this order. page.html has the same five
    ("#1b1b1b", "-", "o"),
    ("#d1495b", "--", "s"),
    ("#2e86ab", "-.", "^"),
    ("#8f6bb3", ":", "D"),
    ("#3a7d44", (0, (9, 3)), "v"),
]
KINDS = dict(zip(("none", "ce", "placebo", "flat", "random"), STYLES)) | {
    "ce-one": ("#e08a1e", (0, (5, 1)), "P"),
    "dense": ("#8a8a8a", (0, (1, 2)), "*"),
    "mse": ("#b5651d", (0, (4, 1, 1, 1, 1, 1)), "p"),
    "reroute": ("#7a4f2b", (0, (7, 2, 1, 2, 1, 2)), "h"),
    "embedding": ("#c2529d", (0, (3, 1)), "<"),
    "feature": ("#4b6a2f", (0, (2, 2)), ">"),
    "task": ("#1f3b73", (0, (6, 2, 2, 2)), "8"),
    "frozen": ("#6b6b6b", (0, (4, 4)), "+"),
}
ENDINGS = ("mse", "reroute", "one", "weight")
MARKERS = "PXdHDp<>8hv"  # of a kind with endings


def style_of(variant: str) -> tuple:
    """Colour, line style and marker of a variant, whatever learning rate is in its name. KeyError for an unknown kind."""
    name = variant.partition("-lr")[0]
    kind, *endings = name.split("-")
    colour, line, marker = KINDS[name if name in KINDS else kind]
    if name not in KINDS and (number := sum(count for ending, count in zip(ENDINGS, (4, 8, 1, 2)) if ending in endings)):
        line, marker = (0, (2 + number, 1, 1 + [*KINDS].index(kind), 1)), MARKERS[number - 1]
    return colour, line, marker


def looks_of(variants: list[str]) -> list[int]:
    """Indices into STYLES, for a page that has only these five: a variant's own, otherwise one that is free."""
    five = list(KINDS)[: len(STYLES)]
    owner = {name.partition("-lr")[0]: i for i, name in reversed([*enumerate(variants)])}  # the first rate's
    looks = {owner[name]: look for look, name in enumerate(five) if name in owner}
    free = [look for look in range(len(five)) if look not in looks.values()]
    return [looks[i] if i in looks else free.pop(0) if free else i % len(five) for i in range(len(variants))]
