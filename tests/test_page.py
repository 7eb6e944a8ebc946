"""The page of lab/report/page.py: its schema and escaping, and what it does in a browser."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lab.report.page import TEMPLATE, pack, write_page

EVIL = "</script><img src=x onerror=alert(1)>"
TEXTS = [
    ("the dog sleeps under the old table", "an animal is asleep"),
    (f"she paid {EVIL} for it", "nobody paid \u2028 & left"),
    ("two children play foot ##ball in the park", "the park is empty"),
    ("it rained for three days in october", "the autumn month was wet"),
]


# ---- 1. Made-up data ----


def unpack(packed: dict) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(packed["data"]), np.dtype(packed["type"]).newbyteorder("<"))
    return values.reshape(packed["shape"]) * packed["scale"]


def read_data(page: Path) -> dict:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    return json.loads(text)


def sample_layer(rng, tokens: int, moments: int, restless: float, twins: bool, experts: int, top_k: int) -> dict:
    """Logits that drift; similarities that have nothing to do with them."""
    logits = rng.normal(0, 1, (1, tokens, experts)) + restless * rng.normal(0, 0.4, (moments, tokens, experts)).cumsum(0)
    ids = np.argsort(-logits, axis=-1)[..., :top_k]
    cosines = np.clip(rng.normal(0.1, 0.4, (*ids.shape, 1)) + rng.normal(0, 0.1, (*ids.shape, 2)), -1, 1)
    similarity = cosines.mean(-1)
    state = np.where(rng.random(ids.shape) < 0.03, 0, 1 + (similarity < 0))
    ordered = np.sort(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), axis=-1)[..., ::-1]
    layer = {
        "logits": pack(logits, 1e-3, "int16"),
        "experts": pack(ids, 1, "uint8"),
        "state": pack(state, 1, "uint8"),
        "cosines": pack(cosines, 1e-4, "int16"),
        "norms": pack(rng.normal(-3, 0.5, ids.shape), 1e-3, "int16"),
        "best": pack(np.where(state == 2, (ids + 1) % experts, 255), 1, "uint8"),
        "load": [[float((one == e).mean()) for e in range(experts)] for one in ids],
        "conflicts": [[float((s[one == e] == 2).mean()) for e in range(experts)] for one, s in zip(ids, state)],
        "histogram": [np.histogram(one, 20, (-1, 1))[0].tolist() for one in similarity],
        "conflict_ratio": [float((one == 2).mean()) for one in state],
        "consistency": np.linspace(0.4, 0.1, moments).tolist(),
        "margin": (ordered[..., top_k - 1] - ordered[..., top_k]).mean(1).tolist(),
        "moved": [restless / 3 + 0.02 * float(rng.random()) if twins and m < moments - 1 else None for m in range(moments)],
        "matrices": [],
    }
    for moment in sorted({0, moments // 2, moments - 1}):
        for expert in range(experts):
            pairs = np.argwhere(ids[moment] == expert).tolist()
            vectors = rng.normal(0, 1, (len(pairs), 6)) + [0.7, 0, 0, 0, 0, 0]
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            matrix = pack(vectors @ vectors.T, 1 / 127, "int8")
            layer["matrices"].append({"moment": moment, "expert": expert, "pairs": pairs, "cosines": matrix})
    return layer


def sample_page(moments=12, experts=4, layers=2, rows=4, seed=0) -> dict:
    """Text and picture examples, three variants. With one moment: of a saved model."""
    rng, tokens, examples = np.random.default_rng(seed), [], []
    for i, (one, two) in enumerate(TEXTS):
        words = ["[CLS]", *(one.replace(EVIL, "EVIL").split(" ")), "[SEP]", *two.split(" "), "[SEP]"]
        middle = words.index("[SEP]")
        for word in words:
            joined, text = word.startswith("##"), EVIL if word == "EVIL" else word.removeprefix("##")
            tokens.append({"text": text, "joined": joined, "example": i, "patch": None})
        fields = [["sentence1", 1, middle], ["sentence2", middle + 1, len(words) - 1]]
        gold = ["entailment", "not_entailment"][i % 2]
        examples.append({"kind": "text", "fields": fields, "gold": gold, "image": None, "grid": None, "question": None})
    for i in range(2):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (rows, rows, 3), dtype=np.uint8)).resize((64, 64), 0).save(file, "PNG")
        image = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        places = [[row, column] for row in range(rows) for column in range(rows)]
        own = [{"text": "", "joined": False, "example": len(examples), "patch": place} for place in places]
        question = "What is left of the red square?"
        words = [{"text": w, "joined": False, "example": len(examples), "patch": None} for w in question.split()]
        tokens += own + words
        more = {"gold": ["a circle", "nothing"][i], "image": image, "grid": [rows, rows], "question": question}
        examples.append({"kind": "picture", "fields": [["question", len(own), len(own) + len(words)]], **more})
    steps, film = (520 * np.linspace(0, 1, moments) ** 2).astype(int).tolist(), moments > 1
    variants = []
    for name, loss, restless in (("none", "none", 0.1), ("ce", "ce", 1.0), ("placebo", "ce", 0.8)):
        answers = [[str(rng.choice(["entailment", "not_entailment", "a circle"])) for _ in examples] for _ in steps]
        own = [sample_layer(rng, len(tokens), len(steps), restless, film, experts, 2) for _ in range(layers)]
        variant = {"name": name, "loss": loss, "select": {"placebo": "random"}.get(name, "conflict"), "drawn": False}
        variant |= {"beta": 0.1, "steps": steps, "layers": own}
        curve = (0.7 * np.exp(-np.linspace(0, 2, len(steps)))).tolist()
        variants.append(variant | {"delta": 26 if film else None, "loss_curve": curve, "answers": answers})
    page = {"title": "How tokens choose their experts", "source": "film" if film else "model", "tau": 0.0, "agreement": None}
    page |= {"notes": ["Made-up numbers, seed 0: 4 text and 2 picture examples."], "experts": experts, "topK": 2}
    page |= {"linears": ["in", "out"], "layers": [f"encoder.layer.{i}.ffn" for i in range(layers)]}
    return page | {"tokens": tokens, "examples": examples, "variants": variants}


# ---- 2. Without a browser ----


@pytest.mark.parametrize("dtype, scale", [("int8", 1 / 127), ("int16", 1e-3), ("uint8", 1)])
def test_packed_numbers_come_back(dtype, scale):
    kind = np.iinfo(dtype)
    values = np.random.default_rng(0).integers(kind.min, kind.max + 1, (3, 5, 2)) * scale
    packed = pack(values, scale, dtype)
    assert packed["type"] == dtype and packed["shape"] == [3, 5, 2]
    np.testing.assert_allclose(unpack(packed), values, rtol=1e-12)
    assert base64.b64decode(pack([1, 258], 1, "int16")["data"]) == bytes([1, 0, 2, 1])  # little endian
    assert unpack(pack([-np.inf], scale, dtype)) == kind.min * scale  # the logarithm of a zero length
    for wrong in (np.nan, (kind.max + 1) * scale, (kind.min - 1) * scale):
        with pytest.raises(ValueError, match="fit"):
            pack([wrong], scale, dtype)


def test_the_data_is_only_text(tmp_path):
    """Nothing of it can end its block or begin a tag, and it is read back as it was."""
    data = sample_page()
    data["title"] = "<!--<script>{{data}}\u2029"
    page = write_page(data, tmp_path / "page.html")
    text, template = page.read_text(encoding="utf-8"), TEMPLATE.read_text(encoding="utf-8")
    assert read_data(page) == data and any(token["text"] == EVIL for token in data["tokens"])
    assert template.count("{{data}}") == 1
    before, after = template.split("{{data}}")
    block = text.removeprefix(before).removesuffix(after)
    assert text == before + block + after and not re.search("[<>&\u2028\u2029]", block)


def test_the_page_forbids_the_network_and_markup_from_data():
    text = TEMPLATE.read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    rules = [rule.strip() for rule in policy.split(";")]
    inline = ["style-src 'unsafe-inline'", "script-src 'unsafe-inline'"]
    assert rules == ["default-src 'none'", *inline, "img-src data:"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bfetch\(", text)
    assert not re.search(r"(src|href)=[\"']?(?!data:|https://arxiv\.org)[\w/.]", text)


def contrast(one: str, two: str) -> float:
    """Of two colours #rrggbb, as WCAG 2 defines it: 1 to 21."""
    shine = []
    for colour in (one, two):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        shine.append(np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(shine) / min(shine)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_contrast(mode):
    """Text on each expert's colour, and marks and curves on the paper."""
    blocks = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--(\w+): (#\w{6});", blocks[mode]))
    for name in ("paper", *(f"e{i}" for i in range(8))):
        assert contrast(colours["ink"], colours[name]) >= 5, name
    assert contrast(colours["soft"], colours["paper"]) >= 5
    for name in ("alarm", *(f"v{i}" for i in range(5))):
        assert contrast(colours[name], colours["paper"]) >= 3, name


# ---- 3. In a browser ----

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEXT = """() => {  // [size on the screen, text] of every visible element with a text of its own
  const found = [];
  for (const node of document.querySelectorAll("body, body *")) {
    const own = [...node.childNodes].filter(one => one.nodeType === 3).map(one => one.data).join("").trim();
    if (!own || ["SCRIPT", "STYLE", "NOSCRIPT", "OPTION"].includes(node.tagName) || !node.checkVisibility()) continue;
    const matrix = node instanceof SVGElement ? node.getScreenCTM() : { a: 1 };
    found.push([parseFloat(getComputedStyle(node).fontSize) * matrix.a, own.slice(0, 30)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: the page is unverified in a browser")
    if CHROMIUM is None:
        pytest.skip("no chromium: the page is unverified in a browser")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens the page from the disk. At the end: no error or warning on the console, no request but for the file and its
    pictures, and no alert."""
    contexts, faults, data = [], [], sample_page()

    def visit(address="", data=data, width=1280, height=720, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append("alert"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or faults.append(request.url))
        page.goto(write_page(data, tmp_path / "page.html").as_uri() + address)
        page.data = data
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not faults


def token(page, n: int, v: int):
    return page.locator(f'.token[data-n="{n}"][data-v="{v}"]')


def value(page, name: str, v: int, *index: int, layer=0) -> float:
    """A number of the data."""
    return unpack(page.data["variants"][v]["layers"][layer][name])[index]


def shown(number: float, digits=2) -> str:
    return f"{number:.{digits}f}".replace("-", "\u2212")


def cells(page) -> list[list[str]]:
    """The texts of the panel's tables, row by row. The last rows are those of all experts."""
    rows = page.locator("#full tr").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


def judged(data: dict, v: int, moment: int) -> list[int]:
    """The tokens that are judged on both experts."""
    state = unpack(data["variants"][v]["layers"][0]["state"])[moment]
    return np.flatnonzero((state > 0).all(1)).tolist()


@pytest.mark.slow
def test_all_variants_and_texts_are_there(visit):
    page = visit()
    for variant in page.data["variants"]:
        assert page.locator("#loads").get_by_text(variant["name"], exact=True).is_visible()
    assert page.locator("#examples .token").count() == 3 * len(page.data["tokens"])
    n = next(n for n, token in enumerate(page.data["tokens"]) if token["text"] == EVIL)
    assert EVIL in token(page, n, 0).inner_text() and page.locator("#examples img").count() == 6
    assert page.locator("img:not([src^='data:'])").count() == 0
    assert "not measured in this run" in page.locator("header").inner_text()
    assert page.data["notes"][0] in page.locator("header").inner_text() and page.title() == page.data["title"]
    page.emulate_media(media="print")
    assert page.locator("#full").is_visible() and not page.locator("#play").is_visible()


@pytest.mark.slow
def test_the_words_above_come_from_the_numbers(visit):
    page = visit()
    said = " ".join(re.sub("[\u25cf\u25a0\u25b2]", "", page.locator("#story").inner_text()).split())
    percent = lambda share: f"{float(f'{100 * share:.2g}'):g} %"  # noqa: E731
    for variant in page.data["variants"]:
        steps = np.array(variant["steps"])
        late = [row["moved"][m] for row in variant["layers"] for m in np.flatnonzero(steps >= 0.75 * steps[-1])]
        moved = np.mean([value for value in late if value is not None])
        first, last = (np.mean([row["conflict_ratio"][m] for row in variant["layers"]]) for m in (0, -1))
        assert f"from {percent(first)} to {percent(last)} with {variant['name']}" in said
        assert f"{percent(moved)} with {variant['name']}" in said


@pytest.mark.slow
def test_the_slider_and_the_play_button_move_through_the_training(visit):
    page = visit()
    steps = page.data["variants"][0]["steps"]
    moment, time = page.locator("#moment"), page.locator("#time")
    assert moment.inner_text() == f"step {steps[-1]} of {steps[-1]}"
    time.focus()
    page.keyboard.press("Home")
    assert moment.inner_text() == f"step 0 of {steps[-1]}" and page.locator("#examples .changed").count() == 0
    page.keyboard.press("ArrowRight")
    assert moment.inner_text() == f"step {steps[1]} of {steps[-1]}"
    for v in range(3):
        ids = unpack(page.data["variants"][v]["layers"][0]["experts"])[..., 0]
        state = unpack(page.data["variants"][v]["layers"][0]["state"])[1, :, 0]
        assert page.locator(f'.changed[data-v="{v}"]').count() == (ids[0] != ids[1]).sum()
        assert page.locator(f'.token.conflict[data-v="{v}"]').count() == (state == 2).sum()
        assert token(page, 3, v).locator("b").inner_text() == f"{ids[1, 3]:.0f}"
    page.evaluate("location.hash = 't=8'")
    page.get_by_text(f"step {steps[8]} of {steps[-1]}", exact=True).wait_for()
    page.evaluate(
        """() => { const moment = document.getElementById("moment"); window.seen = [];
        new MutationObserver(() => window.seen.push(moment.textContent)).observe(moment, {childList: true}); }"""
    )
    page.get_by_label("play", exact=True).click()
    page.get_by_text(f"step {steps[-1]} of {steps[-1]}", exact=True).wait_for()
    assert page.evaluate("window.seen") == [f"step {step} of {steps[-1]}" for step in steps[9:]]
    page.get_by_label("play", exact=True).wait_for()  # it stops by itself
    page.get_by_label("play", exact=True).click()  # from the start
    page.get_by_label("pause", exact=True).click()
    assert page.evaluate("window.seen").count(f"step 0 of {steps[-1]}") == 1


@pytest.mark.slow
def test_a_token_shows_its_numbers(visit):
    """Similarity, cosines, weight and the push, for each loss; with the pointer and with the keyboard."""
    page = visit("#t=4")
    for v in range(3):
        conflicts = unpack(page.data["variants"][v]["layers"][0]["state"])[4] == 2
        n = next(n for n in judged(page.data, v, 4) if conflicts[n, 0] and not conflicts[n, 1])
        token(page, n, v).hover()
        rows = {row[0]: row[1:] for row in cells(page)}
        for k in range(2):
            cosines = [value(page, "cosines", v, 4, n, k, i) for i in range(2)]
            assert rows["similarity"][k] == shown(np.mean(cosines))
            assert [rows[f"cosine of \u201c{name}\u201d"][k] for name in ("in", "out")] == list(map(shown, cosines))
        z = unpack(page.data["variants"][v]["layers"][0]["logits"])[4, n]
        ids = [int(value(page, "experts", v, 4, n, k)) for k in range(2)]
        p = np.exp(z[ids]) / np.exp(z[ids]).sum()
        assert rows["weight"] == list(map(shown, p)) and rows["logit"] == list(map(shown, z[ids]))
        assert rows["judged"] == ["yes: conflict", "yes"] and rows["fits best (reroute)"][0] == f"{(ids[0] + 1) % 4}"
        forces = np.exp(-z) / np.exp(-z).sum() - np.eye(4)[ids[0]]
        assert forces[ids[0]] < 0 and rows[str(ids[0])][-1] == f"\u25bc {-forces[ids[0]]:.3f}"
        said = page.locator("#full").inner_text()
        assert ("what ce would give" in said) == (v != 1) and "Why did this token leave?" in said
    page.locator("h1").hover()
    token(page, 5, 1).click()
    page.keyboard.press("ArrowRight")
    assert token(page, 6, 1).evaluate("node => node === document.activeElement && node.matches('.chosen')")
    assert "example 1, ce:" in page.locator("#brief").inner_text()
    page.keyboard.press("ArrowUp")
    assert "example 1, none:" in page.locator("#brief").inner_text()
    assert token(page, 6, 0).evaluate("node => getComputedStyle(node).outlineStyle") == "solid"


@pytest.mark.slow
@pytest.mark.parametrize("loss, select", [("mse", "conflict"), ("reroute", "conflict"), ("mse", "all"), ("ce", "all")])
def test_the_push_of_the_other_losses(visit, loss, select):
    """Against the difference quotient of the loss, of the pairs in conflict or, of flat, of all."""
    data = sample_page()
    data["variants"][1] |= {"loss": loss, "select": select}
    layer, conflicts = data["variants"][1]["layers"][0], 2 if select == "conflict" else 1
    n = next(n for n in judged(data, 1, 4) if (unpack(layer["state"])[4, n] == 2).sum() == conflicts)
    z, ids, best = (unpack(layer[name])[4, n] for name in ("logits", "experts", "best"))

    def of(z):
        p, q = (np.exp(x) / np.exp(x).sum() for x in (z, -z))
        each = {"mse": p**2, "ce": -np.log(q)}
        return sum(-np.log(p[int(b)]) if loss == "reroute" else each[loss][int(e)] for e, b in zip(ids, best))

    forces = [(of(z - 1e-6 * row) - of(z + 1e-6 * row)) / 2e-6 for row in np.eye(4)]
    page = visit(f"#t=4&n={n}&v=1", data)
    arrows = ["\u25bc" if force < 0 else "\u25b2" for force in forces]
    expected = {j: f"{arrow} {abs(force):.3f}" for j, (arrow, force) in enumerate(zip(arrows, forces))}
    assert {int(row[0]): row[-1] for row in cells(page)[-4:]} == expected
    said = page.locator("#full").inner_text()
    assert f"push of {loss}{' on all pairs' * (select == 'all')}\n" in said and "would give" not in said


@pytest.mark.slow
def test_experts_drawn_by_dice(visit):
    """They have no margin; the push is what ce would give, as without a loss."""
    data = sample_page()
    data["variants"][0] |= {"name": "random", "drawn": True}
    for layer in data["variants"][0]["layers"]:
        layer["margin"] = [None] * len(layer["margin"])
    page = visit("#v=0", data)
    said, (story,) = page.locator("#full").inner_text(), page.locator("#story p").filter(has_text="margin").all_inner_texts()
    assert "what ce would give" in said and "draws the experts of each token by dice" in said
    assert "with \u25a0\xa0ce" in story and "random" not in story


@pytest.mark.slow
def test_pairs_that_are_off_and_inactive_experts(visit):
    """Expert 3 is inactive, and every second token is on one expert alone. The push of ce is among the active experts."""
    data = sample_page()
    variant, layer = data["variants"][1], data["variants"][1]["layers"][0]
    ids, state, z = (unpack(layer[name]).copy() for name in ("experts", "state", "logits"))
    ids[ids == 3], z[..., 3], ids[:, ::2, 1], state[:, ::2, 1] = 0, -np.inf, 255, 0
    layer |= {"experts": pack(ids, 1, "uint8"), "state": pack(state, 1, "uint8"), "logits": pack(z, 1e-3, "int16")}
    variant["equal"] = True
    n = next(n for n in range(0, len(data["tokens"]), 2) if state[4, n, 0] == 2)
    page = visit(f"#t=4&n={n}&v=1&k=1", data)
    assert token(page, n, 1).locator("b").inner_text() == "\u2013" != token(page, n + 1, 1).locator("b").inner_text()
    assert page.locator("#counts").inner_text() == "up to 2 of 4"
    rows = cells(page)
    assert ["", "first"] in rows and ["weight", "1.00"] in rows
    q = np.exp(-z[4, n, :3]) / np.exp(-z[4, n, :3]).sum() - (np.arange(3) == ids[4, n, 0])
    expected = {j: f"{chr(0x25BC if force < 0 else 0x25B2)} {abs(force):.3f}" for j, force in enumerate(q)}
    assert {int(row[0]): row[-1] for row in rows[-3:]} == expected and rows[-4][0] == "expert"


@pytest.mark.slow
def test_layer_and_choice(visit):
    page = visit()
    assert page.get_by_label("MoE layer").locator("option").all_inner_texts() == ["layer 0", "layer 1"]
    for layer, choice in ((1, 0), (1, 1), (0, 1)):
        page.get_by_label("MoE layer").select_option(str(layer))
        page.get_by_label("choice shown").select_option(str(choice))
        for n in (2, 9):
            assert int(token(page, n, 1).locator("b").inner_text()) == value(page, "experts", 1, -1, n, choice, layer=layer)
    page.get_by_label("expert of the matrix").select_option("2")
    pairs = page.data["variants"][0]["layers"][0]["matrices"][-2]["pairs"]
    assert f", {len(pairs)} pairs" in page.locator("#matrices").inner_text() and page.locator("canvas").count() == 3


@pytest.mark.slow
def test_the_address_keeps_what_is_shown(visit):
    page = visit("#t=5&n=7&v=2&l=1&k=1")
    steps = page.data["variants"][0]["steps"]
    assert page.locator("#moment").inner_text() == f"step {steps[5]} of {steps[-1]}"
    assert token(page, 7, 2).evaluate("node => node.matches('.chosen')")
    assert (page.get_by_label("MoE layer").input_value(), page.get_by_label("choice shown").input_value()) == ("1", "1")
    page.get_by_label("MoE layer").select_option("0")
    token(page, 8, 0).click()
    page.wait_for_url("**/*#t=5&n=8&v=0&l=0&k=1&e=*")
    page.evaluate("location.hash = '#t=999&n=-1&v=x&l=1'")  # what does not exist is not taken
    page.wait_for_url("**/*#t=5&n=8&v=0&l=1&k=1&e=*")


@pytest.mark.slow
def test_the_token_that_moved_most_is_chosen(visit):
    data = sample_page()
    layers = [variant["layers"][0] for variant in data["variants"]]
    for layer in layers:
        ids = unpack(layer["experts"])
        ids[:, 0, 0] = np.arange(len(ids)) % 4  # a special token, which is not chosen
        layer["experts"] = pack(ids, 1, "uint8")
    firsts = [unpack(layer["experts"])[..., 0] for layer in layers]
    changes = sum((first[1:] != first[:-1]).sum(0) for first in firsts)
    special = np.array([token["text"] in ("[CLS]", "[SEP]") for token in data["tokens"]])
    chosen = int(visit(data=data).locator(".token.chosen").get_attribute("data-n"))
    assert changes[chosen] == changes[~special].max() < changes[0] and not special[chosen]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["film", "model", "large"])
def test_a_narrow_screen(visit, name):
    """One variant at a time, no sideways scrolling, and the panel leaves most of the screen free."""
    data = {"film": {}, "model": {"moments": 1}, "large": {"experts": 16, "moments": 24, "layers": 1, "rows": 8}}[name]
    page = visit(data=sample_page(**data), width=360, height=740)
    for chosen in (0, 2):
        page.locator("#bar").get_by_label("variant").select_option(str(chosen))
        assert [token(page, 1, v).is_visible() for v in range(3)] == [v == chosen for v in range(3)]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("aside").bounding_box()["height"] <= 740 / 5
    page.locator("#brief").click()
    assert page.locator("#full").is_visible() and page.locator("aside").bounding_box()["height"] <= 740 / 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_large_enough_for_a_projector(visit, scheme):
    page = visit(color_scheme=scheme)
    found = page.evaluate(TEXT)
    assert len(found) > 300 and not [one for one in found if one[0] < 16]
    assert any(text.startswith("\u2212") or text[0].isdigit() for _, text in found)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 21, 21)"}[scheme]


@pytest.mark.slow
def test_a_saved_model_has_no_film(visit):
    page = visit(data=sample_page(moments=1))
    for name in ("#time", "#play", "#curves"):
        assert not page.locator(name).is_visible()
    assert page.locator("#examples .changed").count() == 0 and page.locator("#moment").inner_text() == "saved model"
    assert "Why did" not in page.locator("#full").inner_text()
